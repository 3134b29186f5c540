//! The kernels of x86-64.

use super::kernels::kernels;
use super::lanes::{Lanes, Rows};
use std::arch::x86_64::{
    __m128i, __m256, __m256i, __m512, __m512i, _MM_HINT_T1, _mm_and_si128, _mm_cvtsi32_si128, _mm_loadu_si128,
    _mm_packus_epi32, _mm_prefetch, _mm_set1_epi32, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_castps_si256, _mm256_castsi128_si256, _mm256_castsi256_ps,
    _mm256_castsi256_si128, _mm256_cmpeq_epi8, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_dpbusd_avx_epi32,
    _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_inserti128_si256, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_or_si256, _mm256_permute4x64_epi64,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_shuffle_ps,
    _mm256_sign_epi8, _mm256_sll_epi32, _mm256_srl_epi32, _mm256_storeu_ps, _mm256_storeu_si256, _mm256_unpackhi_epi32,
    _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64, _mm256_xor_si256, _mm512_add_ps,
    _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi128_si512, _mm512_castsi512_ps, _mm512_cvtepi32_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_broadcast_i32x4, _mm512_movm_epi8, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_epi32,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_shuffle_epi8, _mm512_sll_epi32, _mm512_srl_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_test_epi8_mask, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64, _mm512_xor_si512,
};

/// Four signed bytes as a word.
#[inline(always)]
unsafe fn four(a: *const u8) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { a.cast::<i32>().read_unaligned() }
}

/// 16 bytes of a row.
#[inline(always)]
unsafe fn row(rows: Rows, row: usize) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadu_si128(rows.row(row).cast()) }
}

/// AVX-512 with VNNI: 16 rows.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512i);

