//! The operands of matrix products: matrices of any element type, products with strides, and initial values.

use crate::parallel::Shared;
use half::{bf16, f16};
use std::ops::Range;

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

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The type to which the activations of a matrix product are rounded. Sums are f32 in both cases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// They are not rounded: the result is within 1e-5 of the f32 product, relative to the sum of the magnitudes of its terms.
    #[default]
    F32,
    /// bf16, in products with at least 32,768 bf16 weights on processors that multiply bf16
    /// ([`multiplies_bf16`](crate::multiplies_bf16)).
    Bf16,
}

/// `alpha A B` with `A: [m, k]`, `B: [k, n]`.
///
/// A stride is the distance in elements between adjacent rows or columns; a transposed operand swaps its strides.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// A.
    pub a: &'a [f32],
    /// Row and column stride of A.
    pub a_strides: (usize, usize),
    /// B.
    pub b: Matrix<'a>,
    /// Row and column stride of B.
    pub b_strides: (usize, usize),
    /// The number of columns of A and of rows of B.
    pub k: usize,
    /// The factor.
    pub alpha: f32,
    /// The precision.
    pub precision: MatmulPrecision,
}

impl Product<'_> {
    /// The product of columns `at..at + k` of A and rows `at..at + k` of B.
    pub(crate) fn part(&self, at: usize, k: usize) -> Self {
        let b_from = at * self.b_strides.0;
        let b = match self.b {
            Matrix::F32(b) => Matrix::F32(&b[b_from..]),
            Matrix::F16(b) => Matrix::F16(&b[b_from..]),
            Matrix::BF16(b) => Matrix::BF16(&b[b_from..]),
        };
        Self { a: &self.a[at * self.a_strides.1..], b, k, ..*self }
    }
}

/// The initial value of a result, to which products are added.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Zeros.
    Zero,
    /// The current contents of the result.
    Result,
    /// One row `[n]`, repeated for each row of the result (a bias).
    Row(&'a [f32]),
    /// A matrix of the shape of the result.
    Matrix(&'a [f32]),
}

impl Start<'_> {
    /// # Panics
    /// The row or the matrix is too short for a result `[m, n]`.
    pub(crate) fn check(&self, (m, n): (usize, usize)) {
        match self {
            Self::Row(row) => assert!(row.len() >= n, "the row is too short"),
            Self::Matrix(matrix) => assert!(matrix.len() >= m * n, "the matrix is too short"),
            Self::Zero | Self::Result => {}
        }
    }

    /// Writes columns `columns` of row `row` of the initial value to `c`; the result has `n` columns.
    pub(crate) fn write(&self, c: &mut [f32], row: usize, n: usize, columns: Range<usize>) {
        match self {
            Self::Zero => c.fill(0.0),
            Self::Result => {}
            Self::Row(values) => c.copy_from_slice(&values[columns]),
            Self::Matrix(values) => c.copy_from_slice(&values[row * n + columns.start..row * n + columns.end]),
        }
    }

    /// Writes columns `columns` of all rows of the initial value to the result `[m, n]`.
    ///
    /// # Safety
    /// No other task uses these columns, which are within the result.
    pub(crate) unsafe fn write_columns(&self, c: Shared<f32>, (m, n): (usize, usize), columns: Range<usize>) {
        for row in 0..m {
            // SAFETY: the caller's promise.
            let part = unsafe { c.part(row * n + columns.start, columns.len()) };
            self.write(part, row, n, columns.clone());
        }
    }
}
