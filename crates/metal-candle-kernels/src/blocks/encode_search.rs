//! Searches for the scales of groups of weights: least squares for several roundings of the weights, as ggml does it.
//!
//! The functions do the operations of ggml in its order, for several groups at once. So the blocks are those that ggml writes
//! when it is compiled without fused multiply-add.

use super::encode_lanes::{Lanes, rounded};
use crate::isa::{Arithmetic, dispatch};

/// Groups whose largest weight is smaller count as zero.
pub(super) const TINY: f32 = 1e-15;

/// Roundings to try: those to `levels + first + step * k` intervals.
#[derive(Clone, Copy)]
pub(super) struct Tries {
    pub(super) first: f32,
    pub(super) step: f32,
    /// The largest `k`.
    pub(super) last: u8,
    /// Compares sums of absolute instead of squared errors.
    pub(super) absolute: bool,
}

/// The tries for weights with an importance.
pub(super) const IMPORTANT: Tries = Tries { first: -0.9, step: 0.05, last: 36, absolute: false };

dispatch! {
    /// Fits groups of values `x`, whose errors are weighted by `w`, by a scale, a minimum, and levels from 0 to `most`. Writes
    /// the levels, and returns the scales, which are not negative, and the minimums, which are not positive.
    pub(super) fn fit_with_minimum(x: &[Lanes], w: &[Lanes], most: f32, tries: Tries, levels: &mut [Lanes]) -> (Lanes, Lanes)
        = fit_with_minimum_body
}

