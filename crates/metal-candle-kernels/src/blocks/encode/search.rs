//! Searches for the scales of groups of weights like ggml: least squares for several roundings of the weights.
//!
//! The operations and their order are the same as in ggml, without fused multiply-add, so the results are identical bit for bit.

use super::lanes::{Lanes, rounded};
use super::registers::{HasRegisters, Registers};
use crate::isa::dispatch;

/// Groups with a smaller largest weight count as zero.
pub(super) const TINY: f32 = 1e-15;

/// The roundings to try: `levels + first + step * k` intervals, for each `k`.
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
    /// Fits groups of values `x`, with errors weighted by `w`, by a scale, a minimum, and levels from 0 to `max_level`. Writes
    /// the levels, and returns the non-negative scales and the non-positive minimums.
    pub(super) fn fit_with_minimum(x: &[Lanes], w: &[Lanes], max_level: f32, tries: Tries, levels: &mut [Lanes]) -> (Lanes, Lanes)
        = fit_with_minimum_body
}

#[inline(always)]
fn fit_with_minimum_body<A: HasRegisters>(
    x: &[Lanes],
    w: &[Lanes],
    max_level: f32,
    tries: Tries,
    levels: &mut [Lanes],
) -> (Lanes, Lanes) {
    let (scale, minimum) = fit_with_minimum_in::<A::Registers>(x, w, max_level, tries, levels);
    (scale.store(), minimum.store())
}

