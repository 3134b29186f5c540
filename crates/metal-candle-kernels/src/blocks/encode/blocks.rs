//! Quantizes blocks of 32 weights.

use super::batch::{Batch, Encoder, important, levels_in_order, put_half, squares};
use super::lanes::{LANES, Lanes};
use super::search::{IMPORTANT, fit_symmetric, fit_table, fit_with_minimum, table_indices};
use crate::blocks::decode::{IQ4_TABLE, IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

/// The length of the blocks.
const LEN: usize = 32;

/// Packs two levels below 16 per byte, one of the first and one of the second half.
#[inline(always)]
pub(super) fn pack_nibbles(levels: &[u8; LEN], to: &mut [u8]) {
    for i in 0..16 {
        to[i] = levels[i] & 15 | levels[i + 16] << 4;
    }
}

/// Packs the fifth bits of the levels.
#[inline(always)]
fn pack_fifth_bits(levels: &[u8; LEN], to: &mut [u8]) {
    let mut bits = 0_u32;
    for (i, level) in levels.iter().enumerate() {
        bits |= u32::from(level >> 4 & 1) << i;
    }
    to[..4].copy_from_slice(&bits.to_le_bytes());
}

/// The smallest and the largest value.
#[inline(always)]
fn bounds(x: &[Lanes; 2]) -> (f32, f32) {
    let (low, high) = (x[1].min(x[0]), x[1].max(x[0]));
    let (mut smallest, mut largest) = (low.0[0], high.0[0]);
    for lane in 1..LANES {
        smallest = if low.0[lane] < smallest { low.0[lane] } else { smallest };
        largest = if high.0[lane] > largest { high.0[lane] } else { largest };
    }
    (smallest, largest)
}

/// The first zero, which may be negative.
#[cold]
fn first_zero(x: &[Lanes; 2]) -> f32 {
    x[0].0.into_iter().chain(x[1].0).find(|value| *value == 0.0).unwrap_or(0.0)
}

/// The largest magnitude.
#[inline(always)]
fn largest_magnitude(x: &[Lanes; 2]) -> f32 {
    let (low, high) = bounds(x);
    (if -low > high { low } else { high }).abs()
}

/// The first value with the largest magnitude.
#[inline(always)]
fn extreme(x: &[Lanes; 2]) -> f32 {
    let (low, high) = bounds(x);
    if -low > high {
        return low;
    }
    if high > -low {
        return high;
    }
    if high > 0.0 {
        for value in x[0].0.into_iter().chain(x[1].0) {
            if value.abs() >= high {
                return value;
            }
        }
    }
    0.0
}

/// `1 / d`, or zero.
#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d.abs() > 0.0 { 1.0 / d } else { 0.0 }
}

/// A block of 32 values.
#[inline(always)]
fn halves(block: &[f32]) -> [Lanes; 2] {
    let mut halves = [Lanes::ZERO; 2];
    halves[0].0.copy_from_slice(&block[..16]);
    halves[1].0.copy_from_slice(&block[16..32]);
    halves
}

/// The bytes of 32 integers.
#[inline(always)]
fn bytes(levels: &[Lanes; 2]) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..16].copy_from_slice(&levels[0].bytes());
    bytes[16..].copy_from_slice(&levels[1].bytes());
    bytes
}

