//! The Adam and AdamW step.

use super::section::{Section, for_each_piece};
use crate::isa::{Arithmetic, dispatch};

/// The coefficients of one step of Adam or AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay rate of the mean of the gradients.
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients.
    pub beta2: f64,
    /// Added to the square root of the mean of the squared gradients.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether weight decay is subtracted from the parameters (AdamW) instead of added to the gradients (Adam).
    pub is_decoupled: bool,
    /// The number of the step, starting at 1.
    pub step: usize,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

/// Computes one step of Adam (<https://arxiv.org/abs/1412.6980>, algorithm 1) or AdamW (<https://arxiv.org/abs/1711.05101>,
/// algorithm 2) in place.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn adam(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamStep, sections: &[Section]) {
    for_each_piece(sections, params, grads, [m, v], |piece, params, grads, [m, v]| {
        let step = AdamStep {
            learning_rate: piece.learning_rate(step.learning_rate),
            weight_decay: piece.weight_decay(step.weight_decay),
            ..*step
        };
        update(params, grads, m, v, &step);
    });
}

dispatch! {
    pub(super) fn update(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamStep) = update_body
}

#[inline(always)]
fn update_body<A: Arithmetic>(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamStep) {
    let t = step.step as i32;
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let size = (step.learning_rate / (1.0 - step.beta1.powi(t))) as f32;
    let root = (1.0 / (1.0 - step.beta2.powi(t)).sqrt()) as f32;
    let (keep, coupled) = if step.is_decoupled {
        ((1.0 - step.learning_rate * step.weight_decay) as f32, 0.0)
    } else {
        (1.0, step.weight_decay as f32)
    };
    let (rest1, rest2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let (eps, scale) = (step.eps as f32, step.grad_scale as f32);
    for i in 0..params.len() {
        let g = A::mul_add(coupled, params[i], grads[i] * scale);
        m[i] = A::mul_add(beta1, m[i], rest1 * g);
        v[i] = A::mul_add(beta2, v[i], rest2 * g * g);
        params[i] = params[i] * keep - size * m[i] / (v[i].sqrt() * root + eps);
    }
}
