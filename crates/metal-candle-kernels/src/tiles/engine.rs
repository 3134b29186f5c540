//! Splits a sum of products into tasks of tiles.

use super::amx::{DEPTH, LINE, Left, Operands, SIDE, Sums, TILE};
use super::lanes::{self, Wide};
use super::pack::{self, Part, Source, packed_bytes, steps, tiles};
use super::unit::{TileUnit, Unit};
use crate::operand::{MatmulPrecision, Matrix, Product, Start};
use crate::parallel::{Shared, for_each};
use std::arch::x86_64::{
    _mm512_add_ps, _mm512_castsi512_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_setzero_ps,
};
use std::cell::Cell;
use std::ptr;

/// Rows of a panel of the shared operand, and rows or columns of a panel of the streamed operand: two tiles.
const PANEL: usize = 2 * SIDE;
/// Panels of columns whose sums are accumulated together if there are several row panels.
const GROUP: usize = 8;
/// Tiles of a shared panel that are multiplied with a group of columns. They fit the L1 cache.
const BLOCK_TILES: usize = 32;
/// Steps that are multiplied at a time if there is one row panel.
const LONG_BLOCK: usize = 32;
/// Maximum number of row panels of a task. The sums of a group fit the L2 cache.
const TASK_PANELS: usize = 16;
/// Maximum number of panels of columns of a task with one row panel.
const TASK_COLUMNS: usize = 32;
/// Steps of a shared panel that a task packs.
const PACKED_STEPS: usize = 32;
/// Elements of the shared operand that are packed at a time.
const SHARED_ELEMENTS: usize = 4 << 20;

/// A buffer for one tile.
#[repr(align(64))]
#[derive(Clone, Copy)]
#[allow(dead_code)] // accessed as bytes
struct TileBuffer([u32; TILE / 4]);

thread_local! {
    static SHARED: Cell<Vec<TileBuffer>> = const { Cell::new(Vec::new()) };
    static BUFFER: Cell<Vec<TileBuffer>> = const { Cell::new(Vec::new()) };
    static SUMS: Cell<Vec<Sums>> = const { Cell::new(Vec::new()) };
}

fn bytes(tiles: &mut [TileBuffer]) -> &mut [u8] {
    // SAFETY: a buffer is an array of bytes.
    unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * TILE) }
}

/// The side of the tile product that the streamed operand is on.
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

/// The number of terms of the f32 operand that is multiplied with the weights: at least two, which are 16 bits, for the precision
/// of f32.
fn shared_terms(product: &Product) -> usize {
    match (product.b, product.precision) {
        (Matrix::BF16(_), MatmulPrecision::Bf16) => 1,
        _ => terms(&product.b).max(2),
    }
}

/// The maximum of [`shared_terms`].
const MAX_SHARED_TERMS: usize = 3;

/// Some rows of the result.
struct Chunk<'a> {
    unit: TileUnit,
    streamed: Streamed,
    products: &'a [Product<'a>],
    start: Start<'a>,
    /// Columns of the result.
    n: usize,
    /// The first row and the number of rows.
    rows: (usize, usize),
    /// The panels of the shared operand in order.
    shared: &'a [TileBuffer],
    tiles_per_panel: usize,
    c: Shared<f32>,
}

/// Computes [`crate::gemm_sum_to`] with tiles. The caller has checked the lengths of the operands and of the start, and that the
/// unit is available.
pub(crate) fn accumulate(unit: TileUnit, (m, n): (usize, usize), start: Start, products: &[Product], c: Shared<f32>) {
    let by_row = products.iter().max_by_key(|product| product.k).is_some_and(|product| product.b_strides.0 == 1);
    let streamed = if by_row { Streamed::Left } else { Streamed::Right };
    let depth: usize = products.iter().map(|product| DEPTH * steps(product.k)).sum();
    let rows = rows_at_a_time(depth);
    for first in (0..m).step_by(rows) {
        run(unit, (first, rows.min(m - first)), n, start, (streamed, products), c);
    }
}

