//! Splits a sum of products into tasks of tiles.

use super::amx::{DEPTH, Left, Right, SIDE, Sums, TILE, multiply};
use super::pack::{self, Part, Source, right_bytes, steps, tiles};
use crate::isa::{Arithmetic, dispatch};
use crate::math::Element;
use crate::operand::{Matrix, Product, Start};
use crate::parallel::{Shared, for_each};
use std::cell::Cell;

/// Rows of a panel of the shared operand, and rows or columns of a panel of the streamed operand: two tiles.
const PANEL: usize = 2 * SIDE;
/// Steps of a streamed panel that a task multiplies with all its shared panels before the next steps. They fit the L1 cache.
const BLOCK: usize = 16;
/// Maximum number of shared panels of a task. Their sums fit the L2 cache.
const TASK_PANELS: usize = 16;
/// Elements of the shared operand that are packed at once.
const SHARED_ELEMENTS: usize = 4 << 20;

/// A buffer for one tile.
#[repr(align(64))]
#[derive(Clone, Copy)]
#[allow(dead_code)] // seen as words or bytes
struct TileBuffer([u32; TILE / 4]);

thread_local! {
    static SHARED: Cell<Vec<TileBuffer>> = const { Cell::new(Vec::new()) };
    static STREAMED: Cell<Vec<TileBuffer>> = const { Cell::new(Vec::new()) };
    static SUMS: Cell<Vec<Sums>> = const { Cell::new(Vec::new()) };
}

fn words(tiles: &mut [TileBuffer]) -> &mut [u32] {
    // SAFETY: a buffer is an array of words.
    unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * TILE / 4) }
}

fn bytes(tiles: &mut [TileBuffer]) -> &mut [u8] {
    // SAFETY: as above, of bytes.
    unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * TILE) }
}

/// Which side of the tile product the streamed operand is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Streamed {
    /// The columns of B are the rows of the left operand, and the tiles accumulate the transposed result. For weights that are
    /// contiguous along the depth.
    Left,
    /// The columns of B are the columns of the right operand.
    Right,
}

/// The number of bf16 terms of the weights.
fn terms(matrix: &Matrix) -> usize {
    match matrix {
        Matrix::BF16(_) => 1,
        Matrix::F16(_) => 2,
        Matrix::F32(_) => 3,
    }
}

/// The number of terms of the f32 operand that is multiplied with the weights: at least two, which are 16 bits.
fn shared_terms(weights: &Matrix) -> usize {
    terms(weights).max(2)
}

/// The maximum of [`shared_terms`].
const MAX_SHARED_TERMS: usize = 3;

/// Some rows of the result.
struct Chunk<'a> {
    streamed: Streamed,
    products: &'a [Product<'a>],
    start: Start<'a>,
    /// Columns of the result.
    n: usize,
    /// The first row and the number of rows.
    rows: (usize, usize),
    /// The panels of the shared operand in order.
    shared: &'a [TileBuffer],
    c: Shared<f32>,
}

/// Computes [`crate::gemm_sum_to`] with tiles. The caller has checked the lengths of the operands.
pub(crate) fn add_up((m, n): (usize, usize), start: Start, products: &[Product], c: Shared<f32>) {
    let by_row = products.iter().max_by_key(|product| product.k).is_some_and(|product| product.b_strides.0 == 1);
    let streamed = if by_row { Streamed::Left } else { Streamed::Right };
    let depth: usize = products.iter().map(|product| DEPTH * steps(product.k)).sum();
    let rows = rows_at_a_time(depth);
    for first in (0..m).step_by(rows) {
        run((first, rows.min(m - first)), n, start, (streamed, products), c);
    }
}

/// Rows of the shared operand that are packed at once.
fn rows_at_a_time(depth: usize) -> usize {
    (SHARED_ELEMENTS / depth.max(1)).max(PANEL) / PANEL * PANEL
}

/// The size of the packed shared operand `[m, depth]`, in bytes.
pub(crate) fn packed_bytes(m: usize, depth: usize) -> usize {
    let depth = DEPTH * steps(depth);
    2 * MAX_SHARED_TERMS * depth * m.next_multiple_of(PANEL).min(rows_at_a_time(depth))
}

/// Tiles of a shared panel of `rows` rows, for all products.
fn shared_tiles(products: &[Product], rows: usize) -> usize {
    products.iter().map(|product| shared_terms(&product.b) * tiles(rows) * steps(product.k)).sum()
}