// SAFETY of the calls: the processor has the instructions, and the caller's promise.
impl Lanes for Avx512 {
    type Floats = __m512;
    type Dots = __m512i;
    const ROWS: usize = 16;
    const IS_SIGNED: bool = false;
    const HEIGHT: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u64) -> [Self; 2] {
        unsafe {
            let (first, second) = (_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(8).cast()));
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            [Self(_mm512_permutex2var_epi32(first, even, second)), Self(_mm512_permutex2var_epi32(first, odd, second))]
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn load_rows(rows: Rows) -> [Self; 4] {
        unsafe {
            let mut v = [_mm512_castsi128_si512(row(rows, 0)); 4];
            for i in 0..4 {
                let first = _mm512_castsi128_si512(row(rows, i));
                let two = _mm512_mask_broadcast_i32x4(first, 0x00f0, row(rows, 4 + i));
                let three = _mm512_mask_broadcast_i32x4(two, 0x0f00, row(rows, 8 + i));
                v[i] = _mm512_mask_broadcast_i32x4(three, 0xf000, row(rows, 12 + i));
            }
            let low = [_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpacklo_epi32(v[2], v[3])];
            let high = [_mm512_unpackhi_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[2], v[3])];
            [
                Self(_mm512_unpacklo_epi64(low[0], low[1])),
                Self(_mm512_unpackhi_epi64(low[0], low[1])),
                Self(_mm512_unpacklo_epi64(high[0], high[1])),
                Self(_mm512_unpackhi_epi64(high[0], high[1])),
            ]
        }
    }

    #[inline(always)]
    fn splat(word: u32) -> Self {
        Self(unsafe { _mm512_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn repeat(bytes: &[u8; 16]) -> Self {
        Self(unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast())) })
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(unsafe { _mm512_and_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(unsafe { _mm512_or_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(unsafe { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn left<const BITS: i32>(self) -> Self {
        Self(unsafe { _mm512_sll_epi32(self.0, _mm_cvtsi32_si128(BITS)) })
    }

    #[inline(always)]
    fn right<const BITS: i32>(self) -> Self {
        Self(unsafe { _mm512_srl_epi32(self.0, _mm_cvtsi32_si128(BITS)) })
    }

    #[inline(always)]
    fn look_up(table: Self, indices: Self) -> Self {
        Self(unsafe { _mm512_shuffle_epi8(table.0, indices.0) })
    }

    #[inline(always)]
    fn has_bit(self, bits: Self) -> Self {
        Self(unsafe { _mm512_movm_epi8(_mm512_test_epi8_mask(self.0, bits.0)) })
    }

    #[inline(always)]
    fn floats(self) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(self.0) }
    }

    #[inline(always)]
    fn halves(self) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(self.0)) }
    }

    #[inline(always)]
    fn bits(self) -> __m512 {
        unsafe { _mm512_castsi512_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store_floats(values: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, values) }
    }

    #[inline(always)]
    fn splat_float(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn start(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn step(dots: __m512i, weights: Self, a: *const u8, _: u32, _: usize, _: usize) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(dots, weights.0, _mm512_set1_epi32(four(a))) }
    }

    #[inline(always)]
    fn finish(dots: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(dots) }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
}

kernels!(Avx512, "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");

/// Vectors of 256 bits, 8 rows, without the products.
macro_rules! lanes_of_256_bits {
    ($dots:ty) => {
        type Floats = __m256;
        type Dots = $dots;
        const ROWS: usize = 8;
        const HEIGHT: usize = 4;

        #[inline(always)]
        unsafe fn load(from: *const u8) -> Self {
            Self(unsafe { _mm256_loadu_si256(from.cast()) })
        }

        #[inline(always)]
        unsafe fn load_pairs(from: *const u64) -> [Self; 2] {
            unsafe {
                let (first, second) = (_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(4).cast()));
                // works within 128 bits, so the middle quarters must be swapped
                let even = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(first, second));
                let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(first, second));
                [Self(_mm256_permute4x64_epi64::<0xd8>(even)), Self(_mm256_permute4x64_epi64::<0xd8>(odd))]
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut u8) {
            unsafe { _mm256_storeu_si256(to.cast(), self.0) }
        }

        #[inline(always)]
        unsafe fn load_rows(rows: Rows) -> [Self; 4] {
            unsafe {
                let mut v = [_mm256_castsi128_si256(row(rows, 0)); 4];
                for i in 0..4 {
                    let first = _mm256_castsi128_si256(row(rows, i));
                    v[i] = _mm256_inserti128_si256::<1>(first, row(rows, 4 + i));
                }
                let low = [_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpacklo_epi32(v[2], v[3])];
                let high = [_mm256_unpackhi_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[2], v[3])];
                [
                    Self(_mm256_unpacklo_epi64(low[0], low[1])),
                    Self(_mm256_unpackhi_epi64(low[0], low[1])),
                    Self(_mm256_unpacklo_epi64(high[0], high[1])),
                    Self(_mm256_unpackhi_epi64(high[0], high[1])),
                ]
            }
        }

        #[inline(always)]
        fn splat(word: u32) -> Self {
            Self(unsafe { _mm256_set1_epi32(word.cast_signed()) })
        }

        #[inline(always)]
        fn repeat(bytes: &[u8; 16]) -> Self {
            Self(unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) })
        }

        #[inline(always)]
        fn and(self, other: Self) -> Self {
            Self(unsafe { _mm256_and_si256(self.0, other.0) })
        }

        #[inline(always)]
        fn or(self, other: Self) -> Self {
            Self(unsafe { _mm256_or_si256(self.0, other.0) })
        }

        #[inline(always)]
        fn xor(self, other: Self) -> Self {
            Self(unsafe { _mm256_xor_si256(self.0, other.0) })
        }

        #[inline(always)]
        fn left<const BITS: i32>(self) -> Self {
            Self(unsafe { _mm256_sll_epi32(self.0, _mm_cvtsi32_si128(BITS)) })
        }

        #[inline(always)]
        fn right<const BITS: i32>(self) -> Self {
            Self(unsafe { _mm256_srl_epi32(self.0, _mm_cvtsi32_si128(BITS)) })
        }

        #[inline(always)]
        fn look_up(table: Self, indices: Self) -> Self {
            Self(unsafe { _mm256_shuffle_epi8(table.0, indices.0) })
        }

        #[inline(always)]
        fn has_bit(self, bits: Self) -> Self {
            Self(unsafe { _mm256_cmpeq_epi8(_mm256_and_si256(self.0, bits.0), bits.0) })
        }

        #[inline(always)]
        fn floats(self) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(self.0) }
        }

        #[inline(always)]
        fn halves(self) -> __m256 {
            unsafe {
                let mask = _mm_set1_epi32(0xffff);
                let low = _mm_and_si128(_mm256_castsi256_si128(self.0), mask);
                let high = _mm_and_si128(_mm256_extracti128_si256::<1>(self.0), mask);
                _mm256_cvtph_ps(_mm_packus_epi32(low, high))
            }
        }

        #[inline(always)]
        fn bits(self) -> __m256 {
            unsafe { _mm256_castsi256_ps(self.0) }
        }

        #[inline(always)]
        unsafe fn load_floats(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store_floats(values: __m256, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, values) }
        }

        #[inline(always)]
        fn splat_float(value: f32) -> __m256 {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }

        #[inline(always)]
        fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn prefetch(from: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }
    };
}