/// Rows of the shared operand that are packed at a time.
fn rows_at_a_time(depth: usize) -> usize {
    (SHARED_ELEMENTS / depth.max(1)).max(PANEL) / PANEL * PANEL
}

/// The size of the packed shared operand `[m, depth]`, in bytes.
pub(crate) fn shared_bytes(m: usize, depth: usize) -> usize {
    let depth = DEPTH * steps(depth);
    2 * MAX_SHARED_TERMS * depth * m.next_multiple_of(PANEL).min(rows_at_a_time(depth))
}

/// Tiles of a shared panel of `rows` rows, for all products.
fn shared_tiles(products: &[Product], rows: usize) -> usize {
    products.iter().map(|product| shared_terms(product) * tiles(rows) * steps(product.k)).sum()
}

fn run(
    unit: TileUnit,
    (first, count): (usize, usize),
    n: usize,
    start: Start,
    (streamed, products): (Streamed, &[Product]),
    c: Shared<f32>,
) {
    let (panels, tiles_per_panel) = (count.div_ceil(PANEL), shared_tiles(products, count.min(PANEL)));
    let mut shared = SHARED.take();
    if shared.len() < panels * tiles_per_panel {
        // free first: growing in place would need memory for both buffers
        drop(shared);
        shared = vec![TileBuffer([0; TILE / 4]); panels * tiles_per_panel];
    }
    pack_shared((first, count), (streamed, products), tiles_per_panel, &mut shared);
    let depth: usize = products.iter().map(|product| product.k).sum();
    let chunk = Chunk { unit, streamed, products, start, n, rows: (first, count), shared: &shared, tiles_per_panel, c };
    let columns = n.div_ceil(PANEL);
    let threads = rayon::current_num_threads();
    // with few columns the threads split the rows
    let per_task = panels.div_ceil((4 * threads).div_ceil(columns)).clamp(1, TASK_PANELS);
    let parts = panels.div_ceil(per_task);
    let run = if per_task == 1 {
        (columns / (4 * threads)).clamp(1, TASK_COLUMNS)
    } else {
        columns.div_ceil(columns.div_ceil(GROUP).next_multiple_of(threads))
    };
    let runs = columns.div_ceil(run);
    for_each(runs * parts, count * n * depth / 64, |number| {
        let (first, part) = (number / parts * run, number % parts);
        let panels = (part * per_task, panels.min((part + 1) * per_task));
        task(&chunk, (first, columns.min(first + run)), panels);
    });
    SHARED.set(shared);
}

/// Packs the shared operand: panels of rows, each with all products in turn.
fn pack_shared(
    (first, count): (usize, usize),
    (streamed, products): (Streamed, &[Product]),
    tiles_per_panel: usize,
    to: &mut [TileBuffer],
) {
    let panels = count.div_ceil(PANEL);
    let to = Shared::new(bytes(to));
    let mut before = 0;
    for product in products {
        let terms = shared_terms(product);
        let source = Source {
            values: product.a,
            lane_stride: product.a_strides.0,
            depth_stride: product.a_strides.1,
            alpha: product.alpha,
            ahead: 0,
        };
        let blocks = steps(product.k).div_ceil(PACKED_STEPS);
        for_each(panels * blocks, count * product.k, |number| {
            let (panel, block) = (number / blocks, number % blocks);
            let lanes = (first + panel * PANEL, PANEL.min(count - panel * PANEL));
            let step = block * PACKED_STEPS;
            let depth = (step * DEPTH, (PACKED_STEPS * DEPTH).min(product.k - step * DEPTH));
            let start =
                panel * tiles_per_panel * TILE + packed_bytes(lanes.1, 1, before) + packed_bytes(lanes.1, terms, step);
            // SAFETY: the steps of panels do not overlap.
            let to = unsafe { to.part(start, packed_bytes(lanes.1, terms, steps(depth.1))) };
            let part = Part { lanes, depth };
            match streamed {
                Streamed::Left => pack::columns(&source, part, terms, to),
                Streamed::Right => pack::terms_by_step(&source, part, terms, to),
            }
        });
        before += terms * steps(product.k);
    }
}

