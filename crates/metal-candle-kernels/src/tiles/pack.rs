//! Packs operands into tiles of bf16 terms: rows for the left operand, interleaved pairs of rows for the right operand.

use super::amx::{DEPTH, SIDE, TILE};
use crate::isa::{Arithmetic, dispatch};
use crate::math::Element;

/// An operand as lanes along a depth: the rows of a left operand, the columns of a right operand.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub(super) values: &'a [T],
    pub(super) lane_stride: usize,
    pub(super) depth_stride: usize,
    pub(super) alpha: f32,
}

/// A block of an operand: first lane and number of lanes (at most two tiles), first element and length of the depth.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) lanes: (usize, usize),
    pub(super) depth: (usize, usize),
}

/// The number of tiles of `lanes` lanes.
pub(super) fn tiles(lanes: usize) -> usize {
    lanes.div_ceil(SIDE)
}

/// The number of tile products along `depth`.
pub(super) fn steps(depth: usize) -> usize {
    depth.div_ceil(DEPTH)
}

/// Bytes of one step and term of a right operand. A single tile is only as wide as its lanes.
pub(super) fn right_bytes(lanes: usize) -> usize {
    if lanes <= SIDE { 4 * SIDE * lanes } else { 2 * TILE }
}

/// The values of a tile as f32, `[lane][depth]`.
type Block = [[f32; DEPTH]; SIDE];

/// The nearest bf16, in the upper half of a word. Finite values stay finite, and NaN stays NaN.
#[inline(always)]
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

/// Term `TERM` of two values, as one word. The first value is the lower half.
#[inline(always)]
fn pair<const TERM: usize>(first: f32, second: f32) -> u32 {
    term::<TERM>(first) >> 16 | term::<TERM>(second)
}

/// Term `TERM` of a value: the nearest bf16 of the remainder after the previous terms.
#[inline(always)]
fn term<const TERM: usize>(value: f32) -> u32 {
    let mut rest = value;
    for _ in 0..TERM {
        rest -= f32::from_bits(high(rest));
        rest = if rest.is_finite() { rest } else { 0.0 };
    }
    high(rest)
}

dispatch! {
    /// Packs a left operand of one term: rows `stride` bytes apart.
    pub(super) fn rows<T: Element>(source: &Source<T>, part: Part, stride: usize, to: &mut [u8]) = rows_body
}

#[inline(always)]
fn rows_body<A: Arithmetic, T: Element>(source: &Source<T>, part: Part, stride: usize, to: &mut [u8]) {
    each_block::<A, T>(source, part, |tile, step, block| {
        for (lane, values) in block.iter().enumerate() {
            write::<0>(values, &mut to[(tile * SIDE + lane) * stride + step * 2 * DEPTH..]);
        }
    });
}

dispatch! {
    /// Packs a left operand of two or three terms: for each step, the tiles of each term in turn.
    pub(super) fn terms_by_step<T: Element>(source: &Source<T>, part: Part, terms: usize, to: &mut [u8]) = terms_by_step_body
}

#[inline(always)]
fn terms_by_step_body<A: Arithmetic, T: Element>(source: &Source<T>, part: Part, terms: usize, to: &mut [u8]) {
    let tiles = tiles(part.lanes.1);
    each_block::<A, T>(source, part, |tile, step, block| {
        let first = (step * terms * tiles + tile) * TILE;
        for (lane, values) in block.iter().enumerate() {
            let at = first + lane * 2 * DEPTH;
            write::<0>(values, &mut to[at..]);
            if terms > 1 {
                write::<1>(values, &mut to[at + tiles * TILE..]);
            }
            if terms > 2 {
                write::<2>(values, &mut to[at + 2 * tiles * TILE..]);
            }
        }
    });
}

/// Writes one term of a row.
#[inline(always)]
fn write<const TERM: usize>(values: &[f32; DEPTH], to: &mut [u8]) {
    let words: [u32; DEPTH / 2] = std::array::from_fn(|p| pair::<TERM>(values[2 * p], values[2 * p + 1]));
    for (to, word) in to.as_chunks_mut::<4>().0[..DEPTH / 2].iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
}

/// Calls `take` with the index of the tile, the index of the step and the values, padded with zeros.
#[inline(always)]
fn each_block<A: Arithmetic, T: Element>(
    source: &Source<T>,
    Part { lanes: (first, count), depth: (start, depth) }: Part,
    mut take: impl FnMut(usize, usize, &Block),
) {
    let mut block = [[0.0; DEPTH]; SIDE];
    for tile in 0..tiles(count) {
        for step in 0..steps(depth) {
            let lanes = (first + tile * SIDE, SIDE.min(count - tile * SIDE));
            let depth = (start + step * DEPTH, DEPTH.min(depth - step * DEPTH));
            read::<A, T>(source, lanes, depth, &mut block);
            take(tile, step, &block);
        }
    }
}

