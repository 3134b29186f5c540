//! Tiles of dot products: a few rows times a few rows of weights, summed in lanes that stay in registers.

use crate::isa::Arithmetic;
#[cfg(target_arch = "x86_64")]
use crate::isa::Fused;
use crate::math::{Element, LANES};
use crate::parallel::Shared;
use std::marker::PhantomData;

/// Lanes of a sum.
pub(crate) const WIDTH: usize = LANES;
/// Lanes of a [`Vector`].
const HALF: usize = WIDTH / 2;

type Half = [f32; HALF];
pub(crate) type Lanes = [Half; 2];

/// Half of the [`Lanes`] in registers, with the tile compiled for their instruction set.
pub(crate) trait Vector: Copy {
    type Arithmetic: Arithmetic;
    fn load(lanes: &Half) -> Self;
    fn lanes(self) -> Half;
    fn mul_add(a: Self, b: Self, c: Self) -> Self;
    fn add(a: Self, b: Self) -> Self;

    /// [`add_lanes`] of each.
    #[inline(always)]
    fn add_lanes<const C: usize>(sums: [Self; C]) -> [f32; C] {
        sums.map(|sum| add_lanes(sum.lanes()))
    }

    /// [`tile`] as a function of its own, so that its sums have all registers.
    fn tile<T: Element, const R: usize, const C: usize, const PART: u8>(
        operands: &Operands<T>,
        kept: &mut [Lanes],
        to: &Target,
    );
}

#[derive(Clone, Copy)]
pub(crate) struct Portable<A>(Half, PhantomData<A>);

impl<A: Arithmetic + Copy> Vector for Portable<A> {
    type Arithmetic = A;

    #[inline(always)]
    fn load(lanes: &Half) -> Self {
        Self(*lanes, PhantomData)
    }

    #[inline(always)]
    fn lanes(self) -> Half {
        self.0
    }

    #[inline(always)]
    fn mul_add(a: Self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|l| A::mul_add(a.0[l], b.0[l], c.0[l])), PhantomData)
    }

    #[inline(always)]
    fn add(a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|l| a.0[l] + b.0[l]), PhantomData)
    }

    #[inline(never)]
    fn tile<T: Element, const R: usize, const C: usize, const PART: u8>(
        operands: &Operands<T>,
        kept: &mut [Lanes],
        to: &Target,
    ) {
        tile::<Self, T, R, C, PART>(operands, kept, to);
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{Element, Fused, HALF, Half, Lanes, Operands, Target, Vector, add_lanes, tile};
    use std::arch::x86_64::{
        __m256, __m512, _mm_storeu_ps, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_storeu_ps,
        _mm512_add_ps, _mm512_castps512_ps128, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maskz_compress_ps,
        _mm512_permute_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps,
    };

    /// Taken only where `isa` has found AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    // SAFETY of the calls: the instructions are there, and lanes are sixteen floats.
    impl Vector for Avx512 {
        type Arithmetic = Fused;

        #[inline(always)]
        fn load(lanes: &Half) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_loadu_ps(lanes.as_ptr()) })
        }

        #[inline(always)]
        fn lanes(self) -> Half {
            let mut lanes = [0.0; HALF];
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), self.0) };
            lanes
        }

        #[inline(always)]
        fn mul_add(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, c.0) })
        }

        #[inline(always)]
        fn add(a: Self, b: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_add_ps(a.0, b.0) })
        }

        #[inline(always)]
        fn add_lanes<const C: usize>(sums: [Self; C]) -> [f32; C] {
            let mut dots = [0.0; C];
            if let (Some(&[a, b, c, d]), Some(dots)) = (sums.first_chunk::<4>(), dots.first_chunk_mut::<4>()) {
                // SAFETY: as above; there are four dots.
                unsafe {
                    // eight lanes of two sums, then four of four
                    let eights = |a: __m512, b: __m512| {
                        let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                        _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
                    };
                    let (ab, cd) = (eights(a.0, b.0), eights(c.0, d.0));
                    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
                    let fours = _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
                    let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0b01_00_11_10>(fours));
                    let ones = _mm512_add_ps(twos, _mm512_permute_ps::<0b10_11_00_01>(twos));
                    _mm_storeu_ps(dots.as_mut_ptr(), _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, ones)));
                }
            }
            for (dot, sum) in dots.iter_mut().zip(sums).skip(if C >= 4 { 4 } else { 0 }) {
                *dot = add_lanes(sum.lanes());
            }
            dots
        }

        fn tile<T: Element, const R: usize, const C: usize, const PART: u8>(
            operands: &Operands<T>,
            kept: &mut [Lanes],
            to: &Target,
        ) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
            #[inline(never)]
            fn body<T: Element, const R: usize, const C: usize, const PART: u8>(
                operands: &Operands<T>,
                kept: &mut [Lanes],
                to: &Target,
            ) {
                tile::<Avx512, T, R, C, PART>(operands, kept, to);
            }
            // SAFETY: as above.
            unsafe { body::<T, R, C, PART>(operands, kept, to) }
        }
    }

    /// Taken only where `isa` has found AVX2.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    // SAFETY of the calls: the instructions are there, and halves of lanes are eight floats.
    impl Vector for Avx2 {
        type Arithmetic = Fused;

        #[inline(always)]
        fn load(lanes: &Half) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes[8..].as_ptr())) }
        }

        #[inline(always)]
        fn lanes(self) -> Half {
            let mut lanes = [0.0; HALF];
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), self.0);
                _mm256_storeu_ps(lanes[8..].as_mut_ptr(), self.1);
            }
            lanes
        }

        #[inline(always)]
        fn mul_add(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }

        #[inline(always)]
        fn add(a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }

        fn tile<T: Element, const R: usize, const C: usize, const PART: u8>(
            operands: &Operands<T>,
            kept: &mut [Lanes],
            to: &Target,
        ) {
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline(never)]
            fn body<T: Element, const R: usize, const C: usize, const PART: u8>(
                operands: &Operands<T>,
                kept: &mut [Lanes],
                to: &Target,
            ) {
                tile::<Avx2, T, R, C, PART>(operands, kept, to);
            }
            // SAFETY: as above.
            unsafe { body::<T, R, C, PART>(operands, kept, to) }
        }
    }
}

