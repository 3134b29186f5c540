//! The SGD and Lion steps.

use super::section::{Section, for_each_piece};
use crate::isa::{Arithmetic, dispatch};

/// The coefficients of one step of SGD.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// The factor of the previous moment.
    pub momentum: f64,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Weight decay, added to the gradients.
    pub weight_decay: f64,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

/// Computes one step of SGD in place, with momentum if `m` is given
/// (<https://proceedings.mlr.press/v28/sutskever13.html>, section 2, with the learning rate outside of the moment).
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn sgd(params: &mut [f32], grads: &[f32], m: Option<&mut [f32]>, step: &SgdStep, sections: &[Section]) {
    let of = |piece: &Section| SgdStep {
        learning_rate: piece.learning_rate(step.learning_rate),
        weight_decay: piece.weight_decay(step.weight_decay),
        ..*step
    };
    match m {
        None => for_each_piece(sections, params, grads, [], |piece, params, grads, []| {
            plain(params, grads, &of(piece));
        }),
        Some(m) => for_each_piece(sections, params, grads, [m], |piece, params, grads, [m]| {
            with_momentum(params, grads, m, &of(piece));
        }),
    }
}

dispatch! {
    fn plain(params: &mut [f32], grads: &[f32], step: &SgdStep) = plain_body
}

#[inline(always)]
fn plain_body<A: Arithmetic>(params: &mut [f32], grads: &[f32], step: &SgdStep) {
    let (rate, decay, scale) = (step.learning_rate as f32, step.weight_decay as f32, step.grad_scale as f32);
    for i in 0..params.len() {
        params[i] -= rate * A::mul_add(decay, params[i], grads[i] * scale);
    }
}

dispatch! {
    fn with_momentum(params: &mut [f32], grads: &[f32], m: &mut [f32], step: &SgdStep) = with_momentum_body
}

#[inline(always)]
fn with_momentum_body<A: Arithmetic>(params: &mut [f32], grads: &[f32], m: &mut [f32], step: &SgdStep) {
    let (rate, decay, scale) = (step.learning_rate as f32, step.weight_decay as f32, step.grad_scale as f32);
    let momentum = step.momentum as f32;
    let (of_gradient, of_moment) = if step.nesterov { (1.0, momentum) } else { (0.0, 1.0) };
    for i in 0..params.len() {
        let g = A::mul_add(decay, params[i], grads[i] * scale);
        m[i] = A::mul_add(momentum, m[i], g);
        params[i] -= rate * A::mul_add(of_moment, m[i], of_gradient * g);
    }
}

/// The coefficients of one step of Lion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Weight of the moment in the direction of an update.
    pub beta1: f64,
    /// Decay rate of the moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

/// Computes one step of Lion (<https://arxiv.org/abs/2302.06675>, program 1) in place.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn lion(params: &mut [f32], grads: &[f32], m: &mut [f32], step: &LionStep, sections: &[Section]) {
    for_each_piece(sections, params, grads, [m], |piece, params, grads, [m]| {
        let step = LionStep {
            learning_rate: piece.learning_rate(step.learning_rate),
            weight_decay: piece.weight_decay(step.weight_decay),
            ..*step
        };
        lion_update(params, grads, m, &step);
    });
}

dispatch! {
    fn lion_update(params: &mut [f32], grads: &[f32], m: &mut [f32], step: &LionStep) = lion_body
}

#[inline(always)]
fn lion_body<A: Arithmetic>(params: &mut [f32], grads: &[f32], m: &mut [f32], step: &LionStep) {
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let (rest1, rest2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let keep = (1.0 - step.learning_rate * step.weight_decay) as f32;
    let (rate, scale) = (step.learning_rate as f32, step.grad_scale as f32);
    for i in 0..params.len() {
        let g = grads[i] * scale;
        let direction = A::mul_add(beta1, m[i], rest1 * g);
        let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
        params[i] = params[i] * keep - rate * sign;
        m[i] = A::mul_add(beta2, m[i], rest2 * g);
    }
}
