//! Passes over the logits of a vocabulary for sampling: block maxima, exponentials and their sums.
//!
//! Values are processed in blocks of [`BLOCK`]. Every pass has a fixed order of additions (eight f32 lanes in a block, f64
//! between blocks), fuses multiplications and additions only explicitly, and does not use the platform's `exp`. So the
//! results are identical on every machine.

// the bodies fuse explicitly, independent of the instruction set, and compare exactly
#![allow(clippy::extra_unused_type_parameters, clippy::float_cmp, clippy::inline_always)]

use crate::isa::dispatch;

/// The number of values in a block; the last block of a slice may be shorter.
pub const BLOCK: usize = 128;

const LANES: usize = 8;

/// Smaller weights count as 0.
const SMALLEST: f32 = 7.523_164e-37;

dispatch! {
    /// Writes the largest value of each block to `maxima` and returns whether all values are numbers.
    ///
    /// `maxima` is resized to the number of blocks; a NaN leaves the maximum of its block undefined.
    pub fn block_maxima(values: &[f32], maxima: &mut Vec<f32>) -> bool = block_maxima_body
}

dispatch! {
    /// The sum of `exp(value - max)` over all values.
    pub fn sum_of_exponentials(values: &[f32], max: f32) -> f64 = sum_of_exponentials_body
}

dispatch! {
    /// Writes the weights `exp((value - max) / temperature)` and returns their sum.
    ///
    /// Weights below `floor` are then replaced by 0, and `sums` gets the remaining sum of each block. `weights` and `sums` are
    /// resized to the number of values and blocks. `max` must be the largest value, which has weight 1.
    pub fn exponentials(
        values: &[f32],
        max: f32,
        temperature: f64,
        floor: f32,
        weights: &mut Vec<f32>,
        sums: &mut Vec<f64>,
    ) -> f64 = exponentials_body
}

dispatch! {
    /// Writes, for each block, the sum of the weights that rank before the weight of `pivot`, and returns their total.
    ///
    /// A weight ranks before another if it is larger, or equal with a lower index.
    pub fn sums_before(weights: &[f32], pivot: usize, sums: &mut Vec<f64>) -> f64 = sums_before_body
}

/// Block `number`; the last block is copied to `spare` and padded.
// no closures here: they would not be compiled for the wider instructions of their caller
#[inline(always)]
fn block_at<'a>(values: &'a [f32], number: usize, spare: &'a mut [f32; BLOCK]) -> &'a [f32; BLOCK] {
    let rest = &values[number * BLOCK..];
    if let Some(block) = rest.first_chunk::<BLOCK>() {
        return block;
    }
    spare[..rest.len()].copy_from_slice(rest);
    spare
}

/// The sum of a block: lane by lane in f32, then over the lanes in f64.
#[inline(always)]
fn sum(block: &[f32; BLOCK]) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    for row in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += row[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes.map(f64::from);
    let [a, b, c, d] = [a + e, b + f, c + g, d + h];
    (a + c) + (b + d)
}

// one instruction, unlike `f32::max`; a NaN as `a` is ignored
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn block_maxima_body<A>(values: &[f32], maxima: &mut Vec<f32>) -> bool {
    maxima.resize(values.len().div_ceil(BLOCK), 0.0);
    let mut bad = [0_u32; LANES];
    let mut spare = [f32::NEG_INFINITY; BLOCK];
    for (number, maximum) in maxima.iter_mut().enumerate() {
        let block = block_at(values, number, &mut spare);
        let mut largest = [f32::NEG_INFINITY; LANES];
        for row in block.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                largest[lane] = larger(row[lane], largest[lane]);
                bad[lane] |= u32::from(row[lane].is_nan());
            }
        }
        let [a, b, c, d, e, f, g, h] = largest;
        let [a, b, c, d] = [larger(a, e), larger(b, f), larger(c, g), larger(d, h)];
        *maximum = larger(larger(a, c), larger(b, d));
    }
    bad.iter().all(|&bad| bad == 0)
}

/// `2^y` for `y <= 0` to about 1.5e-7 of its value; exactly 1 at 0, and about 2^-125 below -125.
#[inline(always)]
fn exp2(y: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const ROUND: f32 = 12_582_912.0;
    let y = if y > -125.0 { y } else { -125.0 };
    let rounded = y + ROUND;
    let f = y - (rounded - ROUND);
    let p = 0.001_326_472_7_f32.mul_add(f, 0.009_671_513);
    let p = p.mul_add(f, 0.055_507_336);
    let p = p.mul_add(f, 0.240_222_42);
    let p = p.mul_add(f, 0.693_146_97);
    let p = p.mul_add(f, 1.0);
    f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23))
}

#[inline(always)]
fn sum_of_exponentials_body<A>(values: &[f32], max: f32) -> f64 {
    let mut total = 0.0;
    let mut spare = [f32::NEG_INFINITY; BLOCK];
    for number in 0..values.len().div_ceil(BLOCK) {
        let block = block_at(values, number, &mut spare);
        let mut weights = [0.0; BLOCK];
        for (weight, value) in weights.iter_mut().zip(block) {
            *weight = exp2((value - max) * std::f32::consts::LOG2_E);
        }
        total += sum(&weights);
    }
    total
}

