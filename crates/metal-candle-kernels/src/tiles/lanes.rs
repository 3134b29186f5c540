//! AVX-512 helpers: sixteen lanes of f32 or of words. A machine with AMX has AVX-512.

use super::amx::SIDE;
use crate::math::Element;
use half::{bf16, f16};
use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_maskz_loadu_epi16, _mm512_add_epi32, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmpge_epu32_mask, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_sub_ps, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

/// Elements that are loaded as f32.
pub(super) trait Wide: Element {
    /// Bits of the significand.
    const SIGNIFICAND: usize;

    /// The elements whose bit in `mask` is set; zero for the others, which are not accessed.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL are available, and the elements can be read.
    unsafe fn load(mask: u16, from: *const Self) -> __m512;
}

impl Wide for f32 {
    const SIGNIFICAND: usize = 24;

    #[inline(always)]
    unsafe fn load(mask: u16, from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Wide for f16 {
    const SIGNIFICAND: usize = 11;

    #[inline(always)]
    unsafe fn load(mask: u16, from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())) }
    }
}

impl Wide for bf16 {
    const SIGNIFICAND: usize = 8;

    #[inline(always)]
    unsafe fn load(mask: u16, from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }
}

/// A mask of the first `count` lanes.
#[inline]
pub(super) fn first(count: usize) -> u16 {
    if count >= SIDE { u16::MAX } else { (1 << count) - 1 }
}

/// Prefetches the cache line of an address, which need not be valid.
#[inline]
pub(super) fn prefetch<T>(address: *const T) {
    // SAFETY: every x86-64 processor has the instruction, and it accesses no memory.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn zero() -> __m512i {
    _mm512_setzero_si512()
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn bits(values: __m512) -> __m512i {
    _mm512_castps_si512(values)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn scaled(values: __m512, factor: f32) -> __m512 {
    _mm512_mul_ps(values, _mm512_set1_ps(factor))
}

/// `values` minus the values of `words`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn minus(values: __m512, words: __m512i) -> __m512 {
    _mm512_sub_ps(values, _mm512_castsi512_ps(words))
}

/// Whether the nearest bf16 of a value may not be finite.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn may_overflow(values: __m512) -> bool {
    let magnitude = _mm512_and_si512(bits(values), _mm512_set1_epi32(0x7fff_ffff));
    _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7f00_0000)) != 0
}

/// The nearest bf16 of values that cannot overflow, in the upper halves of words.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn nearest(values: __m512) -> __m512i {
    let bits = bits(values);
    let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), is_odd);
    _mm512_and_si512(nearest, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

/// Transposes a square by swapping pairs, then fours, then quarters of rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(rows: &[__m512i; SIDE]) -> [__m512i; SIDE] {
    let (mut pairs, mut fours, mut eights, mut all) = ([zero(); SIDE], [zero(); SIDE], [zero(); SIDE], [zero(); SIDE]);
    for i in 0..SIDE / 2 {
        let (a, b) = (rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i] = _mm512_unpacklo_epi32(a, b);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(a, b);
    }
    // fours[4 g + j]: columns j, 4 + j, 8 + j and 12 + j of rows 4 g to 4 g + 3
    for g in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * g + half], pairs[4 * g + 2 + half]);
            fours[4 * g + 2 * half] = _mm512_unpacklo_epi64(a, b);
            fours[4 * g + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    for half in 0..2 {
        for j in 0..4 {
            let (a, b) = (fours[8 * half + j], fours[8 * half + 4 + j]);
            eights[8 * half + j] = _mm512_shuffle_i32x4::<0x88>(a, b);
            eights[8 * half + 4 + j] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        }
    }
    for j in 0..4 {
        for odd in 0..2 {
            let (a, b) = (eights[4 * odd + j], eights[8 + 4 * odd + j]);
            all[4 * odd + j] = _mm512_shuffle_i32x4::<0x88>(a, b);
            all[8 + 4 * odd + j] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        }
    }
    all
}
