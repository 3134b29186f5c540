//! Computes products with block-quantized weights whose result for a row does not depend on other rows. Inference uses them for
//! any number of rows, training (in f32) for few rows.

use super::dots::{Dequantize, HEIGHT, Operands, WIDTH};
use super::int8;
use super::matrix::BlockMatrix;
use super::task::Task;
use crate::gemm_rows::{Line, Ordered, add_dots, row_lines, with_ordered_rows};
#[cfg(target_arch = "x86_64")]
use crate::gemm_tile::x86;
use crate::gemm_tile::{FloatVector, Portable};
use crate::isa::Arithmetic;
#[cfg(target_arch = "aarch64")]
use crate::isa::Fused;
#[cfg(not(target_arch = "aarch64"))]
use crate::isa::Separate;
use crate::operand::Start;
use crate::parallel::{for_each, written};
use std::cell::Cell;

/// The number of columns that are dequantized at a time: four rows of them fill half of the L1 cache.
const DEPTH: usize = 1024;
/// The stride of dequantized rows; not a power of two, which would map rows to the same cache sets.
const STRIDE: usize = DEPTH + 16;
/// Rows that are dequantized at a time if A has many rows.
const PANEL_ROWS: usize = 48;
/// Weights of a task.
const TASK_ELEMENTS: usize = 128 * 1024;

thread_local! {
    static PANEL: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// `start + alpha A B^T` as a new matrix `[m, n]`, with `A: [m, k]` and `B: [n, k]`.
///
/// The bits of a row of the result do not depend on other rows. If the processor has an 8-bit kernel, each 32 activations are
/// rounded to multiples of their largest magnitude divided by 127: the relative error is about 0.0054 for normal activations.
/// Then a row with a non-finite value becomes NaN, and 32 values below 1e-30 count as zero.
///
/// # Panics
/// An operand does not have the shape, or the start is the result itself.
#[must_use]
pub fn block_row_products((m, n): (usize, usize), start: Start, a: &[f32], b: BlockMatrix, alpha: f32) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every element is written from the start before it is read.
    unsafe { written(m * n, |c| add_int8_rows(&Task { shape: (m, n), start, a, b, alpha, c })) }
}

/// Computes the product with 8-bit activations if the processor has a kernel, otherwise in f32.
pub(super) fn add_int8_rows(task: &Task) {
    if task.check() && !int8::add_rows(task) {
        run_f32(task);
    }
}

/// Computes the product in f32.
pub(super) fn add_rows(task: &Task) {
    if task.check() {
        run_f32(task);
    }
}

fn run_f32(task: &Task) {
    #[cfg(target_arch = "x86_64")]
    match crate::isa::isa() {
        crate::isa::Isa::Avx512 => return run::<x86::Avx512>(task),
        crate::isa::Isa::Avx2 => return run::<x86::Avx2>(task),
        crate::isa::Isa::Baseline => {}
    }
    #[cfg(target_arch = "aarch64")]
    run::<Portable<Fused>>(task);
    #[cfg(not(target_arch = "aarch64"))]
    run::<Portable<Separate>>(task);
}

pub(super) fn run<V: Dequantize>(task: &Task) {
    let ((m, n), k) = (task.shape, task.b.columns());
    with_ordered_rows::<V>(task.a, (m, k), |rows| {
        // read-only formats have no kernel in registers, because its code would be large
        if m <= V::MAX_ROWS && task.b.format().is_writable() {
            let per_task = (TASK_ELEMENTS / k.max(1)).max(1).next_multiple_of(WIDTH);
            return for_each(n.div_ceil(per_task), m * n * k, |number| {
                multiply_in_registers::<V>(task, rows, (number * per_task, n.min((number + 1) * per_task)));
            });
        }
        let (height, width) = V::shape(m);
        // with few rows of A, a panel has the rows of one tile, which stay in the L1 cache
        let panel = if m <= height { width } else { PANEL_ROWS / width * width };
        let per_task = (TASK_ELEMENTS / k.max(1)).max(1).next_multiple_of(panel);
        for_each(n.div_ceil(per_task), m * n * k, |number| {
            let mut buffer = PANEL.take();
            if buffer.len() < panel * STRIDE / 16 {
                buffer = vec![Line::default(); panel * STRIDE / 16];
            }
            let (first, last) = (number * per_task, n.min((number + 1) * per_task));
            for from in (first..last).step_by(panel) {
                multiply::<V>(task, rows, (from, last.min(from + panel)), Line::floats_mut(&mut buffer));
            }
            PANEL.set(buffer);
        });
    });
}

/// Columns `from..to` of the result, without a panel.
fn multiply_in_registers<V: Dequantize>(task: &Task, rows: &[Line], (from, to): (usize, usize)) {
    let ((m, n), k, lines) = (task.shape, task.b.columns(), row_lines::<f32>(task.b.columns()));
    // SAFETY: tasks have disjoint columns.
    unsafe { task.start.write_columns(task.c, (m, n), from..to) };
    // distant rows of weights: the hardware prefetches several streams at once
    let apart = (to - from).div_ceil(WIDTH);
    for first in from..from + apart {
        let width = WIDTH.min((to - first).div_ceil(apart));
        for at in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - at);
            let mut weights = [std::ptr::null(); WIDTH];
            for (c, weights) in weights.iter_mut().enumerate() {
                *weights = task.b.blocks(first + c.min(width - 1) * apart, at..at + depth).as_ptr();
            }
            for i in (0..m).step_by(HEIGHT) {
                let height = HEIGHT.min(m - i);
                let mut a = [std::ptr::null(); HEIGHT];
                for (r, a) in a.iter_mut().enumerate() {
                    *a = rows[(i + r.min(height - 1)) * lines + at / 16..].as_ptr().cast();
                }
                // SAFETY: the rows and the blocks have these columns.
                let dots = unsafe { V::block_dots(task.b.format(), &Operands { a, rows: height, weights, depth }) };
                for (r, dots) in dots.iter().enumerate().take(height) {
                    for (column, dot) in dots.iter().enumerate().take(width) {
                        // SAFETY: tasks have disjoint columns.
                        let c = unsafe { &mut task.c.part((i + r) * n + first + column * apart, 1)[0] };
                        *c = V::Arithmetic::mul_add(task.alpha, *dot, *c);
                    }
                }
            }
        }
    }
}

/// Columns `from..to` of the result.
fn multiply<V: FloatVector>(task: &Task, rows: &[Line], (from, to): (usize, usize), panel: &mut [f32]) {
    let ((m, n), k) = (task.shape, task.b.columns());
    // SAFETY: tasks have disjoint columns.
    unsafe { task.start.write_columns(task.c, (m, n), from..to) };
    for at in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - at);
        for (row, panel) in (from..to).zip(panel.chunks_exact_mut(STRIDE)) {
            // the hardware prefetches too little of such a short run: prefetch the next columns, or those of the next panel
            let (row_ahead, ahead) = if at + depth < k { (row, at + depth) } else { (row + to - from, 0) };
            for line in task.b.blocks(row_ahead, ahead..k.min(ahead + DEPTH)).chunks(64) {
                V::prefetch(line.as_ptr());
            }
            task.b.widen_row(row, at..at + depth, &mut panel[..depth]);
        }
        let rows = Ordered { rows: &rows[at / 16..], stride: row_lines::<f32>(k), depth };
        // SAFETY: tasks have disjoint columns.
        unsafe { add_dots::<V, f32>((m, n), &rows, (panel, STRIDE), (from, to), task.alpha, task.c) };
    }
}
