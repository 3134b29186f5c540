//! Quantizes superblocks: 256 weights in groups of 16 or 32, each with its own scale.

use super::batch::{Batch, Encoder, important, levels_in_order, put_half, squares, sums};
use super::blocks::pack_nibbles;
use super::lanes::{LANES, Lanes, rounded};
use super::search::{
    IMPORTANT, TINY, Tries, fit_by_level, fit_scales, fit_symmetric, fit_symmetric_in, fit_table, fit_with_minimum,
    table_indices,
};
use crate::blocks::decode::IQ4_TABLE;
use crate::blocks::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};

/// The length of the superblocks.
const LEN: usize = 256;

/// The weights of errors without an importance: the root mean square of the group plus the magnitude of the value.
#[inline(always)]
fn root_mean_square_plus_magnitudes<const N: usize>(x: &[Lanes; N]) -> [Lanes; N] {
    let mean = (sums(&squares(x)) / Lanes::splat(N as f32)).sqrt();
    let mut weights = [Lanes::ZERO; N];
    for i in 0..N {
        weights[i] = mean + x[i].abs();
    }
    weights
}

/// Quantizes the non-negative scales of a superblock such that the largest gets the level `max_level`. Writes the levels and
/// returns the scale of the scales.
#[inline(always)]
fn scale_largest(scales: &[f32], max_level: f32, levels: &mut [f32]) -> f32 {
    let mut largest = 0.0;
    for &scale in scales {
        largest = if scale > largest { scale } else { largest };
    }
    let inverse = if largest > 0.0 { max_level / largest } else { 0.0 };
    for (level, scale) in levels.iter_mut().zip(scales) {
        *level = rounded(inverse * scale, 0.0, max_level);
    }
    largest / max_level
}

/// A format of groups with scales and minimums.
trait WithMinimums: Encoder {
    /// The largest level of a weight.
    const MAX_LEVEL: f32;
    /// The largest level of a scale.
    const MAX_SCALE: f32;
    /// The offset of the f16 scale; the scale of the minimums follows.
    const SCALES_AT: usize;

    /// Packs a block. `scales` and `minimums` have a level per group.
    fn pack<const N: usize>(levels: &[[u8; N]], scales: &[u8], minimums: &[u8], block: &mut [u8]);
}

/// Quantizes superblocks of groups of `N` weights `x`, with errors weighted by `w`.
#[inline(always)]
fn encode_with_minimums<F: WithMinimums, const N: usize>(
    x: &[Lanes; N],
    w: &[Lanes; N],
    tries: Tries,
    has_importance: bool,
    blocks: &mut [u8],
) -> bool {
    let groups = LEN / N;
    let mut levels = [Lanes::ZERO; N];
    let (fitted, minimum) = fit_with_minimum(x, w, F::MAX_LEVEL, tries, &mut levels);
    let sums = sums(w);
    let (mut scales, mut minimums) = (Lanes::ZERO, Lanes::ZERO);
    let (mut scale_levels, mut minimum_levels): (Lanes, Lanes) = (Lanes::ZERO, Lanes::ZERO);
    let mut fits = true;
    for (index, block) in blocks.chunks_exact_mut(F::BYTES).enumerate() {
        let lanes = index * groups..(index + 1) * groups;
        let negative = Lanes::ZERO - minimum;
        let mut rounded = [0.0; 2];
        for (part, (from, levels)) in
            [(&fitted, &mut scale_levels), (&negative, &mut minimum_levels)].into_iter().enumerate()
        {
            let (from, levels) = (&from.0[lanes.clone()], &mut levels.0[lanes.clone()]);
            let d = if has_importance {
                fit_scales(from, &sums.0[lanes.clone()], F::MAX_SCALE, levels)
            } else {
                scale_largest(from, F::MAX_SCALE, levels)
            };
            rounded[part] = put_half(block, F::SCALES_AT + 2 * part, d);
            fits &= rounded[part].is_finite();
        }
        for lane in lanes {
            scales.0[lane] = rounded[0] * scale_levels.0[lane];
            minimums.0[lane] = rounded[1] * minimum_levels.0[lane];
        }
    }
    for i in 0..N {
        let level = ((x[i] + minimums) / scales).rounded(0.0, F::MAX_LEVEL);
        // the levels of groups without a scale do not matter
        levels[i] = Lanes::where_less(Lanes::ZERO, scales, level, levels[i]);
    }
    let (levels, scales, minimums) = (levels_in_order(&levels), scale_levels.bytes(), minimum_levels.bytes());
    for (index, block) in blocks.chunks_exact_mut(F::BYTES).enumerate() {
        let lanes = index * groups..(index + 1) * groups;
        F::pack(&levels[lanes.clone()], &scales[lanes.clone()], &minimums[lanes], block);
    }
    fits
}

