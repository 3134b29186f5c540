//! Computes the cross-entropy of logits, and converts losses to perplexity and bits per byte.
//!
//! Training itself uses [`Model::loss_and_gradients`](crate::Model::loss_and_gradients), which never holds the logits
//! of all tokens.

use crate::error::{Error, Result};
use candle_core::{D, DType, Tensor};

/// Cross-entropy in nats of each row, `(1 - s) (-log p[target]) + s / vocab * sum(-log p)` with label smoothing `s`.
///
/// # Shapes
/// `logits` is `[tokens, vocab]`, `targets` `[tokens]` of `u32`, the result `[tokens]` in f32.
///
/// # Errors
/// The shapes differ, a target is not below `vocab`, or `label_smoothing` is outside 0 to 1.
pub fn cross_entropy_rows(logits: &Tensor, targets: &Tensor, label_smoothing: f64) -> Result<Tensor> {
    if logits.rank() != 2 {
        return Err(Error::shape("logits", "[tokens, vocab]", logits.dims()));
    }
    let (tokens, vocab) = logits.dims2()?;
    if targets.dims() != [tokens] {
        return Err(Error::shape("targets", format!("[{tokens}]"), targets.dims()));
    }
    check_label_smoothing(label_smoothing)?;
    let targets = targets.to_dtype(DType::U32)?.contiguous()?;
    if let Some(target) = targets.to_vec1::<u32>()?.into_iter().find(|&target| target as usize >= vocab) {
        return Err(Error::argument("targets", format!("`{target}` is outside a vocabulary of {vocab}")));
    }
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    let normalizer = logits.log_sum_exp(D::Minus1)?;
    let wanted = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    let likelihood = (&normalizer - wanted)?;
    if label_smoothing == 0.0 {
        return Ok(likelihood);
    }
    let uniform = (normalizer - logits.mean(D::Minus1)?)?;
    Ok(((likelihood * (1.0 - label_smoothing))? + (uniform * label_smoothing)?)?)
}

/// The mean of [`cross_entropy_rows`] over all tokens: a scalar.
///
/// ```
/// # fn main() -> metal_candle::Result<()> {
/// use candle_core::{Device, Tensor};
/// use metal_candle::training::cross_entropy;
///
/// let logits = Tensor::zeros((3, 8), candle_core::DType::F32, &Device::Cpu)?;
/// let targets = Tensor::new(&[0_u32, 3, 7], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &targets, 0.1)?.to_scalar::<f32>()?;
/// assert!((loss - 8.0_f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Shapes
/// `logits` is `[tokens, vocab]`, `targets` `[tokens]` of `u32`.
///
/// # Errors
/// As [`cross_entropy_rows`]; also if there are no tokens.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, label_smoothing: f64) -> Result<Tensor> {
    if targets.elem_count() == 0 {
        return Err(Error::argument("targets", "expected at least one token"));
    }
    Ok(cross_entropy_rows(logits, targets, label_smoothing)?.mean_all()?)
}

/// `exp(loss)` of a mean loss in nats per token: the number of equally likely tokens with the same loss.
pub fn perplexity(loss: f64) -> f64 {
    loss.exp()
}

/// The bits a model needs for each byte of a text.
///
/// `total_loss` is the loss in nats summed over all tokens, `num_bytes` the length of the text in UTF-8.
pub fn bits_per_byte(total_loss: f64, num_bytes: usize) -> f64 {
    total_loss / std::f64::consts::LN_2 / num_bytes as f64
}

pub(crate) fn check_label_smoothing(label_smoothing: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&label_smoothing) {
        return Err(Error::argument("label_smoothing", format!("`{label_smoothing}` is not between 0 and 1")));
    }
    Ok(())
}
