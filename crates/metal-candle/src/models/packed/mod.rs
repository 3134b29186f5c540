//! Loads quantized safetensors checkpoints: finds the tensors that store a matrix, and repacks or dequantizes them.

mod bitsandbytes;
mod codes;
mod compressed;
mod dense;
mod float8;
mod gptq;
mod integers;
mod matrix;
mod mlx;
mod module;
mod quantization;
mod small_floats;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod weights;

pub(super) use quantization::Quantization;
pub(super) use weights::PackedWeights;
