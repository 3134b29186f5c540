//! Computes tiles of dot products: a few rows times a few rows of weights, accumulated in registers.

use crate::isa::Arithmetic;
#[cfg(target_arch = "x86_64")]
use crate::isa::Fused;
use crate::math::{Element, add_lanes};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Lanes of the widest [`Vector`].
pub(crate) const MAX_LANES: usize = 16;

/// A vector register with f32 sums, with [`tile`] compiled for its instruction set.
pub(crate) trait Vector: Copy {
    type Arithmetic: Arithmetic;
    /// The elements of the rows that are multiplied with weights.
    type Row: Copy;
    /// At most [`MAX_LANES`].
    const LANES: usize;

    fn zero() -> Self;
    /// Prefetches a cache line. Any address is valid.
    fn prefetch(_: *const u8) {}

    /// `2 * LANES` elements of a row.
    ///
    /// # Safety
    /// `from` points to them.
    unsafe fn load_row(from: *const Self::Row) -> (Self, Self);

    /// `sum` plus the products of `2 * LANES` elements of a row and as many weights.
    fn add_products(row: (Self, Self), weights: (Self, Self), sum: Self) -> Self;

    /// The sum of the lanes of each vector, added pairwise.
    fn sums(of: [Self; 4]) -> [f32; 4];

    /// The number of rows and of weight rows of a tile if `rows` rows remain. Its sums fit the registers.
    fn shape(rows: usize) -> (usize, usize);

    /// Computes a tile of shape `shape(rows)` and adds its existing rows to the result.
    ///
    /// # Safety
    /// As of [`tile`], and `to` is writable.
    unsafe fn add_dots<T: Weights<Self>>(rows: usize, operands: &Operands<Self, T>, to: Destination);
}

/// A vector of f32.
pub(crate) trait FloatVector: Vector<Row = f32> {
    fn mul_add(a: Self, b: Self, c: Self) -> Self;

    /// # Safety
    /// `from` points to `LANES` elements.
    unsafe fn load(from: *const f32) -> Self;

    /// # Safety
    /// As of [`FloatVector::load`].
    unsafe fn load_f16(from: *const f16) -> Self;

    /// The elements with even and with odd index, as f32.
    ///
    /// # Safety
    /// `from` points to `2 * LANES` elements.
    unsafe fn load_split(from: *const bf16) -> (Self, Self);
}

/// [`Vector::load_row`] and [`Vector::add_products`] of a [`FloatVector`].
macro_rules! float_rows {
    () => {
        type Row = f32;

        #[inline(always)]
        unsafe fn load_row(from: *const f32) -> (Self, Self) {
            // SAFETY: the caller's promise.
            unsafe { (Self::load(from), Self::load(from.add(Self::LANES))) }
        }

        #[inline(always)]
        fn add_products(row: (Self, Self), weights: (Self, Self), sum: Self) -> Self {
            Self::mul_add(row.1, weights.1, Self::mul_add(row.0, weights.0, sum))
        }
    };
}

/// The destination of the dot products of a tile: row `r` and weight row `c` are added at `r * row_stride + c * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Destination {
    pub(crate) first: *mut f32,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
    /// The factor of the dot products.
    pub(crate) alpha: f32,
}

impl Destination {
    /// # Safety
    /// The destination is writable.
    #[inline(always)]
    unsafe fn add<A: Arithmetic, const R: usize, const C: usize>(
        self,
        dots: &[[f32; C]; R],
        (height, width): (usize, usize),
    ) {
        for (r, dots) in dots.iter().enumerate().take(height) {
            for (c, dot) in dots.iter().enumerate().take(width) {
                // SAFETY: the caller's promise.
                let to = unsafe { &mut *self.first.add(r * self.row_stride + c * self.column_stride) };
                *to = A::mul_add(self.alpha, *dot, *to);
            }
        }
    }
}

