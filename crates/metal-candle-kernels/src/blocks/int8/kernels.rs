//! The inner loops of 8-bit products, generic over the instruction set.

use super::lanes::{COLUMNS, Kind, Lanes, Rows, Sink, Unpack};
use crate::blocks::decode::Decoder;
use std::marker::PhantomData;

/// Bytes of the smallest pages.
const PAGE: usize = 4096;

/// Maximum number of rows of weights in a vector.
pub(super) const MAX_ROWS: usize = 16;

/// Bytes of 32 columns of a row of activations: the integers, their scale, and an offset for each group of weights.
pub(super) const fn activation_bytes(groups: usize) -> usize {
    COLUMNS + 4 + 4 * groups
}

/// Bytes of 32 columns of a panel: eight vectors of weights, then the scales and the minimums of the groups.
pub(super) const fn panel_bytes<L: Lanes, K: Kind>() -> usize {
    4 * L::ROWS * (8 + K::GROUPS + if K::HAS_MINIMUMS { K::GROUPS } else { 0 })
}

/// The loops, compiled for an instruction set.
pub(super) trait Kernels: Lanes {
    /// Dot products of a row of activations with [`Lanes::ROWS`] rows of weights. Prefetches the same number of bytes at `next`.
    ///
    /// # Safety
    /// The processor has the instructions; each row has `blocks` blocks, and the activations have their columns; `dots` has
    /// [`Lanes::ROWS`] elements.
    unsafe fn dots<F: Decoder + Unpack>(rows: Rows, blocks: usize, next: *const u8, a: *const u8, dots: *mut f32);

    /// Unpacks rows of weights to a panel, and prefetches.
    ///
    /// # Safety
    /// The processor has the instructions; each row has `blocks` blocks, and the panel is large enough for them.
    unsafe fn fill<F: Decoder + Unpack>(rows: Rows, blocks: usize, next: *const u8, panel: *mut u8);

    /// Adds the dot products of up to [`Lanes::HEIGHT`] rows of activations with a panel of 32 `count` columns to one vector of
    /// `sums` per row. `stride` is the row stride of the activations in bytes.
    ///
    /// # Safety
    /// The processor has the instructions; the panel and the activations have these columns.
    unsafe fn add_tile<K: Kind>(panel: *const u8, count: usize, a: (*const u8, usize), height: usize, sums: *mut f32);

    /// Adds `alpha dots` to `c`.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn add_scaled(alpha: f32, dots: &[f32], c: &mut [f32]);
}

/// 32 columns of unpacked weights.
trait Block<L: Lanes> {
    /// The weights of columns `4 step..4 step + 4`.
    fn weights(&self, step: usize) -> L;
    fn scale(&self, group: usize) -> L::Floats;
    fn minimum(&self, group: usize) -> L::Floats;
}

/// A block in registers.
struct Unpacked<L: Lanes> {
    weights: [L; 8],
    scales: [L::Floats; 2],
    minimums: [L::Floats; 2],
}

impl<L: Lanes> Block<L> for Unpacked<L> {
    #[inline(always)]
    fn weights(&self, step: usize) -> L {
        self.weights[step]
    }

    #[inline(always)]
    fn scale(&self, group: usize) -> L::Floats {
        self.scales[group]
    }

    #[inline(always)]
    fn minimum(&self, group: usize) -> L::Floats {
        self.minimums[group]
    }
}

/// A block of a panel.
struct Stored<K> {
    at: *const u8,
    kind: PhantomData<K>,
}

// SAFETY of the loads: the caller of the tile guarantees the panel.
impl<L: Lanes, K: Kind> Block<L> for Stored<K> {
    #[inline(always)]
    fn weights(&self, step: usize) -> L {
        unsafe { L::load(self.at.add(4 * L::ROWS * step)) }
    }

    #[inline(always)]
    fn scale(&self, group: usize) -> L::Floats {
        unsafe { L::load_floats(self.at.add(4 * L::ROWS * (8 + group)).cast()) }
    }

    #[inline(always)]
    fn minimum(&self, group: usize) -> L::Floats {
        unsafe { L::load_floats(self.at.add(4 * L::ROWS * (8 + K::GROUPS + group)).cast()) }
    }
}