/// Packs levels below 4: each byte contains four levels, one from each group of 32 values of a half.
#[inline(always)]
fn pack_pairs(levels: &[u8], to: &mut [u8]) {
    for half in 0..2 {
        let levels = &levels[128 * half..128 * (half + 1)];
        let to = &mut to[32 * half..32 * (half + 1)];
        for i in 0..32 {
            to[i] = levels[i] | levels[i + 32] << 2 | levels[i + 64] << 4 | levels[i + 96] << 6;
        }
    }
}

impl WithMinimums for Q2K {
    const MAX_LEVEL: f32 = 3.0;
    const MAX_SCALE: f32 = 15.0;
    const SCALES_AT: usize = 80;

    #[inline(always)]
    fn pack<const N: usize>(levels: &[[u8; N]], scales: &[u8], minimums: &[u8], block: &mut [u8]) {
        for group in 0..16 {
            block[group] = scales[group] | minimums[group] << 4;
        }
        pack_pairs(levels.as_flattened(), &mut block[16..80]);
    }
}

impl Encoder for Q2K {
    const GROUP: usize = 16;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let x = batch.groups::<16>();
        if let Some(importance) = batch.importance {
            let variance = batch.mean_squares_of_blocks::<16>(LEN);
            let w = important(&batch.importance_of_groups(importance), &x, variance);
            return encode_with_minimums::<Self, 16>(&x, &w, IMPORTANT, true, blocks);
        }
        let mut w = x;
        for i in 0..16 {
            w[i] = x[i].abs();
        }
        let tries = Tries { first: -0.5, step: 0.1, last: 15, absolute: true };
        encode_with_minimums::<Self, 16>(&x, &w, tries, false, blocks)
    }
}

/// Packs the scales and minimums of `Q4_K` and `Q5_K` with 6 bits each.
#[inline(always)]
fn pack_scales_and_minimums(scales: &[u8], minimums: &[u8], to: &mut [u8]) {
    for group in 0..4 {
        let (scale, minimum) = (scales[group + 4], minimums[group + 4]);
        to[group] = scales[group] | scale >> 4 << 6;
        to[group + 4] = minimums[group] | minimum >> 4 << 6;
        to[group + 8] = scale & 15 | (minimum & 15) << 4;
    }
}

/// Packs the low four bits of levels: each byte contains the bits of two groups.
#[inline(always)]
fn pack_low_bits(levels: &[u8], to: &mut [u8]) {
    for pair in 0..4 {
        let levels = &levels[64 * pair..64 * (pair + 1)];
        let to = &mut to[32 * pair..32 * (pair + 1)];
        for i in 0..32 {
            to[i] = levels[i] & 15 | levels[i + 32] << 4;
        }
    }
}

/// Quantizes a batch to `Q4_K` or `Q5_K`.
#[inline(always)]
fn encode_groups_of_32<F: WithMinimums>(batch: &Batch, tries: Tries, blocks: &mut [u8]) -> bool {
    let x = batch.groups::<32>();
    let (w, tries) = if let Some(importance) = batch.importance {
        let mean = batch.mean_squares_of_blocks::<32>(LEN);
        (important(&batch.importance_of_groups(importance), &x, mean + mean), IMPORTANT)
    } else {
        (root_mean_square_plus_magnitudes(&x), tries)
    };
    encode_with_minimums::<F, 32>(&x, &w, tries, batch.importance.is_some(), blocks)
}

impl WithMinimums for Q4K {
    const MAX_LEVEL: f32 = 15.0;
    const MAX_SCALE: f32 = 63.0;
    const SCALES_AT: usize = 0;

