//! Products of quantized activations with block-quantized weights.

use super::activations::{Activations, Sums, with_quantized};
use super::kernels::{Kernels, MAX_ROWS, panel_bytes};
use super::lanes::{COLUMNS, Kind, Rows, Unpack};
use crate::blocks::decode::{Decoder, IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::blocks::matrix::{BlockFormat, with_writable};
use crate::blocks::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};
use crate::blocks::task::Task;
use crate::gemm_rows::Line;
use crate::isa::{Int8, int8};
use crate::parallel::for_each;
use std::cell::Cell;

/// Columns of a panel: a multiple of the block lengths. With a tile of activations, it stays in the L1 cache.
const DEPTH: usize = 512;
/// Number of panels that are multiplied with a tile of activations one after the other, if there are many rows.
const PANELS: usize = 4;
/// Maximum number of rows of A for which one panel is used.
const FEW_ROWS: usize = 8;
/// Maximum number of weights in a task. The last prefetches of a task are for weights of another task, so few large tasks are
/// better.
const TASK_ELEMENTS: usize = 1024 * 1024;

thread_local! {
    static BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Writes the product and returns `true`. Returns `false` if there is no kernel for the processor or the format.
pub(in crate::blocks) fn add_rows(task: &Task) -> bool {
    if !task.b.format().is_writable() {
        return false;
    }
    match int8() {
        #[cfg(target_arch = "x86_64")]
        Some(Int8::Avx512Vnni) => run::<super::x86::Avx512>(task),
        #[cfg(target_arch = "x86_64")]
        Some(Int8::AvxVnni) => run::<super::x86::AvxVnni>(task),
        #[cfg(target_arch = "x86_64")]
        Some(Int8::Avx2) => run::<super::x86::Avx2>(task),
        #[cfg(target_arch = "aarch64")]
        Some(Int8::Dotprod) => run::<super::neon::Dotprod>(task),
        None => return false,
    }
    true
}

pub(super) fn run<L: Kernels>(task: &Task) {
    // `add_rows` checked the format
    with_writable!(task.b.format(), F => Kernel::of::<L, F>().run(task), {});
}

/// The rows of weights.
#[derive(Clone, Copy)]
struct Weights<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    rows: usize,
}

/// The loops for an instruction set and a format, as pointers, so that their callers are compiled only once.
struct Kernel {
    /// Rows of weights of a vector.
    rows: usize,
    /// Rows of A of a tile.
    height: usize,
    /// Weights of a block.
    len: usize,
    /// Bytes of a block.
    bytes: usize,
    groups: usize,
    sums: Sums,
    /// Bytes of 32 columns of a panel.
    panel_bytes: usize,
    dots: unsafe fn(Rows, usize, *const u8, *const u8, *mut f32),
    fill: unsafe fn(Rows, usize, *const u8, *mut u8),
    add_tile: unsafe fn(*const u8, usize, (*const u8, usize), usize, *mut f32),
    add_scaled: unsafe fn(f32, &[f32], &mut [f32]),
}

impl Kernel {
    fn of<L: Kernels, F: Decoder + Unpack>() -> Self {
        Self {
            rows: L::ROWS,
            height: L::HEIGHT,
            len: F::LEN,
            bytes: F::BYTES,
            groups: F::Kind::GROUPS,
            sums: if F::Kind::HAS_MINIMUMS { Sums::Minimums } else { Sums::Zero(F::zero::<L>()) },
            panel_bytes: panel_bytes::<L, F::Kind>(),
            dots: L::dots::<F>,
            fill: L::fill::<F>,
            add_tile: L::add_tile::<F::Kind>,
            add_scaled: L::add_scaled,
        }
    }

    fn run(&self, task: &Task) {
        let ((m, n), k) = (task.shape, task.b.columns());
        let row_bytes = k / self.len * self.bytes;
        // with fewer rows than lanes, the last row is repeated
        let mut padded = Vec::new();
        if n < self.rows {
            padded.extend_from_slice(task.b.bytes());
            for _ in n..self.rows {
                padded.extend_from_slice(&task.b.bytes()[(n - 1) * row_bytes..]);
            }
        }
        let bytes = if padded.is_empty() { task.b.bytes() } else { &padded };
        let weights = Weights { bytes, row_bytes, rows: n.max(self.rows) };
        with_quantized(task.a, (m, k), (self.groups, self.sums), |a| {
            let width = self.rows * if m <= FEW_ROWS { 1 } else { PANELS };
            let per_task = (TASK_ELEMENTS / k.max(1)).min(n.div_ceil(4 * rayon::current_num_threads()));
            let per_task = per_task.max(1).next_multiple_of(width);
            for_each(n.div_ceil(per_task), m * n * k, |number| {
                let (from, to) = (number * per_task, n.min((number + 1) * per_task));
                // SAFETY: tasks have disjoint columns.
                unsafe { task.start.write_columns(task.c, (m, n), from..to) };
                if m == 1 {
                    return self.multiply_row(task, weights, a, (from, to));
                }
                for at in (from..to).step_by(width) {
                    self.multiply(task, weights, a, (at, to.min(at + width)));
                }
            });
        });
    }

