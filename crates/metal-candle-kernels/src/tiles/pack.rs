//! Packs operands into tiles of bf16 terms: rows for the left operand, interleaved pairs of rows for the right operand.

use super::amx::{DEPTH, SIDE, TILE};
use super::lanes::{self, Wide};
use std::arch::x86_64::{
    __m512, __m512i, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_epi16, _mm512_permutex2var_epi16,
    _mm512_setzero_ps, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
};

/// An operand as lanes along a depth: the rows of a left operand, the columns of a right operand.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub(super) values: &'a [T],
    pub(super) lane_stride: usize,
    pub(super) depth_stride: usize,
    pub(super) alpha: f32,
    /// How many elements ahead to prefetch.
    pub(super) ahead: usize,
}

/// A block of an operand: first lane and number of lanes (at most two tiles), first element and length of the depth.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) lanes: (usize, usize),
    pub(super) depth: (usize, usize),
}

impl<T: Wide> Source<'_, T> {
    /// Whether `terms` terms are exact.
    #[allow(clippy::float_cmp)] // a factor of one is exact
    fn is_exact(&self, terms: usize) -> bool {
        let bits = if self.alpha == 1.0 { T::SIGNIFICAND } else { 24 };
        8 * terms >= bits
    }

    /// # Panics
    /// The part is not within the operand.
    fn check(&self, Part { lanes, depth }: Part) {
        let last = |(first, count): (usize, usize)| first + count - 1;
        let last = last(lanes) * self.lane_stride + last(depth) * self.depth_stride;
        assert!(last < self.values.len(), "the operand is too short");
    }
}

/// The number of tiles of `lanes` lanes.
pub(super) fn tiles(lanes: usize) -> usize {
    lanes.div_ceil(SIDE)
}

/// The number of tile products along `depth`.
pub(super) fn steps(depth: usize) -> usize {
    depth.div_ceil(DEPTH)
}

/// Bytes of an operand of `lanes` lanes and `steps` steps that is packed with `terms` terms.
pub(super) fn packed_bytes(lanes: usize, terms: usize, steps: usize) -> usize {
    steps * terms * tiles(lanes) * TILE
}

/// Calls a function for the number of terms, one to three.
macro_rules! by_terms {
    ($terms:expr, $function:ident($($argument:expr),*)) => {
        // SAFETY: tiles are used only where AVX-512 F, BW and VL are available.
        unsafe {
            match $terms {
                1 => $function::<T, 1>($($argument),*),
                2 => $function::<T, 2>($($argument),*),
                _ => $function::<T, 3>($($argument),*),
            }
        }
    };
}

/// Packs a left operand of one term: rows `stride` bytes apart.
pub(super) fn rows<T: Wide>(source: &Source<T>, part: Part, stride: usize, to: &mut [u8]) {
    source.check(part);
    assert!(to.len() >= tiles(part.lanes.1) * SIDE * stride && stride >= 2 * DEPTH * steps(part.depth.1));
    // SAFETY: tiles are used only where AVX-512 F, BW and VL are available.
    unsafe { rows_in_lanes::<T, 1>(source, part, (SIDE * stride, stride, 2 * DEPTH, 0), to) }
}

/// Packs a left operand of up to three terms: for each step, the tiles of all terms, one after the other.
pub(super) fn terms_by_step<T: Wide>(source: &Source<T>, part: Part, terms: usize, to: &mut [u8]) {
    let tiles = tiles(part.lanes.1);
    source.check(part);
    assert!(to.len() >= packed_bytes(part.lanes.1, terms, steps(part.depth.1)));
    by_terms!(terms, rows_in_lanes(source, part, (TILE, 2 * DEPTH, terms * tiles * TILE, tiles * TILE), to));
}

/// Packs a right operand: for each step, the tiles of all terms, one after the other.
pub(super) fn columns<T: Wide>(source: &Source<T>, part: Part, terms: usize, to: &mut [u8]) {
    source.check(part);
    assert!(to.len() >= packed_bytes(part.lanes.1, terms, steps(part.depth.1)));
    let to: *mut i32 = to.as_mut_ptr().cast();
    if source.lane_stride == 1 {
        by_terms!(terms, columns_by_pairs(source, part, to));
    } else {
        by_terms!(terms, columns_by_blocks(source, part, to));
    }
}

/// Packs rows; the strides of tiles, lanes, steps and terms are in bytes.
///
/// # Safety
/// The part is within the source, and the rows are within `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn rows_in_lanes<T: Wide, const TERMS: usize>(
    source: &Source<T>,
    part: Part,
    (tile_stride, lane_stride, step_stride, term_stride): (usize, usize, usize, usize),
    to: &mut [u8],
) {
    let (mut block, is_exact) = (Block::ZERO, source.is_exact(TERMS));
    for tile in 0..tiles(part.lanes.1) {
        for step in 0..steps(part.depth.1) {
            // SAFETY: the caller's promise.
            let lines = unsafe { Lines::new(source, part, (tile, step), &mut block) };
            for lane in 0..SIDE {
                // SAFETY: as above.
                let line = split_line::<TERMS>(unsafe { lines.line(lane) }, is_exact);
                for (number, term) in line.into_iter().enumerate() {
                    let at = tile * tile_stride + lane * lane_stride + step * step_stride + number * term_stride;
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(at).cast(), term) };
                }
            }
        }
    }
}

