//! Adds low-rank updates to the output of a linear layer in inference. The rows of a batch may have different adapters.
//!
//! The bits of an element do not depend on other rows, other adapters or the number of threads.

use crate::gemm_rows::{Ordered, row_lines, with_padded_rows};
#[cfg(target_arch = "x86_64")]
use crate::gemm_tile::x86;
use crate::gemm_tile::{FloatVector, Portable};
#[cfg(target_arch = "aarch64")]
use crate::isa::Fused;
#[cfg(not(target_arch = "aarch64"))]
use crate::isa::Separate;
use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each};
use std::cell::Cell;
use std::ops::Range;

/// The update `scale X A^T B` of some rows.
#[derive(Debug, Clone)]
pub struct LowRankUpdate<'a> {
    /// The updated rows of Y, and the same rows of X.
    pub rows: Range<usize>,
    /// The number of rows of A and of B.
    pub rank: usize,
    /// A: `[rank, k]`, row-major.
    pub a: &'a [f32],
    /// B: `[rank, n]`, row-major.
    pub b: &'a [f32],
    /// The factor.
    pub scale: f32,
}

/// Maximum number of rows in a task.
const TASK_ROWS: usize = 8;
/// Products with at least this number of elements are split by columns if there are too few rows for the threads.
const WIDE: usize = 64 * 1024;
/// The number of parts of the columns.
const PARTS: usize = 8;

thread_local! {
    static PRODUCTS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Some rows of an update.
struct Task<'a> {
    update: &'a LowRankUpdate<'a>,
    first: usize,
    count: usize,
    /// The offset of its products with A.
    offset: usize,
}

/// Adds the updates to `y: [m, n]`, with `x: [m, k]`.
///
/// # Panics
/// An operand is shorter than its shape requires, or two updates share a row.
pub fn add_low_rank_updates((n, k): (usize, usize), x: &[f32], updates: &[LowRankUpdate], y: &mut [f32]) {
    let (mut tasks, mut offset, mut work, mut largest) = (Vec::new(), 0, 0, 0);
    for (index, update) in updates.iter().enumerate() {
        let LowRankUpdate { rows, rank, a, b, .. } = update;
        assert!(x.len() >= rows.end * k && y.len() >= rows.end * n, "the rows {rows:?} end outside the tensor");
        assert!(a.len() >= rank * k && b.len() >= rank * n, "the matrices of an update are too short");
        let is_apart = |other: &LowRankUpdate| other.rows.end <= rows.start || rows.end <= other.rows.start;
        assert!(rows.is_empty() || updates[..index].iter().all(is_apart), "two updates have a row in common");
        for first in rows.clone().step_by(TASK_ROWS) {
            let count = TASK_ROWS.min(rows.end - first);
            tasks.push(Task { update, first, count, offset });
            offset += count * rank;
            work += count * rank * (n + k);
            largest = largest.max(rank * n.max(k));
        }
    }
    let y = Shared::new(y);
    let is_wide = tasks.len() < 2 * rayon::current_num_threads() && largest >= WIDE;
    let mut buffer = PRODUCTS.take();
    buffer.clear();
    buffer.resize(offset, 0.0);
    let products = Shared::new(&mut buffer);
    // SAFETY of both: tasks have disjoint rows or columns, and disjoint parts of the products.
    if is_wide {
        for_each(tasks.len() * PARTS, work, |number| {
            let task = &tasks[number / PARTS];
            unsafe { multiply_by_a(task, k, x, part(task.update.rank, number % PARTS), products) };
        });
        for_each(tasks.len() * PARTS, work, |number| {
            let columns = part(n, number % PARTS);
            unsafe { add_product_with_b(&tasks[number / PARTS], n, columns, products, y) };
        });
    } else {
        for_each(tasks.len(), work, |number| unsafe {
            multiply_by_a(&tasks[number], k, x, 0..tasks[number].update.rank, products);
            add_product_with_b(&tasks[number], n, 0..n, products, y);
        });
    }
    PRODUCTS.set(buffer);
}

/// One of [`PARTS`] parts of `0..count`.
fn part(count: usize, number: usize) -> Range<usize> {
    let size = count.div_ceil(PARTS);
    (number * size).min(count)..((number + 1) * size).min(count)
}

/// Computes `columns` of the products of a task's rows of X with A.
///
/// # Safety
/// No other task uses them.
unsafe fn multiply_by_a(task: &Task, k: usize, x: &[f32], columns: Range<usize>, products: Shared<f32>) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        match crate::isa::isa() {
            crate::isa::Isa::Avx512 => return multiply_by_a_in::<x86::Avx512>(task, k, x, columns, products),
            crate::isa::Isa::Avx2 => return multiply_by_a_in::<x86::Avx2>(task, k, x, columns, products),
            crate::isa::Isa::Baseline => {}
        }
        #[cfg(target_arch = "aarch64")]
        multiply_by_a_in::<Portable<Fused>>(task, k, x, columns, products);
        #[cfg(not(target_arch = "aarch64"))]
        multiply_by_a_in::<Portable<Separate>>(task, k, x, columns, products);
    }
}

/// # Safety
/// As of [`multiply_by_a`].
unsafe fn multiply_by_a_in<V: FloatVector>(
    task: &Task,
    k: usize,
    x: &[f32],
    columns: Range<usize>,
    products: Shared<f32>,
) {
    let &Task { update, first, count, offset } = task;
    if columns.is_empty() || k == 0 {
        return;
    }
    with_padded_rows(&x[first * k..], (count, k), |rows| {
        let rows = Ordered { rows, stride: row_lines::<f32>(k), depth: k };
        let a = &update.a[columns.start * k..columns.end * k];
        // SAFETY: the products of the task start there.
        let products = unsafe { products.from(offset) };
        let columns = (columns.start, columns.end);
        // SAFETY: the caller's promise.
        unsafe { crate::gemm_rows::add_dots::<V, f32>((count, update.rank), &rows, (a, k), columns, 1.0, products) };
    });
}