#[inline(always)]
fn read<A: Arithmetic, T: Element>(
    source: &Source<T>,
    (first, count): (usize, usize),
    (start, depth): (usize, usize),
    block: &mut Block,
) {
    let &Source { values, lane_stride, depth_stride, alpha } = source;
    let values = &values[first * lane_stride + start * depth_stride..];
    if count < SIDE || depth < DEPTH {
        *block = [[0.0; DEPTH]; SIDE];
    }
    if depth_stride == 1 {
        for (lane, to) in block.iter_mut().enumerate().take(count) {
            let from = &values[lane * lane_stride..][..depth];
            if let Some(from) = from.first_chunk::<DEPTH>() {
                *to = from.map(|value| alpha * value.to_f32());
            } else {
                to.iter_mut().zip(from).for_each(|(to, value)| *to = alpha * value.to_f32());
            }
        }
    } else if lane_stride == 1 && count == SIDE && depth == DEPTH {
        for at in (0..DEPTH).step_by(8) {
            for lane in (0..SIDE).step_by(8) {
                let line = |p: usize| &values[(at + p) * depth_stride + lane..][..8];
                let square = std::array::from_fn(|p| {
                    let line = line(p);
                    std::array::from_fn(|i| alpha * line[i].to_f32())
                });
                let square = A::transposed(square);
                for (i, values) in square.iter().enumerate() {
                    block[lane + i][at..at + 8].copy_from_slice(values);
                }
            }
        }
    } else {
        for (lane, to) in block.iter_mut().enumerate().take(count) {
            for (p, to) in to.iter_mut().enumerate().take(depth) {
                *to = alpha * values[lane * lane_stride + p * depth_stride].to_f32();
            }
        }
    }
}

dispatch! {
    /// Packs a right operand: for each step, the tiles of each term in turn.
    pub(super) fn columns<T: Element>(source: &Source<T>, part: Part, terms: usize, to: &mut [u32]) = columns_body
}

#[inline(always)]
fn columns_body<A: Arithmetic, T: Element>(source: &Source<T>, part: Part, terms: usize, to: &mut [u32]) {
    let (lanes, words) = (part.lanes.1, right_bytes(part.lanes.1) / 4);
    let width = lanes.min(SIDE);
    if source.lane_stride == 1 && lanes.is_multiple_of(SIDE) {
        return interleaved::<T>(source, part, terms, to);
    }
    each_block::<A, T>(source, part, |tile, step, block| {
        let at = step * terms * words + tile * SIDE * SIDE;
        turned::<A, 0>(block, width, &mut to[at..]);
        if terms > 1 {
            turned::<A, 1>(block, width, &mut to[at + words..]);
        }
        if terms > 2 {
            turned::<A, 2>(block, width, &mut to[at + 2 * words..]);
        }
    });
}

/// Writes one term of a block transposed, so that its lanes are adjacent.
#[inline(always)]
fn turned<A: Arithmetic, const TERM: usize>(block: &Block, width: usize, to: &mut [u32]) {
    let words: [[u32; SIDE]; SIDE] =
        std::array::from_fn(|i| std::array::from_fn(|p| pair::<TERM>(block[i][2 * p], block[i][2 * p + 1])));
    if width < SIDE {
        for (p, to) in to.chunks_exact_mut(width).enumerate().take(SIDE) {
            for (i, to) in to.iter_mut().enumerate() {
                *to = words[i][p];
            }
        }
        return;
    }
    let lines = &mut to.as_chunks_mut::<SIDE>().0[..SIDE];
    for i in (0..SIDE).step_by(8) {
        for p in (0..SIDE).step_by(8) {
            // the bits are only moved, never used in arithmetic
            let square = std::array::from_fn(|a| std::array::from_fn(|b| f32::from_bits(words[i + a][p + b])));
            let square = A::transposed(square);
            for (b, line) in square.iter().enumerate() {
                for (a, value) in line.iter().enumerate() {
                    lines[p + b][i + a] = value.to_bits();
                }
            }
        }
    }
}

/// [`columns`] for full tiles of a source whose lanes are adjacent: needs no transposition.
#[inline(always)]
fn interleaved<T: Element>(
    &Source { values, depth_stride, alpha, .. }: &Source<T>,
    Part { lanes: (first, lanes), depth: (start, depth) }: Part,
    terms: usize,
    to: &mut [u32],
) {
    let values = &values[first + start * depth_stride..];
    let words = right_bytes(lanes) / 4;
    let lines = to.as_chunks_mut::<SIDE>().0;
    for p in 0..steps(depth) * DEPTH / 2 {
        for tile in 0..lanes / SIDE {
            let line = |at: usize| -> [f32; SIDE] {
                let line = &values[at * depth_stride + tile * SIDE..][..SIDE];
                std::array::from_fn(|i| alpha * line[i].to_f32())
            };
            let a = if 2 * p < depth { line(2 * p) } else { [0.0; SIDE] };
            let b = if 2 * p + 1 < depth { line(2 * p + 1) } else { [0.0; SIDE] };
            let at = (p / SIDE * terms * words) / SIDE + tile * SIDE + p % SIDE;
            for i in 0..SIDE {
                lines[at][i] = pair::<0>(a[i], b[i]);
            }
            if terms > 1 {
                for i in 0..SIDE {
                    lines[at + words / SIDE][i] = pair::<1>(a[i], b[i]);
                }
            }
            if terms > 2 {
                for i in 0..SIDE {
                    lines[at + 2 * words / SIDE][i] = pair::<2>(a[i], b[i]);
                }
            }
        }
    }
}
