//! Block-quantized weights as GGUF files store them: their layouts, quantization, dequantization, and products
//! with them.
//!
//! Products dequantize a few rows of weights at a time, or in registers for very few activations, and multiply them in f32.
//! Activations are never rounded.

mod decode;
mod dots;
mod encode;
mod encode_batch;
mod encode_blocks;
mod encode_lanes;
mod encode_registers;
mod encode_search;
mod encode_superblocks;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod encode_tests;
mod matrix;
mod products;
mod rows;
mod superblocks;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use encode::QuantizeError;
pub use matrix::{BlockFormat, BlockMatrix};
pub use products::{block_products, block_transposed_products};
pub use rows::block_row_products;