/// Adds the products of 32 columns of `R` rows of activations. The order of the f32 operations defines the result.
///
/// # Safety
/// The activations have these columns.
#[inline(always)]
unsafe fn add_block<L: Lanes, K: Kind, const R: usize>(
    block: &impl Block<L>,
    a: &[*const u8; R],
    sums: &mut [L::Floats; R],
) {
    let steps = 8 / K::GROUPS;
    let mut terms = [L::splat_float(0.0); R];
    for group in 0..K::GROUPS {
        let mut dots = [L::start(0); R];
        if !K::HAS_MINIMUMS {
            for r in 0..R {
                // SAFETY: the caller's promise; also below.
                dots[r] = L::start(unsafe { a[r].add(COLUMNS + 4 + 4 * group).cast::<i32>().read_unaligned() });
            }
        }
        for step in 0..steps {
            let weights = block.weights(group * steps + step);
            for r in 0..R {
                let a = a[r].wrapping_add(4 * (group * steps + step));
                dots[r] = unsafe { L::step(dots[r], weights, a, K::MAX_WEIGHT, step, steps) };
            }
        }
        let scale = block.scale(group);
        for r in 0..R {
            let dots = L::finish(dots[r]);
            terms[r] = if group == 0 { L::mul(dots, scale) } else { L::mul_add(dots, scale, terms[r]) };
        }
    }
    if K::HAS_MINIMUMS {
        for group in 0..K::GROUPS {
            let minimum = block.minimum(group);
            for r in 0..R {
                let sum = unsafe { a[r].add(COLUMNS + 4 + 4 * group).cast::<f32>().read_unaligned() };
                terms[r] = L::mul_add(L::splat_float(sum), minimum, terms[r]);
            }
        }
    }
    for r in 0..R {
        let scale = unsafe { a[r].add(COLUMNS).cast::<f32>().read_unaligned() };
        sums[r] = L::mul_add(terms[r], L::splat_float(scale), sums[r]);
    }
}

/// The weights to prefetch. The kernel reads rows on several pages in parallel, which the hardware does not predict, although
/// the rows are one contiguous range.
struct Next<F> {
    at: *const u8,
    format: PhantomData<F>,
}

impl<F: Decoder> Next<F> {
    /// Prefetches the number of bytes in 32 columns of the rows.
    #[inline(always)]
    fn prefetch<L: Lanes>(&mut self) {
        let bytes = L::ROWS * F::BYTES * COLUMNS / F::LEN;
        for at in (0..bytes).step_by(64) {
            L::prefetch(self.at.wrapping_add(at));
        }
        // also translates the address of the next page
        L::prefetch(self.at.wrapping_add(PAGE));
        self.at = self.at.wrapping_add(bytes);
    }
}

/// Multiplies unpacked weights by one row of activations.
struct Multiply<L: Lanes, F> {
    a: *const u8,
    sums: L::Floats,
    next: Next<F>,
}

impl<L: Lanes, F: Decoder + Unpack> Sink<L> for Multiply<L, F> {
    #[inline(always)]
    unsafe fn take(&mut self, weights: [L; 8], scales: [L::Floats; 2], minimums: [L::Floats; 2]) {
        let mut sums = [self.sums];
        // SAFETY: the caller's promise.
        unsafe { add_block::<L, F::Kind, 1>(&Unpacked { weights, scales, minimums }, &[self.a], &mut sums) };
        self.sums = sums[0];
        self.a = self.a.wrapping_add(activation_bytes(F::Kind::GROUPS));
        self.next.prefetch::<L>();
    }
}

/// # Safety
/// Same as [`Kernels::dots`].
#[inline(always)]
pub(super) unsafe fn dots<L: Lanes, F: Decoder + Unpack>(
    rows: Rows,
    blocks: usize,
    next: *const u8,
    a: *const u8,
    dots: *mut f32,
) {
    let next = Next::<F> { at: next, format: PhantomData };
    let mut sink = Multiply { a, sums: L::splat_float(0.0), next };
    // SAFETY: the caller's promise.
    unsafe {
        F::unpack::<L, _>(rows, blocks, &mut sink);
        L::store_floats(sink.sums, dots);
    }
}

/// Stores unpacked weights.
struct Store<F> {
    to: *mut u8,
    next: Next<F>,
}

impl<L: Lanes, F: Decoder + Unpack> Sink<L> for Store<F> {
    #[inline(always)]
    unsafe fn take(&mut self, weights: [L; 8], scales: [L::Floats; 2], minimums: [L::Floats; 2]) {
        let vector = 4 * L::ROWS;
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..8 {
                weights[i].store(self.to.add(vector * i));
            }
            for group in 0..F::Kind::GROUPS {
                L::store_floats(scales[group], self.to.add(vector * (8 + group)).cast());
                if F::Kind::HAS_MINIMUMS {
                    L::store_floats(minimums[group], self.to.add(vector * (8 + F::Kind::GROUPS + group)).cast());
                }
            }
        }
        self.next.prefetch::<L>();
        self.to = self.to.wrapping_add(panel_bytes::<L, F::Kind>());
    }
}

/// # Safety
/// Same as [`Kernels::fill`].
#[inline(always)]
pub(super) unsafe fn fill<L: Lanes, F: Decoder + Unpack>(rows: Rows, blocks: usize, next: *const u8, panel: *mut u8) {
    let mut sink = Store { to: panel, next: Next::<F> { at: next, format: PhantomData } };
    // SAFETY: the caller's promise.
    unsafe { F::unpack::<L, _>(rows, blocks, &mut sink) };
}

