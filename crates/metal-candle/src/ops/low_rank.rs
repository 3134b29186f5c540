//! Low-rank terms: what an adapter adds to a linear layer (LoRA, <https://arxiv.org/abs/2106.09685>, section 4.1).

use super::host::{Host, edit};
use super::products::{Part, Start, add_scaled, outer, product, row_dots, sum};
use super::weight::Weight;
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{LowRankUpdate, add_low_rank_updates};
use std::ops::Range;

/// The term `scale * B A x` that is added to the output of one linear layer.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A: `[rank, in_features]`.
    pub a: Tensor,
    /// B: `[out_features, rank]`.
    pub b: Tensor,
    /// The factor.
    pub scale: f32,
    /// Probability with which an input element of A is dropped in training; ignored elsewhere.
    pub dropout: f32,
    /// A and B as they were when training began, if they were not without effect: `scale * (B A - B0 A0) x` is added then,
    /// as if `scale * B0 A0` had been taken out of the weight. They are frozen.
    pub start: Option<(Tensor, Tensor)>,
    /// The magnitudes of the rows, for weight-decomposed adapters.
    pub magnitude: Option<Magnitude>,
    /// The f32 factors that inference on the CPU multiplies by, if A and B are known not to change; otherwise they are computed
    /// for each call: A `[rank, in_features]` and the transpose of B `[rank, out_features]`, with A0 and the negative of B0 below
    /// them.
    pub fixed: Option<(Tensor, Tensor)>,
}

impl LowRank {
    /// The term `scale * B A x`.
    pub fn new(a: Tensor, b: Tensor, scale: f32) -> Self {
        Self { a, b, scale, dropout: 0.0, start: None, magnitude: None, fixed: None }
    }
}

/// `y` with the updates of runs of its rows, in its place: on the CPU, without their magnitudes.
///
/// # Shapes
/// `x: [tokens, in_features]`, `y: [tokens, out_features]`.
pub(super) fn add_updates(y: Tensor, x: &Tensor, terms: &[(Range<usize>, &LowRank)]) -> Result<Tensor> {
    let _span = span("low-rank update", Kind::Gemm);
    let shape = (y.dim(1)?, x.dim(1)?);
    let factors = terms.iter().map(|(_, term)| term.factors()).collect::<Result<Vec<_>>>()?;
    let hosts = factors.iter().map(|(a, b)| Ok((Host::new(a)?, Host::new(b)?))).collect::<Result<Vec<_>>>()?;
    let mut updates = Vec::with_capacity(terms.len());
    for ((rows, term), ((a, _), of)) in terms.iter().zip(factors.iter().zip(&hosts)) {
        let (rank, scale) = (a.dim(0)?, term.scale);
        updates.push(LowRankUpdate { rows: rows.clone(), rank, a: of.0.f32()?, b: of.1.f32()?, scale });
    }
    let x = Host::new(x)?;
    let x = x.f32()?;
    edit(y, |y| add_low_rank_updates(shape, x, &updates, y))
}

/// The gradients of a low-rank term, f32.
#[derive(Debug, Clone)]
pub struct TermGradients {
    /// With respect to A: `[rank, in_features]`.
    pub a: Tensor,
    /// With respect to B: `[out_features, rank]`.
    pub b: Tensor,
    /// With respect to the magnitudes, if there are any: `[out_features]`.
    pub magnitude: Option<Tensor>,
}

impl TermGradients {
    /// The sum of two gradients of the same term.
    pub(super) fn plus(self, other: &Self) -> Result<Self> {
        let magnitude = match (self.magnitude, &other.magnitude) {
            (Some(sum), Some(other)) => Some(add_scaled(sum, 1.0, other)?),
            (sum, other) => sum.or_else(|| other.clone()),
        };
        Ok(Self { a: add_scaled(self.a, 1.0, &other.a)?, b: add_scaled(self.b, 1.0, &other.b)?, magnitude })
    }
}

/// The magnitudes of a weight-decomposed term (DoRA, <https://arxiv.org/abs/2402.09353>, section 4): row `j` of the
/// product of input and adapted weight is multiplied by `m[j] / |W[j] + scale * (B A)[j]|`, and the norm counts as constant in
/// the backward pass.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// m: `[out_features]`.
    pub m: Tensor,
    /// The squared norm of each row of the weight: `[out_features]`, f32; what [`weight_norms_squared`] returns.
    pub weight_norms_squared: Tensor,
    /// `1 / |W[j] + scale * (B A)[j]|`, f32, if A and B are known not to change; else it is computed whenever it is needed.
    pub reciprocal_norms: Option<Tensor>,
}

