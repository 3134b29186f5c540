//! Cross-entropy with label smoothing over rows of logits.

use crate::isa::{Arithmetic, dispatch};
use crate::math::{LANES, add_lanes, exp, max};
use crate::parallel::{Shared, for_each};

/// What one row of logits should predict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// The wanted class.
    pub target: usize,
    /// The factor on this row's loss.
    pub weight: f32,
}

/// The weighted loss of each row of `logits: [rows.len(), classes]`, in nats.
///
/// With smoothing `e` the target distribution is `1 - e` on the wanted class plus `e / classes` on each
/// (<https://arxiv.org/abs/1512.00567>, section 7).
///
/// # Panics
/// A target is not a class.
pub fn cross_entropy(logits: &mut [f32], rows: &[Row], smoothing: f32, losses: &mut [f32]) {
    run(logits, rows, smoothing, None, losses);
}

/// As [`cross_entropy`]; `logits` becomes the gradient of `scale * sum(losses)` with respect to them.
///
/// # Panics
/// A target is not a class.
pub fn cross_entropy_backward(logits: &mut [f32], rows: &[Row], smoothing: f32, scale: f32, losses: &mut [f32]) {
    run(logits, rows, smoothing, Some(scale), losses);
}

fn run(logits: &mut [f32], rows: &[Row], smoothing: f32, scale: Option<f32>, losses: &mut [f32]) {
    if rows.is_empty() {
        return;
    }
    let classes = logits.len() / rows.len();
    assert!(rows.iter().all(|row| row.target < classes), "a target is not below {classes}");
    let work = 8 * logits.len();
    let (shared, shared_losses) = (Shared::new(logits), Shared::new(losses));
    for_each(rows.len(), work, |i| {
        // SAFETY: rows are disjoint.
        let (logits, loss) = unsafe { (shared.part(i * classes, classes), shared_losses.part(i, 1)) };
        loss[0] = one_row(logits, rows[i], smoothing, scale);
    });
}

dispatch! {
    fn one_row(logits: &mut [f32], row: Row, smoothing: f32, scale: Option<f32>) -> f32 = one_row_body
}

#[inline(always)]
fn one_row_body<A: Arithmetic>(logits: &mut [f32], row: Row, smoothing: f32, scale: Option<f32>) -> f32 {
    let classes = logits.len();
    let largest = max(logits);
    let wanted = logits[row.target];
    let mean = if smoothing > 0.0 { sum(logits, |v| v) / classes as f32 } else { wanted };
    let total = sum(logits, |v| exp::<A>(v - largest));
    // a NaN anywhere reaches the loss through the sum
    let log_sum = largest + total.ln();
    let loss = log_sum - (1.0 - smoothing) * wanted - smoothing * mean;
    if let Some(scale) = scale {
        let factor = scale * row.weight;
        let (share, floor) = (factor / total, factor * smoothing / classes as f32);
        for v in logits.iter_mut() {
            *v = A::mul_add(exp::<A>(*v - largest), share, -floor);
        }
        logits[row.target] -= factor * (1.0 - smoothing);
    }
    row.weight * loss
}

#[inline(always)]
fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += term(chunk[i]);
        }
    }
    for (i, v) in rest.iter().enumerate() {
        lanes[i] += term(*v);
    }
    add_lanes(lanes)
}