/// Quantizes blocks with a scale to levels from `-HALF` to `HALF - 1`. Without an importance, the value with the largest
/// magnitude gets the level `-HALF` and is exact except for the rounding of the scale.
#[inline(always)]
fn encode_symmetric<E: Encoder, const HALF: u8>(batch: &Batch, blocks: &mut [u8]) -> bool {
    let half = f32::from(HALF);
    let mut fits = true;
    if let Some(importance) = batch.importance {
        let (x, variance) = (batch.groups::<LEN>(), batch.mean_squares_of_rows::<LEN>(importance));
        let w = important(&batch.importance_of_groups(importance), &x, variance);
        let mut levels = [Lanes::ZERO; LEN];
        let scales = fit_symmetric(&x, &w, half, &mut levels);
        let levels = levels_in_order(&levels);
        for (lane, block) in blocks.chunks_exact_mut(E::BYTES).enumerate() {
            fits &= put_half(block, 0, scales.0[lane]).is_finite();
            put_levels::<E>(block, 2, &levels[lane]);
        }
        return fits;
    }
    for (x, block) in batch.values.chunks_exact(LEN).zip(blocks.chunks_exact_mut(E::BYTES)) {
        let x = halves(x);
        let d = extreme(&x) / -half;
        let (id, middle) = (Lanes::splat(inverse(d)), Lanes::splat(half + 0.5));
        fits &= put_half(block, 0, d).is_finite();
        let max_level = 2.0 * half - 1.0;
        let levels = [(x[0] * id + middle).floor(0.0, max_level), (x[1] * id + middle).floor(0.0, max_level)];
        put_levels::<E>(block, 2, &bytes(&levels));
    }
    fits
}

/// Quantizes blocks with a scale and a minimum to levels from 0 to `MAX_LEVEL`. Without an importance the smallest value gets
/// the level 0, and the largest the level `MAX_LEVEL`.
#[inline(always)]
fn encode_with_minimum<E: Encoder, const MAX_LEVEL: u8>(batch: &Batch, blocks: &mut [u8]) -> bool {
    let max_level = f32::from(MAX_LEVEL);
    let mut fits = true;
    if let Some(importance) = batch.importance {
        let (x, variance) = (batch.groups::<LEN>(), batch.mean_squares_of_rows::<LEN>(importance));
        let w = important(&batch.importance_of_groups(importance), &x, variance);
        let mut levels = [Lanes::ZERO; LEN];
        let (scales, minimums) = fit_with_minimum(&x, &w, max_level, IMPORTANT, &mut levels);
        let levels = levels_in_order(&levels);
        for (lane, block) in blocks.chunks_exact_mut(E::BYTES).enumerate() {
            fits &= put_half(block, 0, scales.0[lane]).is_finite();
            fits &= put_half(block, 2, minimums.0[lane]).is_finite();
            put_levels::<E>(block, 4, &levels[lane]);
        }
        return fits;
    }
    for (x, block) in batch.values.chunks_exact(LEN).zip(blocks.chunks_exact_mut(E::BYTES)) {
        let x = halves(x);
        let (low, high) = bounds(&x);
        let (d, low) = ((high - low) / max_level, if low == 0.0 { first_zero(&x) } else { low });
        let (id, middle) = (Lanes::splat(inverse(d)), Lanes::splat(0.5));
        fits &= put_half(block, 0, d).is_finite() & put_half(block, 2, low).is_finite();
        let low = Lanes::splat(low);
        let levels =
            [((x[0] - low) * id + middle).floor(0.0, max_level), ((x[1] - low) * id + middle).floor(0.0, max_level)];
        put_levels::<E>(block, 4, &bytes(&levels));
    }
    fits
}

/// Packs the levels of a block with four or five bits each, starting at `at`, the end of the scales.
#[inline(always)]
fn put_levels<E: Encoder>(block: &mut [u8], at: usize, levels: &[u8; LEN]) {
    let packed = E::BYTES - 16;
    if packed > at {
        pack_fifth_bits(levels, &mut block[at..]);
    }
    pack_nibbles(levels, &mut block[packed..]);
}

impl Encoder for Q4_0 {
    const GROUP: usize = LEN;
    const NEEDS_MEAN_SQUARES: bool = true;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        encode_symmetric::<Self, 8>(batch, blocks)
    }
}

impl Encoder for Q5_0 {
    const GROUP: usize = LEN;
    const NEEDS_MEAN_SQUARES: bool = true;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        encode_symmetric::<Self, 16>(batch, blocks)
    }
}

impl Encoder for Q4_1 {
    const GROUP: usize = LEN;
    const NEEDS_MEAN_SQUARES: bool = true;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        encode_with_minimum::<Self, 15>(batch, blocks)
    }
}

