//! Batches of groups of weights that are quantized together.

use super::lanes::{LANES, Lanes, transposed};
use crate::blocks::decode::Decoder;
use half::f16;

/// Quantizes the blocks of a format.
pub(super) trait Encoder: Decoder {
    /// The number of weights that share a scale.
    const GROUP: usize;
    /// Whether the weights of errors depend on the mean square of the row.
    const NEEDS_MEAN_SQUARES: bool = false;
    /// Whether scales are f16.
    const HAS_HALF_SCALES: bool = true;

    /// Quantizes finite values to all bytes of `blocks`. Returns false if a scale is too large for f16.
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool;
}

/// The importance of columns.
#[derive(Clone, Copy)]
pub(super) struct Importance<'a> {
    pub(super) columns: &'a [f32],
    /// Mean squares of the rows, if the format needs them.
    pub(super) mean_squares: &'a [f32],
}

/// Values of up to sixteen groups.
pub(super) struct Batch<'a> {
    /// Whole blocks.
    pub(super) values: &'a [f32],
    /// The index of the first value in the rows.
    pub(super) first: usize,
    pub(super) importance: Option<Importance<'a>>,
}

impl Batch<'_> {
    /// The values, with a group of `N` per lane.
    #[inline(always)]
    pub(super) fn groups<const N: usize>(&self) -> [Lanes; N] {
        transposed(self.values)
    }

    /// The importance of each value; 1 where there is no group. Never inlined, as [`transposed`].
    #[inline(never)]
    pub(super) fn importance_of_groups<const N: usize>(&self, importance: Importance) -> [Lanes; N] {
        let mut lanes = [Lanes::splat(1.0); N];
        for lane in 0..self.values.len() / N {
            let column = (self.first + lane * N) % importance.columns.len();
            let group = &importance.columns[column..column + N];
            for i in 0..N {
                lanes[i].0[lane] = group[i];
            }
        }
        lanes
    }

    /// The mean square of the row of each lane.
    #[inline(always)]
    pub(super) fn mean_squares_of_rows<const N: usize>(&self, importance: Importance) -> Lanes {
        let mut lanes = Lanes::ZERO;
        for lane in 0..self.values.len() / N {
            lanes.0[lane] = importance.mean_squares[(self.first + lane * N) / importance.columns.len()];
        }
        lanes
    }

    /// The mean square of the block of `len` values of each lane.
    #[inline(always)]
    pub(super) fn mean_squares_of_blocks<const N: usize>(&self, len: usize) -> Lanes {
        let mut lanes = Lanes::ZERO;
        for (block, values) in self.values.chunks_exact(len).enumerate() {
            let mean = sum_of_squares(values) / len as f32;
            for lane in 0..len / N {
                lanes.0[block * (len / N) + lane] = mean;
            }
        }
        lanes
    }
}

/// The weights of errors for values with an importance.
#[inline(always)]
pub(super) fn important<const N: usize>(importance: &[Lanes; N], x: &[Lanes; N], variance: Lanes) -> [Lanes; N] {
    let mut weights = [Lanes::ZERO; N];
    for i in 0..N {
        weights[i] = importance[i] * (variance + x[i] * x[i]).sqrt();
    }
    weights
}

/// The squares of the values.
#[inline(always)]
pub(super) fn squares<const N: usize>(x: &[Lanes; N]) -> [Lanes; N] {
    let mut weights = [Lanes::ZERO; N];
    for i in 0..N {
        weights[i] = x[i] * x[i];
    }
    weights
}

/// The sum of each group.
#[inline(always)]
pub(super) fn sums<const N: usize>(groups: &[Lanes; N]) -> Lanes {
    let mut sum = Lanes::ZERO;
    for values in groups {
        sum = sum + *values;
    }
    sum
}

/// The sum of the squares, added in ascending order.
#[inline(always)]
pub(super) fn sum_of_squares(values: &[f32]) -> f32 {
    let mut sum = 0.0;
    for value in values {
        sum += value * value;
    }
    sum
}

/// The levels, group by group. Never inlined, as [`transposed`].
#[inline(never)]
pub(super) fn levels_in_order<const N: usize>(levels: &[Lanes; N]) -> [[u8; N]; LANES] {
    let mut ordered = [[0; N]; LANES];
    for i in 0..N {
        let bytes = levels[i].bytes();
        for lane in 0..LANES {
            ordered[lane][i] = bytes[lane];
        }
    }
    ordered
}

/// Writes a scale as f16 and returns the written value.
#[inline(always)]
pub(super) fn put_half(block: &mut [u8], at: usize, scale: f32) -> f32 {
    let half = f16::from_f32(scale);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}
