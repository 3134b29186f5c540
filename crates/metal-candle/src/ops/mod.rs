//! Forward and backward passes of every operation in a model. No other module knows about backends or gradients.
//!
//! Each operation has its forward pass and its hand-written backward pass side by side. They call the kernels of
//! `metal-candle-kernels`. The `plain_*` functions do the same with candle's operations on detached tensors: tests use
//! them as the reference, and devices without a kernel fall back to them.

pub(crate) mod activation;
pub(crate) mod adam;
pub(crate) mod adapters;
pub(crate) mod attention;
mod attention_gpu;
#[cfg(test)]
mod cache_tests;
mod cache_type;
pub(crate) mod cache_write;
pub(crate) mod embedding;
pub(crate) mod fused;
#[cfg(all(test, any(feature = "metal", feature = "cuda")))]
mod fused_tests;
pub(crate) mod gpu;
pub(crate) mod gpu_blocks;
#[cfg(all(test, feature = "cuda"))]
mod gpu_blocks_tests;
#[cfg(all(test, any(feature = "metal", feature = "cuda")))]
mod gpu_tests;
pub(crate) mod head;
pub(crate) mod host;
pub(crate) mod linear;
mod low_rank;
mod low_rank_gpu;
pub(crate) mod norm;
pub(crate) mod products;
mod quantized;
pub(crate) mod rotary;
mod rotary_scaling;
#[cfg(test)]
mod rotary_tests;
pub(crate) mod row_updates;
mod spans;
#[cfg(test)]
mod tests;
mod weight;
#[cfg(test)]
mod weight_tests;

use crate::error::Result;
use candle_core::{DType, Tensor};

pub use adapters::Adapters;
pub use cache_type::KVCacheType;
pub use low_rank::{LowRank, LowRankGradients, LowRankUpdates, Magnitude, weight_norms_squared};
pub use metal_candle_kernels::BlockFormat;
pub(crate) use weight::MappedFiles;
pub use weight::Weight;

/// An activation in the type in which it is saved for backward, given the dtype of the weights: f32 is rounded to bf16
/// if the weights are in half precision. This changes gradients by less than the rounding of the weights does.
pub(crate) fn saved_activation(x: Tensor, weights: DType) -> Result<Tensor> {
    if weights == DType::F32 || !host::on_cpu(&x) { Ok(x) } else { host::rounded(&x) }
}

/// The size of a tensor, in bytes.
pub(crate) fn num_bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