impl Encoder for Q5_1 {
    const GROUP: usize = LEN;
    const NEEDS_MEAN_SQUARES: bool = true;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        encode_with_minimum::<Self, 31>(batch, blocks)
    }
}

impl Encoder for Q8_0 {
    const GROUP: usize = LEN;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let mut fits = true;
        for (x, block) in batch.values.chunks_exact(LEN).zip(blocks.chunks_exact_mut(34)) {
            let x = halves(x);
            let d = largest_magnitude(&x) / 127.0;
            fits &= put_half(block, 0, d).is_finite();
            let id = Lanes::splat(inverse(d));
            for part in 0..2 {
                // ties away from zero
                let scaled = x[part] * id;
                let magnitude = (scaled.abs() + Lanes::splat(0.5)).floor(0.0, 127.0);
                // the sum may have been rounded up to an integer
                let over =
                    Lanes::where_less(scaled.abs(), magnitude - Lanes::splat(0.5), Lanes::splat(1.0), Lanes::ZERO);
                let magnitude = magnitude - over;
                let q = Lanes::where_less(scaled, Lanes::ZERO, Lanes::ZERO - magnitude, magnitude);
                block[2 + 16 * part..][..16].copy_from_slice(&q.bytes());
            }
        }
        fits
    }
}

impl Encoder for IQ4NL {
    const GROUP: usize = LEN;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let x = batch.groups::<LEN>();
        let w = if let Some(importance) = batch.importance {
            let variance = batch.mean_squares_of_blocks::<LEN>(LEN);
            important(&batch.importance_of_groups(importance), &x, variance + variance)
        } else {
            squares(&x)
        };
        let scales = fit_table(&IQ4_TABLE, &x, &w);
        let mut ids = Lanes::ZERO;
        let mut fits = true;
        for (lane, block) in blocks.chunks_exact_mut(18).enumerate() {
            fits &= put_half(block, 0, scales.0[lane]).is_finite();
            ids.0[lane] = inverse(scales.0[lane]);
        }
        let mut indices = x;
        table_indices(&IQ4_TABLE, &x, ids, &mut indices);
        let levels = levels_in_order(&indices);
        for (lane, block) in blocks.chunks_exact_mut(18).enumerate() {
            pack_nibbles(&levels[lane], &mut block[2..]);
        }
        fits
    }
}

/// The midpoints between the magnitudes of 4-bit floats.
const FP4_MIDDLES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// The exponent of MXFP4 for a block with the largest magnitude `largest`: the exponent of `largest`, minus 2, plus 127.
#[inline(always)]
fn exponent_of(largest: f32) -> u8 {
    let bits = largest.to_bits();
    let mut exponent = bits >> 23;
    // ggml rounds the logarithm to f32: magnitudes just below a power of two count as that power
    if bits & 0x7f_ffff > 0x7f_ff00 && (f64::from(largest).log2() as f32).floor() >= exponent as f32 - 126.0 {
        exponent += 1;
    }
    exponent.saturating_sub(2) as u8
}

impl Encoder for MXFP4 {
    const GROUP: usize = LEN;
    const HAS_HALF_SCALES: bool = false;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        for (x, block) in batch.values.chunks_exact(LEN).zip(blocks.chunks_exact_mut(17)) {
            let x = halves(x);
            let exponent = exponent_of(largest_magnitude(&x));
            block[0] = exponent;
            let bits = u32::from(exponent);
            let scale = f32::from_bits(if bits == 0 { 0x0040_0000 } else { bits << 23 });
            let mut levels = x;
            for part in 0..2 {
                let magnitude = x[part].abs();
                let mut level = Lanes::ZERO;
                for middle in FP4_MIDDLES {
                    let next = level + Lanes::splat(1.0);
                    level = Lanes::where_less(Lanes::splat(middle * scale), magnitude, next, level);
                }
                let negative = level + Lanes::where_less(Lanes::ZERO, level, Lanes::splat(8.0), Lanes::ZERO);
                levels[part] = Lanes::where_less(x[part], Lanes::ZERO, negative, level);
            }
            pack_nibbles(&bytes(&levels), &mut block[1..]);
        }
        true
    }
}
