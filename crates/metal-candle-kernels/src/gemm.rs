//! Matrix products with weights of any type, accumulated in f32.

use crate::isa::{Arithmetic, dispatch};
use crate::math::{Element, dot, widen};
use crate::parallel::{Shared, for_each};
use gemmkit::{MatRef, Parallelism};
use half::{bf16, f16};
use std::cell::RefCell;

/// The elements of a matrix operand.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// Half-precision floats.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for Matrix<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

impl Matrix<'_> {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::BF16(v) => v.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Rows and columns of the result that one task computes; its inner steps of half-precision operands.
const TILE_ROWS: usize = 256;
const TILE_COLUMNS: usize = 256;
const TILE_DEPTH: usize = 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `C = alpha A B + beta C` with `A: [m, k]`, `B: [k, n]`, `C: [m, n]` row-major.
///
/// `a_strides` and `b_strides` are the distances of neighbouring rows and columns, so a transposed operand is a
/// matter of strides. The result is cut into tiles of fixed size that are computed one thread each.
///
/// # Panics
/// An operand is shorter than its shape and strides say.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: &[f32],
    a_strides: (usize, usize),
    b: Matrix,
    b_strides: (usize, usize),
    beta: f32,
    c: &mut [f32],
) {
    assert!(c.len() >= m * n, "the result has {} elements, not {m} x {n}", c.len());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        c[..m * n].iter_mut().for_each(|c| *c *= beta);
        return;
    }
    assert!(a.len() > (m - 1) * a_strides.0 + (k - 1) * a_strides.1, "the left operand is too short");
    assert!(b.len() > (k - 1) * b_strides.0 + (n - 1) * b_strides.1, "the right operand is too short");
    let (row_tiles, column_tiles) = (m.div_ceil(TILE_ROWS), n.div_ceil(TILE_COLUMNS));
    // with few tiles the threads would idle: cut the rows finer
    let row_tiles = if row_tiles * column_tiles < 8 { m.div_ceil(64).min(8) } else { row_tiles };
    let rows = m.div_ceil(row_tiles);
    let shared = Shared::new(c);
    for_each(row_tiles * column_tiles, m * n * k / 16, |tile| {
        let (i, j) = ((tile / column_tiles) * rows, (tile % column_tiles) * TILE_COLUMNS);
        if i >= m {
            return;
        }
        let (height, width) = (rows.min(m - i), TILE_COLUMNS.min(n - j));
        let a = &a[i * a_strides.0..];
        // SAFETY: tiles do not overlap, and each lies within C.
        let c = unsafe { shared.pointer().add(i * n + j) };
        let tile = Tile { height, width, k, alpha, a_strides, b_strides, beta, c, c_stride: n };
        match b {
            Matrix::F32(b) => tile.product(a, &b[j * b_strides.1..]),
            Matrix::F16(b) => tile.widened_product(a, &b[j * b_strides.1..]),
            Matrix::BF16(b) => tile.widened_product(a, &b[j * b_strides.1..]),
        }
    });
}

struct Tile {
    height: usize,
    width: usize,
    k: usize,
    alpha: f32,
    a_strides: (usize, usize),
    b_strides: (usize, usize),
    beta: f32,
    c: *mut f32,
    c_stride: usize,
}

impl Tile {
    fn product(&self, a: &[f32], b: &[f32]) {
        self.multiply(a, self.k, b, self.b_strides, self.beta);
    }

    /// Widens a panel of B to f32 at a time and multiplies that.
    fn widened_product<T: Element>(&self, a: &[f32], b: &[T]) {
        SCRATCH.with_borrow_mut(|panel| {
            for start in (0..self.k).step_by(TILE_DEPTH) {
                let depth = TILE_DEPTH.min(self.k - start);
                panel.resize(panel.len().max(depth * self.width), 0.0);
                let b = &b[start * self.b_strides.0..];
                // keeps the order of memory: rows of a weight stay rows
                let strides = if self.b_strides.0 == 1 {
                    for j in 0..self.width {
                        widen(&b[j * self.b_strides.1..][..depth], &mut panel[j * depth..][..depth]);
                    }
                    (1, depth)
                } else if self.b_strides.1 == 1 {
                    for p in 0..depth {
                        widen(&b[p * self.b_strides.0..][..self.width], &mut panel[p * self.width..][..self.width]);
                    }
                    (self.width, 1)
                } else {
                    for p in 0..depth {
                        for j in 0..self.width {
                            panel[p * self.width + j] = b[p * self.b_strides.0 + j * self.b_strides.1].to_f32();
                        }
                    }
                    (self.width, 1)
                };
                let beta = if start == 0 { self.beta } else { 1.0 };
                self.multiply(&a[start * self.a_strides.1..], depth, panel, strides, beta);
            }
        });
    }

