//! AdamW over flat buffers.

/// The numbers of one AdamW step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AdamWStep {
    /// Learning rate.
    pub(super) learning_rate: f64,
    /// Decay of the first moment.
    pub(super) beta1: f64,
    /// Decay of the second moment.
    pub(super) beta2: f64,
    /// Added to the root of the second moment.
    pub(super) eps: f64,
    /// Decoupled weight decay.
    pub(super) weight_decay: f64,
    /// The step, counted from 1.
    pub(super) step: usize,
    /// Factor on the gradient, for clipping.
    pub(super) grad_scale: f64,
}
/// AdamW.
pub(super) fn adamw(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
    let t = step.step as i32;
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let size = (step.learning_rate / (1.0 - step.beta1.powi(t))) as f32;
    let root = (1.0 / (1.0 - step.beta2.powi(t)).sqrt()) as f32;
    let keep = (1.0 - step.learning_rate * step.weight_decay) as f32;
    let (rest1, rest2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let (eps, scale) = (step.eps as f32, step.grad_scale as f32);
    for i in 0..params.len() {
        let g = grads[i] * scale;
        m[i] = beta1 * m[i] + rest1 * g;
        v[i] = beta2 * v[i] + rest2 * g * g;
        params[i] = params[i] * keep - size * m[i] / (v[i].sqrt() * root + eps);
    }
}
/// Sum.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}
