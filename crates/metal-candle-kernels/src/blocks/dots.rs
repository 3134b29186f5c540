//! Computes dot products of a few rows with block-quantized weights that are dequantized in registers.
//!
//! The sums are identical to those of a dequantized panel: the same weights, added in the same order.

#[cfg(target_arch = "x86_64")]
use super::decode::{Decoder, Target};
use super::matrix::BlockFormat;
use crate::gemm_tile::{FloatVector, Portable};
use crate::isa::Arithmetic;

/// Rows of weights of a tile.
pub(super) const WIDTH: usize = 4;
/// Maximum number of rows of A in a tile.
pub(super) const HEIGHT: usize = 4;

/// The operands of a tile.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only kernels of x86-64 dequantize in registers
pub(super) struct Operands {
    /// The rows of A. If there are fewer, the last is repeated.
    pub(super) a: [*const f32; HEIGHT],
    /// The number of different rows of A.
    pub(super) rows: usize,
    /// The blocks of the rows of weights. If there are fewer rows, the last is repeated.
    pub(super) weights: [*const u8; WIDTH],
    /// The number of columns, a multiple of the block length.
    pub(super) depth: usize,
}

/// A vector that blocks can be dequantized to.
pub(super) trait Dequantize: FloatVector {
    /// Most rows of A for which [`Dequantize::block_dots`] is faster than a dequantized panel; 0 if there is no kernel.
    const MAX_ROWS: usize = 0;

    /// The dot products of a tile, by row of A, with a format of [`BlockFormat::WRITABLE`].
    ///
    /// # Safety
    /// The pointers are valid for `depth` columns.
    unsafe fn block_dots(_: BlockFormat, _: &Operands) -> [[f32; WIDTH]; HEIGHT] {
        [[0.0; WIDTH]; HEIGHT]
    }
}

