//! Computes cross-entropy with label smoothing over rows of logits, and its gradient.

use crate::elementwise::chunks;
use crate::isa::{Arithmetic, dispatch};
use crate::math::{exp, max, soft_cap, sum};
use crate::parallel::{Shared, for_each};

/// How to compute logits from the products of the output head: `y = scale * x`, then `cap * tanh(y / cap)` if there is a cap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitForm {
    /// The factor of each product.
    pub scale: f32,
    /// The bound of the magnitude of logits.
    pub soft_cap: Option<f32>,
}

impl LogitForm {
    /// Logits equal the products.
    pub const PLAIN: Self = Self { scale: 1.0, soft_cap: None };

    /// Whether logits equal the products.
    #[must_use]
    pub fn is_plain(self) -> bool {
        self == Self::PLAIN
    }

    /// Converts products to logits in place.
    pub fn apply(self, products: &mut [f32]) {
        if self.is_plain() {
            return;
        }
        let len = products.len();
        let shared = Shared::new(products);
        chunks(len, |start, end| {
            // SAFETY: chunks are disjoint.
            form_chunk(unsafe { shared.part(start, end - start) }, self);
        });
    }

    /// The derivative of a logit with respect to its product.
    #[inline(always)]
    fn slope(self, logit: f32) -> f32 {
        self.scale * self.soft_cap.map_or(1.0, |cap| (1.0 - logit / cap) * (1.0 + logit / cap))
    }
}

dispatch! {
    fn form_chunk(products: &mut [f32], form: LogitForm) = form_chunk_body
}

#[inline(always)]
fn form_chunk_body<A: Arithmetic>(products: &mut [f32], form: LogitForm) {
    match form.soft_cap {
        None => products.iter_mut().for_each(|v| *v *= form.scale),
        Some(cap) => products.iter_mut().for_each(|v| *v = soft_cap::<A>(*v * form.scale, cap)),
    }
}

/// The target of one row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// The target class.
    pub target: usize,
    /// The factor of this row's loss.
    pub weight: f32,
}

/// Computes the weighted loss of each row of `logits: [rows.len(), classes]`, in nats. `logits` contains the products of the
/// output head, which are converted to logits with `form`.
///
/// With smoothing `e` the target distribution is `1 - e` on the target class plus `e / classes` on each class
/// (<https://arxiv.org/abs/1512.00567>, section 7).
///
/// # Panics
/// A target is not a class.
pub fn cross_entropy(logits: &mut [f32], form: LogitForm, rows: &[Row], smoothing: f32, losses: &mut [f32]) {
    run(logits, form, rows, smoothing, None, losses);
}

/// As [`cross_entropy`]; also replaces `logits` with the gradient of `scale * sum(losses)` with respect to the products.
///
/// # Panics
/// A target is not a class.
pub fn cross_entropy_backward(
    logits: &mut [f32],
    form: LogitForm,
    rows: &[Row],
    smoothing: f32,
    scale: f32,
    losses: &mut [f32],
) {
    run(logits, form, rows, smoothing, Some(scale), losses);
}

fn run(logits: &mut [f32], form: LogitForm, rows: &[Row], smoothing: f32, scale: Option<f32>, losses: &mut [f32]) {
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
        loss[0] = one_row(logits, form, rows[i], smoothing, scale);
    });
}

dispatch! {
    fn one_row(logits: &mut [f32], form: LogitForm, row: Row, smoothing: f32, scale: Option<f32>) -> f32 = one_row_body
}

#[inline(always)]
fn one_row_body<A: Arithmetic>(
    logits: &mut [f32],
    form: LogitForm,
    row: Row,
    smoothing: f32,
    scale: Option<f32>,
) -> f32 {
    if !form.is_plain() {
        form_chunk_body::<A>(logits, form);
    }
    let classes = logits.len();
    let largest = max(logits);
    let target_logit = logits[row.target];
    let mean = if smoothing > 0.0 { sum(logits, |v| v) / classes as f32 } else { target_logit };
    let total = sum(logits, |v| exp::<A>(v - largest));
    // a NaN in any logit makes the sum, and so the loss, NaN
    let log_sum = largest + total.ln();
    let loss = log_sum - (1.0 - smoothing) * target_logit - smoothing * mean;
    if let Some(scale) = scale {
        let factor = scale * row.weight;
        let (share, floor) = (factor / total, factor * smoothing / classes as f32);
        let gradient = |v: f32| A::mul_add(exp::<A>(v - largest), share, -floor);
        let of_target = factor * (1.0 - smoothing);
        if form.is_plain() {
            for v in logits.iter_mut() {
                *v = gradient(*v);
            }
            logits[row.target] -= of_target;
        } else {
            for v in logits.iter_mut() {
                *v = gradient(*v) * form.slope(*v);
            }
            logits[row.target] -= of_target * form.slope(target_logit);
        }
    }
    row.weight * loss
}