/// # Safety
/// Same as [`Kernels::add_tile`], with `R` rows.
#[inline(always)]
pub(super) unsafe fn add_tile<L: Lanes, K: Kind, const R: usize>(
    panel: *const u8,
    count: usize,
    (first, stride): (*const u8, usize),
    to: *mut f32,
) {
    let mut a = [first; R];
    let mut sums = [L::splat_float(0.0); R];
    for r in 0..R {
        a[r] = first.wrapping_add(r * stride);
        // SAFETY: the caller's promise; also below.
        sums[r] = unsafe { L::load_floats(to.add(r * L::ROWS)) };
    }
    for block in 0..count {
        let stored = Stored::<K> { at: panel.wrapping_add(block * panel_bytes::<L, K>()), kind: PhantomData };
        unsafe { add_block::<L, K, R>(&stored, &a, &mut sums) };
        for r in 0..R {
            a[r] = a[r].wrapping_add(activation_bytes(K::GROUPS));
        }
    }
    for r in 0..R {
        unsafe { L::store_floats(sums[r], to.add(r * L::ROWS)) };
    }
}

/// `c + alpha dots`, with fused multiply-add if the caller is compiled for it.
#[inline(always)]
pub(super) fn add_scaled(alpha: f32, dots: &[f32], c: &mut [f32]) {
    for (dot, c) in dots.iter().zip(c) {
        *c = alpha.mul_add(*dot, *c);
    }
}

/// Implements [`Kernels`].
macro_rules! kernels {
    ($lanes:ident, $features:literal) => {
        // SAFETY of the calls: the caller's promise.
        impl crate::blocks::int8::kernels::Kernels for $lanes {
            unsafe fn dots<F: crate::blocks::decode::Decoder + crate::blocks::int8::lanes::Unpack>(
                rows: Rows,
                blocks: usize,
                next: *const u8,
                a: *const u8,
                dots: *mut f32,
            ) {
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn body<F: crate::blocks::decode::Decoder + crate::blocks::int8::lanes::Unpack>(
                    rows: Rows,
                    blocks: usize,
                    next: *const u8,
                    a: *const u8,
                    dots: *mut f32,
                ) {
                    unsafe { crate::blocks::int8::kernels::dots::<$lanes, F>(rows, blocks, next, a, dots) }
                }
                unsafe { body::<F>(rows, blocks, next, a, dots) }
            }

            unsafe fn fill<F: crate::blocks::decode::Decoder + crate::blocks::int8::lanes::Unpack>(
                rows: Rows,
                blocks: usize,
                next: *const u8,
                panel: *mut u8,
            ) {
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn body<F: crate::blocks::decode::Decoder + crate::blocks::int8::lanes::Unpack>(
                    rows: Rows,
                    blocks: usize,
                    next: *const u8,
                    panel: *mut u8,
                ) {
                    unsafe { crate::blocks::int8::kernels::fill::<$lanes, F>(rows, blocks, next, panel) }
                }
                unsafe { body::<F>(rows, blocks, next, panel) }
            }

            unsafe fn add_tile<K: crate::blocks::int8::lanes::Kind>(
                panel: *const u8,
                count: usize,
                a: (*const u8, usize),
                height: usize,
                sums: *mut f32,
            ) {
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn body<K: crate::blocks::int8::lanes::Kind, const R: usize>(
                    panel: *const u8,
                    count: usize,
                    a: (*const u8, usize),
                    sums: *mut f32,
                ) {
                    unsafe { crate::blocks::int8::kernels::add_tile::<$lanes, K, R>(panel, count, a, sums) }
                }
                let (mut a, mut sums, mut left) = (a, sums, height);
                while left > 0 {
                    let height = match left {
                        8.. if $lanes::HEIGHT >= 8 => 8,
                        4.. => 4,
                        left => left,
                    };
                    unsafe {
                        match height {
                            1 => body::<K, 1>(panel, count, a, sums),
                            2 => body::<K, 2>(panel, count, a, sums),
                            3 => body::<K, 3>(panel, count, a, sums),
                            4 => body::<K, 4>(panel, count, a, sums),
                            _ if $lanes::HEIGHT >= 8 => body::<K, 8>(panel, count, a, sums),
                            _ => {}
                        }
                    }
                    a.0 = a.0.wrapping_add(height * a.1);
                    sums = sums.wrapping_add(height * $lanes::ROWS);
                    left -= height;
                }
            }

            unsafe fn add_scaled(alpha: f32, dots: &[f32], c: &mut [f32]) {
                #[target_feature(enable = $features)]
                unsafe fn body(alpha: f32, dots: &[f32], c: &mut [f32]) {
                    crate::blocks::int8::kernels::add_scaled(alpha, dots, c);
                }
                unsafe { body(alpha, dots, c) }
            }
        }
    };
}

pub(super) use kernels;