fn run(
    (first, count): (usize, usize),
    n: usize,
    start: Start,
    (streamed, products): (Streamed, &[Product]),
    c: Shared<f32>,
) {
    let (panels, tiles_per_panel) = (count.div_ceil(PANEL), shared_tiles(products, count.min(PANEL)));
    let mut shared = SHARED.take();
    if shared.len() < panels * tiles_per_panel {
        // freed first: growing in place would hold both buffers
        drop(shared);
        shared = vec![TileBuffer([0; TILE / 4]); panels * tiles_per_panel];
    }
    let depth: usize = products.iter().map(|product| product.k).sum();
    let to = Shared::new(&mut shared);
    for_each(panels, count * depth, |panel| {
        let lanes = (first + panel * PANEL, PANEL.min(count - panel * PANEL));
        // SAFETY: panels do not overlap.
        let mut to = unsafe { to.part(panel * tiles_per_panel, tiles_per_panel) };
        for product in products {
            let source = Source {
                values: product.a,
                lane_stride: product.a_strides.0,
                depth_stride: product.a_strides.1,
                alpha: product.alpha,
            };
            let terms = shared_terms(&product.b);
            let (here, rest) = to.split_at_mut(terms * tiles(lanes.1) * steps(product.k));
            let part = Part { lanes, depth: (0, product.k) };
            match streamed {
                Streamed::Left => pack::columns(&source, part, terms, words(here)),
                Streamed::Right => pack::terms_by_step(&source, part, terms, bytes(here)),
            }
            to = rest;
        }
    });
    let chunk = Chunk { streamed, products, start, n, rows: (first, count), shared: &shared, c };
    let columns = n.div_ceil(PANEL);
    // with few columns the threads split the rows
    let wanted = (4 * rayon::current_num_threads()).div_ceil(columns).min(panels);
    let per_task = panels.div_ceil(wanted.max(1)).min(TASK_PANELS);
    let parts = panels.div_ceil(per_task);
    for_each(columns * parts, count * n * depth / 64, |number| {
        let (column, part) = (number / parts, number % parts);
        let panels = (part * per_task, panels.min((part + 1) * per_task));
        task(&chunk, column * PANEL, panels, tiles_per_panel);
    });
    SHARED.set(shared);
}

/// Computes the panel of columns that starts at `column`, for a range of row panels.
fn task(chunk: &Chunk, column: usize, panels: (usize, usize), tiles_per_panel: usize) {
    let width = PANEL.min(chunk.n - column);
    let mut sums = SUMS.take();
    if sums.len() < panels.1 - panels.0 {
        sums.resize(panels.1 - panels.0, Sums([0.0; PANEL * PANEL]));
    }
    let mut streamed = STREAMED.take();
    let (mut is_added, mut before) = (false, 0);
    for product in chunk.products {
        let (a_terms, b_terms, all) = (shared_terms(&product.b), terms(&product.b), steps(product.k));
        for step in (0..all).step_by(BLOCK) {
            let count = BLOCK.min(all - step);
            let from = (column, width, step, count);
            let operand = match &product.b {
                Matrix::F32(b) => stream(b, product, chunk.streamed, from, &mut streamed),
                Matrix::F16(b) => stream(b, product, chunk.streamed, from, &mut streamed),
                Matrix::BF16(b) => stream(b, product, chunk.streamed, from, &mut streamed),
            };
            for panel in panels.0..panels.1 {
                let rows = PANEL.min(chunk.rows.1 - panel * PANEL);
                let sums = &mut sums[panel - panels.0];
                let at = panel * tiles_per_panel + before * tiles(rows);
                let shared = chunk.shared[at..].as_ptr().cast::<u8>();
                // SAFETY: the operands were packed for these numbers of lanes, steps and terms, and AMX is available.
                unsafe {
                    match chunk.streamed {
                        Streamed::Left => {
                            let offset = step * a_terms * right_bytes(rows);
                            let columns = if rows <= SIDE { rows } else { PANEL };
                            let right = Right { start: shared.wrapping_add(offset), columns };
                            add((operand, b_terms), (right, a_terms), (width, count), is_added, sums);
                        }
                        Streamed::Right => {
                            let offset = step * a_terms * tiles(rows) * TILE;
                            let left = Left { start: shared.wrapping_add(offset), stride: 2 * DEPTH };
                            let columns = if width <= SIDE { width } else { PANEL };
                            let right = Right { start: operand.start, columns };
                            add((left, a_terms), (right, b_terms), (rows, count), is_added, sums);
                        }
                    }
                }
            }
            is_added = true;
        }
        before += all * a_terms;
    }
    if !is_added {
        sums.fill(Sums([0.0; PANEL * PANEL]));
    }
    for panel in panels.0..panels.1 {
        let rows = PANEL.min(chunk.rows.1 - panel * PANEL);
        let sums = &mut sums[panel - panels.0];
        finish(chunk, (chunk.rows.0 + panel * PANEL, rows), (column, width), sums);
    }
    STREAMED.set(streamed);
    SUMS.set(sums);
}

