//! AdamW over flat buffers.

use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each};

/// The numbers of one AdamW step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The step, counted from 1.
    pub step: usize,
    /// Factor on the gradient, for clipping.
    pub grad_scale: f64,
}

/// Elements that one task handles.
const CHUNK: usize = 64 * 1024;

/// One step of AdamW (<https://arxiv.org/abs/1711.05101>, algorithm 2) in place; the slices have the same length.
///
/// # Panics
/// The slices differ in length.
pub fn adamw(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
    let n = params.len();
    assert!(grads.len() == n && m.len() == n && v.len() == n, "the buffers differ in length");
    let (params, m, v) = (Shared::new(params), Shared::new(m), Shared::new(v));
    for_each(n.div_ceil(CHUNK), n, |task| {
        let start = task * CHUNK;
        let len = CHUNK.min(n - start);
        // SAFETY: chunks are disjoint.
        let (params, m, v) = unsafe { (params.part(start, len), m.part(start, len), v.part(start, len)) };
        update(params, &grads[start..start + len], m, v, step);
    });
}

dispatch! {
    fn update(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) = update_body
}

#[inline(always)]
fn update_body<A: Arithmetic>(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
    let t = step.step as i32;
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let size = (step.learning_rate / (1.0 - step.beta1.powi(t))) as f32;
    let root = (1.0 / (1.0 - step.beta2.powi(t)).sqrt()) as f32;
    let keep = (1.0 - step.learning_rate * step.weight_decay) as f32;
    let (rest1, rest2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let (eps, scale) = (step.eps as f32, step.grad_scale as f32);
    for i in 0..params.len() {
        let g = grads[i] * scale;
        m[i] = A::mul_add(beta1, m[i], rest1 * g);
        v[i] = A::mul_add(beta2, v[i], rest2 * g * g);
        params[i] = params[i] * keep - size * m[i] / (v[i].sqrt() * root + eps);
    }
}

/// The sum of the squares, in f64 and in an order that does not depend on the number of threads.
#[must_use]
pub fn sum_of_squares(values: &[f32]) -> f64 {
    values.chunks(CHUNK).map(|chunk| chunk.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>()).sum()
}
