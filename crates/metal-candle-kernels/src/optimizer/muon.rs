//! The Muon step.

use super::section::{MatrixSection, check, sum_of_squares};
use crate::gemm::gemm;
use crate::parallel::{Shared, for_each};

/// The coefficients of one step of Muon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuonStep {
    /// Learning rate for weight decay.
    pub learning_rate: f64,
    /// Decay rate of the mean of the gradients.
    pub momentum: f64,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The coefficients of `X`, `X X^T X` and `(X X^T)^2 X` in an iteration.
    pub coefficients: [f32; 3],
    /// The number of iterations.
    pub iterations: usize,
    /// A matrix is divided by its norm, or by this value if it is larger.
    pub eps: f64,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

/// Matrices with fewer elements are computed in parallel. Larger matrices are computed one after the other, each with all
/// threads, which limits the memory for intermediate matrices.
const LARGE: usize = 256 * 1024;

/// Computes one step of Muon (<https://kellerjordan.github.io/posts/muon/>) in place: the update of a matrix is the orthogonal
/// matrix nearest to the mean of its gradients. `scale` returns the factor of the learning rate for a number of rows and
/// columns.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn muon(
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    step: &MuonStep,
    scale: impl Fn(usize, usize) -> f64 + Send + Sync,
    matrices: &[MatrixSection],
) {
    let sections = || matrices.iter().map(|matrix| matrix.section);
    check(sections().map(|s| (s.start, s.len)), params.len().min(grads.len()), "parameters");
    check(sections().map(|s| (s.state, s.len)), m.len(), "state");
    let (params, m) = (Shared::new(params), Shared::new(m));
    let update_one = |matrix: &MatrixSection| {
        let section = &matrix.section;
        // SAFETY: the sections are disjoint and within the buffers.
        let (params, m) = unsafe { (params.part(section.start, section.len), m.part(section.state, section.len)) };
        update(params, &grads[section.start..][..section.len], m, step, &scale, matrix);
    };
    let (large, small): (Vec<&MatrixSection>, Vec<_>) = matrices.iter().partition(|m| m.section.len >= LARGE);
    large.into_iter().for_each(update_one);
    for_each(small.len(), small.iter().map(|m| m.section.len).sum(), |number| update_one(small[number]));
}

fn update(
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    step: &MuonStep,
    scale: impl Fn(usize, usize) -> f64,
    matrix: &MatrixSection,
) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    assert_eq!(params.len(), rows * columns, "the length of a matrix does not match its shape");
    let (momentum, rest) = (step.momentum as f32, (1.0 - step.momentum) as f32);
    let grad_scale = step.grad_scale as f32;
    let (of_gradient, of_moment) = if step.nesterov { (rest, momentum) } else { (0.0, 1.0) };
    let direction = |m: &mut f32, g: f32| {
        let g = g * grad_scale;
        *m = momentum * *m + rest * g;
        of_moment * *m + of_gradient * g
    };
    // the product of a matrix with its transpose is smaller if there are no more rows than columns
    let is_tall = rows > columns;
    let mut x = vec![0.0; rows * columns];
    if is_tall {
        for (row, (m, grads)) in m.chunks_exact_mut(columns).zip(grads.chunks_exact(columns)).enumerate() {
            for (column, (m, &g)) in m.iter_mut().zip(grads).enumerate() {
                x[column * rows + row] = direction(m, g);
            }
        }
    } else {
        for (x, (m, &g)) in x.iter_mut().zip(m.iter_mut().zip(grads)) {
            *x = direction(m, g);
        }
    }
    let x = orthogonalize(x, rows.min(columns), rows.max(columns), step);
    let learning_rate = matrix.section.learning_rate(step.learning_rate);
    let keep = (1.0 - learning_rate * matrix.section.weight_decay(step.weight_decay)) as f32;
    let rate = (learning_rate * scale(rows, columns)) as f32;
    if is_tall {
        for (row, params) in params.chunks_exact_mut(columns).enumerate() {
            for (column, p) in params.iter_mut().enumerate() {
                *p = *p * keep - rate * x[column * rows + row];
            }
        }
    } else {
        for (p, x) in params.iter_mut().zip(&x) {
            *p = *p * keep - rate * x;
        }
    }
}

/// Moves the singular values of `x: [rows, columns]` close to 1 by iterating `X <- (a I + b G + c G^2) X` with
/// `G = X X^T`.
fn orthogonalize(mut x: Vec<f32>, rows: usize, columns: usize, step: &MuonStep) -> Vec<f32> {
    let norm = sum_of_squares(&x).sqrt().max(step.eps) as f32;
    for x in &mut x {
        *x /= norm;
    }
    let [a, b, c] = step.coefficients;
    let mut gram = vec![0.0; rows * rows];
    let (mut factor, mut next) = (gram.clone(), vec![0.0; x.len()]);
    for _ in 0..step.iterations {
        gemm((rows, rows, columns), 1.0, &x, (columns, 1), x.as_slice().into(), (1, columns), 0.0, &mut gram);
        for (factor, gram) in factor.iter_mut().zip(&gram) {
            *factor = b * gram;
        }
        gemm((rows, rows, rows), c, &gram, (rows, 1), gram.as_slice().into(), (rows, 1), 1.0, &mut factor);
        for element in factor.iter_mut().step_by(rows + 1) {
            *element += a;
        }
        gemm((rows, columns, rows), 1.0, &factor, (rows, 1), x.as_slice().into(), (columns, 1), 0.0, &mut next);
        std::mem::swap(&mut x, &mut next);
    }
    x
}
