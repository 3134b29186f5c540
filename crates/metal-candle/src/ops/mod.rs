//! Differentiable operations: the only place that knows backends and gradients.
//!
//! Each operation has a forward and a hand-written backward pass side by side. They run the kernels of
//! `metal-candle-kernels`; the `plain_*` functions are the same in candle's operations on detached tensors, which is the
//! reference in tests, and what runs where there is no kernel.

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
#[cfg(all(test, feature = "metal"))]
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
pub(crate) mod norm;
pub(crate) mod products;
mod quantized;
pub(crate) mod rotary;
mod rotary_scaling;
#[cfg(test)]
mod rotary_tests;
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
pub use low_rank::{LowRank, LowRankTerms, Magnitude, TermGradients, weight_norms_squared};
pub use metal_candle_kernels::BlockFormat;
pub(crate) use weight::MappedFiles;
pub use weight::Weight;

/// An activation as it is kept beside weights of this type for the backward pass: rounded to bf16 where the weights have
/// half precision, which changes gradients by less than the rounding of the weights does.
pub(crate) fn kept(x: Tensor, weights: DType) -> Result<Tensor> {
    if weights == DType::F32 || !host::on_cpu(&x) { Ok(x) } else { host::rounded(&x) }
}

/// The size of a tensor, in bytes.
pub(crate) fn num_bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