/// Defines [`Vector::shape`] and [`Vector::add_dots`]. Each shape is a separate function, so that its sums stay in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! shapes {
    ($vector:ident, $(#[$meta:meta])? $(($rows:pat, $r:literal, $c:literal))*) => {
        fn shape(rows: usize) -> (usize, usize) {
            match rows {
                $($rows => ($r, $c),)*
            }
        }

        unsafe fn add_dots<T: Weights<Self>>(rows: usize, operands: &Operands<Self, T>, to: Destination) {
            $(#[$meta])?
            #[inline(never)]
            unsafe fn body<T: Weights<$vector>, const R: usize, const C: usize>(operands: &Operands<$vector, T>, to: Destination) {
                // SAFETY: the caller's promise.
                unsafe {
                    let dots = tile::<$vector, T, R, C>(operands);
                    to.add::<<$vector as Vector>::Arithmetic, R, C>(&dots, (operands.a.2, operands.weights.2));
                }
            }
            match rows {
                // SAFETY: as above, and the processor has the instructions.
                $($rows => unsafe { body::<T, $r, $c>(operands, to) },)*
            }
        }
    };
}

/// An element type of weights.
pub(crate) trait Weights<V>: Element + Default {
    /// Loads `2 * LANES` elements as two vectors: the first and the second half, or for bf16 the elements with even and with odd
    /// index, which needs no shuffle. The rows are ordered the same way.
    ///
    /// # Safety
    /// `from` points to `2 * LANES` elements.
    unsafe fn pair(from: *const Self) -> (V, V);
}

// SAFETY of the calls: the caller guarantees the elements.
impl<V: FloatVector> Weights<V> for f32 {
    #[inline(always)]
    unsafe fn pair(from: *const Self) -> (V, V) {
        // SAFETY: as above.
        unsafe { (V::load(from), V::load(from.add(V::LANES))) }
    }
}

impl<V: FloatVector> Weights<V> for f16 {
    #[inline(always)]
    unsafe fn pair(from: *const Self) -> (V, V) {
        // SAFETY: as above.
        unsafe { (V::load_f16(from), V::load_f16(from.add(V::LANES))) }
    }
}

impl<V: FloatVector> Weights<V> for bf16 {
    #[inline(always)]
    unsafe fn pair(from: *const Self) -> (V, V) {
        // SAFETY: as above.
        unsafe { V::load_split(from) }
    }
}

/// Lanes of [`Portable`].
const PORTABLE: usize = 8;

#[derive(Clone, Copy)]
pub(crate) struct Portable<A>([f32; PORTABLE], PhantomData<A>);

impl<A: Arithmetic + Copy> Vector for Portable<A> {
    type Arithmetic = A;
    const LANES: usize = PORTABLE;

    float_rows!();

    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; PORTABLE], PhantomData)
    }

    #[inline(always)]
    fn sums(of: [Self; 4]) -> [f32; 4] {
        of.map(|Self(lanes, _)| add_lanes(lanes))
    }

    fn shape(rows: usize) -> (usize, usize) {
        if rows == 1 { (1, 6) } else { (2, 3) }
    }

    unsafe fn add_dots<T: Weights<Self>>(rows: usize, operands: &Operands<Self, T>, to: Destination) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => portable_tile::<A, T, 1, 6>(operands, to),
                _ => portable_tile::<A, T, 2, 3>(operands, to),
            }
        }
    }
}

impl<A: Arithmetic + Copy> FloatVector for Portable<A> {
    #[inline(always)]
    fn mul_add(a: Self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|l| A::mul_add(a.0[l], b.0[l], c.0[l])), PhantomData)
    }

    // SAFETY of the reads: the caller's promise.
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { from.cast::<[f32; PORTABLE]>().read_unaligned() }, PhantomData)
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as above.
        let values = unsafe { from.cast::<[f16; PORTABLE]>().read_unaligned() };
        Self(values.map(Element::to_f32), PhantomData)
    }

    #[inline(always)]
    unsafe fn load_split(from: *const bf16) -> (Self, Self) {
        // SAFETY: as above.
        let values = unsafe { from.cast::<[[bf16; 2]; PORTABLE]>().read_unaligned() };
        let part = |i: usize| Self(values.map(|pair| Element::to_f32(pair[i])), PhantomData);
        (part(0), part(1))
    }
}