/// Computes panels of columns for a range of row panels.
fn task(chunk: &Chunk, columns: (usize, usize), panels: (usize, usize)) {
    let (mut sums, mut buffer) = (SUMS.take(), BUFFER.take());
    // a single row panel reads the weights in memory order
    let group = if panels.1 - panels.0 == 1 { 1 } else { GROUP };
    let needed = group * (panels.1 - panels.0);
    if sums.len() < needed {
        sums.resize(needed, Sums([0.0; PANEL * PANEL]));
    }
    // SAFETY: the caller checked that the unit is available, and a task starts no other task.
    let unit = unsafe { Unit::new(chunk.unit) };
    for first in (columns.0..columns.1).step_by(group) {
        let group = Group { columns: (first, columns.1.min(first + group)), end: columns.1, panels };
        group.accumulate(chunk, (&unit, &mut buffer, &mut sums));
        for panel in panels.0..panels.1 {
            for column in group.columns.0..group.columns.1 {
                finish(chunk, panel, column, &sums[group.sums(panel, column)]);
            }
        }
    }
    drop(unit);
    BUFFER.set(buffer);
    SUMS.set(sums);
}

/// A panel of columns, for some steps.
#[derive(Clone, Copy)]
struct Operand {
    left: Left,
    /// Contiguous memory that is read after this panel.
    ahead: Option<*const u8>,
    /// The same part of the next steps, with the row stride of `left`.
    next: Option<*const u8>,
}

impl Operand {
    const NONE: Self = Self { left: Left { start: ptr::null(), stride: 0, step: 0 }, ahead: None, next: None };

    /// Prefetches part `number` of `count` of the next steps.
    fn prefetch(self, (number, count): (usize, usize), steps: usize) {
        let Some(next) = self.next else { return };
        let lanes = PANEL.div_ceil(count);
        for lane in number * lanes..PANEL.min((number + 1) * lanes) {
            for step in 0..steps {
                lanes::prefetch(next.wrapping_add(lane * self.left.stride + step * 2 * DEPTH));
            }
        }
    }
}

/// Panels of columns and of rows whose sums are accumulated together.
struct Group {
    columns: (usize, usize),
    /// The end of the columns of the task.
    end: usize,
    panels: (usize, usize),
}

impl Group {
    /// The index of the sums of a row panel and a panel of columns.
    fn sums(&self, panel: usize, column: usize) -> usize {
        (panel - self.panels.0) * (self.columns.1 - self.columns.0) + column - self.columns.0
    }

    fn accumulate(&self, chunk: &Chunk, (unit, buffer, sums): (&Unit, &mut Vec<TileBuffer>, &mut [Sums])) {
        let (mut is_added, mut before) = (false, 0);
        for product in chunk.products {
            let (a_terms, all) = (shared_terms(product), steps(product.k));
            let block = if self.panels.1 - self.panels.0 == 1 { LONG_BLOCK } else { BLOCK_TILES / (2 * a_terms) };
            for step in (0..all).step_by(block) {
                let steps = (step, block.min(all - step));
                let state = (steps, before, is_added);
                match &product.b {
                    Matrix::F32(b) => self.add_block::<_, 3, 3>(chunk, (b, product), state, (unit, buffer, sums)),
                    Matrix::F16(b) => self.add_block::<_, 2, 2>(chunk, (b, product), state, (unit, buffer, sums)),
                    Matrix::BF16(b) if a_terms == 1 => {
                        self.add_block::<_, 1, 1>(chunk, (b, product), state, (unit, buffer, sums));
                    }
                    Matrix::BF16(b) => self.add_block::<_, 2, 1>(chunk, (b, product), state, (unit, buffer, sums)),
                }
                is_added = true;
            }
            before += all * a_terms;
        }
        if !is_added {
            sums.fill(Sums([0.0; PANEL * PANEL]));
        }
    }