    #[inline(always)]
    fn pack<const N: usize>(levels: &[[u8; N]], scales: &[u8], minimums: &[u8], block: &mut [u8]) {
        pack_scales_and_minimums(scales, minimums, &mut block[4..16]);
        pack_low_bits(levels.as_flattened(), &mut block[16..]);
    }
}

impl Encoder for Q4K {
    const GROUP: usize = 32;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let tries = Tries { first: -1.0, step: 0.1, last: 20, absolute: false };
        encode_groups_of_32::<Self>(batch, tries, blocks)
    }
}

impl WithMinimums for Q5K {
    const MAX_LEVEL: f32 = 31.0;
    const MAX_SCALE: f32 = 63.0;
    const SCALES_AT: usize = 0;

    #[inline(always)]
    fn pack<const N: usize>(levels: &[[u8; N]], scales: &[u8], minimums: &[u8], block: &mut [u8]) {
        let levels = levels.as_flattened();
        pack_scales_and_minimums(scales, minimums, &mut block[4..16]);
        for i in 0..32 {
            let mut bits = 0;
            for group in 0..8 {
                bits |= (levels[32 * group + i] >> 4) << group;
            }
            block[16 + i] = bits;
        }
        pack_low_bits(levels, &mut block[48..]);
    }
}

impl Encoder for Q5K {
    const GROUP: usize = 32;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let tries = Tries { first: -0.5, step: 0.1, last: 15, absolute: false };
        encode_groups_of_32::<Self>(batch, tries, blocks)
    }
}

/// The first number with the largest magnitude.
#[inline(always)]
fn extreme(values: &[f32]) -> f32 {
    let mut extreme = 0.0_f32;
    for &value in values {
        extreme = if value.abs() > extreme.abs() { value } else { extreme };
    }
    extreme
}

/// The levels of `x` from `-half` to `half - 1` for these scales, plus `half`. Where the scale is zero, the levels of the search
/// stay.
#[inline(always)]
fn levels_of(x: &[Lanes; 16], scales: Lanes, half: f32, searched: &[Lanes; 16]) -> [[u8; 16]; LANES] {
    let mut levels = *searched;
    for i in 0..16 {
        let level = (x[i] / scales).rounded(-half, half - 1.0) + Lanes::splat(half);
        levels[i] = Lanes::where_less(Lanes::ZERO, scales.abs(), level, searched[i]);
    }
    levels_in_order(&levels)
}

/// Quantizes the scales of a superblock such that the one with the largest magnitude gets the level `-half`. Returns the scale
/// of the scales, and the levels.
#[inline(always)]
fn scale_extreme(scales: Lanes, half: f32) -> (f32, Lanes) {
    let extreme = extreme(&scales.0);
    if extreme.abs() <= 0.0 {
        return (0.0, Lanes::splat(-half));
    }
    let inverse = -half / extreme;
    (1.0 / inverse, (Lanes::splat(inverse) * scales).rounded(-half, half - 1.0))
}

impl Encoder for Q3K {
    const GROUP: usize = 16;

    #[inline(always)]
    fn encode(batch: &Batch, block: &mut [u8]) -> bool {
        let x = batch.groups::<16>();
        let mut searched = [Lanes::ZERO; 16];
        let (d, scale_levels) = if let Some(importance) = batch.importance {
            let mean = batch.mean_squares_of_blocks::<16>(LEN);
            let w = important(&batch.importance_of_groups(importance), &x, mean + mean);
            let scales = fit_symmetric(&x, &w, 4.0, &mut searched);
            let (mut scales_in_one, mut weights) = ([Lanes([0.0]); 16], [Lanes([0.0]); 16]);
            let sums = sums(&w);
            for group in 0..16 {
                (scales_in_one[group].0[0], weights[group].0[0]) = (scales.0[group], sums.0[group]);
            }
            let mut levels = scales_in_one;
            let d: Lanes<1> = fit_symmetric_in(&scales_in_one, &weights, 32.0, &mut levels);
            let mut scale_levels = Lanes::ZERO;
            for (scale_level, level) in scale_levels.0.iter_mut().zip(&levels) {
                *scale_level = level.0[0] - 32.0;
            }
            (d.0[0], scale_levels)
        } else {
            let scales = fit_by_level(&x, 4.0, &mut searched);
            scale_extreme(scales, 32.0)
        };
        let d = put_half(block, 108, d);
        let levels = levels_of(&x, Lanes::splat(d) * scale_levels, 4.0, &searched);
        let levels = levels.as_flattened();
        for i in 0..32 {
            let mut bits = 0;
            for group in 0..8 {
                bits |= (levels[32 * group + i] >> 2) << group;
            }
            block[i] = bits;
        }
        let mut low = [0; LEN];
        for i in 0..LEN {
            low[i] = levels[i] & 3;
        }
        pack_pairs(&low, &mut block[32..96]);
        let scales = (scale_levels + Lanes::splat(32.0)).bytes();
        for group in 0..8 {
            block[96 + group] = scales[group] & 15 | (scales[group + 8] & 15) << 4;
        }
        for group in 0..4 {
            let mut bits = 0;
            for part in 0..4 {
                bits |= (scales[4 * part + group] >> 4) << (2 * part);
            }
            block[104 + group] = bits;
        }
        d.is_finite()
    }
}