/// AVX2 with AVX-VNNI.
#[derive(Clone, Copy)]
pub(super) struct AvxVnni(__m256i);

impl Lanes for AvxVnni {
    lanes_of_256_bits!(__m256i);
    const IS_SIGNED: bool = false;

    #[inline(always)]
    fn start(value: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn step(dots: __m256i, weights: Self, a: *const u8, _: u32, _: usize, _: usize) -> __m256i {
        unsafe { _mm256_dpbusd_avx_epi32(dots, weights.0, _mm256_set1_epi32(four(a))) }
    }

    #[inline(always)]
    fn finish(dots: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(dots) }
    }
}

kernels!(AvxVnni, "avxvnni,avx2,fma,f16c");

/// AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256i);

/// 16-bit sums, which steps use as long as they cannot overflow, and 32-bit sums.
#[derive(Clone, Copy)]
pub(super) struct NarrowAndWide(__m256i, __m256i);

impl Lanes for Avx2 {
    lanes_of_256_bits!(NarrowAndWide);
    const IS_SIGNED: bool = true;

    #[inline(always)]
    fn start(value: i32) -> NarrowAndWide {
        unsafe { NarrowAndWide(_mm256_setzero_si256(), _mm256_set1_epi32(value)) }
    }

    #[inline(always)]
    unsafe fn step(
        NarrowAndWide(narrow, wide): NarrowAndWide,
        weights: Self,
        a: *const u8,
        max_weight: u32,
        step: usize,
        steps: usize,
    ) -> NarrowAndWide {
        unsafe {
            let a = _mm256_set1_epi32(four(a));
            // a pair of products is at most 2 * 127 * 63, or 2 * 127 * 128 for signed weights: neither saturates
            let pairs = if max_weight == 255 {
                _mm256_maddubs_epi16(_mm256_abs_epi8(weights.0), _mm256_sign_epi8(a, weights.0))
            } else {
                _mm256_maddubs_epi16(weights.0, a)
            };
            let safe = match max_weight {
                0..=15 => 8,
                16..=31 => 4,
                32..=63 => 2,
                _ => 1,
            };
            let narrow = if step.is_multiple_of(safe) { pairs } else { _mm256_add_epi16(narrow, pairs) };
            if (step + 1).is_multiple_of(safe) || step + 1 == steps {
                NarrowAndWide(narrow, _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1))))
            } else {
                NarrowAndWide(narrow, wide)
            }
        }
    }

    #[inline(always)]
    fn finish(dots: NarrowAndWide) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(dots.1) }
    }
}

kernels!(Avx2, "avx2,fma,f16c");

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::arch::x86_64::_mm256_dpbusd_epi32;

    /// [`AvxVnni`] with the equivalent AVX-512 instructions, which more processors have.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Vnni256(__m256i);

    impl Lanes for Vnni256 {
        lanes_of_256_bits!(__m256i);
        const IS_SIGNED: bool = false;

        #[inline(always)]
        fn start(value: i32) -> __m256i {
            unsafe { _mm256_set1_epi32(value) }
        }

        #[inline(always)]
        unsafe fn step(dots: __m256i, weights: Self, a: *const u8, _: u32, _: usize, _: usize) -> __m256i {
            unsafe { _mm256_dpbusd_epi32(dots, weights.0, _mm256_set1_epi32(four(a))) }
        }

        #[inline(always)]
        fn finish(dots: __m256i) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(dots) }
        }
    }

    kernels!(Vnni256, "avx512vnni,avx512vl,avx512f,avx2,fma,f16c");
}