/// The squared Euclidean norm of each row of `weight: [out_features, in_features]`: `[out_features]`, f32.
///
/// # Errors
/// The device fails.
pub fn weight_norms_squared(weight: &Tensor) -> Result<Tensor> {
    Weight::from(weight.clone()).row_norms_squared()
}

impl LowRank {
    /// The factors that `fixed` caches.
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        if let Some(factors) = &self.fixed {
            return Ok(factors.clone());
        }
        let factors = match &self.start {
            None => (self.a.clone(), self.b.t()?),
            Some((a, b)) => (Tensor::cat(&[&self.a, a], 0)?, Tensor::cat(&[&self.b, &b.neg()?], 1)?.t()?),
        };
        let wide = |tensor: Tensor| tensor.to_dtype(DType::F32)?.contiguous();
        Ok((wide(factors.0)?, wide(factors.1)?))
    }

    /// The term with what depends on A and B alone computed, for as long as these do not change.
    pub(crate) fn fixed(&self, weight: &Weight, is_embedding: bool) -> Result<Self> {
        let mut fixed = self.clone();
        if !is_embedding && self.a.device().is_cpu() {
            fixed.fixed = Some(self.factors()?);
        }
        if let Some(magnitude) = &mut fixed.magnitude {
            magnitude.reciprocal_norms = Some(self.reciprocal_norms(magnitude, weight, is_embedding)?);
        }
        Ok(fixed)
    }

    /// `1 / |W[j] + scale * (B A - B0 A0)[j]|` for each row: `[out_features]`, f32.
    ///
    /// The norm is taken apart, `|W|^2 + 2 scale (W A^T) . B + scale^2 (B A A^T) . B`, so that no matrix of the size of W is made.
    /// Of an embedding the transpose of W is kept.
    pub(super) fn reciprocal_norms(
        &self,
        magnitude: &Magnitude,
        weight: &Weight,
        is_embedding: bool,
    ) -> Result<Tensor> {
        if let Some(reciprocal_norms) = &magnitude.reciprocal_norms {
            return Ok(reciprocal_norms.clone());
        }
        let (a, b) = match &self.start {
            None => (self.a.clone(), self.b.clone()),
            Some((a, b)) => (Tensor::cat(&[&self.a, a], 0)?, Tensor::cat(&[&self.b, &b.neg()?], 1)?),
        };
        // W A^T as (A W^T)^T: the weight may be in half precision, A is not
        let through =
            if is_embedding { sum(Start::Zero, &[Part::plain(&a, weight, 1.0)])? } else { product(&a, weight)? };
        let through = through.t()?.contiguous()?.to_dtype(DType::F32)?;
        let b = b.to_dtype(DType::F32)?.contiguous()?;
        let gram = outer(&a.t()?.contiguous()?, &a.t()?.contiguous()?)?;
        let square = product(&b, &gram)?;
        let scale = f64::from(self.scale);
        let norms =
            add_scaled(magnitude.weight_norms_squared.force_contiguous()?, 2.0 * scale, &row_dots(&through, &b)?)?;
        let norms = add_scaled(norms, scale * scale, &row_dots(&square, &b)?)?;
        // rounding may leave a row of zeros slightly negative
        Ok(norms.clamp(f32::MIN_POSITIVE, f32::MAX)?.sqrt()?.recip()?)
    }
}

/// The terms of an adapter by the number of the linear layer they belong to.
#[derive(Debug, Clone, Default)]
pub struct LowRankTerms {
    terms: Vec<Option<LowRank>>,
}

impl LowRankTerms {
    /// No terms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the term of linear layer `number`.
    pub fn insert(&mut self, number: usize, term: LowRank) {
        if self.terms.len() <= number {
            self.terms.resize_with(number + 1, || None);
        }
        self.terms[number] = Some(term);
    }

    /// The term of linear layer `number`.
    pub fn get(&self, number: usize) -> Option<&LowRank> {
        self.terms.get(number).and_then(Option::as_ref)
    }

    /// The terms with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &LowRank)> {
        self.terms.iter().enumerate().filter_map(|(number, term)| Some((number, term.as_ref()?)))
    }
}