/// [`tile`] as a separate function, so that its sums stay in registers.
#[inline(never)]
unsafe fn portable_tile<A: Arithmetic + Copy, T: Weights<Portable<A>>, const R: usize, const C: usize>(
    operands: &Operands<Portable<A>, T>,
    to: Destination,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let dots = tile::<Portable<A>, T, R, C>(operands);
        to.add::<A, R, C>(&dots, (operands.a.2, operands.weights.2));
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{Destination, FloatVector, Fused, Operands, Vector, Weights, bf16, f16, tile};
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, _MM_HINT_T0, _mm_add_ps, _mm_loadu_si128, _mm_prefetch, _mm_shuffle_ps,
        _mm_storeu_ps, _mm256_and_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtph_ps,
        _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32,
        _mm256_setzero_ps, _mm256_slli_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps512_ps128,
        _mm512_castsi512_ps, _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_maskz_compress_ps, _mm512_permute_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_slli_epi32,
    };

    use std::mem::transmute;

    /// The upper half of a word: the bf16 with odd index.
    const UPPER: i32 = 0xffff_0000_u32.cast_signed();

    /// Used only if `isa` detected AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(crate) __m512);

    // SAFETY of the calls: the processor has the instructions, and the caller guarantees the elements.
    impl Vector for Avx512 {
        type Arithmetic = Fused;
        const LANES: usize = 16;

        float_rows!();

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        fn prefetch(line: *const u8) {
            // SAFETY: nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }

        #[inline(always)]
        fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            let mut sums = [0.0; 4];
            // SAFETY: as above; there are four sums.
            unsafe {
                // eight lanes each of two sums, then four lanes each of four sums
                let eights = |a: __m512, b: __m512| {
                    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                    _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
                };
                let (ab, cd) = (eights(a.0, b.0), eights(c.0, d.0));
                let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
                let fours = _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
                let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0b01_00_11_10>(fours));
                let ones = _mm512_add_ps(twos, _mm512_permute_ps::<0b10_11_00_01>(twos));
                _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, ones)));
            }
            sums
        }

        shapes! {
            Avx512,
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
            (1, 1, 4) (2, 2, 8) (3 | 4, 4, 5) (_, 8, 3)
        }
    }

    // SAFETY of the calls: as above.
    impl FloatVector for Avx512 {
        #[inline(always)]
        fn mul_add(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, c.0) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
        }

        #[inline(always)]
        unsafe fn load_split(from: *const bf16) -> (Self, Self) {
            // SAFETY: as above.
            unsafe {
                let words = _mm512_loadu_si512(from.cast());
                let odd = _mm512_and_si512(words, _mm512_set1_epi32(UPPER));
                (Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))), Self(_mm512_castsi512_ps(odd)))
            }
        }
    }

    /// Dot products of bf16 pairs. Used only if AVX512-BF16 was detected.
    #[derive(Clone, Copy)]
    pub(crate) struct Bf16Dots(__m512);

    // SAFETY of the calls: the processor has the instructions, and the caller guarantees the elements.
    impl Vector for Bf16Dots {
        type Arithmetic = Fused;
        type Row = bf16;
        const LANES: usize = 16;

        #[inline(always)]
        fn zero() -> Self {
            Self(Avx512::zero().0)
        }

        #[inline(always)]
        fn prefetch(line: *const u8) {
            Avx512::prefetch(line);
        }

        // all elements are in the first vector
        #[inline(always)]
        unsafe fn load_row(from: *const bf16) -> (Self, Self) {
            // SAFETY: as above.
            (Self(unsafe { _mm512_loadu_ps(from.cast()) }), Self::zero())
        }

        #[inline(always)]
        fn add_products(row: (Self, Self), weights: (Self, Self), sum: Self) -> Self {
            let pairs = |vector: Self| {
                // SAFETY: both types are 512 bits.
                unsafe { transmute::<__m512, __m512bh>(vector.0) }
            };
            // SAFETY: as above.
            Self(unsafe { _mm512_dpbf16_ps(sum.0, pairs(row.0), pairs(weights.0)) })
        }

        #[inline(always)]
        fn sums(of: [Self; 4]) -> [f32; 4] {
            Avx512::sums(of.map(|sum| Avx512(sum.0)))
        }

        shapes! {
            Bf16Dots,
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
            (1, 1, 4) (2, 2, 8) (3 | 4, 4, 5) (_, 8, 3)
        }
    }

    impl Weights<Bf16Dots> for bf16 {
        #[inline(always)]
        unsafe fn pair(from: *const Self) -> (Bf16Dots, Bf16Dots) {
            // SAFETY: the caller's promise.
            unsafe { Bf16Dots::load_row(from) }
        }
    }

    /// Used only if `isa` detected AVX2.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(pub(crate) __m256);

    // SAFETY of the calls: the processor has the instructions, and the caller guarantees the elements.
    impl Vector for Avx2 {
        type Arithmetic = Fused;
        const LANES: usize = 8;

        float_rows!();

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_setzero_ps() })
        }

        #[inline(always)]
        fn prefetch(line: *const u8) {
            // SAFETY: nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }

        #[inline(always)]
        fn sums(of: [Self; 4]) -> [f32; 4] {
            let mut sums = [0.0; 4];
            // SAFETY: as above; there are four sums.
            unsafe {
                let [a, b, c, d] =
                    of.map(|sum| _mm_add_ps(_mm256_castps256_ps128(sum.0), _mm256_extractf128_ps::<1>(sum.0)));
                // two lanes each of two sums, then one lane each of four sums
                let twos =
                    |a, b| _mm_add_ps(_mm_shuffle_ps::<0b01_00_01_00>(a, b), _mm_shuffle_ps::<0b11_10_11_10>(a, b));
                let (ab, cd) = (twos(a, b), twos(c, d));
                let ones = _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ab, cd), _mm_shuffle_ps::<0b11_01_11_01>(ab, cd));
                _mm_storeu_ps(sums.as_mut_ptr(), ones);
            }
            sums
        }

        shapes! {
            Avx2,
            #[target_feature(enable = "avx2,fma,f16c")]
            (1, 1, 4) (2, 2, 5) (_, 4, 2)
        }
    }

    // SAFETY of the calls: as above.
    impl FloatVector for Avx2 {
        #[inline(always)]
        fn mul_add(a: Self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_fmadd_ps(a.0, b.0, c.0) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
        }

        #[inline(always)]
        unsafe fn load_split(from: *const bf16) -> (Self, Self) {
            // SAFETY: as above.
            unsafe {
                let words = _mm256_loadu_si256(from.cast());
                let odd = _mm256_and_si256(words, _mm256_set1_epi32(UPPER));
                (Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))), Self(_mm256_castsi256_ps(odd)))
            }
        }
    }
}