/// Adds `columns` of the products of a task with B.
///
/// # Safety
/// No other task uses them or changes the products.
unsafe fn add_product_with_b(task: &Task, n: usize, columns: Range<usize>, products: Shared<f32>, y: Shared<f32>) {
    let &Task { update, first, count, offset } = task;
    // SAFETY: the caller's promise.
    let products = unsafe { products.read(offset, count * update.rank) };
    for (row, products) in products.chunks_exact(update.rank.max(1)).enumerate() {
        // SAFETY: as above.
        let y = unsafe { y.part((first + row) * n + columns.start, columns.len()) };
        add_rows_of(products, update.scale, &update.b[columns.start..], n, y);
    }
}

dispatch! {
    /// `y += scale * sum over p of factors[p] rows[p]`, where rows are `stride` apart.
    fn add_rows_of(factors: &[f32], scale: f32, rows: &[f32], stride: usize, y: &mut [f32]) = add_rows_of_body
}

#[inline(always)]
fn add_rows_of_body<A: Arithmetic>(factors: &[f32], scale: f32, rows: &[f32], stride: usize, y: &mut [f32]) {
    let mut at = 0;
    at = add_columns::<A, 64>(factors, scale, rows, stride, y, at);
    at = add_columns::<A, 16>(factors, scale, rows, stride, y, at);
    add_columns::<A, 1>(factors, scale, rows, stride, y, at);
}

/// Accumulates `N` columns at a time, starting at `at`; returns the next column.
#[inline(always)]
fn add_columns<A: Arithmetic, const N: usize>(
    factors: &[f32],
    scale: f32,
    rows: &[f32],
    stride: usize,
    y: &mut [f32],
    mut at: usize,
) -> usize {
    while at + N <= y.len() {
        let mut sums = [0.0; N];
        for (p, factor) in factors.iter().enumerate() {
            let row = &rows[p * stride + at..][..N];
            for j in 0..N {
                sums[j] = A::mul_add(*factor, row[j], sums[j]);
            }
        }
        let y = &mut y[at..][..N];
        for j in 0..N {
            y[j] = A::mul_add(scale, sums[j], y[j]);
        }
        at += N;
    }
    at
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::random;

    /// Odd widths, a rank of one, and matrices that threads share.
    const SHAPES: [(usize, usize, usize); 5] = [(37, 99, 3), (64, 32, 1), (5, 8, 8), (288, 768, 16), (4100, 3000, 24)];

    #[test]
    fn sums_match_f64() {
        for (n, k, rank) in SHAPES {
            for m in [1, 9] {
                let (x, a, b) = (random(m * k, 1), random(rank * k, 2), random(rank * n, 3));
                let start = random(m * n, 4);
                let mut y = start.clone();
                add_low_rank_updates(
                    (n, k),
                    &x,
                    &[LowRankUpdate { rows: 0..m, rank, a: &a, b: &b, scale: 1.5 }],
                    &mut y,
                );
                for i in 0..m {
                    let z: Vec<f64> = (0..rank)
                        .map(|p| (0..k).map(|q| f64::from(x[i * k + q]) * f64::from(a[p * k + q])).sum())
                        .collect();
                    for j in (0..n).step_by(7) {
                        let sum: f64 = (0..rank).map(|p| z[p] * f64::from(b[p * n + j])).sum();
                        let (found, expected) = (f64::from(y[i * n + j]), f64::from(start[i * n + j]) + 1.5 * sum);
                        let size = (k * rank) as f64;
                        assert!(
                            (found - expected).abs() < 1e-6 * size.sqrt() * 3.0,
                            "{found}, not {expected}, n {n}, k {k}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_bits_of_a_row_do_not_depend_on_other_adapters() {
        for (n, k, rank) in SHAPES {
            let m = 21;
            let x = random(m * k, 1);
            let matrices: Vec<_> = (0..3).map(|i| (random(rank * k, 2 + i), random(rank * n, 9 + i))).collect();
            let update = |rows: Range<usize>, of: usize| LowRankUpdate {
                rows,
                rank,
                a: &matrices[of].0,
                b: &matrices[of].1,
                scale: 0.7,
            };
            // row 4 has no adapter
            let updates = [update(0..4, 0), update(5..6, 1), update(6..m, 2)];
            let on_threads = |count: usize| {
                let mut y = vec![0.5; m * n];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
                pool.install(|| add_low_rank_updates((n, k), &x, &updates, &mut y));
                y
            };
            let y = on_threads(1);
            assert!(y == on_threads(4), "n {n}, k {k}, rank {rank}");
            for (row, of) in [(0, 0), (3, 0), (5, 1), (6, 2), (14, 2), (20, 2)] {
                let mut alone = vec![0.5; n];
                add_low_rank_updates((n, k), &x[row * k..][..k], &[update(0..1, of)], &mut alone);
                assert!(alone == y[row * n..][..n], "row {row}, n {n}, k {k}, rank {rank}");
            }
            assert!(y[4 * n..][..n].iter().all(|value| value.to_bits() == 0.5_f32.to_bits()));
        }
    }

    #[test]
    #[should_panic(expected = "two updates have a row in common")]
    fn updates_of_the_same_row_are_refused() {
        let update = |rows| LowRankUpdate { rows, rank: 1, a: &[1.0], b: &[1.0], scale: 1.0 };
        add_low_rank_updates((1, 1), &[1.0; 3], &[update(0..2), update(1..3)], &mut [0.0; 3]);
    }
}