    /// A vector of rows of weights, from column `column` on.
    fn weights(&self, weights: Weights, first: usize, column: usize) -> Rows {
        let at = first * weights.row_bytes + column / self.len * self.bytes;
        Rows { first: weights.bytes.as_ptr().wrapping_add(at), stride: weights.row_bytes }
    }

    /// The address to prefetch: the same columns of the rows starting at `first`, as one range of bytes.
    fn next(&self, weights: Weights, first: usize, column: usize) -> *const u8 {
        let at = first * weights.row_bytes + self.rows * (column / self.len * self.bytes);
        weights.bytes.as_ptr().wrapping_add(at)
    }

    /// Columns `from..to` of the result of one row.
    fn multiply_row(&self, task: &Task, weights: Weights, a: Activations, (from, to): (usize, usize)) {
        let blocks = task.b.columns() / self.len;
        for at in (from..to).step_by(self.rows) {
            // the last vector overlaps the previous one
            let first = at.min(weights.rows - self.rows);
            let rows = self.weights(weights, first, 0);
            let mut dots = [0.0; MAX_ROWS];
            // SAFETY: these are rows of the matrix, and the activations have its columns.
            let next = self.next(weights, first + self.rows, 0);
            unsafe { (self.dots)(rows, blocks, next, a.row(0, 0, self.groups), dots.as_mut_ptr()) };
            let width = self.rows.min(to - at);
            // SAFETY: tasks have disjoint columns.
            unsafe { (self.add_scaled)(task.alpha, &dots[at - first..][..width], task.c.part(at, width)) };
        }
    }

    /// Columns `from..to` of the result, at most [`PANELS`] vectors of them.
    fn multiply(&self, task: &Task, weights: Weights, a: Activations, (from, to): (usize, usize)) {
        let ((m, n), k) = (task.shape, task.b.columns());
        let panel_lines = (DEPTH.min(k) / COLUMNS * self.panel_bytes).div_ceil(64) + 1;
        let sums_lines = (m * self.rows).div_ceil(16);
        let panels = (to - from).div_ceil(self.rows);
        let mut buffer = BUFFER.take();
        if buffer.len() < panels * (panel_lines + sums_lines) {
            buffer = vec![Line::default(); panels * (panel_lines + sums_lines)];
        }
        let (panel, sums) = buffer.split_at_mut(panels * panel_lines);
        let sums = &mut Line::floats_mut(sums)[..panels * 16 * sums_lines];
        sums.fill(0.0);
        for at in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - at);
            for number in 0..panels {
                let first = (from + number * self.rows).min(weights.rows - self.rows);
                let rows = self.weights(weights, first, at);
                let panel = Line::bytes_mut(&mut panel[number * panel_lines..][..panel_lines]);
                // SAFETY: these are rows of the matrix, and the panel is large enough for the columns.
                let next = self.next(weights, first + panels * self.rows, at);
                unsafe { (self.fill)(rows, depth / self.len, next, panel.as_mut_ptr()) };
            }
            for i in (0..m).step_by(self.height) {
                let height = self.height.min(m - i);
                let rows = (a.row(i, at / COLUMNS, self.groups), a.stride);
                for number in 0..panels {
                    let panel = Line::bytes_mut(&mut panel[number * panel_lines..][..panel_lines]);
                    let sums = &mut sums[number * 16 * sums_lines + i * self.rows..][..height * self.rows];
                    // SAFETY: the panel was filled with these columns, which the activations have.
                    unsafe { (self.add_tile)(panel.as_ptr(), depth / COLUMNS, rows, height, sums.as_mut_ptr()) };
                }
            }
        }
        for number in 0..panels {
            let at = from + number * self.rows;
            let (first, width) = (at.min(weights.rows - self.rows), self.rows.min(to - at));
            for i in 0..m {
                let dots = &sums[number * 16 * sums_lines + i * self.rows..][at - first..][..width];
                // SAFETY: tasks have disjoint columns.
                unsafe { (self.add_scaled)(task.alpha, dots, task.c.part(i * n + at, width)) };
            }
        }
        BUFFER.set(buffer);
    }
}