impl<A: Arithmetic + Copy> Dequantize for Portable<A> {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Arithmetic, BlockFormat, Decoder, Dequantize, FloatVector, HEIGHT, Operands, Target, WIDTH};
    use crate::blocks::decode::{IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    use crate::blocks::matrix::with_writable;
    use crate::blocks::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};
    use crate::gemm_tile::x86::{Avx2, Avx512};
    use std::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_cvtsi32_si128, _mm_loadl_epi64, _mm_loadu_si128, _mm_set1_epi8, _mm_shuffle_epi8,
        _mm_srl_epi16, _mm256_add_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_mul_ps, _mm256_set1_ps,
        _mm512_add_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_mul_ps,
        _mm512_permutexvar_ps, _mm512_set1_ps, _mm512_srli_epi32,
    };

    /// A vector of quantized weights, one byte each.
    trait Scale: FloatVector {
        /// The first `LANES` bytes.
        ///
        /// # Safety
        /// They can be read.
        unsafe fn bytes(from: *const u8) -> __m128i;

        /// `scale q + offset`.
        fn scale(q: __m128i, scale: f32, offset: Option<f32>) -> Self;

        /// `scale table[index] + offset` for the four bits from `SHIFT` on of each byte.
        fn look_up<const SHIFT: u32>(table: &[i8; 16], packed: __m128i, scale: f32, offset: Option<f32>) -> Self;
    }

    // SAFETY of the calls: the processor has the instructions.
    impl Scale for Avx512 {
        #[inline(always)]
        unsafe fn bytes(from: *const u8) -> __m128i {
            // SAFETY: as above, and the caller's promise.
            unsafe { _mm_loadu_si128(from.cast()) }
        }

        #[inline(always)]
        fn scale(q: __m128i, scale: f32, offset: Option<f32>) -> Self {
            // SAFETY: as above.
            unsafe {
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), _mm512_set1_ps(scale));
                Self(if let Some(offset) = offset { _mm512_add_ps(scaled, _mm512_set1_ps(offset)) } else { scaled })
            }
        }

        /// Scales the table, which happens once for all vectors with this scale. The lookup ignores the upper bits.
        #[inline(always)]
        fn look_up<const SHIFT: u32>(table: &[i8; 16], packed: __m128i, scale: f32, offset: Option<f32>) -> Self {
            // SAFETY: as above, and the table has sixteen bytes.
            unsafe {
                let Self(table) = Self::scale(Self::bytes(table.as_ptr().cast()), scale, offset);
                let indices = _mm512_srli_epi32::<SHIFT>(_mm512_cvtepu8_epi32(packed));
                Self(_mm512_permutexvar_ps(indices, table))
            }
        }
    }

    impl Scale for Avx2 {
        #[inline(always)]
        unsafe fn bytes(from: *const u8) -> __m128i {
            // SAFETY: as above, and the caller's promise.
            unsafe { _mm_loadl_epi64(from.cast()) }
        }

        #[inline(always)]
        fn scale(q: __m128i, scale: f32, offset: Option<f32>) -> Self {
            // SAFETY: as above.
            unsafe {
                let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), _mm256_set1_ps(scale));
                Self(if let Some(offset) = offset { _mm256_add_ps(scaled, _mm256_set1_ps(offset)) } else { scaled })
            }
        }

        #[inline(always)]
        fn look_up<const SHIFT: u32>(table: &[i8; 16], packed: __m128i, scale: f32, offset: Option<f32>) -> Self {
            // SAFETY: as above, and the table has sixteen bytes.
            let q = unsafe {
                let shifted = _mm_srl_epi16(packed, _mm_cvtsi32_si128(SHIFT.cast_signed()));
                let indices = _mm_and_si128(shifted, _mm_set1_epi8(15));
                _mm_shuffle_epi8(_mm_loadu_si128(table.as_ptr().cast()), indices)
            };
            Self::scale(q, scale, offset)
        }
    }

    /// Sums of the products of weights with `R` rows.
    struct Sums<V, const R: usize> {
        /// The rows, starting at the first column of the block.
        a: [*const f32; R],
        sums: [V; R],
    }

    impl<V: Scale, const R: usize> Sums<V, R> {
        /// Adds the products of the weights from `at` on.
        #[inline(always)]
        fn add(&mut self, weights: V, at: usize) {
            for r in 0..R {
                // SAFETY: the caller of the tile guarantees the rows.
                let a = unsafe { V::load(self.a[r].add(at)) };
                self.sums[r] = V::mul_add(a, weights, self.sums[r]);
            }
        }
    }

    impl<V: Scale, const R: usize> Sums<V, R> {
        /// Adds the products of `scale q + offset` as the weights from `at` on.
        #[inline(always)]
        fn add_scaled(&mut self, q: &[i8; 16], scale: f32, offset: Option<f32>, at: usize) {
            for part in (0..16).step_by(V::LANES) {
                // SAFETY: the vector is within the sixteen bytes.
                let q = unsafe { V::bytes(q.as_ptr().add(part).cast()) };
                self.add(V::scale(q, scale, offset), at + part);
            }
        }
    }

    impl<V: Scale, const R: usize> Target for Sums<V, R> {
        #[inline(always)]
        fn scaled(&mut self, q: &[i8; 16], scale: f32, at: usize) {
            self.add_scaled(q, scale, None, at);
        }

        #[inline(always)]
        fn shifted(&mut self, q: &[i8; 16], scale: f32, offset: f32, at: usize) {
            self.add_scaled(q, scale, Some(offset), at);
        }

        #[inline(always)]
        fn looked_up<A: Arithmetic, const SHIFT: u32>(
            &mut self,
            table: &[i8; 16],
            packed: &[u8; 16],
            scale: f32,
            offset: Option<f32>,
            at: usize,
        ) {
            for part in (0..16).step_by(V::LANES) {
                // SAFETY: the vector is within the sixteen bytes.
                let packed = unsafe { V::bytes(packed.as_ptr().add(part)) };
                self.add(V::look_up::<SHIFT>(table, packed, scale, offset), at + part);
            }
        }
    }

    /// The dot products of `R` rows.
    ///
    /// # Safety
    /// Same as [`Dequantize::block_dots`].
    // indexed loops: closures are not always inlined, and are then compiled without the instruction set
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn tile<V: Scale, D: Decoder, const R: usize>(operands: &Operands) -> [[f32; WIDTH]; HEIGHT] {
        let mut sums = [[V::zero(); R]; WIDTH];
        for block in 0..operands.depth / D::LEN {
            let mut a = [std::ptr::null(); R];
            for r in 0..R {
                a[r] = operands.a[r].wrapping_add(block * D::LEN);
            }
            for c in 0..WIDTH {
                // SAFETY: the caller's promise.
                let bytes = unsafe { std::slice::from_raw_parts(operands.weights[c].add(block * D::BYTES), D::BYTES) };
                let mut target = Sums { a, sums: sums[c] };
                D::decode::<V::Arithmetic, _>(bytes, &mut target);
                sums[c] = target.sums;
            }
        }
        let mut dots = [[0.0; WIDTH]; HEIGHT];
        for r in 0..R {
            dots[r] = V::sums([sums[0][r], sums[1][r], sums[2][r], sums[3][r]]);
        }
        dots
    }

    macro_rules! dequantize {
        ($vector:ident, $features:literal) => {
            impl Dequantize for $vector {
                const MAX_ROWS: usize = HEIGHT;

                unsafe fn block_dots(format: BlockFormat, operands: &Operands) -> [[f32; WIDTH]; HEIGHT] {
                    #[target_feature(enable = $features)]
                    #[inline(never)]
                    unsafe fn body<D: Decoder, const R: usize>(operands: &Operands) -> [[f32; WIDTH]; HEIGHT] {
                        // SAFETY: the caller's promise.
                        unsafe { tile::<$vector, D, R>(operands) }
                    }
                    // SAFETY: as above, and the processor has the instructions.
                    with_writable!(format, D => unsafe {
                        match operands.rows {
                            1 => body::<D, 1>(operands),
                            2 => body::<D, 2>(operands),
                            _ => body::<D, HEIGHT>(operands),
                        }
                    }, unreachable!("a format without a kernel"))
                }
            }
        };
    }

    dequantize!(Avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");
    dequantize!(Avx2, "avx2,fma,f16c");
}
