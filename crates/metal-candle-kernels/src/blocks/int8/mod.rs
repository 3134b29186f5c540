//! Products of block-quantized weights with activations that are quantized to 8 bits, for inference.
//!
//! Each 32 columns of a row of activations are rounded to integers from -127 to 127 with an f32 scale. A block of weights and the
//! activations are multiplied and summed as integers, exactly; the sums are scaled and added in f32, in ascending order of the
//! columns. Each row of weights has its own lane, so results are identical at every level with fused multiply-add, for any number
//! of rows, and equal to those of `portable.rs`, which the tests use.

mod activations;
mod kernels;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod portable;
mod products;
mod superblocks;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use products::add_rows;
