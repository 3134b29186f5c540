//! The output head with cross-entropy, in chunks of rows: `[tokens, vocab]` is never held.

use super::host::{Host, on_cpu, tensor};
use super::linear::{add_scaled, outer, product, product_transposed};
use crate::error::{Error, Result};
use candle_core::{D, DType, Tensor};
use metal_candle_kernels::{self as kernels, Row};

/// Bytes of logits held at a time.
const CHUNK_BYTES: usize = 16 << 20;

/// What [`loss`] returns.
#[derive(Debug)]
pub(crate) struct HeadLoss {
    /// Weight times loss of each row: `[rows]`.
    pub(crate) rows: Vec<f32>,
    /// The gradient with respect to `hidden`, if wanted.
    pub(crate) hidden: Option<Tensor>,
    /// The gradient with respect to the head's weight, if wanted.
    pub(crate) weight: Option<Tensor>,
}

/// Which gradients are wanted, and the factor on them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) scale: f32,
    pub(crate) weight: bool,
}

/// Weighted cross-entropy of `hidden W^T` against `rows`, with label smoothing, and its gradients.
///
/// # Shapes
/// `hidden: [rows, hidden]`, `weight: [vocab, hidden]`.
pub(crate) fn loss(
    hidden: &Tensor,
    weight: &Tensor,
    rows: &[Row],
    smoothing: f32,
    wanted: Option<Wanted>,
) -> Result<HeadLoss> {
    let vocab = weight.dim(0)?;
    if let Some(row) = rows.iter().find(|row| row.target >= vocab) {
        let message = format!("token id {} is not below the vocabulary's {vocab}", row.target);
        return Err(Error::argument("targets", message));
    }
    let chunk = (CHUNK_BYTES / 4 / vocab).max(1);
    let mut result = HeadLoss { rows: Vec::with_capacity(rows.len()), hidden: None, weight: None };
    let mut d_hidden = Vec::new();
    for start in (0..rows.len()).step_by(chunk) {
        let rows = &rows[start..rows.len().min(start + chunk)];
        let hidden = hidden.narrow(0, start, rows.len())?;
        let logits = product(&hidden, weight)?;
        let (losses, gradient) = if on_cpu(&logits) {
            cross_entropy(logits, rows, smoothing, wanted.map(|w| w.scale))?
        } else {
            plain_cross_entropy(&logits, rows, smoothing, wanted.map(|w| w.scale))?
        };
        result.rows.extend(losses);
        if let (Some(gradient), Some(wanted)) = (gradient, wanted) {
            d_hidden.push(product_transposed(&gradient, weight)?);
            if wanted.weight {
                let dw = outer(&gradient, &hidden)?;
                result.weight = Some(match result.weight.take() {
                    Some(sum) => add_scaled(sum, 1.0, &dw)?,
                    None => dw,
                });
            }
        }
    }
    if !d_hidden.is_empty() {
        result.hidden = Some(Tensor::cat(&d_hidden, 0)?);
    }
    Ok(result)
}

/// The losses, and the gradient in place of the logits.
fn cross_entropy(
    logits: Tensor,
    rows: &[Row],
    smoothing: f32,
    scale: Option<f32>,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let losses = std::cell::RefCell::new(vec![0.0; rows.len()]);
    let logits = super::host::edit(logits, |logits| match scale {
        Some(scale) => kernels::cross_entropy_backward(logits, rows, smoothing, scale, &mut losses.borrow_mut()),
        None => kernels::cross_entropy(logits, rows, smoothing, &mut losses.borrow_mut()),
    })?;
    Ok((losses.into_inner(), scale.map(|_| logits)))
}

/// Losses and gradient in candle's operations, f32 inside.
pub(crate) fn plain_cross_entropy(
    logits: &Tensor,
    rows: &[Row],
    smoothing: f32,
    scale: Option<f32>,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let (device, dtype) = (logits.device(), logits.dtype());
    let (count, vocab) = logits.dims2()?;
    let targets: Vec<u32> = rows.iter().map(|row| row.target as u32).collect();
    let targets = Tensor::from_vec(targets, (count, 1), device)?;
    let weights = Tensor::from_vec(rows.iter().map(|row| row.weight).collect::<Vec<_>>(), (count, 1), device)?;
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(D::Minus1)?;
    let log_probabilities = shifted.broadcast_sub(&sums.log()?)?;
    let wanted = log_probabilities.gather(&targets, D::Minus1)?;
    let mean = log_probabilities.mean_keepdim(D::Minus1)?;
    let smoothing = f64::from(smoothing);
    let losses = ((wanted.affine(smoothing - 1.0, 0.0)? - mean.affine(smoothing, 0.0)?)? * &weights)?;
    let losses = losses.flatten_all()?.to_vec1()?;
    let Some(scale) = scale else {
        return Ok((losses, None));
    };
    let ones = Tensor::full((smoothing - 1.0) as f32, (count, 1), device)?;
    let gradient = exponentials.broadcast_div(&sums)?.affine(1.0, -smoothing / vocab as f64)?;
    let gradient = gradient.scatter_add(&targets, &ones, D::Minus1)?;
    let gradient = gradient.broadcast_mul(&weights.affine(f64::from(scale), 0.0)?)?;
    Ok((losses, Some(gradient.to_dtype(dtype)?)))
}

/// `hidden W^T` in f32: `[rows, vocab]`.
pub(crate) fn logits(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(product(hidden, weight)?.to_dtype(DType::F32)?)
}

/// The rows of the embedding `weight: [vocab, hidden]` with these ids, in `dtype`: `[tokens, hidden]`.
pub(crate) fn embed(weight: &Tensor, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let vocab = weight.dim(0)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("ids", format!("token id {id} is not below the vocabulary's {vocab}")));
    }
    let ids = Tensor::new(ids, weight.device())?;
    Ok(weight.index_select(&ids, 0)?.to_dtype(dtype)?)
}

/// The gradient of [`embed`] with respect to the weight is added to `dw: [vocab, hidden]`, f32, in place on the CPU.
pub(crate) fn embed_backward(ids: &[u32], dx: &Tensor, dw: Tensor) -> Result<Tensor> {
    if !on_cpu(dx) {
        let ids = Tensor::new(ids, dx.device())?;
        return Ok(dw.index_add(&ids, &dx.to_dtype(DType::F32)?, 0)?);
    }
    let width = dx.dim(1)?;
    let dx = Host::new(dx)?;
    let dx = dx.f32()?;
    super::host::edit(dw, |dw| {
        for (id, dx) in ids.iter().zip(dx.chunks_exact(width)) {
            kernels::add_scaled(1.0, dx, &mut dw[*id as usize * width..][..width]);
        }
    })
}

/// A zero gradient of a weight of this shape, f32.
pub(crate) fn zeros_like(weight: &Tensor) -> Result<Tensor> {
    if weight.device().is_cpu() {
        return tensor(vec![0.0; weight.elem_count()], weight.shape());
    }
    Ok(Tensor::zeros(weight.shape(), DType::F32, weight.device())?)
}
