//! Computes products with few rows or columns, for decoding and the gradients of low-rank matrices.

use crate::isa::{Arithmetic, dispatch};
use crate::math::{Element, dot};
use crate::operand::{Matrix, Product, Start};
use crate::parallel::{Shared, for_each};

/// Maximum number of rows for which a product reads each weight once and multiplies it with every row.
pub(crate) const MAX_DOT_ROWS: usize = 4;

/// The number of weights that one task of such a product reads.
const DOT_ELEMENTS: usize = 64 * 1024;

/// The sum of products with few rows, whose right operands are rows of weights: `[n, k]` row-major.
pub(crate) fn few_rows((m, n): (usize, usize), start: Start, products: &[Product], shared: Shared<f32>) {
    let depth: usize = products.iter().map(|product| product.k).sum();
    let columns = (DOT_ELEMENTS / depth.max(1)).max(1);
    for_each(n.div_ceil(columns), n * depth, |task| {
        let (from, to) = (task * columns, (task * columns + columns).min(n));
        for i in 0..m {
            // SAFETY: tasks write disjoint ranges of each row.
            let c = unsafe { shared.part(i * n + from, to - from) };
            start.write(c, i, n, from..to);
            for &Product { a, a_strides, b, b_strides, k, alpha, .. } in products.iter().filter(|product| product.k > 0)
            {
                let x = &a[i * a_strides.0..][..k];
                let range = from * b_strides.1..(to - 1) * b_strides.1 + k;
                match b {
                    Matrix::F32(w) => add_dots(&w[range], b_strides.1, x, alpha, c),
                    Matrix::F16(w) => add_dots(&w[range], b_strides.1, x, alpha, c),
                    Matrix::BF16(w) => add_dots(&w[range], b_strides.1, x, alpha, c),
                }
            }
        }
    });
}

dispatch! {
    /// `y[j] += alpha w[j] . x` for the rows of `w`, `stride` apart.
    pub(crate) fn add_dots<T: Element>(w: &[T], stride: usize, x: &[f32], alpha: f32, y: &mut [f32]) = add_dots_body
}

#[inline(always)]
fn add_dots_body<A: Arithmetic, T: Element>(w: &[T], stride: usize, x: &[f32], alpha: f32, y: &mut [f32]) {
    for (w, y) in w.chunks(stride).zip(y) {
        *y = A::mul_add(alpha, dot::<A, T>(&w[..x.len()], x), *y);
    }
}

/// Maximum number of rows in a result that is accumulated row by row.
const MAX_OUTER_ROWS: usize = 16;
/// Number of columns in a task of such a result.
const OUTER_COLUMNS: usize = 64;

/// Computes a product whose operands both have long contiguous rows and whose result has few rows (or columns), such as a
/// gradient of a low-rank matrix; returns false for other products.
pub(crate) fn narrow_outer((m, n): (usize, usize), product: &Product, c: Shared<f32>) -> bool {
    let Product { a, a_strides, b: Matrix::F32(b), b_strides, k, alpha, .. } = *product else { return false };
    if a_strides.0 != 1 || b_strides.1 != 1 || m.min(n) > MAX_OUTER_ROWS || m.max(n) < OUTER_COLUMNS || k == 0 {
        return false;
    }
    if m <= n {
        accumulate_rows((m, n, k), alpha, (a, a_strides.1), (b, b_strides.0), c);
        return true;
    }
    let mut transposed = vec![0.0; m * n];
    accumulate_rows((n, m, k), alpha, (b, b_strides.0), (a, a_strides.1), Shared::new(&mut transposed));
    for i in 0..m {
        // SAFETY: no other task uses the result.
        for (j, c) in unsafe { c.part(i * n, n) }.iter_mut().enumerate() {
            *c = transposed[j * m + i];
        }
    }
    true
}

/// `C[i, j] = alpha sum over p of few[p, i] many[p, j]`.
fn accumulate_rows(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (few, few_stride): (&[f32], usize),
    (many, many_stride): (&[f32], usize),
    shared: Shared<f32>,
) {
    for_each(n.div_ceil(OUTER_COLUMNS), m * n * k / 8, |task| {
        let (start, width) = (task * OUTER_COLUMNS, OUTER_COLUMNS.min(n - task * OUTER_COLUMNS));
        let mut sums = [0.0; MAX_OUTER_ROWS * OUTER_COLUMNS];
        outer_columns(few, few_stride, &many[start..], many_stride, (m, width, k), &mut sums);
        for (i, sums) in sums.chunks_exact(OUTER_COLUMNS).take(m).enumerate() {
            // SAFETY: tasks have disjoint columns.
            let c = unsafe { shared.part(i * n + start, width) };
            c.iter_mut().zip(sums).for_each(|(c, sum)| *c = alpha * sum);
        }
    });
}

dispatch! {
    /// Accumulates four rows at a time, so that a sum is loaded and stored once per four products.
    fn outer_columns(few: &[f32], few_stride: usize, many: &[f32], many_stride: usize, shape: (usize, usize, usize), sums: &mut [f32]) = outer_columns_body
}

#[inline(always)]
fn outer_columns_body<A: Arithmetic>(
    few: &[f32],
    few_stride: usize,
    many: &[f32],
    many_stride: usize,
    (m, width, k): (usize, usize, usize),
    sums: &mut [f32],
) {
    let whole = k / 4 * 4;
    for p in (0..whole).step_by(4) {
        let rows: [&[f32]; 4] = std::array::from_fn(|q| &many[(p + q) * many_stride..][..width]);
        for (i, sums) in sums.chunks_exact_mut(OUTER_COLUMNS).take(m).enumerate() {
            let factors: [f32; 4] = std::array::from_fn(|q| few[(p + q) * few_stride + i]);
            let sums = &mut sums[..width];
            for j in 0..width {
                let sum = A::mul_add(factors[0], rows[0][j], sums[j]);
                let sum = A::mul_add(factors[1], rows[1][j], sum);
                let sum = A::mul_add(factors[2], rows[2][j], sum);
                sums[j] = A::mul_add(factors[3], rows[3][j], sum);
            }
        }
    }
    for p in whole..k {
        for (i, sums) in sums.chunks_exact_mut(OUTER_COLUMNS).take(m).enumerate() {
            let factor = few[p * few_stride + i];
            for (sum, value) in sums.iter_mut().zip(&many[p * many_stride..][..width]) {
                *sum = A::mul_add(factor, *value, *sum);
            }
        }
    }
}
