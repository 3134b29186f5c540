//! RMSNorm (<https://arxiv.org/abs/1910.07467>, section 4): `y = x / sqrt(mean(x^2) + eps) * w`.

use crate::isa::{Arithmetic, dispatch};
use crate::math::{LANES, add_lanes, dot};
use crate::parallel::{Shared, for_each, rows_per_task, written};

/// RMSNorm of the rows of `x: [rows, w.len()]`.
///
/// # Panics
/// `x` does not consist of whole rows.
#[must_use]
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let width = w.len();
    assert!(x.len().is_multiple_of(width), "rows of {width}, but {} elements", x.len());
    let rows = rows_per_task(width);
    let write = |y: Shared<f32>| {
        for_each(x.len().div_ceil(rows * width), x.len(), |task| {
            let start = task * rows * width;
            let x = &x[start..x.len().min(start + rows * width)];
            // SAFETY: tasks write disjoint rows.
            forward_rows(x, w, eps, unsafe { y.part(start, x.len()) });
        });
    };
    // SAFETY: the tasks cover all rows.
    unsafe { written(x.len(), write) }
}

dispatch! {
    fn forward_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) = forward_rows_body
}

#[inline(always)]
fn forward_rows_body<A: Arithmetic>(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let scale = reciprocal_rms::<A>(x, eps);
        for i in 0..w.len() {
            y[i] = x[i] * scale * w[i];
        }
    }
}

#[inline(always)]
fn reciprocal_rms<A: Arithmetic>(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot::<A, f32>(x, x) / x.len() as f32 + eps).sqrt()
}

/// The gradient of [`rms_norm`] with respect to `x` is added to `dx`, and that with respect to `w` to `dw` if given.
pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>) {
    let width = w.len();
    let rows = rows_per_task(width);
    let shared = Shared::new(dx);
    for_each(x.len().div_ceil(rows * width), 2 * x.len(), |task| {
        let start = task * rows * width;
        let end = x.len().min(start + rows * width);
        // SAFETY: tasks write disjoint rows.
        backward_rows(&x[start..end], w, eps, &dy[start..end], unsafe { shared.part(start, end - start) });
    });
    if let Some(dw) = dw {
        weight_gradient(x, eps, dy, dw);
    }
}

dispatch! {
    fn backward_rows(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) = backward_rows_body
}

#[inline(always)]
fn backward_rows_body<A: Arithmetic>(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let width = w.len();
    for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
        let scale = reciprocal_rms::<A>(x, eps);
        let mut lanes = [0.0f32; LANES];
        let whole = width / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            for i in 0..LANES {
                lanes[i] = A::mul_add(x[start + i] * w[start + i], dy[start + i], lanes[i]);
            }
        }
        for i in whole..width {
            lanes[i - whole] = A::mul_add(x[i] * w[i], dy[i], lanes[i - whole]);
        }
        let mean = add_lanes(lanes) * scale * scale / width as f32;
        for i in 0..width {
            dx[i] += scale * A::mul_add(-mean, x[i], w[i] * dy[i]);
        }
    }
}

dispatch! {
    fn weight_gradient(x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) = weight_gradient_body
}

#[inline(always)]
fn weight_gradient_body<A: Arithmetic>(x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
    let width = dw.len();
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let scale = reciprocal_rms::<A>(x, eps);
        for i in 0..width {
            dw[i] = A::mul_add(x[i] * scale, dy[i], dw[i]);
        }
    }
}