#[inline(always)]
fn exponentials_body<A>(
    values: &[f32],
    max: f32,
    temperature: f64,
    floor: f32,
    weights: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) -> f64 {
    // bounded so that the distance 0 times the factor stays 0
    let factor = (std::f64::consts::LOG2_E / temperature).min(1e30) as f32;
    let floor = floor.max(SMALLEST);
    let num_blocks = values.len().div_ceil(BLOCK);
    weights.resize(num_blocks * BLOCK, 0.0);
    sums.resize(num_blocks, 0.0);
    let mut total = 0.0;
    let mut spare = [f32::NEG_INFINITY; BLOCK];
    for (number, (weights, kept)) in weights.as_chunks_mut::<BLOCK>().0.iter_mut().zip(sums).enumerate() {
        let block = block_at(values, number, &mut spare);
        let mut all = [0.0; BLOCK];
        for (weight, value) in all.iter_mut().zip(block) {
            *weight = exp2((value - max) * factor);
        }
        for (weight, &all) in weights.iter_mut().zip(&all) {
            *weight = if all >= floor { all } else { 0.0 };
        }
        *kept = sum(weights);
        total += if floor > SMALLEST { sum(&all) } else { *kept };
    }
    weights.truncate(values.len());
    total
}

#[inline(always)]
fn sums_before_body<A>(weights: &[f32], pivot: usize, sums: &mut Vec<f64>) -> f64 {
    sums.resize(weights.len().div_ceil(BLOCK), 0.0);
    let Some(&bound) = weights.get(pivot) else { return 0.0 };
    let mut total = 0.0;
    let mut spare = [0.0; BLOCK];
    for (number, sum_before) in sums.iter_mut().enumerate() {
        let block = block_at(weights, number, &mut spare);
        let mut before = [0.0; BLOCK];
        match number.cmp(&(pivot / BLOCK)) {
            std::cmp::Ordering::Less => {
                for (before, &weight) in before.iter_mut().zip(block) {
                    *before = if weight >= bound { weight } else { 0.0 };
                }
            }
            std::cmp::Ordering::Greater => {
                for (before, &weight) in before.iter_mut().zip(block) {
                    *before = if weight > bound { weight } else { 0.0 };
                }
            }
            std::cmp::Ordering::Equal => {
                for (index, (before, &weight)) in before.iter_mut().zip(block).enumerate() {
                    if weight > bound || (weight == bound && index < pivot % BLOCK) {
                        *before = weight;
                    }
                }
            }
        }
        *sum_before = sum(&before);
        total += *sum_before;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 61.0).collect()
    }

    #[test]
    fn exponentials_match_the_standard_library() {
        for n in [1, 7, 8, 64, 127, 128, 129, 1000] {
            let values = values(n);
            let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut maxima = Vec::new();
            assert!(block_maxima(&values, &mut maxima));
            assert_eq!(maxima.len(), n.div_ceil(BLOCK));
            assert_eq!(maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max), max);
            let (mut weights, mut sums) = (Vec::new(), Vec::new());
            for temperature in [0.3, 1.0, 2.5] {
                let sum = exponentials(&values, max, temperature, 0.0, &mut weights, &mut sums);
                let expected: Vec<f64> =
                    values.iter().map(|&value| (f64::from(value - max) / temperature).exp()).collect();
                for (&weight, &expected) in weights.iter().zip(&expected) {
                    // the rounding of the exponent grows with it
                    let tolerance = expected * 2e-7 * (1.0 - expected.ln());
                    assert!((f64::from(weight) - expected).abs() <= tolerance, "{weight} {expected}");
                }
                let expected: f64 = expected.iter().sum();
                assert!((sum - expected).abs() < 1e-6 * expected);
                assert!((sums.iter().sum::<f64>() - expected).abs() < 1e-6 * expected);
            }
            let sum = sum_of_exponentials(&values, max);
            let expected: f64 = values.iter().map(|&value| f64::from(value - max).exp()).sum();
            assert!((sum - expected).abs() < 1e-6 * expected);
        }
    }

    #[test]
    fn the_largest_value_has_weight_one_and_negative_infinity_zero() {
        let (mut weights, mut sums) = (Vec::new(), Vec::new());
        for temperature in [1e-300, 1e-9, 1.0, 1e9] {
            let sum = exponentials(&[f32::NEG_INFINITY, 3.5, 3.0], 3.5, temperature, 0.0, &mut weights, &mut sums);
            assert_eq!(weights[0], 0.0);
            assert_eq!(weights[1], 1.0);
            assert!((1.0..=2.0).contains(&sum));
        }
    }

    #[test]
    fn weights_below_the_floor_remain_in_the_total() {
        let (mut weights, mut sums) = (Vec::new(), Vec::new());
        let sum = exponentials(&[0.0, -1.0, -3.0], 0.0, 1.0, 0.1, &mut weights, &mut sums);
        assert!((sum - 1.417_666_5).abs() < 1e-6);
        assert_eq!(weights[2], 0.0);
        assert!((sums[0] - 1.367_879_4).abs() < 1e-6);
    }

    #[test]
    fn sums_before_follow_rank_and_index() {
        let weights: Vec<f32> = (0..400).map(|i| (i % 5) as f32).collect();
        let mut sums = Vec::new();
        for pivot in [0, 3, 127, 128, 260, 399] {
            let before = |i: usize| weights[i] > weights[pivot] || (weights[i] == weights[pivot] && i < pivot);
            let expected: f32 = (0..400).filter(|&i| before(i)).map(|i| weights[i]).sum();
            assert_eq!(sums_before(&weights, pivot, &mut sums), f64::from(expected));
            assert_eq!(sums.iter().sum::<f64>(), f64::from(expected));
        }
    }

    #[test]
    fn a_nan_is_detected_at_any_index() {
        for at in [0, 8, 128, 199] {
            let mut values = values(200);
            values[at] = f32::NAN;
            assert!(!block_maxima(&values, &mut Vec::new()));
        }
    }
}
