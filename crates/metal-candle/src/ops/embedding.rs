//! Token embeddings, with low-rank updates and NEFTune noise, and their gradients.

use super::adapters::LayerUpdates;
use super::host::{Host, edit, on_cpu};
use super::linear::{
    Accumulator, LowRankGradients, Order, ScaledProduct, column_dots, scale_columns, scaled_outer, sum, sum_in,
};
use super::low_rank::LowRank;
use super::weight::Weight;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;
use std::collections::HashMap;

/// The rows `ids` of the embedding `weight: [vocab, hidden]`, times `scale`, in `dtype`: `[tokens, hidden]`.
///
/// A low-rank update adds `scale * B A[:, id]` with A `[rank, vocab]` and B `[hidden, rank]`. Its magnitudes apply to
/// columns, as in PEFT.
pub(crate) fn forward(
    weight: &Weight,
    update: Option<&LowRank>,
    ids: &[u32],
    dtype: DType,
    scale: f32,
) -> Result<Tensor> {
    scaled(unscaled(Order::ByShape, weight, update, ids, dtype)?, scale)
}

/// [`forward`] without a backward pass. The low-rank updates may differ by row. On the CPU the result of a row does not
/// depend on the other rows, bit for bit.
pub(crate) fn infer(weight: &Weight, updates: &LayerUpdates, ids: &[u32], dtype: DType, scale: f32) -> Result<Tensor> {
    let embedded = |ids: &[u32], update| unscaled(Order::ByRow, weight, update, ids, dtype);
    let x = match updates {
        LayerUpdates::Same(update) => embedded(ids, *update)?,
        LayerUpdates::ByRows(runs) => {
            let parts = runs.iter().map(|(rows, update)| embedded(&ids[rows.clone()], *update));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?
        }
    };
    scaled(x, scale)
}

fn scaled(x: Tensor, scale: f32) -> Result<Tensor> {
    let is_one = scale.to_bits() == 1f32.to_bits();
    if is_one { Ok(x) } else { Ok(x.affine(f64::from(scale), 0.0)?) }
}

fn unscaled(order: Order, weight: &Weight, update: Option<&LowRank>, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let vocab = weight.dims2()?.0;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("ids", format!("token `{id}` is outside the vocabulary of {vocab} tokens")));
    }
    let x = weight.rows(ids, dtype)?;
    let Some(update) = update else { return Ok(x) };
    let x = with_update(order, x, update, &Tensor::new(ids, weight.device())?)?;
    let Some(magnitude) = &update.magnitude else { return Ok(x) };
    let reciprocal_norms = update.reciprocal_norms(magnitude, weight, true)?;
    scale_columns(x, &(magnitude.m.to_dtype(DType::F32)? * reciprocal_norms)?)
}

/// The rows `x` plus the low-rank update, without its magnitudes.
fn with_update(order: Order, x: Tensor, update: &LowRank, indices: &Tensor) -> Result<Tensor> {
    let z = columns(&update.a, indices)?;
    let z0 = update.initial_factors.as_ref().map(|(a, _)| columns(a, indices)).transpose()?;
    let mut parts = vec![ScaledProduct::transposed(&z, &update.b, update.scale)];
    if let (Some((_, b)), Some(z0)) = (&update.initial_factors, &z0) {
        parts.push(ScaledProduct::transposed(z0, b, -update.scale));
    }
    sum_in(order, Accumulator::InPlace(x), &parts)
}

/// The columns of `a: [rank, vocab]` with these ids, as rows: `[tokens, rank]`.
fn columns(a: &Tensor, ids: &Tensor) -> Result<Tensor> {
    Ok(a.index_select(ids, 1)?.t()?.contiguous()?)
}

/// Adds the gradient of [`forward`] with respect to the weight to `dw: [vocab, hidden]`, f32, in place on the CPU.
pub(crate) fn backward(ids: &[u32], dx: &Tensor, dw: Tensor, scale: f32) -> Result<Tensor> {
    if !on_cpu(dx) {
        let ids = Tensor::new(ids, dx.device())?;
        return Ok(dw.index_add(&ids, &scaled(dx.to_dtype(DType::F32)?, scale)?, 0)?);
    }
    let width = dx.dim(1)?;
    let dx = Host::new(dx)?;
    let dx = dx.f32()?;
    edit(dw, |dw| {
        for (id, dx) in ids.iter().zip(dx.chunks_exact(width)) {
            kernels::add_scaled(scale, dx, &mut dw[*id as usize * width..][..width]);
        }
    })
}

