//! Computes products with block-quantized weights for training and prefill: dequantizes panels of weights and multiplies them.

use super::matrix::BlockMatrix;
use super::rows::add_rows;
use super::task::Task;
use crate::gemm::serial_gemm;
use crate::operand::Start;
use crate::parallel::{Shared, for_each, written};
use std::cell::Cell;

/// Maximum number of rows for which [`block_products`] dequantizes in registers.
const FEW_ROWS: usize = 4;
/// Rows of weights of a panel.
const PANEL_ROWS: usize = 64;
/// Columns of a panel of [`block_products`].
const PANEL_DEPTH: usize = 1024;
/// Rows and columns of a panel of [`block_transposed_products`].
const TRANSPOSED_ROWS: usize = 128;
const TRANSPOSED_COLUMNS: usize = 256;

thread_local! {
    static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `start + alpha A B^T` as a new matrix `[m, n]`, with `A: [m, k]` and `B: [n, k]`.
///
/// Each element is summed in the same order for any number of threads.
///
/// # Panics
/// An operand does not have the shape, or the start is the result itself.
#[must_use]
pub fn block_products((m, n): (usize, usize), start: Start, a: &[f32], b: BlockMatrix, alpha: f32) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every element is written from the start before it is read.
    unsafe { written(m * n, |c| products((m, n), start, a, b, alpha, c)) }
}

fn products((m, n): (usize, usize), start: Start, a: &[f32], b: BlockMatrix, alpha: f32, c: Shared<f32>) {
    if m <= FEW_ROWS {
        return add_rows(&Task { shape: (m, n), start, a, b, alpha, c });
    }
    let k = b.columns();
    assert!(b.rows() == n, "the right operand has {} rows, not {n}", b.rows());
    assert!(a.len() >= m * k, "the left operand is too short");
    start.check((m, n));
    for_each(n.div_ceil(PANEL_ROWS), m * n * k, |number| {
        let from = number * PANEL_ROWS;
        let width = PANEL_ROWS.min(n - from);
        // SAFETY: tasks have disjoint columns.
        unsafe { start.write_columns(c, (m, n), from..from + width) };
        for at in (0..k).step_by(PANEL_DEPTH) {
            let depth = PANEL_DEPTH.min(k - at);
            with_panel(b, (from, width), (at, depth), |panel| {
                let to = (c.pointer().wrapping_add(from), n);
                // SAFETY: as above.
                unsafe { serial_gemm((m, width, depth), alpha, &a[at..], (k, 1), panel, (1, depth), 1.0, to) };
            });
        }
    });
}

/// `start + alpha A B` as a new matrix `[m, k]`, with `A: [m, n]` and `B: [n, k]`: the gradient of the input of a layer.
///
/// Each element is summed in the same order for any number of threads.
///
/// # Panics
/// An operand does not have the shape, or the start is the result itself.
#[must_use]
pub fn block_transposed_products(
    (m, k): (usize, usize),
    start: Start,
    a: &[f32],
    b: BlockMatrix,
    alpha: f32,
) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "there is no result to start from");
    // SAFETY: every element is written from the start before it is read.
    unsafe { written(m * k, |c| transposed_products((m, k), start, a, b, alpha, c)) }
}

fn transposed_products((m, k): (usize, usize), start: Start, a: &[f32], b: BlockMatrix, alpha: f32, c: Shared<f32>) {
    let n = b.rows();
    assert!(b.columns() == k, "the right operand has {} columns, not {k}", b.columns());
    assert!(a.len() >= m * n, "the left operand is too short");
    start.check((m, k));
    if m == 0 {
        return;
    }
    // the last range is a multiple of the block length, as the width is
    for_each(k.div_ceil(TRANSPOSED_COLUMNS), m * n * k, |number| {
        let from = number * TRANSPOSED_COLUMNS;
        let width = TRANSPOSED_COLUMNS.min(k - from);
        // SAFETY: tasks have disjoint columns.
        unsafe { start.write_columns(c, (m, k), from..from + width) };
        for at in (0..n).step_by(TRANSPOSED_ROWS) {
            let depth = TRANSPOSED_ROWS.min(n - at);
            with_panel(b, (at, depth), (from, width), |panel| {
                let to = (c.pointer().wrapping_add(from), k);
                // SAFETY: as above.
                unsafe { serial_gemm((m, width, depth), alpha, &a[at..], (n, 1), panel, (width, 1), 1.0, to) };
            });
        }
    });
}

/// Dequantizes a range of rows and columns, given as start and length, and calls `run` with them, row-major.
fn with_panel(b: BlockMatrix, (first, rows): (usize, usize), (at, columns): (usize, usize), run: impl FnOnce(&[f32])) {
    let mut panel = PANEL.take();
    if panel.len() < rows * columns {
        panel.resize(rows * columns, 0.0);
    }
    for (row, to) in (first..first + rows).zip(panel.chunks_exact_mut(columns)) {
        b.widen_row(row, at..at + columns, to);
    }
    run(&panel[..rows * columns]);
    PANEL.set(panel);
}
