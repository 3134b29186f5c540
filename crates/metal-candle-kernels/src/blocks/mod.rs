//! Quantizes, dequantizes and multiplies block-quantized weights in the formats of GGUF files.
//!
//! Training multiplies dequantized weights in f32, so forward and backward use the same weights and activations are not rounded.
//! Inference rounds the activations to 8 bits, with a scale for every 32, and multiplies integers ([`block_row_products`]). A
//! processor without kernels for that (x86-64 before AVX2, Arm before dot products) uses f32 in inference, too.

mod codebooks;
mod decode;
mod dots;
mod encode;
// indexed loops: closures are not always inlined into functions for an instruction set
#[allow(clippy::needless_range_loop)]
mod int8;
mod matrix;
mod products;
mod rows;
mod superblocks;
mod task;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use encode::QuantizeError;
pub use matrix::{BlockFormat, BlockMatrix};
pub use products::{block_products, block_transposed_products};
pub use rows::block_row_products;