/// The gradient of [`forward`] with respect to the weight's rows `rows`, plus `sum: [rows, hidden]`, f32.
pub(crate) fn rows_backward(ids: &[u32], dx: &Tensor, rows: &[u32], sum: Option<Tensor>, scale: f32) -> Result<Tensor> {
    let indices: HashMap<u32, u32> = rows.iter().zip(0..).map(|(id, index)| (*id, index)).collect();
    let (mut rows_of_dx, mut found) = (Vec::new(), Vec::new());
    for (row, id) in (0_u32..).zip(ids) {
        if let Some(index) = indices.get(id) {
            rows_of_dx.push(row);
            found.push(*index);
        }
    }
    let sum = match sum {
        Some(sum) => sum,
        None => Tensor::zeros((rows.len(), dx.dim(1)?), DType::F32, dx.device())?,
    };
    if rows_of_dx.is_empty() {
        return Ok(sum);
    }
    backward(&found, &dx.index_select(&Tensor::new(rows_of_dx, dx.device())?, 0)?, sum, scale)
}

/// The gradients of [`forward`] with respect to A, B and the magnitudes of its low-rank update.
pub(crate) fn low_rank_backward(
    weight: &Weight,
    update: &LowRank,
    ids: &[u32],
    dx: &Tensor,
    scale: f32,
) -> Result<LowRankGradients> {
    let dx = &scaled(dx.clone(), scale)?;
    let indices = Tensor::new(ids, dx.device())?;
    let Some(magnitude) = &update.magnitude else { return matrices_backward(update, &indices, dx) };
    let reciprocal_norms = update.reciprocal_norms(magnitude, weight, true)?;
    let x = with_update(Order::ByShape, weight.rows(ids, dx.dtype())?, update, &indices)?;
    let d_magnitude = (column_dots(dx, &x)? * &reciprocal_norms)?;
    let factors = (magnitude.m.to_dtype(DType::F32)? * reciprocal_norms)?;
    let of_matrices = matrices_backward(update, &indices, &scale_columns(dx.force_contiguous()?, &factors)?)?;
    Ok(LowRankGradients { magnitude: Some(d_magnitude), ..of_matrices })
}

fn matrices_backward(update: &LowRank, indices: &Tensor, dx: &Tensor) -> Result<LowRankGradients> {
    let b = scaled_outer(update.scale, dx, &columns(&update.a, indices)?)?;
    let dz = sum(Accumulator::Zero, &[ScaledProduct::plain(dx, &update.b, update.scale)])?.to_dtype(DType::F32)?;
    let (rank, vocab) = update.a.dims2()?;
    let transposed = Tensor::zeros((vocab, rank), DType::F32, dx.device())?.index_add(indices, &dz, 0)?;
    Ok(LowRankGradients { a: transposed.t()?.contiguous()?, b, magnitude: None })
}

/// Adds noise, uniform within `alpha / sqrt(length * hidden)`, to the rows of each sequence
/// `offsets[i]..offsets[i + 1]` (`NEFTune`, <https://arxiv.org/abs/2310.05914>, algorithm 1). The noise depends on the
/// seed only.
pub(crate) fn add_noise(x: Tensor, offsets: &[usize], alpha: f32, seed: u64) -> Result<Tensor> {
    let (tokens, hidden) = x.dims2()?;
    let mut noise = vec![0.0; tokens * hidden];
    for span in offsets.windows(2) {
        let length = span[1] - span[0];
        let bound = alpha / ((length * hidden) as f32).sqrt();
        kernels::uniform_noise(&mut noise[span[0] * hidden..span[1] * hidden], bound, seed, span[0] * hidden);
    }
    let noise = Tensor::from_vec(noise, (tokens, hidden), x.device())?.to_dtype(x.dtype())?;
    Ok((x + noise)?)
}
