//! The embedding of token ids, with an optional low-rank term and noise.

use super::adapters::LayerTerms;
use super::host::{Host, edit, on_cpu};
use super::linear::{Order, Part, Start, TermGradients, column_dots, scale_columns, scaled_outer, sum, sum_in};
use super::low_rank::LowRank;
use super::weight::Weight;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;
use std::collections::HashMap;

/// The rows of the embedding `weight: [vocab, hidden]` with these ids times `scale`, in `dtype`: `[tokens, hidden]`.
///
/// A term adds `scale * B A[:, id]` with A `[rank, vocab]` and B `[hidden, rank]`. Its magnitudes are those of the columns, as in
/// PEFT.
pub(crate) fn forward(
    weight: &Weight,
    term: Option<&LowRank>,
    ids: &[u32],
    dtype: DType,
    scale: f32,
) -> Result<Tensor> {
    scaled(unscaled(Order::ByShape, weight, term, ids, dtype)?, scale)
}

/// As [`forward`] where no backward pass follows: with terms that may differ by row, and on the CPU with the same bits for a row
/// alone and among any others.
pub(crate) fn infer(weight: &Weight, terms: &LayerTerms, ids: &[u32], dtype: DType, scale: f32) -> Result<Tensor> {
    let embedded = |ids: &[u32], term| unscaled(Order::ByRow, weight, term, ids, dtype);
    let x = match terms {
        LayerTerms::Same(term) => embedded(ids, *term)?,
        LayerTerms::ByRows(runs) => {
            let parts = runs.iter().map(|(rows, term)| embedded(&ids[rows.clone()], *term));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?
        }
    };
    scaled(x, scale)
}

fn scaled(x: Tensor, scale: f32) -> Result<Tensor> {
    let is_one = scale.to_bits() == 1f32.to_bits();
    if is_one { Ok(x) } else { Ok(x.affine(f64::from(scale), 0.0)?) }
}

fn unscaled(order: Order, weight: &Weight, term: Option<&LowRank>, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let vocab = weight.dims2()?.0;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("ids", format!("token id {id} is not below the vocabulary's {vocab}")));
    }
    let x = weight.rows(ids, dtype)?;
    let Some(term) = term else { return Ok(x) };
    let x = with_term(order, x, term, &Tensor::new(ids, weight.device())?)?;
    let Some(magnitude) = &term.magnitude else { return Ok(x) };
    let reciprocal_norms = term.reciprocal_norms(magnitude, weight, true)?;
    scale_columns(x, &(magnitude.m.to_dtype(DType::F32)? * reciprocal_norms)?)
}

/// The rows `x` and what the term adds to them, without its magnitudes.
fn with_term(order: Order, x: Tensor, term: &LowRank, indices: &Tensor) -> Result<Tensor> {
    let z = columns(&term.a, indices)?;
    let z0 = term.start.as_ref().map(|(a, _)| columns(a, indices)).transpose()?;
    let mut parts = vec![Part::transposed(&z, &term.b, term.scale)];
    if let (Some((_, b)), Some(z0)) = (&term.start, &z0) {
        parts.push(Part::transposed(z0, b, -term.scale));
    }
    sum_in(order, Start::Sum(x), &parts)
}

/// The columns of `a: [rank, vocab]` with these ids, as rows: `[tokens, rank]`.
fn columns(a: &Tensor, ids: &Tensor) -> Result<Tensor> {
    Ok(a.index_select(ids, 1)?.t()?.contiguous()?)
}

/// The gradient of [`forward`] with respect to the weight is added to `dw: [vocab, hidden]`, f32, in place on the CPU.
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

/// The gradient of [`forward`] with respect to the rows of the weight with the ids `rows`, plus `sum: [rows, hidden]`, f32.
pub(crate) fn rows_backward(ids: &[u32], dx: &Tensor, rows: &[u32], sum: Option<Tensor>, scale: f32) -> Result<Tensor> {
    let numbers: HashMap<u32, u32> = rows.iter().zip(0..).map(|(id, number)| (*id, number)).collect();
    let (mut places, mut found) = (Vec::new(), Vec::new());
    for (place, id) in (0_u32..).zip(ids) {
        if let Some(number) = numbers.get(id) {
            places.push(place);
            found.push(*number);
        }
    }
    let sum = match sum {
        Some(sum) => sum,
        None => Tensor::zeros((rows.len(), dx.dim(1)?), DType::F32, dx.device())?,
    };
    if places.is_empty() {
        return Ok(sum);
    }
    backward(&found, &dx.index_select(&Tensor::new(places, dx.device())?, 0)?, sum, scale)
}

/// The gradients of [`forward`] with respect to A, B and the magnitudes of its term.
pub(crate) fn term_backward(
    weight: &Weight,
    term: &LowRank,
    ids: &[u32],
    dx: &Tensor,
    scale: f32,
) -> Result<TermGradients> {
    let dx = &scaled(dx.clone(), scale)?;
    let indices = Tensor::new(ids, dx.device())?;
    let Some(magnitude) = &term.magnitude else { return matrices_backward(term, &indices, dx) };
    let reciprocal_norms = term.reciprocal_norms(magnitude, weight, true)?;
    let x = with_term(Order::ByShape, weight.rows(ids, dx.dtype())?, term, &indices)?;
    let d_magnitude = (column_dots(dx, &x)? * &reciprocal_norms)?;
    let factors = (magnitude.m.to_dtype(DType::F32)? * reciprocal_norms)?;
    let of_matrices = matrices_backward(term, &indices, &scale_columns(dx.force_contiguous()?, &factors)?)?;
    Ok(TermGradients { magnitude: Some(d_magnitude), ..of_matrices })
}

fn matrices_backward(term: &LowRank, indices: &Tensor, dx: &Tensor) -> Result<TermGradients> {
    let b = scaled_outer(term.scale, dx, &columns(&term.a, indices)?)?;
    let dz = sum(Start::Zero, &[Part::plain(dx, &term.b, term.scale)])?.to_dtype(DType::F32)?;
    let (rank, vocab) = term.a.dims2()?;
    let transposed = Tensor::zeros((vocab, rank), DType::F32, dx.device())?.index_add(indices, &dz, 0)?;
    Ok(TermGradients { a: transposed.t()?.contiguous()?, b, magnitude: None })
}

/// Adds noise, uniform within `alpha / sqrt(length * hidden)`, to the rows of each sequence `offsets[i]..offsets[i + 1]`
/// (`NEFTune`, <https://arxiv.org/abs/2310.05914>, algorithm 1). Only the seed decides which.
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
