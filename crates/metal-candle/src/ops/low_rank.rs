//! The low-rank updates that adapters add to linear layers (LoRA, <https://arxiv.org/abs/2106.09685>, section 4.1), and
//! DoRA magnitudes.

use super::host::{Host, edit};
use super::products::{Accumulator, ScaledProduct, add_scaled, outer, product, row_dots, sum};
use super::weight::Weight;
use crate::error::Result;
use crate::files::Digest;
use crate::profile::{Kind, span};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{LowRankUpdate, add_low_rank_updates};
use std::ops::Range;

/// The low-rank update `scale * B A x`, which is added to the output of one linear layer.
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
    /// A0 and B0, the initial values of A and B if their product is not 0 (PiSSA, OLoRA). The update is then
    /// `scale * (B A - B0 A0) x`, as if `scale * B0 A0` had been subtracted from the weight. They are frozen.
    pub initial_factors: Option<(Tensor, Tensor)>,
    /// The DoRA magnitudes, if the adapter has any.
    pub magnitude: Option<Magnitude>,
    /// The f32 matrices that inference on the CPU multiplies by, if A and B will not change; otherwise they are
    /// computed in every call: A `[rank, in_features]` and the transpose of B `[rank, out_features]`, followed by A0
    /// and the negative of B0.
    pub cached_factors: Option<(Tensor, Tensor)>,
}

impl LowRank {
    /// The low-rank update `scale * B A x`.
    pub fn new(a: Tensor, b: Tensor, scale: f32) -> Self {
        Self { a, b, scale, dropout: 0.0, initial_factors: None, magnitude: None, cached_factors: None }
    }
}

/// Adds the low-rank updates of runs of rows to `y` in place, on the CPU, without their magnitudes.
///
/// # Shapes
/// `x: [tokens, in_features]`, `y: [tokens, out_features]`.
pub(super) fn add_updates(y: Tensor, x: &Tensor, updates: &[(Range<usize>, &LowRank)]) -> Result<Tensor> {
    let _span = span("low-rank update", Kind::Gemm);
    let shape = (y.dim(1)?, x.dim(1)?);
    let factors = updates.iter().map(|(_, update)| update.factors()).collect::<Result<Vec<_>>>()?;
    let hosts = factors.iter().map(|(a, b)| Ok((Host::new(a)?, Host::new(b)?))).collect::<Result<Vec<_>>>()?;
    let mut with_slices = Vec::with_capacity(updates.len());
    for ((rows, update), ((a, _), of)) in updates.iter().zip(factors.iter().zip(&hosts)) {
        let (rank, scale) = (a.dim(0)?, update.scale);
        with_slices.push(LowRankUpdate { rows: rows.clone(), rank, a: of.0.f32()?, b: of.1.f32()?, scale });
    }
    let x = Host::new(x)?;
    let x = x.f32()?;
    edit(y, |y| add_low_rank_updates(shape, x, &with_slices, y))
}

/// The gradients of a low-rank update, f32.
#[derive(Debug, Clone)]
pub struct LowRankGradients {
    /// With respect to A: `[rank, in_features]`.
    pub a: Tensor,
    /// With respect to B: `[out_features, rank]`.
    pub b: Tensor,
    /// With respect to the magnitudes, if there are any: `[out_features]`.
    pub magnitude: Option<Tensor>,
}

impl LowRankGradients {
    /// The sum of two gradients of the same low-rank update.
    pub(super) fn plus(self, other: &Self) -> Result<Self> {
        let magnitude = match (self.magnitude, &other.magnitude) {
            (Some(sum), Some(other)) => Some(add_scaled(sum, 1.0, other)?),
            (sum, other) => sum.or_else(|| other.clone()),
        };
        Ok(Self { a: add_scaled(self.a, 1.0, &other.a)?, b: add_scaled(self.b, 1.0, &other.b)?, magnitude })
    }
}