#[inline(always)]
fn fit_with_minimum_body<A: Arithmetic>(
    x: &[Lanes],
    w: &[Lanes],
    most: f32,
    tries: Tries,
    levels: &mut [Lanes],
) -> (Lanes, Lanes) {
    let n = x.len();
    let (w, levels) = (&w[..n], &mut levels[..n]);
    let (mut low, mut high, mut sum_w, mut sum_x) = (x[0], x[0], w[0], w[0] * x[0]);
    for i in 1..n {
        (low, high) = (x[i].min(low), x[i].max(high));
        (sum_w, sum_x) = (sum_w + w[i], sum_x + w[i] * x[i]);
    }
    low = Lanes::where_less(Lanes::ZERO, low, Lanes::ZERO, low);
    let (one, least) = (Lanes::splat(1.0), low);

    let mut minimum = low;
    let mut inverse = Lanes::splat(most) / (high - low);
    let mut scale = one / inverse;
    // the rounding that is the best so far
    let mut best_inverse = inverse;
    let mut best_low = low;
    let mut best = Lanes::ZERO;
    for i in 0..n {
        let level = (inverse * (x[i] - low)).rounded(0.0, most);
        best = best + cost(scale, level, minimum, x[i], w[i], tries.absolute);
    }

    for k in 0..=tries.last {
        inverse = Lanes::splat(tries.first + tries.step * f32::from(k) + most) / (high - minimum);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (Lanes::ZERO, Lanes::ZERO, Lanes::ZERO);
        for i in 0..n {
            let level = (inverse * (x[i] - minimum)).rounded(0.0, most);
            levels[i] = level;
            let weighted = w[i] * level;
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * level;
            sum_xl = sum_xl + weighted * x[i];
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let new_scale = Lanes::where_less(Lanes::ZERO, new_minimum, sum_xl / sum_l2, new_scale);
        let new_minimum = Lanes::where_less(Lanes::ZERO, new_minimum, Lanes::ZERO, new_minimum);
        let mut error = Lanes::ZERO;
        for i in 0..n {
            error = error + cost(new_scale, levels[i], new_minimum, x[i], w[i], tries.absolute);
        }
        let error = Lanes::where_less(Lanes::ZERO, determinant, error, Lanes::splat(f32::INFINITY));
        best_inverse = Lanes::where_less(error, best, inverse, best_inverse);
        best_low = Lanes::where_less(error, best, minimum, best_low);
        scale = Lanes::where_less(error, best, new_scale, scale);
        minimum = Lanes::where_less(error, best, new_minimum, minimum);
        best = Lanes::where_less(error, best, error, best);
    }

    // groups of one value
    scale = Lanes::where_less(least, high, scale, Lanes::ZERO);
    minimum = Lanes::where_less(least, high, minimum, least);
    for i in 0..n {
        let level = (best_inverse * (x[i] - best_low)).rounded(0.0, most);
        levels[i] = Lanes::where_less(least, high, level, Lanes::ZERO);
    }
    (scale, minimum)
}

/// The weighted error of `scale * level + minimum` for `x`.
#[inline(always)]
fn cost(scale: Lanes, level: Lanes, minimum: Lanes, x: Lanes, w: Lanes, absolute: bool) -> Lanes {
    let difference = scale * level + minimum - x;
    w * if absolute { difference.abs() } else { difference * difference }
}

/// The value with the largest magnitude, and the magnitude. The first if there are several.
#[inline(always)]
fn extreme<const L: usize>(x: &[Lanes<L>]) -> (Lanes<L>, Lanes<L>) {
    let (mut largest, mut value) = (Lanes::ZERO, Lanes::ZERO);
    for x in x {
        let magnitude = x.abs();
        value = Lanes::where_less(largest, magnitude, *x, value);
        largest = Lanes::where_less(largest, magnitude, magnitude, largest);
    }
    (value, largest)
}

/// `yes` where `sum_xl^2 / sum_l2`, by which the least squares shrink, is above `best`, else `no`.
#[inline(always)]
fn where_better<const L: usize>(sums: (Lanes<L>, Lanes<L>), best: Lanes<L>, yes: Lanes<L>, no: Lanes<L>) -> Lanes<L> {
    let (sum_xl, sum_l2) = sums;
    let gain = Lanes::where_less(Lanes::ZERO, sum_l2, sum_xl * sum_xl, Lanes::splat(-1.0));
    Lanes::where_less(best * sum_l2, gain, yes, no)
}

dispatch! {
    /// Fits groups of values `x`, whose errors are weighted by `w`, by a scale and levels from `-half` to `half - 1`. Writes the
    /// levels plus `half`, and returns the scales.
    pub(super) fn fit_symmetric(x: &[Lanes], w: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes = fit_symmetric_body
}

#[inline(always)]
fn fit_symmetric_body<A: Arithmetic>(x: &[Lanes], w: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes {
    fit_symmetric_lanes(x, w, half, levels)
}

/// [`fit_symmetric`] for any number of lanes.
#[inline(always)]
pub(super) fn fit_symmetric_lanes<const L: usize>(
    x: &[Lanes<L>],
    w: &[Lanes<L>],
    half: f32,
    levels: &mut [Lanes<L>],
) -> Lanes<L> {
    let n = x.len();
    let (w, levels) = (&w[..n], &mut levels[..n]);
    let (extreme, largest) = extreme(x);
    let (mut scale, mut best, mut best_inverse) = (Lanes::ZERO, Lanes::ZERO, Lanes::ZERO);
    // the first try is the middle one, and is taken anyway
    for k in [0_i8, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let inverse = Lanes::splat(-(half + 0.1 * f32::from(k))) / extreme;
        let (mut sum_xl, mut sum_l2) = (Lanes::ZERO, Lanes::ZERO);
        for i in 0..n {
            let level = (inverse * x[i]).rounded(-half, half - 1.0);
            sum_xl = sum_xl + w[i] * x[i] * level;
            sum_l2 = sum_l2 + w[i] * level * level;
        }
        let new_scale = Lanes::where_less(Lanes::ZERO, sum_l2, sum_xl / sum_l2, Lanes::ZERO);
        let new_best = new_scale * sum_xl;
        if k == 0 {
            (scale, best, best_inverse) = (new_scale, new_best, inverse);
        } else {
            let sums = (sum_xl, sum_l2);
            scale = where_better(sums, best, new_scale, scale);
            best_inverse = where_better(sums, best, inverse, best_inverse);
            best = where_better(sums, best, new_best, best);
        }
    }
    let tiny = Lanes::splat(TINY);
    for i in 0..n {
        let level = (best_inverse * x[i]).rounded(-half, half - 1.0) + Lanes::splat(half);
        levels[i] = Lanes::where_less(largest, tiny, Lanes::ZERO, level);
    }
    Lanes::where_less(largest, tiny, Lanes::ZERO, scale)
}

dispatch! {
    /// As [`fit_symmetric`], but improves one level after another, with the squares of `x` as weights.
    pub(super) fn fit_by_level(x: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes = fit_by_level_body
}

#[inline(always)]
fn fit_by_level_body<A: Arithmetic>(x: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes {
    let n = x.len();
    let levels = &mut levels[..n];
    let (extreme, largest) = extreme(x);
    let inverse = Lanes::splat(-half) / extreme;
    let (mut sum_xl, mut sum_l2) = (Lanes::ZERO, Lanes::ZERO);
    for i in 0..n {
        let (level, w) = ((inverse * x[i]).rounded(-half, half - 1.0), x[i] * x[i]);
        levels[i] = level;
        sum_xl = sum_xl + w * x[i] * level;
        sum_l2 = sum_l2 + w * level * level;
    }
    let never = Lanes::splat(-1.0);
    for _ in 0..5 {
        for i in 0..n {
            let (level, w) = (levels[i], x[i] * x[i]);
            let without_xl = sum_xl - w * x[i] * level;
            let without_l2 = sum_l2 - w * level * level;
            let new_level = (x[i] * without_l2 / without_xl).rounded(-half, half - 1.0);
            let new_xl = without_xl + w * x[i] * new_level;
            let new_l2 = without_l2 + w * new_level * new_level;
            let change = (new_level - level).abs();
            let gain = new_xl * new_xl * sum_l2;
            let gain = Lanes::where_less(Lanes::ZERO, change, gain, never);
            let gain = Lanes::where_less(Lanes::ZERO, without_xl, gain, never);
            let gain = Lanes::where_less(Lanes::ZERO, new_l2, gain, never);
            let bar = sum_xl * sum_xl * new_l2;
            levels[i] = Lanes::where_less(bar, gain, new_level, level);
            sum_xl = Lanes::where_less(bar, gain, new_xl, sum_xl);
            sum_l2 = Lanes::where_less(bar, gain, new_l2, sum_l2);
        }
    }
    let tiny = Lanes::splat(TINY);
    for level in levels {
        *level = Lanes::where_less(largest, tiny, Lanes::ZERO, *level + Lanes::splat(half));
    }
    let scale = Lanes::where_less(Lanes::ZERO, sum_l2, sum_xl / sum_l2, Lanes::ZERO);
    Lanes::where_less(largest, tiny, Lanes::ZERO, scale)
}

/// Fits the scales of a superblock, which are not negative, by one scale and levels up to `most`. Returns that scale and
/// writes the levels.
#[inline(never)]
pub(super) fn fit_scales(x: &[f32], w: &[f32], most: f32, levels: &mut [f32]) -> f32 {
    let len = x.len();
    let mut largest = 0.0;
    for &x in x {
        largest = if x > largest { x } else { largest };
    }
    levels.fill(0.0);
    if largest < TINY {
        return 0.0;
    }
    let (mut best_inverse, mut best) = (most / largest, f32::INFINITY);
    for k in [0_i8, -4, -3, -2, -1, 1, 2, 3, 4] {
        let inverse = (0.1 * f32::from(k) + most) / largest;
        let scale = 1.0 / inverse;
        let mut error = 0.0;
        for i in 0..len {
            let difference = x[i] - scale * rounded(inverse * x[i], 0.0, most);
            error += w[i] * difference * difference;
        }
        if error < best {
            (best_inverse, best) = (inverse, error);
        }
    }
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    for i in 0..len {
        let level = rounded(best_inverse * x[i], 0.0, most);
        levels[i] = level;
        sum_xl += w[i] * x[i] * level;
        sum_l2 += w[i] * level * level;
    }
    for _ in 0..5 {
        let mut is_changed = false;
        for i in 0..len {
            let (x, w) = (x[i], w[i]);
            let without_xl = sum_xl - w * x * levels[i];
            let without_l2 = sum_l2 - w * levels[i] * levels[i];
            if without_xl > 0.0 && without_l2 > 0.0 {
                let level = rounded(x * without_l2 / without_xl, 0.0, most);
                let new_xl = without_xl + w * x * level;
                let new_l2 = without_l2 + w * level * level;
                let is_other = (level - levels[i]).abs() > 0.0;
                if is_other && new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2 {
                    (levels[i], sum_xl, sum_l2) = (level, new_xl, new_l2);
                    is_changed = true;
                }
            }
        }
        if !is_changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }
}

/// The entry of `table`, which ascends, that is nearest to `x`, and its index.
#[inline(always)]
pub(super) fn nearest_entry(table: &[i8; 16], x: Lanes) -> (Lanes, Lanes) {
    let (mut entry, mut index) = (Lanes::splat(f32::from(table[0])), Lanes::ZERO);
    for next in 1..16 {
        let [below, here] = [f32::from(table[next - 1]), f32::from(table[next])];
        let middle = Lanes::splat(f32::midpoint(below, here));
        entry = Lanes::where_less(x, middle, entry, Lanes::splat(here));
        index = Lanes::where_less(x, middle, index, Lanes::splat(next as f32));
    }
    (entry, index)
}

dispatch! {
    /// The scales of groups of values `x`, whose errors are weighted by `w`, as multiples of the entries of `table`.
    pub(super) fn fit_table(table: &[i8; 16], x: &[Lanes], w: &[Lanes]) -> Lanes = fit_table_body
}

#[inline(always)]
fn fit_table_body<A: Arithmetic>(table: &[i8; 16], x: &[Lanes], w: &[Lanes]) -> Lanes {
    let n = x.len();
    let w = &w[..n];
    let (extreme, largest) = extreme(x);
    let edge = f32::from(table[0]);
    let (mut scale, mut best) = (Lanes::ZERO, Lanes::ZERO);
    for k in -8_i8..=7 {
        // the first try is taken anyway
        let is_first = k == -8;
        let inverse = if is_first {
            Lanes::splat(1.0) / (extreme / Lanes::splat(-edge))
        } else {
            Lanes::splat(f32::from(k) + edge) / extreme
        };
        let (mut sum_xq, mut sum_q2) = (Lanes::ZERO, Lanes::ZERO);
        for i in 0..n {
            let (entry, _) = nearest_entry(table, inverse * x[i]);
            let weighted = w[i] * entry;
            sum_xq = sum_xq + weighted * x[i];
            sum_q2 = sum_q2 + weighted * entry;
        }
        let new_scale = Lanes::where_less(Lanes::ZERO, sum_q2, sum_xq / sum_q2, Lanes::ZERO);
        let new_best = new_scale * sum_xq;
        if is_first {
            (scale, best) = (new_scale, new_best);
        } else {
            scale = where_better((sum_xq, sum_q2), best, new_scale, scale);
            best = where_better((sum_xq, sum_q2), best, new_best, best);
        }
    }
    Lanes::where_less(largest, Lanes::splat(TINY), Lanes::ZERO, scale)
}