    /// Adds some steps of a product to all sums. The streamed operand `b` has `TERMS` terms, the shared operand `SHARED_TERMS`.
    fn add_block<T: Wide, const SHARED_TERMS: usize, const TERMS: usize>(
        &self,
        chunk: &Chunk,
        (b, product): (&[T], &Product),
        ((step, count), before, is_added): ((usize, usize), usize, bool),
        (unit, buffer, sums): (&Unit, &mut Vec<TileBuffer>, &mut [Sums]),
    ) {
        let width = |column: usize| PANEL.min(chunk.n - column * PANEL);
        let tiles_per_column = 2 * TERMS * count;
        let needed = tiles_per_column * (self.columns.1 - self.columns.0);
        if buffer.len() < needed {
            buffer.resize(needed, TileBuffer([0; TILE / 4]));
        }
        let mut streamed = [Operand::NONE; GROUP];
        for column in self.columns.0..self.columns.1 {
            let number = column - self.columns.0;
            let buffer = &mut buffer[number * tiles_per_column..][..tiles_per_column];
            streamed[number] =
                self.stream::<T, TERMS>(chunk, (b, product), (column, width(column)), (step, count), buffer);
        }
        for panel in self.panels.0..self.panels.1 {
            let rows = PANEL.min(chunk.rows.1 - panel * PANEL);
            let offset = packed_bytes(rows, 1, before) + packed_bytes(rows, SHARED_TERMS, step);
            let shared = chunk.shared[panel * chunk.tiles_per_panel..].as_ptr().cast::<u8>().wrapping_add(offset);
            for column in self.columns.0..self.columns.1 {
                let operand = streamed[column - self.columns.0];
                operand.prefetch((panel - self.panels.0, self.panels.1 - self.panels.0), count);
                let Operand { left: operand, ahead, .. } = operand;
                let sums = &mut sums[self.sums(panel, column)];
                let (rows, columns) = (tiles(rows), tiles(width(column)));
                // SAFETY: the operands were packed for these numbers of tiles, steps and terms.
                unsafe {
                    match chunk.streamed {
                        Streamed::Left => {
                            let operands = Operands { left: operand, right: shared, steps: count, ahead };
                            unit.multiply::<TERMS, SHARED_TERMS>((columns, rows), operands, is_added, sums);
                        }
                        Streamed::Right => {
                            let left = Left { start: shared, stride: LINE, step: SHARED_TERMS * rows * TILE };
                            let operands = Operands { left, right: operand.start, steps: count, ahead };
                            unit.multiply::<SHARED_TERMS, TERMS>((rows, columns), operands, is_added, sums);
                        }
                    }
                }
            }
        }
    }

    /// Packs `width` columns of B for `count` steps of the depth. Rows of bf16 along the depth are used in place.
    fn stream<T: Wide, const TERMS: usize>(
        &self,
        chunk: &Chunk,
        (b, product): (&[T], &Product),
        (column, width): (usize, usize),
        (step, count): (usize, usize),
        buffer: &mut [TileBuffer],
    ) -> Operand {
        let (depth_stride, lane_stride) = product.b_strides;
        let (at, depth) = (step * DEPTH, (count * DEPTH).min(product.k - step * DEPTH));
        let is_last = at + depth == product.k;
        let next_group = self.columns.1 - self.columns.0;
        let has_next = column + next_group < self.end;
        // from an element to the element with the same role in the next block
        let ahead = if !is_last && next_group > 1 {
            depth * depth_stride
        } else if has_next {
            next_group * PANEL * lane_stride
        } else {
            0
        };
        let first = column * PANEL * lane_stride + at * depth_stride;
        let operand = Operand::NONE;
        let is_in_place = chunk.streamed == Streamed::Left && TERMS == 1 && depth_stride == 1;
        let is_whole = width.is_multiple_of(SIDE) && depth == count * DEPTH;
        let start = b[first..].as_ptr();
        // rows that cross cache lines are copied if they are used more than once
        let is_aligned = start.addr().is_multiple_of(LINE) && (size_of::<T>() * lane_stride).is_multiple_of(LINE);
        if is_in_place && is_whole && (is_aligned || next_group == 1) {
            let mut operand = Operand {
                left: Left { start: start.cast(), stride: size_of::<T>() * lane_stride, step: LINE },
                ..operand
            };
            if next_group == 1 && ahead > 0 && lane_stride == product.k {
                // the next panel follows in memory
                operand.ahead = Some(start.wrapping_add(PANEL * lane_stride + (PANEL - 1) * at).cast());
            } else if ahead > 0 {
                operand.next = Some(start.wrapping_add(ahead).cast());
            }
            return operand;
        }
        let source = Source { values: b, lane_stride, depth_stride, alpha: 1.0, ahead };
        let part = Part { lanes: (column * PANEL, width), depth: (at, depth) };
        let (mut stride, mut step) = (LINE, TERMS * tiles(width) * TILE);
        match (chunk.streamed, TERMS) {
            (Streamed::Right, _) => pack::columns(&source, part, TERMS, bytes(buffer)),
            (Streamed::Left, 1) => {
                (stride, step) = (LINE * count, LINE);
                pack::rows(&source, part, stride, bytes(buffer));
            }
            (Streamed::Left, _) => pack::terms_by_step(&source, part, TERMS, bytes(buffer)),
        }
        Operand { left: Left { start: buffer.as_ptr().cast(), stride, step }, ..operand }
    }
}

