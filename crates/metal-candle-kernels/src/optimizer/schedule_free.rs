//! The step of schedule-free AdamW.

use super::section::{Section, for_each_piece};
use crate::isa::{Arithmetic, dispatch};

/// The coefficients of one step of schedule-free AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduleFreeStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Weight of the average `x` in the point `y` where gradients are computed.
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients.
    pub beta2: f64,
    /// Added to the square root of the mean of the squared gradients.
    pub eps: f64,
    /// Weight decay of `y`.
    pub weight_decay: f64,
    /// Weight of this step in the average.
    pub weight: f64,
    /// The number of the step, starting at 1.
    pub step: usize,
    /// The gradient is multiplied by this factor, for clipping.
    pub grad_scale: f64,
}

/// Computes one step of schedule-free AdamW (<https://arxiv.org/abs/2405.15682>, algorithm 1) in place.
///
/// `y` is the point where gradients are computed, `z` the point that is updated, and `v` the mean of the squared gradients. The
/// average `x` is not stored, because it follows from `y = (1 - beta1) z + beta1 x`.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
pub fn schedule_free_adamw(
    y: &mut [f32],
    grads: &[f32],
    z: &mut [f32],
    v: &mut [f32],
    step: &ScheduleFreeStep,
    sections: &[Section],
) {
    for_each_piece(sections, y, grads, [z, v], |piece, y, grads, [z, v]| {
        let step = ScheduleFreeStep {
            learning_rate: piece.learning_rate(step.learning_rate),
            weight_decay: piece.weight_decay(step.weight_decay),
            ..*step
        };
        update(y, grads, z, v, &step);
    });
}

dispatch! {
    fn update(y: &mut [f32], grads: &[f32], z: &mut [f32], v: &mut [f32], step: &ScheduleFreeStep) = update_body
}

#[inline(always)]
fn update_body<A: Arithmetic>(y: &mut [f32], grads: &[f32], z: &mut [f32], v: &mut [f32], step: &ScheduleFreeStep) {
    let (beta2, rest2) = (step.beta2 as f32, (1.0 - step.beta2) as f32);
    let root = (1.0 / (1.0 - step.beta2.powi(step.step as i32)).sqrt()) as f32;
    let (weight, rest) = (step.weight as f32, (1.0 - step.weight) as f32);
    let rate = step.learning_rate as f32;
    let rate_of_y = (step.learning_rate * (1.0 - step.beta1 * (1.0 - step.weight))) as f32;
    let (eps, decay, scale) = (step.eps as f32, step.weight_decay as f32, step.grad_scale as f32);
    for i in 0..y.len() {
        let g = grads[i] * scale;
        v[i] = A::mul_add(beta2, v[i], rest2 * g * g);
        let change = A::mul_add(decay, y[i], g / A::mul_add(v[i].sqrt(), root, eps));
        y[i] = A::mul_add(weight, z[i], rest * y[i]) - rate_of_y * change;
        z[i] -= rate * change;
    }
}