/// The operands of a tile. If there are fewer rows than the tile has, the last row is repeated.
pub(crate) struct Operands<V: Vector, T> {
    /// Pointer to the first row, row stride and number of rows. Rows are in the order of [`Weights::pair`] and padded with zeros
    /// to a multiple of `2 * LANES`.
    pub(crate) a: (*const V::Row, usize, usize),
    /// The same for the weights, which are not padded.
    pub(crate) weights: (*const T, usize, usize),
    pub(crate) depth: usize,
    /// Whether weights are prefetched. For several long streams the hardware prefetcher is faster.
    pub(crate) prefetches: bool,
}

/// How far ahead weights are prefetched, in elements of a row.
const AHEAD: usize = 256;

/// The dot products of `R` rows and `C` rows of weights.
///
/// # Safety
/// The pointers are valid for at least one row each.
#[inline(always)]
unsafe fn tile<V: Vector, T: Weights<V>, const R: usize, const C: usize>(operands: &Operands<V, T>) -> [[f32; C]; R] {
    let &Operands { a: (a, a_stride, a_rows), weights: (w, w_stride, w_rows), depth, prefetches } = operands;
    let a: [*const V::Row; R] = std::array::from_fn(|r| a.wrapping_add(r.min(a_rows - 1) * a_stride));
    let w: [*const T; C] = std::array::from_fn(|c| w.wrapping_add(c.min(w_rows - 1) * w_stride));
    let group = 2 * V::LANES;
    let whole = depth / group * group;
    let mut sums = [[V::zero(); C]; R];
    for at in (0..whole).step_by(group) {
        // prefetches in the same row, or at its end in the row of the next tile
        let ahead = if at + AHEAD < depth { AHEAD } else { (C * w_stride + AHEAD).saturating_sub(depth) };
        // SAFETY: the caller's promise.
        unsafe { step((&a, at), (&w, at, prefetches.then_some(ahead)), &mut sums) };
    }
    if whole < depth {
        let mut rest = [[T::default(); 2 * MAX_LANES]; C];
        let mut padded = w;
        for c in 0..C {
            // SAFETY: as above, up to the depth.
            unsafe { std::ptr::copy_nonoverlapping(w[c].add(whole), rest[c].as_mut_ptr(), depth - whole) };
            padded[c] = rest[c].as_ptr();
        }
        // SAFETY: as above; a group of weights is padded.
        unsafe { step((&a, whole), (&padded, 0, None), &mut sums) };
    }
    let mut dots = [[0.0; C]; R];
    for first in (0..R * C).step_by(4) {
        let position = |i: usize| ((first + i) / C, (first + i) % C);
        let of =
            std::array::from_fn(|i| if first + i < R * C { sums[position(i).0][position(i).1] } else { V::zero() });
        for (i, sum) in V::sums(of).into_iter().enumerate().take(R * C - first) {
            dots[position(i).0][position(i).1] = sum;
        }
    }
    dots
}

/// Adds the products of two vectors of each row.
///
/// # Safety
/// Each pointer is valid for two vectors at its offset.
// indexed loops: closures are not always inlined, and are then compiled without the instruction set
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn step<V: Vector, T: Weights<V>, const R: usize, const C: usize>(
    (a, a_at): (&[*const V::Row; R], usize),
    (w, w_at, ahead): (&[*const T; C], usize, Option<usize>),
    sums: &mut [[V; C]; R],
) {
    let mut weights = [(V::zero(), V::zero()); C];
    for c in 0..C {
        if let Some(ahead) = ahead {
            for line in (0..2 * V::LANES * size_of::<T>()).step_by(64) {
                V::prefetch(w[c].wrapping_add(w_at + ahead).cast::<u8>().wrapping_add(line));
            }
        }
        // SAFETY: the caller's promise.
        weights[c] = unsafe { T::pair(w[c].add(w_at)) };
    }
    for r in 0..R {
        // SAFETY: as above.
        let row = unsafe { V::load_row(a[r].add(a_at)) };
        for c in 0..C {
            sums[r][c] = V::add_products(row, weights[c], sums[r][c]);
        }
    }
}