/// Packs columns that are contiguous along the depth, or have gaps in both directions: transposes blocks.
///
/// # Safety
/// The part is within the source, and the columns are within `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn columns_by_blocks<T: Wide, const TERMS: usize>(source: &Source<T>, part: Part, to: *mut i32) {
    let words = tiles(part.lanes.1) * TILE / 4;
    let (mut block, is_exact) = (Block::ZERO, source.is_exact(TERMS));
    for tile in 0..tiles(part.lanes.1) {
        for step in 0..steps(part.depth.1) {
            // SAFETY: the caller's promise.
            let source = unsafe { Lines::new(source, part, (tile, step), &mut block) };
            let mut lines = [[lanes::zero(); SIDE]; TERMS];
            for lane in 0..SIDE.min(part.lanes.1 - tile * SIDE) {
                // SAFETY: as above.
                let line = split_line::<TERMS>(unsafe { source.line(lane) }, is_exact);
                for (lines, term) in lines.iter_mut().zip(line) {
                    lines[lane] = term;
                }
            }
            for (term, lines) in lines.iter().enumerate() {
                let at = (step * TERMS + term) * words + tile * SIDE * SIDE;
                for (p, line) in lanes::transposed(lines).into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_si512(to.add(at + p * SIDE).cast(), line) };
                }
            }
        }
    }
}

/// Packs columns that are adjacent: needs no transposition.
///
/// # Safety
/// Same as [`columns_by_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn columns_by_pairs<T: Wide, const TERMS: usize>(
    source: &Source<T>,
    Part { lanes: (first, lanes), depth: (start, depth) }: Part,
    to: *mut i32,
) {
    let &Source { values, depth_stride, alpha, ahead, .. } = source;
    let is_exact = source.is_exact(TERMS);
    let words = tiles(lanes) * TILE / 4;
    for p in 0..steps(depth) * DEPTH / 2 {
        for tile in 0..tiles(lanes) {
            let mask = lanes::first(lanes - tile * SIDE);
            let mut line = [_mm512_setzero_ps(); 2];
            for (i, line) in line.iter_mut().enumerate() {
                if 2 * p + i < depth {
                    let at = (start + 2 * p + i) * depth_stride + first + tile * SIDE;
                    // SAFETY: the caller's promise.
                    *line = unsafe { T::load(mask, values.as_ptr().add(at)) };
                    lanes::prefetch(values.as_ptr().wrapping_add(at + ahead));
                }
            }
            let (a, b) = (lanes::scaled(line[0], alpha), lanes::scaled(line[1], alpha));
            let (a, b) = (split::<TERMS>(a, is_exact), split::<TERMS>(b, is_exact));
            for term in 0..TERMS {
                let at = (p / SIDE * TERMS + term) * words + tile * SIDE * SIDE + p % SIDE * SIDE;
                let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(a[term]), b[term]);
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(to.add(at).cast(), pairs) };
            }
        }
    }
}

/// The values of a tile as f32, `[lane][depth]`.
#[repr(align(64))]
struct Block([[f32; DEPTH]; SIDE]);

impl Block {
    const ZERO: Self = Self([[0.0; DEPTH]; SIDE]);
}

/// The lanes of a tile and a step.
struct Lines<'a, T> {
    /// The first element, if the lanes are contiguous along the depth.
    in_place: Option<*const T>,
    block: &'a Block,
    lane_stride: usize,
    alpha: f32,
    ahead: usize,
    lanes: usize,
    /// The elements of each half that exist.
    masks: [u16; 2],
}

impl<'a, T: Wide> Lines<'a, T> {
    /// Lanes with gaps along the depth are copied to `block`.
    ///
    /// # Safety
    /// The part is within the source.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn new(
        source: &Source<T>,
        Part { lanes: (first, lanes), depth: (start, depth) }: Part,
        (tile, step): (usize, usize),
        block: &'a mut Block,
    ) -> Self {
        let (lane, lanes) = (first + tile * SIDE, SIDE.min(lanes - tile * SIDE));
        let (at, depth) = (start + step * DEPTH, DEPTH.min(depth - step * DEPTH));
        let &Source { values, lane_stride, depth_stride, alpha, ahead } = source;
        let values = &values[lane * lane_stride + at * depth_stride..];
        let in_place = (depth_stride == 1).then_some(values.as_ptr());
        if in_place.is_none() {
            // SAFETY: the caller's promise.
            unsafe { copy(&Source { values, ..*source }, (lanes, depth), block) };
        }
        let masks = [lanes::first(depth), lanes::first(depth.saturating_sub(SIDE))];
        Lines { in_place, block, lane_stride, alpha, ahead, lanes, masks }
    }

    /// The two halves of a lane, padded with zeros.
    ///
    /// # Safety
    /// Same as [`Lines::new`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn line(&self, lane: usize) -> [__m512; 2] {
        if lane >= self.lanes {
            return [_mm512_setzero_ps(); 2];
        }
        let Some(values) = self.in_place else {
            let line = self.block.0[lane].as_ptr();
            // SAFETY: both halves of a line.
            return unsafe { [_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(SIDE))] };
        };
        let from = values.wrapping_add(lane * self.lane_stride);
        lanes::prefetch(from.wrapping_add(self.ahead));
        if size_of::<T>() == 4 {
            lanes::prefetch(from.wrapping_add(self.ahead + SIDE));
        }
        // SAFETY: the caller's promise; masked elements are not accessed.
        let halves = unsafe { [T::load(self.masks[0], from), T::load(self.masks[1], from.wrapping_add(SIDE))] };
        [lanes::scaled(halves[0], self.alpha), lanes::scaled(halves[1], self.alpha)]
    }
}

