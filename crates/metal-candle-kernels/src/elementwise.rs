//! Elementwise kernels: rotary embedding, bias, factors, rounding, dropout.

use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each, rows_per_task, written};
use half::bf16;

/// Number of elements in a task.
const CHUNK: usize = 32 * 1024;

/// Runs `task(start, end)` over `0..len` in chunks.
pub(crate) fn chunks(len: usize, task: impl Fn(usize, usize) + Send + Sync) {
    for_each(len.div_ceil(CHUNK), 4 * len, |i| task(i * CHUNK, len.min((i + 1) * CHUNK)));
}

/// Rounds `x` to bfloat16, ties to even; NaN is preserved.
#[must_use]
pub fn round_to_bf16(x: &[f32]) -> Vec<bf16> {
    let write = |y: Shared<bf16>| {
        chunks(x.len(), |start, end| {
            // SAFETY: chunks are disjoint.
            round_chunk(&x[start..end], unsafe { y.part(start, end - start) });
        });
    };
    // SAFETY: the chunks cover all elements.
    unsafe { written(x.len(), write) }
}

dispatch! {
    fn round_chunk(x: &[f32], y: &mut [bf16]) = round_chunk_body
}

#[inline(always)]
fn round_chunk_body<A: Arithmetic>(x: &[f32], y: &mut [bf16]) {
    for (x, y) in x.iter().zip(y) {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        *y = bf16::from_bits(if x.is_nan() { quiet } else { rounded });
    }
}

/// The pairs of elements of a head that are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// Element `i` and element `i + n / 2` of the `n` that rotate.
    Halves,
    /// Elements `2 i` and `2 i + 1`.
    Adjacent,
}

/// Rotates the first elements of each head in place (<https://arxiv.org/abs/2104.09864>, section 3.4).
///
/// `x: [tokens, heads, head_dim]`, `cos` and `sin`: `[tokens, half]`, for the first `2 * half` elements of a head. `inverse`
/// rotates in the other direction, which is the gradient.
///
/// # Panics
/// `cos` or `sin` has fewer tokens than `x`, or a head has fewer than `2 * half` elements.
pub fn rotary(
    x: &mut [f32],
    (heads, head_dim): (usize, usize),
    (cos, sin, half): (&[f32], &[f32], usize),
    pairs: Pairs,
    inverse: bool,
) {
    let width = heads * head_dim;
    if width == 0 || half == 0 {
        return;
    }
    assert!(2 * half <= head_dim, "{} elements of a head of {head_dim} to rotate", 2 * half);
    let tokens = x.len() / width;
    let rows = rows_per_task(width);
    let shared = Shared::new(x);
    for_each(tokens.div_ceil(rows), tokens * width, |task| {
        for token in task * rows..tokens.min((task + 1) * rows) {
            // SAFETY: tokens are disjoint.
            let x = unsafe { shared.part(token * width, width) };
            let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
            match pairs {
                Pairs::Halves => rotate_halves(x, head_dim, cos, sin, inverse),
                Pairs::Adjacent => rotate_adjacent(x, head_dim, cos, sin, inverse),
            }
        }
    });
}

dispatch! {
    fn rotate_halves(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) = rotate_halves_body
}

#[inline(always)]
fn rotate_halves_body<A: Arithmetic>(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) {
    let half = cos.len();
    let sign = if inverse { -1.0 } else { 1.0 };
    for head in x.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(half);
        let second = &mut second[..half];
        for i in 0..half {
            let (a, b, s) = (first[i], second[i], sign * sin[i]);
            first[i] = A::mul_add(a, cos[i], -(b * s));
            second[i] = A::mul_add(b, cos[i], a * s);
        }
    }
}

dispatch! {
    fn rotate_adjacent(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) = rotate_adjacent_body
}