/// The magnitudes of a weight-decomposed low-rank update (DoRA, <https://arxiv.org/abs/2402.09353>, section 4): row `j`
/// of the adapted weight is multiplied by `m[j] / |W[j] + scale * (B A)[j]|`. The norm is treated as a constant in the
/// backward pass.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// m: `[out_features]`.
    pub m: Tensor,
    /// The squared norm of each row of the weight, `[out_features]`, f32: the result of [`weight_norms_squared`].
    pub weight_norms_squared: Tensor,
    /// `1 / |W[j] + scale * (B A)[j]|`, f32, if A and B will not change; otherwise it is computed in every call.
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
    /// The matrices that `cached_factors` caches.
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        if let Some(factors) = &self.cached_factors {
            return Ok(factors.clone());
        }
        let factors = match &self.initial_factors {
            None => (self.a.clone(), self.b.t()?),
            Some((a, b)) => (Tensor::cat(&[&self.a, a], 0)?, Tensor::cat(&[&self.b, &b.neg()?], 1)?.t()?),
        };
        let wide = |tensor: Tensor| tensor.to_dtype(DType::F32)?.contiguous();
        Ok((wide(factors.0)?, wide(factors.1)?))
    }

    /// The low-rank update with everything cached that depends on A and B only. It is valid until they change.
    pub(crate) fn with_cached_factors(&self, weight: &Weight, is_embedding: bool) -> Result<Self> {
        let mut cached = self.clone();
        if !is_embedding && self.a.device().is_cpu() {
            cached.cached_factors = Some(self.factors()?);
        }
        if let Some(magnitude) = &mut cached.magnitude {
            magnitude.reciprocal_norms = Some(self.reciprocal_norms(magnitude, weight, is_embedding)?);
        }
        Ok(cached)
    }

    /// `1 / |W[j] + scale * (B A - B0 A0)[j]|` for each row: `[out_features]`, f32.
    ///
    /// The norm is expanded to `|W|^2 + 2 scale (W A^T) . B + scale^2 (B A A^T) . B`, so no matrix of the size of W is
    /// allocated. An embedding stores the transpose of W.
    pub(super) fn reciprocal_norms(
        &self,
        magnitude: &Magnitude,
        weight: &Weight,
        is_embedding: bool,
    ) -> Result<Tensor> {
        if let Some(reciprocal_norms) = &magnitude.reciprocal_norms {
            return Ok(reciprocal_norms.clone());
        }
        let (a, b) = match &self.initial_factors {
            None => (self.a.clone(), self.b.clone()),
            Some((a, b)) => (Tensor::cat(&[&self.a, a], 0)?, Tensor::cat(&[&self.b, &b.neg()?], 1)?),
        };
        // W A^T as (A W^T)^T, because the weight may be in half precision and A is not
        let through = if is_embedding {
            sum(Accumulator::Zero, &[ScaledProduct::plain(&a, weight, 1.0)])?
        } else {
            product(&a, weight)?
        };
        let through = through.t()?.contiguous()?.to_dtype(DType::F32)?;
        let b = b.to_dtype(DType::F32)?.contiguous()?;
        let gram = outer(&a.t()?.contiguous()?, &a.t()?.contiguous()?)?;
        let square = product(&b, &gram)?;
        let scale = f64::from(self.scale);
        let norms =
            add_scaled(magnitude.weight_norms_squared.force_contiguous()?, 2.0 * scale, &row_dots(&through, &b)?)?;
        let norms = add_scaled(norms, scale * scale, &row_dots(&square, &b)?)?;
        // rounding may make the norm of a zero row slightly negative
        Ok(norms.clamp(f32::MIN_POSITIVE, f32::MAX)?.sqrt()?.recip()?)
    }
}

/// The low-rank updates of an adapter, by the id of their linear layer.
#[derive(Debug, Clone, Default)]
pub struct LowRankUpdates {
    updates: Vec<Option<LowRank>>,
}

impl LowRankUpdates {
    /// No low-rank updates.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the low-rank update of linear layer `id`.
    pub fn insert(&mut self, id: usize, update: LowRank) {
        if self.updates.len() <= id {
            self.updates.resize_with(id + 1, || None);
        }
        self.updates[id] = Some(update);
    }

    /// The low-rank update of linear layer `id`.
    pub fn get(&self, id: usize) -> Option<&LowRank> {
        self.updates.get(id).and_then(Option::as_ref)
    }

    /// A SHA-256 of everything that determines the results of inference: the ids of the layers and their updates.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn digest(&self) -> Result<[u8; 32]> {
        let mut digest = Digest::new("low-rank updates");
        for (id, update) in self.iter() {
            digest.add_number(id as u64);
            digest.add_number(u64::from(update.scale.to_bits()));
            let initial = update.initial_factors.as_ref().map(|(a, b)| [a, b]);
            let magnitude = update.magnitude.as_ref().map(|magnitude| &magnitude.m);
            let parts = [Some(&update.a), Some(&update.b), initial.map(|[a, _]| a), initial.map(|[_, b]| b), magnitude];
            for part in parts {
                digest.add_number(u64::from(part.is_some()));
                part.map_or(Ok(()), |tensor| digest.add_tensor(tensor))?;
            }
        }
        Ok(digest.finish())
    }

    /// The low-rank updates with the ids of their layers.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &LowRank)> {
        self.updates.iter().enumerate().filter_map(|(id, update)| Some((id, update.as_ref()?)))
    }
}