impl Encoder for Q6K {
    const GROUP: usize = 16;

    #[inline(always)]
    fn encode(batch: &Batch, block: &mut [u8]) -> bool {
        let x = batch.groups::<16>();
        let w =
            if let Some(importance) = batch.importance { batch.importance_of_groups(importance) } else { squares(&x) };
        let mut searched = [Lanes::ZERO; 16];
        let scales = fit_symmetric(&x, &w, 32.0, &mut searched);
        if extreme(&scales.0).abs() < TINY {
            block.fill(0);
            return true;
        }
        let (d, scale_levels) = scale_extreme(scales, 128.0);
        let d = put_half(block, 208, d);
        block[192..208].copy_from_slice(&scale_levels.bytes());
        let levels = levels_of(&x, Lanes::splat(d) * scale_levels, 32.0, &searched);
        let levels = levels.as_flattened();
        for half in 0..2 {
            let levels = &levels[128 * half..128 * (half + 1)];
            for i in 0..64 {
                block[64 * half + i] = levels[i] & 15 | levels[i + 64] << 4;
            }
            for i in 0..32 {
                let high =
                    levels[i] >> 4 | levels[i + 32] >> 4 << 2 | levels[i + 64] >> 4 << 4 | levels[i + 96] >> 4 << 6;
                block[128 + 32 * half + i] = high;
            }
        }
        d.is_finite()
    }
}

impl Encoder for IQ4XS {
    const GROUP: usize = 32;

    #[inline(always)]
    fn encode(batch: &Batch, blocks: &mut [u8]) -> bool {
        let x = batch.groups::<32>();
        let w = if let Some(importance) = batch.importance {
            let mean = batch.mean_squares_of_blocks::<32>(LEN);
            important(&batch.importance_of_groups(importance), &x, mean + mean)
        } else {
            squares(&x)
        };
        let scales = fit_table(&IQ4_TABLE, &x, &w);
        let mut ids = Lanes::ZERO;
        let mut fits = true;
        for (index, block) in blocks.chunks_exact_mut(136).enumerate() {
            let scales = &scales.0[8 * index..8 * (index + 1)];
            let d = -extreme(scales) / 32.0;
            fits &= put_half(block, 0, d).is_finite();
            let inverse = if d.abs() > 0.0 { 1.0 / d } else { 0.0 };
            let (mut upper, mut lower) = (0_u16, [0_u8; 4]);
            for group in 0..8 {
                let level = rounded(inverse * scales[group], -32.0, 31.0);
                let scale = d * level;
                ids.0[8 * index + group] = if scale.abs() > 0.0 { 1.0 / scale } else { 0.0 };
                let level = (level + 32.0) as u8;
                upper |= u16::from(level >> 4) << (2 * group);
                lower[group / 2] |= (level & 15) << (4 * (group % 2));
            }
            block[2..4].copy_from_slice(&upper.to_le_bytes());
            block[4..8].copy_from_slice(&lower);
        }
        let mut indices = x;
        table_indices(&IQ4_TABLE, &x, ids, &mut indices);
        let levels = levels_in_order(&indices);
        for (levels, packed) in levels.chunks_exact(8).zip(blocks.chunks_exact_mut(136)) {
            for group in 0..8 {
                pack_nibbles(&levels[group], &mut packed[8 + 16 * group..]);
            }
        }
        fits
    }
}