/// Packs `width` columns of B, starting at `column`, for `count` steps of the depth. Rows of bf16 along the depth are used in
/// place.
fn stream<T: Element>(
    b: &[T],
    product: &Product,
    streamed: Streamed,
    (column, width, step, count): (usize, usize, usize, usize),
    buffer: &mut Vec<TileBuffer>,
) -> Left {
    let (depth_stride, lane_stride) = product.b_strides;
    let (at, depth) = (step * DEPTH, (count * DEPTH).min(product.k - step * DEPTH));
    let terms = terms(&product.b);
    let is_whole = width == PANEL || width <= SIDE;
    if streamed == Streamed::Left && terms == 1 && depth_stride == 1 && is_whole && depth == count * DEPTH {
        let start = b[column * lane_stride + at..].as_ptr().cast();
        return Left { start, stride: size_of::<T>() * lane_stride };
    }
    let needed = (terms * count * 2).max(buffer.len());
    buffer.resize(needed, TileBuffer([0; TILE / 4]));
    let source = Source { values: b, lane_stride, depth_stride, alpha: 1.0 };
    let part = Part { lanes: (column, width), depth: (at, depth) };
    let mut stride = 2 * DEPTH;
    match (streamed, terms) {
        (Streamed::Right, _) => pack::columns(&source, part, terms, words(buffer)),
        (Streamed::Left, 1) => {
            stride = 2 * DEPTH * count;
            pack::rows(&source, part, stride, bytes(buffer));
        }
        (Streamed::Left, _) => pack::terms_by_step(&source, part, terms, bytes(buffer)),
    }
    Left { start: buffer.as_ptr().cast(), stride }
}

/// Dispatches to [`multiply`] by the numbers of tiles and terms.
///
/// # Safety
/// As of [`multiply`].
unsafe fn add(
    (left, a_terms): (Left, usize),
    (right, b_terms): (Right, usize),
    (rows, steps): (usize, usize),
    is_added: bool,
    sums: &mut Sums,
) {
    macro_rules! choose {
        ($(($a:literal, $b:literal, $a_terms:literal, $b_terms:literal))*) => {
            match (tiles(rows), tiles(right.columns), a_terms, b_terms) {
                // SAFETY: the caller's promise.
                $(($a, $b, $a_terms, $b_terms) => unsafe {
                    multiply::<$a, $b, $a_terms, $b_terms>(left, right, (rows, steps), is_added, sums);
                },)*
                other => unreachable!("tiles and terms {other:?}"),
            }
        };
    }
    choose! {
        (1, 1, 1, 2) (1, 2, 1, 2) (2, 1, 1, 2) (2, 2, 1, 2)
        (1, 1, 2, 1) (1, 2, 2, 1) (2, 1, 2, 1) (2, 2, 2, 1)
        (1, 1, 2, 2) (1, 2, 2, 2) (2, 1, 2, 2) (2, 2, 2, 2)
        (1, 1, 3, 3) (1, 2, 3, 3) (2, 1, 3, 3) (2, 2, 3, 3)
    }
}

dispatch! {
    /// Adds the sums of a panel to the initial value and writes them to the result.
    fn finish(chunk: &Chunk, rows: (usize, usize), columns: (usize, usize), sums: &mut Sums) = finish_body
}

#[inline(always)]
fn finish_body<A: Arithmetic>(
    chunk: &Chunk,
    (first, rows): (usize, usize),
    (column, width): (usize, usize),
    sums: &mut Sums,
) {
    if chunk.streamed == Streamed::Left {
        transpose::<A>(sums);
    }
    for (i, sums) in sums.0.as_chunks::<PANEL>().0.iter().enumerate().take(rows) {
        let at = (first + i) * chunk.n + column;
        // SAFETY: tasks have rows or columns of their own.
        let c = unsafe { chunk.c.part(at, width) };
        match chunk.start {
            Start::Zero => store(c, sums, |_, _| 0.0),
            Start::Result => store(c, sums, |c, _| c),
            Start::Row(row) => store(c, sums, |_, j| row[column + j]),
            Start::Matrix(matrix) => {
                let matrix = &matrix[at..][..width];
                store(c, sums, |_, j| matrix[j]);
            }
        }
    }
}

/// Writes `start + sums`. A full row has a constant length, so that the loop is vectorized.
#[inline(always)]
fn store(c: &mut [f32], sums: &[f32; PANEL], start: impl Fn(f32, usize) -> f32) {
    if let Some(c) = c.first_chunk_mut::<PANEL>() {
        for j in 0..PANEL {
            c[j] = start(c[j], j) + sums[j];
        }
        return;
    }
    for (j, (c, sum)) in c.iter_mut().zip(sums).enumerate() {
        *c = start(*c, j) + sum;
    }
}

#[inline(always)]
fn transpose<A: Arithmetic>(sums: &mut Sums) {
    let square = |sums: &Sums, i: usize, j: usize| -> [[f32; 8]; 8] {
        std::array::from_fn(|a| std::array::from_fn(|b| sums.0[(i + a) * PANEL + j + b]))
    };
    let put = |sums: &mut Sums, i: usize, j: usize, square: [[f32; 8]; 8]| {
        for (a, row) in square.iter().enumerate() {
            sums.0[(i + a) * PANEL + j..][..8].copy_from_slice(row);
        }
    };
    for i in (0..PANEL).step_by(8) {
        for j in (i..PANEL).step_by(8) {
            let (here, there) = (A::transposed(square(sums, i, j)), A::transposed(square(sums, j, i)));
            put(sums, j, i, here);
            put(sums, i, j, there);
        }
    }
}
