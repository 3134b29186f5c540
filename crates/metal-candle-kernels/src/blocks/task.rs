//! The operands of a product with block-quantized weights.

use super::matrix::BlockMatrix;
use crate::operand::Start;
use crate::parallel::Shared;

/// `start + alpha A B^T`, written to `c`.
pub(super) struct Task<'a> {
    /// The numbers of rows of A and of B.
    pub(super) shape: (usize, usize),
    pub(super) start: Start<'a>,
    pub(super) a: &'a [f32],
    pub(super) b: BlockMatrix<'a>,
    pub(super) alpha: f32,
    pub(super) c: Shared<f32>,
}

impl Task<'_> {
    /// Whether there is anything to compute.
    ///
    /// # Panics
    /// An operand does not have the shape.
    pub(super) fn check(&self) -> bool {
        let (m, n) = self.shape;
        assert!(self.b.rows() == n, "the right operand has {} rows, not {n}", self.b.rows());
        assert!(self.a.len() >= m * self.b.columns(), "the left operand is too short");
        self.start.check((m, n));
        m > 0 && n > 0
    }
}