/// Adds the sums of a panel to the initial value and writes them to the result.
fn finish(chunk: &Chunk, panel: usize, column: usize, sums: &Sums) {
    let n = chunk.n;
    let (first, rows) = (chunk.rows.0 + panel * PANEL, PANEL.min(chunk.rows.1 - panel * PANEL));
    let (column, width) = (column * PANEL, PANEL.min(n - column * PANEL));
    let start = match chunk.start {
        Start::Zero => From::Nothing,
        Start::Result => From::Rows(chunk.c.pointer().cast_const(), n),
        Start::Row(row) => From::Rows(row.as_ptr(), 0),
        Start::Matrix(matrix) => From::Rows(matrix.as_ptr(), n),
    };
    // SAFETY: tasks have disjoint rows or columns; the caller checked the lengths; tiles need AVX-512.
    unsafe { write(start, chunk, (first, rows), (column, width), sums) };
}

/// The initial value: none, or rows with a stride.
#[derive(Clone, Copy)]
enum From {
    Nothing,
    Rows(*const f32, usize),
}

/// # Safety
/// AVX-512 F is available, and the rows and columns are within the initial value and the result.
#[target_feature(enable = "avx512f")]
unsafe fn write(
    start: From,
    chunk: &Chunk,
    (first, rows): (usize, usize),
    (column, width): (usize, usize),
    sums: &Sums,
) {
    for i in (0..rows).step_by(SIDE) {
        for j in (0..width).step_by(SIDE) {
            let mut square = [lanes::zero(); SIDE];
            let (from, is_turned) = match chunk.streamed {
                Streamed::Left => (j * PANEL + i, true),
                Streamed::Right => (i * PANEL + j, false),
            };
            for (line, square) in square.iter_mut().enumerate() {
                // SAFETY: a square of the sums.
                *square = unsafe { _mm512_loadu_si512(sums.0.as_ptr().add(from + line * PANEL).cast()) };
            }
            if is_turned {
                square = lanes::transposed(&square);
            }
            let mask = lanes::first(width - j);
            for (line, sums) in square.into_iter().enumerate().take(rows - i) {
                let (row, column) = (first + i + line, column + j);
                let sums = _mm512_castsi512_ps(sums);
                // SAFETY: the caller's promise; masked elements are not accessed.
                unsafe {
                    let start = match start {
                        From::Nothing => _mm512_setzero_ps(),
                        From::Rows(start, stride) => _mm512_maskz_loadu_ps(mask, start.add(row * stride + column)),
                    };
                    let to = chunk.c.pointer().add(row * chunk.n + column);
                    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(start, sums));
                }
            }
        }
    }
}