#[inline(always)]
fn fit_with_minimum_in<V: Registers>(
    x: &[V::Memory],
    w: &[V::Memory],
    max_level: f32,
    tries: Tries,
    levels: &mut [V::Memory],
) -> (V, V) {
    let n = x.len();
    let (w, levels) = (&w[..n], &mut levels[..n]);
    let (first, first_w) = (V::load(&x[0]), V::load(&w[0]));
    let (mut low, mut high, mut sum_w, mut sum_x) = (first, first, first_w, first_w * first);
    for i in 1..n {
        let (x, w) = (V::load(&x[i]), V::load(&w[i]));
        (low, high) = (x.min(low), x.max(high));
        (sum_w, sum_x) = (sum_w + w, sum_x + w * x);
    }
    low = V::where_less(V::zero(), low, V::zero(), low);
    let (one, least) = (V::splat(1.0), low);

    let mut minimum = low;
    let mut inverse = V::splat(max_level) / (high - low);
    let mut scale = one / inverse;
    // the best rounding so far
    let mut best_inverse = inverse;
    let mut best_low = low;
    let mut best = V::zero();
    for i in 0..n {
        let (x, w) = (V::load(&x[i]), V::load(&w[i]));
        let level = (inverse * (x - low)).rounded(0.0, max_level);
        best = best + cost(scale, level, minimum, x, w, tries.absolute);
    }

    for k in 0..=tries.last {
        inverse = V::splat(tries.first + tries.step * f32::from(k) + max_level) / (high - minimum);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (V::zero(), V::zero(), V::zero());
        for i in 0..n {
            let (x, w) = (V::load(&x[i]), V::load(&w[i]));
            let level = (inverse * (x - minimum)).rounded(0.0, max_level);
            levels[i] = level.store();
            let weighted = w * level;
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * level;
            sum_xl = sum_xl + weighted * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let new_scale = V::where_less(V::zero(), new_minimum, sum_xl / sum_l2, new_scale);
        let new_minimum = V::where_less(V::zero(), new_minimum, V::zero(), new_minimum);
        let mut error = V::zero();
        for i in 0..n {
            let (x, w, level) = (V::load(&x[i]), V::load(&w[i]), V::load(&levels[i]));
            error = error + cost(new_scale, level, new_minimum, x, w, tries.absolute);
        }
        let error = V::where_less(V::zero(), determinant, error, V::splat(f32::INFINITY));
        best_inverse = V::where_less(error, best, inverse, best_inverse);
        best_low = V::where_less(error, best, minimum, best_low);
        scale = V::where_less(error, best, new_scale, scale);
        minimum = V::where_less(error, best, new_minimum, minimum);
        best = V::where_less(error, best, error, best);
    }

    // groups of one value
    scale = V::where_less(least, high, scale, V::zero());
    minimum = V::where_less(least, high, minimum, least);
    for i in 0..n {
        let level = (best_inverse * (V::load(&x[i]) - best_low)).rounded(0.0, max_level);
        levels[i] = V::where_less(least, high, level, V::zero()).store();
    }
    (scale, minimum)
}

/// The weighted error of `scale * level + minimum` for `x`.
#[inline(always)]
fn cost<V: Registers>(scale: V, level: V, minimum: V, x: V, w: V, absolute: bool) -> V {
    let difference = scale * level + minimum - x;
    w * if absolute { difference.abs() } else { difference * difference }
}

/// The first value with the largest magnitude, and the magnitude.
#[inline(always)]
fn extreme<V: Registers>(x: &[V::Memory]) -> (V, V) {
    let (mut largest, mut value) = (V::zero(), V::zero());
    for x in x {
        let x = V::load(x);
        let magnitude = x.abs();
        value = V::where_less(largest, magnitude, x, value);
        largest = V::where_less(largest, magnitude, magnitude, largest);
    }
    (value, largest)
}

/// `yes` where `sum_xl^2 / sum_l2`, by which the least squares shrink, is above `best`, else `no`.
#[inline(always)]
fn where_better<V: Registers>(sums: (V, V), best: V, yes: V, no: V) -> V {
    let (sum_xl, sum_l2) = sums;
    let gain = V::where_less(V::zero(), sum_l2, sum_xl * sum_xl, V::splat(-1.0));
    V::where_less(best * sum_l2, gain, yes, no)
}

dispatch! {
    /// Fits groups of values `x`, with errors weighted by `w`, by a scale and levels from `-half` to `half - 1`. Writes the
    /// levels plus `half`, and returns the scales.
    pub(super) fn fit_symmetric(x: &[Lanes], w: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes = fit_symmetric_body
}

#[inline(always)]
fn fit_symmetric_body<A: HasRegisters>(x: &[Lanes], w: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes {
    fit_symmetric_in::<A::Registers>(x, w, half, levels).store()
}

/// [`fit_symmetric`] for any number of lanes.
#[inline(always)]
pub(super) fn fit_symmetric_in<V: Registers>(
    x: &[V::Memory],
    w: &[V::Memory],
    half: f32,
    levels: &mut [V::Memory],
) -> V {
    let n = x.len();
    let (w, levels) = (&w[..n], &mut levels[..n]);
    let (extreme, largest) = extreme::<V>(x);
    let (mut scale, mut best, mut best_inverse) = (V::zero(), V::zero(), V::zero());
    // the first try is the middle one, which is always accepted
    for k in [0_i8, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let inverse = V::splat(-(half + 0.1 * f32::from(k))) / extreme;
        let (mut sum_xl, mut sum_l2) = (V::zero(), V::zero());
        for i in 0..n {
            let (x, w) = (V::load(&x[i]), V::load(&w[i]));
            let level = (inverse * x).rounded(-half, half - 1.0);
            sum_xl = sum_xl + w * x * level;
            sum_l2 = sum_l2 + w * level * level;
        }
        let new_scale = V::where_less(V::zero(), sum_l2, sum_xl / sum_l2, V::zero());
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
    let tiny = V::splat(TINY);
    for i in 0..n {
        let level = (best_inverse * V::load(&x[i])).rounded(-half, half - 1.0) + V::splat(half);
        levels[i] = V::where_less(largest, tiny, V::zero(), level).store();
    }
    V::where_less(largest, tiny, V::zero(), scale)
}

dispatch! {
    /// As [`fit_symmetric`], but improves one level after another, with the squares of `x` as weights.
    pub(super) fn fit_by_level(x: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes = fit_by_level_body
}

#[inline(always)]
fn fit_by_level_body<A: HasRegisters>(x: &[Lanes], half: f32, levels: &mut [Lanes]) -> Lanes {
    fit_by_level_in::<A::Registers>(x, half, levels).store()
}

#[inline(always)]
fn fit_by_level_in<V: Registers>(x: &[V::Memory], half: f32, levels: &mut [V::Memory]) -> V {
    let n = x.len();
    let levels = &mut levels[..n];
    let (extreme, largest) = extreme::<V>(x);
    let inverse = V::splat(-half) / extreme;
    let (mut sum_xl, mut sum_l2) = (V::zero(), V::zero());
    for i in 0..n {
        let x = V::load(&x[i]);
        let (level, w) = ((inverse * x).rounded(-half, half - 1.0), x * x);
        levels[i] = level.store();
        sum_xl = sum_xl + w * x * level;
        sum_l2 = sum_l2 + w * level * level;
    }
    let never = V::splat(-1.0);
    for _ in 0..5 {
        for i in 0..n {
            let (x, level) = (V::load(&x[i]), V::load(&levels[i]));
            let w = x * x;
            let without_xl = sum_xl - w * x * level;
            let without_l2 = sum_l2 - w * level * level;
            let new_level = (x * without_l2 / without_xl).rounded(-half, half - 1.0);
            let new_xl = without_xl + w * x * new_level;
            let new_l2 = without_l2 + w * new_level * new_level;
            let change = (new_level - level).abs();
            let gain = new_xl * new_xl * sum_l2;
            let gain = V::where_less(V::zero(), change, gain, never);
            let gain = V::where_less(V::zero(), without_xl, gain, never);
            let gain = V::where_less(V::zero(), new_l2, gain, never);
            let bar = sum_xl * sum_xl * new_l2;
            levels[i] = V::where_less(bar, gain, new_level, level).store();
            sum_xl = V::where_less(bar, gain, new_xl, sum_xl);
            sum_l2 = V::where_less(bar, gain, new_l2, sum_l2);
        }
    }
    let tiny = V::splat(TINY);
    for level in levels {
        *level = V::where_less(largest, tiny, V::zero(), V::load(level) + V::splat(half)).store();
    }
    let scale = V::where_less(V::zero(), sum_l2, sum_xl / sum_l2, V::zero());
    V::where_less(largest, tiny, V::zero(), scale)
}

/// Fits the non-negative scales `x` of a superblock by a scale and levels from 0 to `max_level`. Writes the levels and returns
/// the scale.
#[inline(never)]
pub(super) fn fit_scales(x: &[f32], w: &[f32], max_level: f32, levels: &mut [f32]) -> f32 {
    let len = x.len();
    let mut largest = 0.0;
    for &x in x {
        largest = if x > largest { x } else { largest };
    }
    levels.fill(0.0);
    if largest < TINY {
        return 0.0;
    }
    let (mut best_inverse, mut best) = (max_level / largest, f32::INFINITY);
    for k in [0_i8, -4, -3, -2, -1, 1, 2, 3, 4] {
        let inverse = (0.1 * f32::from(k) + max_level) / largest;
        let scale = 1.0 / inverse;
        let mut error = 0.0;
        for i in 0..len {
            let difference = x[i] - scale * rounded(inverse * x[i], 0.0, max_level);
            error += w[i] * difference * difference;
        }
        if error < best {
            (best_inverse, best) = (inverse, error);
        }
    }
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    for i in 0..len {
        let level = rounded(best_inverse * x[i], 0.0, max_level);
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
                let level = rounded(x * without_l2 / without_xl, 0.0, max_level);
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

/// The entry of the sorted `table` that is nearest to `x`, and its index.
#[inline(always)]
fn nearest_entry<V: Registers>(table: &[i8; 16], x: V) -> (V, V) {
    let (mut entry, mut index) = (V::splat(f32::from(table[0])), V::zero());
    for next in 1..16 {
        let [below, here] = [f32::from(table[next - 1]), f32::from(table[next])];
        let middle = V::splat(f32::midpoint(below, here));
        entry = V::where_less(x, middle, entry, V::splat(here));
        index = V::where_less(x, middle, index, V::splat(next as f32));
    }
    (entry, index)
}

dispatch! {
    /// The scales of groups of values `x`, whose errors are weighted by `w`, as multiples of the entries of `table`.
    pub(super) fn fit_table(table: &[i8; 16], x: &[Lanes], w: &[Lanes]) -> Lanes = fit_table_body
}

#[inline(always)]
fn fit_table_body<A: HasRegisters>(table: &[i8; 16], x: &[Lanes], w: &[Lanes]) -> Lanes {
    fit_table_in::<A::Registers>(table, x, w).store()
}

#[inline(always)]
fn fit_table_in<V: Registers>(table: &[i8; 16], x: &[V::Memory], w: &[V::Memory]) -> V {
    let n = x.len();
    let w = &w[..n];
    let (extreme, largest) = extreme::<V>(x);
    let edge = f32::from(table[0]);
    let (mut scale, mut best) = (V::zero(), V::zero());
    for k in -8_i8..=7 {
        // the first try is always accepted
        let is_first = k == -8;
        let inverse = if is_first {
            V::splat(1.0) / (extreme / V::splat(-edge))
        } else {
            V::splat(f32::from(k) + edge) / extreme
        };
        let (mut sum_xq, mut sum_q2) = (V::zero(), V::zero());
        for i in 0..n {
            let (x, w) = (V::load(&x[i]), V::load(&w[i]));
            let (entry, _) = nearest_entry(table, inverse * x);
            let weighted = w * entry;
            sum_xq = sum_xq + weighted * x;
            sum_q2 = sum_q2 + weighted * entry;
        }
        let new_scale = V::where_less(V::zero(), sum_q2, sum_xq / sum_q2, V::zero());
        let new_best = new_scale * sum_xq;
        if is_first {
            (scale, best) = (new_scale, new_best);
        } else {
            scale = where_better((sum_xq, sum_q2), best, new_scale, scale);
            best = where_better((sum_xq, sum_q2), best, new_best, best);
        }
    }
    V::where_less(largest, V::splat(TINY), V::zero(), scale)
}

dispatch! {
    /// The indices of the entries of `table` that are nearest to `x * inverse`.
    pub(super) fn table_indices(table: &[i8; 16], x: &[Lanes], inverse: Lanes, indices: &mut [Lanes]) = table_indices_body
}

#[inline(always)]
fn table_indices_body<A: HasRegisters>(table: &[i8; 16], x: &[Lanes], inverse: Lanes, indices: &mut [Lanes]) {
    let inverse = A::Registers::load(&inverse);
    for (x, to) in x.iter().zip(indices) {
        let (_, index) = nearest_entry(table, A::Registers::load(x) * inverse);
        *to = index.store();
    }
}