/// Copies the first lanes and elements of a source that is not contiguous along the depth, padded with zeros.
///
/// # Safety
/// They are within the source.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn copy<T: Wide>(source: &Source<T>, (lanes, depth): (usize, usize), block: &mut Block) {
    let &Source { values, lane_stride, depth_stride, alpha, .. } = source;
    if lanes < SIDE || depth < DEPTH {
        *block = Block::ZERO;
    }
    if lane_stride != 1 {
        for (lane, to) in block.0.iter_mut().enumerate().take(lanes) {
            for (p, to) in to.iter_mut().enumerate().take(depth) {
                *to = alpha * values[lane * lane_stride + p * depth_stride].to_f32();
            }
        }
        return;
    }
    for half in [0, SIDE] {
        let mut lines = [lanes::zero(); SIDE];
        for (p, line) in lines.iter_mut().enumerate().take(depth.saturating_sub(half)) {
            // SAFETY: the caller's promise; masked elements are not accessed.
            let values = unsafe { T::load(lanes::first(lanes), values.as_ptr().add((half + p) * depth_stride)) };
            *line = lanes::bits(lanes::scaled(values, alpha));
        }
        for (lane, line) in lanes::transposed(&lines).into_iter().enumerate() {
            // SAFETY: a block has this line.
            unsafe { _mm512_storeu_si512(block.0[lane].as_mut_ptr().add(half).cast(), line) };
        }
    }
}

/// The terms of a line, each in the order of the depth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn split_line<const TERMS: usize>([low, high]: [__m512; 2], is_exact: bool) -> [__m512i; TERMS] {
    const UPPER: [u16; DEPTH] = {
        let mut indices = [0; DEPTH];
        let mut at = 0;
        while at < DEPTH {
            indices[at] = 2 * at as u16 + 1;
            at += 1;
        }
        indices
    };
    // SAFETY: 32 indices.
    let upper = unsafe { _mm512_loadu_si512(UPPER.as_ptr().cast()) };
    let (low, high) = (split::<TERMS>(low, is_exact), split::<TERMS>(high, is_exact));
    let mut line = [lanes::zero(); TERMS];
    for term in 0..TERMS {
        line[term] = _mm512_permutex2var_epi16(low[term], upper, high[term]);
    }
    line
}

/// The terms of sixteen values, each a bf16 in the upper half of a word. If the terms are exact, the last term is the remainder.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn split<const TERMS: usize>(values: __m512, is_exact: bool) -> [__m512i; TERMS] {
    let (mut rest, mut terms) = (values, [lanes::zero(); TERMS]);
    if is_exact && TERMS == 1 {
        return [lanes::bits(values); TERMS];
    }
    if lanes::may_overflow(values) {
        return split_one_by_one(values);
    }
    for (number, term) in terms.iter_mut().enumerate() {
        let is_last = number + 1 == TERMS;
        *term = if is_last && is_exact { lanes::bits(rest) } else { lanes::nearest(rest) };
        if !is_last {
            rest = lanes::minus(rest, *term);
        }
    }
    terms
}

#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn split_one_by_one<const TERMS: usize>(values: __m512) -> [__m512i; TERMS] {
    let (mut rest, mut words) = ([0.0; SIDE], [[0_u32; SIDE]; TERMS]);
    // SAFETY: sixteen values.
    unsafe { _mm512_storeu_ps(rest.as_mut_ptr(), values) };
    for words in &mut words {
        for (word, rest) in words.iter_mut().zip(&mut rest) {
            *word = high(*rest);
            *rest -= f32::from_bits(*word);
            *rest = if rest.is_finite() { *rest } else { 0.0 };
        }
    }
    let mut terms = [lanes::zero(); TERMS];
    for (term, words) in terms.iter_mut().zip(&words) {
        // SAFETY: sixteen words.
        *term = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    }
    terms
}

/// The nearest bf16, in the upper half of a word. Finite values stay finite, and NaN stays NaN.
fn high(value: f32) -> u32 {
    const UPPER: u32 = 0xffff_0000;
    const EXPONENT: u32 = 0x7f80_0000;
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let is_special = bits & EXPONENT == EXPONENT;
    let quiet = if is_special && bits << 9 != 0 { 1 << 22 } else { 0 };
    let word = if is_special || nearest & EXPONENT == EXPONENT { bits | quiet } else { nearest };
    word & UPPER
}