#[inline(always)]
fn rotate_adjacent_body<A: Arithmetic>(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) {
    let sign = if inverse { -1.0 } else { 1.0 };
    for head in x.chunks_exact_mut(head_dim) {
        let (pairs, _) = head.as_chunks_mut::<2>();
        for ((pair, cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
            let ([a, b], s) = (*pair, sign * sin);
            *pair = [A::mul_add(a, *cos, -(b * s)), A::mul_add(b, *cos, a * s)];
        }
    }
}

/// Runs `change(row, start)` on each row of `x: [rows, width]`, several rows per task; `start` is the index of its first
/// element.
fn rows(x: &mut [f32], width: usize, change: impl Fn(&mut [f32], usize) + Send + Sync) {
    if width == 0 {
        return;
    }
    let (count, per_task) = (x.len() / width, rows_per_task(width));
    let shared = Shared::new(x);
    for_each(count.div_ceil(per_task), count * width, |task| {
        for row in task * per_task..count.min((task + 1) * per_task) {
            // SAFETY: rows are disjoint.
            change(unsafe { shared.part(row * width, width) }, row * width);
        }
    });
}

/// Adds `bias` to each row of `x: [rows, bias.len()]`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    rows(x, bias.len(), |row, _| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
}

/// Multiplies each row of `x: [rows, factors.len()]` by `factors`, element by element.
pub fn scale_columns(x: &mut [f32], factors: &[f32]) {
    rows(x, factors.len(), |row, _| row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor));
}

/// Multiplies row `i` of `x: [factors.len(), width]` by `factors[i]`.
///
/// # Panics
/// The length of `x` is not a multiple of the number of factors.
pub fn scale_rows(x: &mut [f32], factors: &[f32]) {
    let width = x.len() / factors.len().max(1);
    assert_eq!(x.len(), width * factors.len(), "the length of the matrix is not a multiple of {} rows", factors.len());
    rows(x, width, |row, start| {
        let factor = factors[start / width];
        for x in row {
            *x *= factor;
        }
    });
}

/// `y += scale * x`.
pub fn add_scaled(scale: f32, x: &[f32], y: &mut [f32]) {
    let shared = Shared::new(y);
    chunks(x.len(), |start, end| {
        // SAFETY: chunks are disjoint.
        let y = unsafe { shared.part(start, end - start) };
        y.iter_mut().zip(&x[start..end]).for_each(|(y, x)| *y += scale * x);
    });
}

/// Adds the sum of each column of `x: [rows, width]` to `sums`.
pub fn column_sums(x: &[f32], sums: &mut [f32]) {
    for row in x.chunks_exact(sums.len().max(1)) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x;
        }
    }
}

/// Inverted dropout: element `i` of `x` becomes 0 with probability `p`, otherwise it is divided by `1 - p`.
///
/// The decision depends only on `seed` and `i` (the finalizer of `SplitMix64`), so the backward pass can repeat it.
pub fn dropout(x: &[f32], p: f32, seed: u64, y: &mut [f32]) {
    let threshold = dropout_threshold(p);
    let scale = 1.0 / (1.0 - p);
    let shared = Shared::new(y);
    chunks(x.len(), |start, end| {
        // SAFETY: chunks are disjoint.
        let y = unsafe { shared.part(start, end - start) };
        for (i, (y, x)) in y.iter_mut().zip(&x[start..end]).enumerate() {
            let kept = mix(seed ^ mix((start + i) as u64)) >> 32 >= threshold;
            *y = if kept { x * scale } else { 0.0 };
        }
    });
}

/// The minimum value of the upper 32 bits of an element's hash for which [`dropout`] with this probability keeps the element.
#[must_use]
pub fn dropout_threshold(p: f32) -> u64 {
    (f64::from(p) * 2f64.powi(32)) as u64
}

/// Fills `y` with numbers from `-bound` up to `bound`; element `i` depends only on `seed` and `first + i`.
pub fn uniform_noise(y: &mut [f32], bound: f32, seed: u64, first: usize) {
    let shared = Shared::new(y);
    chunks(y.len(), |start, end| {
        // SAFETY: chunks are disjoint.
        let y = unsafe { shared.part(start, end - start) };
        for (i, y) in y.iter_mut().enumerate() {
            let bits = mix(seed ^ mix((first + start + i) as u64)) >> 40;
            *y = bound * (bits as f32 / (1_u32 << 23) as f32 - 1.0);
        }
    });
}

/// The output function of `SplitMix64` (<https://doi.org/10.1145/2714064.2660195>).
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::round_to_bf16;
    use half::bf16;

    #[test]
    fn rounding_matches_the_half_crate() {
        let values: Vec<f32> = (0..200_000_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        for (value, rounded) in values.iter().zip(round_to_bf16(&values)) {
            let expected = bf16::from_f32(*value);
            assert!(rounded == expected || rounded.is_nan() && expected.is_nan(), "{value}: {rounded} {expected}");
        }
    }
}