    fn multiply(&self, a: &[f32], k: usize, b: &[f32], b_strides: (usize, usize), beta: f32) {
        let (shape, c) = ((self.height, self.width, k), (self.c, self.c_stride));
        // SAFETY: `gemm` makes each tile with a part of C of its own.
        unsafe { serial_gemm(shape, self.alpha, a, self.a_strides, b, b_strides, beta, c) }
    }
}

/// `C = alpha A B + beta C` on the calling thread; `c` is a pointer and the distance of rows.
///
/// # Safety
/// The rows of C are writable and no other task touches them meanwhile.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn serial_gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    beta: f32,
    (c, c_stride): (*mut f32, usize),
) {
    let signed = |(row, column): (usize, usize)| (row as isize, column as isize);
    // checks that the operands lie within their slices
    let (a_row, a_column) = signed(a_strides);
    let (b_row, b_column) = signed(b_strides);
    let _ = (MatRef::new(a, m, k, a_row, a_column), MatRef::new(b, k, n, b_row, b_column));
    // SAFETY: A and B were just checked; C is the caller's promise.
    unsafe {
        gemmkit::gemm_unchecked(
            m,
            k,
            n,
            alpha,
            a.as_ptr(),
            a_row,
            a_column,
            b.as_ptr(),
            b_row,
            b_column,
            beta,
            c,
            c_stride as isize,
            1,
            Parallelism::Serial,
        );
    }
}

/// Rows up to which a product reads each weight once and multiplies it with every row.
const MAX_DOT_ROWS: usize = 4;

/// Weights of a product of few rows that one task reads.
const DOT_ELEMENTS: usize = 64 * 1024;

/// `Y = X W^T` with `X: [m, k]`, `W: [n, k]`, `Y: [m, n]`, all row-major.
///
/// # Panics
/// An operand is shorter than its shape says.
pub fn linear((m, n, k): (usize, usize, usize), x: &[f32], w: Matrix, y: &mut [f32]) {
    assert!(x.len() >= m * k && w.len() >= n * k && y.len() >= m * n, "an operand is too short");
    if m > MAX_DOT_ROWS {
        return gemm((m, n, k), 1.0, x, (k, 1), w, (1, k), 0.0, y);
    }
    let rows = (DOT_ELEMENTS / k.max(1)).max(1);
    let shared = Shared::new(y);
    for_each(n.div_ceil(rows), n * k, |task| {
        let (start, end) = (task * rows, (task * rows + rows).min(n));
        for i in 0..m {
            let x = &x[i * k..][..k];
            // SAFETY: tasks write disjoint ranges of each row of Y.
            let y = unsafe { shared.part(i * n + start, end - start) };
            match w {
                Matrix::F32(w) => dots(&w[start * k..end * k], x, y),
                Matrix::F16(w) => dots(&w[start * k..end * k], x, y),
                Matrix::BF16(w) => dots(&w[start * k..end * k], x, y),
            }
        }
    });
}

dispatch! {
    /// `y[j] = w[j] . x` for the rows of `w`.
    fn dots<T: Element>(w: &[T], x: &[f32], y: &mut [f32]) = dots_body
}

#[inline(always)]
fn dots_body<A: Arithmetic, T: Element>(w: &[T], x: &[f32], y: &mut [f32]) {
    for (w, y) in w.chunks_exact(x.len()).zip(y) {
        *y = dot::<A, T>(w, x);
    }
}