/// Parts of the depth.
pub(crate) const WHOLE: u8 = 0;
pub(crate) const FIRST: u8 = 1;
pub(crate) const MIDDLE: u8 = 2;
pub(crate) const LAST: u8 = 3;

/// Rows of A and of weights, and which part of their depth is multiplied.
pub(crate) struct Operands<'a, T> {
    pub(crate) a: &'a [f32],
    pub(crate) a_stride: usize,
    pub(crate) weights: &'a [T],
    pub(crate) weights_stride: usize,
    /// A multiple of [`WIDTH`].
    pub(crate) depth: usize,
}

/// Where a tile goes in the result.
pub(crate) struct Target {
    pub(crate) c: Shared<f32>,
    pub(crate) at: usize,
    pub(crate) stride: usize,
    pub(crate) width: usize,
    pub(crate) alpha: f32,
}

/// Adds the products of `R` rows and `C` rows of weights, lane by lane; between parts of the depth the lanes are in `kept`.
#[inline(always)]
fn tile<V: Vector, T: Element, const R: usize, const C: usize, const PART: u8>(
    operands: &Operands<T>,
    kept: &mut [Lanes],
    target: &Target,
) {
    let &Operands { a, a_stride, weights, weights_stride, depth } = operands;
    assert!(a.len() >= (R - 1) * a_stride + depth && weights.len() >= (C - 1) * weights_stride + depth);
    let mut first = [[V::load(&[0.0; HALF]); C]; R];
    let mut second = first;
    if PART == MIDDLE || PART == LAST {
        let kept = &kept[..R * C];
        for r in 0..R {
            for c in 0..C {
                (first[r][c], second[r][c]) = (V::load(&kept[r * C + c][0]), V::load(&kept[r * C + c][1]));
            }
        }
    }
    for at in (0..depth / WIDTH).map(|step| step * WIDTH) {
        // SAFETY: the assertion above; steps end within the depth.
        unsafe {
            multiply_half((a.as_ptr().add(at), a_stride), (weights.as_ptr().add(at), weights_stride), &mut first);
            let at = at + HALF;
            multiply_half((a.as_ptr().add(at), a_stride), (weights.as_ptr().add(at), weights_stride), &mut second);
        }
    }
    if PART == FIRST || PART == MIDDLE {
        let kept = &mut kept[..R * C];
        for r in 0..R {
            for c in 0..C {
                kept[r * C + c] = [first[r][c].lanes(), second[r][c].lanes()];
            }
        }
        return;
    }
    for r in 0..R {
        let dots = V::add_lanes::<C>(std::array::from_fn(|c| V::add(first[r][c], second[r][c])));
        // SAFETY: tasks have columns of their own.
        let c = unsafe { target.c.part(target.at + r * target.stride, target.width) };
        if let Some(c) = c.first_chunk_mut::<C>() {
            for l in 0..C {
                c[l] = V::Arithmetic::mul_add(target.alpha, dots[l], c[l]);
            }
        } else {
            for (c, dot) in c.iter_mut().zip(dots) {
                *c = V::Arithmetic::mul_add(target.alpha, dot, *c);
            }
        }
    }
}

/// Adds the products of half of the lanes.
///
/// # Safety
/// There are [`HALF`] elements at each row.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn multiply_half<V: Vector, T: Element, const R: usize, const C: usize>(
    (a, a_stride): (*const f32, usize),
    (weights, weights_stride): (*const T, usize),
    sums: &mut [[V; C]; R],
) {
    // SAFETY: the caller's promise.
    let a: [V; R] = std::array::from_fn(|r| V::load(unsafe { &*a.add(r * a_stride).cast() }));
    for c in 0..C {
        // SAFETY: as above.
        let w: &[T; HALF] = unsafe { &*weights.add(c * weights_stride).cast() };
        let w = V::load(&w.map(T::to_f32));
        for r in 0..R {
            sums[r][c] = V::mul_add(a[r], w, sums[r][c]);
        }
    }
}

/// Adds up lanes, the halves of which are already added, pairwise: those at a distance of 8, then 4, 2 and 1.
#[inline(always)]
fn add_lanes(mut lanes: Half) -> f32 {
    let mut width = HALF / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}
