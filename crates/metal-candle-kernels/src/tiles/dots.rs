//! Multiplies tiles with the dot products of AVX512-BF16, for processors without AMX.
//!
//! The layouts are those of [`super::amx`]. Sixteen accumulators stay in registers: eight rows of two tiles of columns, or sixteen
//! rows of one tile. Each element is summed in the order of the depth.

use super::amx::{DEPTH, LINE, Operands, SIDE, Sums, TILE};
use super::lanes;
use std::arch::x86_64::{
    __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::mem::transmute;

/// Floats of a row of [`Sums`].
const WIDTH: usize = 2 * SIDE;

/// As [`super::amx::Unit::multiply`].
///
/// # Safety
/// The operands have these tiles, and AVX512-BF16 is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize>(
    operands: Operands,
    is_added: bool,
    sums: &mut Sums,
) {
    for first in (0..A * SIDE).step_by(SIDE) {
        // SAFETY: the caller's promise.
        unsafe {
            if B == 1 {
                rows::<A, 1, A_TERMS, B_TERMS, SIDE>(operands, first, is_added, sums);
            } else {
                rows::<A, 2, A_TERMS, B_TERMS, { SIDE / 2 }>(operands, first, is_added, sums);
                rows::<A, 2, A_TERMS, B_TERMS, { SIDE / 2 }>(operands, first + SIDE / 2, is_added, sums);
            }
        }
    }
}

/// Prefetches `lines` cache lines of the 2 KiB of a step.
#[inline(always)]
fn prefetch(ahead: Option<*const u8>, step: usize, lines: std::ops::Range<usize>) {
    if let Some(ahead) = ahead {
        for line in lines {
            lanes::prefetch(ahead.wrapping_add(step * 2 * TILE + line * LINE));
        }
    }
}

/// Multiplies `ROWS` rows of the left operand from row `first`, with `B` tiles of columns.
///
/// # Safety
/// As of [`multiply`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rows<const A: usize, const B: usize, const A_TERMS: usize, const B_TERMS: usize, const ROWS: usize>(
    Operands { left, right, steps, ahead }: Operands,
    first: usize,
    is_added: bool,
    sums: &mut Sums,
) {
    let most = A_TERMS.max(B_TERMS);
    let to = sums.0.as_mut_ptr().wrapping_add(first * WIDTH);
    let mut sums = [[_mm512_setzero_ps(); B]; ROWS];
    if is_added {
        for (row, sums) in sums.iter_mut().enumerate() {
            for (column, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a line of the sums.
                *sum = unsafe { _mm512_loadu_ps(to.add(row * WIDTH + column * SIDE)) };
            }
        }
    }
    let start = left.start.wrapping_add(first * left.stride);
    for step in 0..steps {
        prefetch(ahead, step, first..first + ROWS);
        for t in 0..B_TERMS {
            let right = right.wrapping_add((step * B_TERMS + t) * B * TILE);
            for s in (0..A_TERMS).filter(|s| s + t < most) {
                let left_of = start.wrapping_add(step * left.step + s * A * TILE);
                for p in 0..DEPTH / 2 {
                    let mut columns = [zero(); B];
                    for (column, values) in columns.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        *values = unsafe { pairs(right.add(column * TILE + p * LINE)) };
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        let pair = unsafe { pair(left_of.add(row * left.stride + 4 * p)) };
                        for (sum, &values) in sums.iter_mut().zip(&columns) {
                            *sum = _mm512_dpbf16_ps(*sum, pair, values);
                        }
                    }
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (column, &sum) in sums.iter().enumerate() {
            // SAFETY: a line of the sums.
            unsafe { _mm512_storeu_ps(to.add(row * WIDTH + column * SIDE), sum) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> __m512bh {
    // SAFETY: both types are 512 bits.
    unsafe { transmute::<__m512, __m512bh>(_mm512_setzero_ps()) }
}

/// A pair in all lanes.
///
/// # Safety
/// The pair can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pair(from: *const u8) -> __m512bh {
    // SAFETY: the caller's promise; both types are 512 bits.
    unsafe { transmute(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
}

/// Sixteen pairs.
///
/// # Safety
/// The line can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pairs(from: *const u8) -> __m512bh {
    // SAFETY: the caller's promise; both types are 512 bits.
    unsafe { transmute(_mm512_loadu_si512(from.cast())) }
}
