//! Linear layers with an optional low-rank update, `y = x W^T + b + scale (drop(x) A^T) B^T`, and their gradients.

use super::adapters::LayerUpdates;
use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, on_cpu, tensor};
pub(super) use super::low_rank::LowRankGradients;
use super::low_rank::{LowRank, Magnitude, add_updates};
pub(super) use super::products::{
    Accumulator, Order, ScaledProduct, column_dots, product, scale_columns, scaled_outer, sum, sum_in,
};
use super::products::{add_bias, product_in};
pub(crate) use super::products::{add_scaled, column_sums, outer};
use super::weight::Weight;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;
use std::ops::Range;

/// The weights of a linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[out_features, in_features]`.
    pub(crate) weight: Weight,
    /// `[out_features]`.
    pub(crate) bias: Option<Tensor>,
}

/// The gradients that [`Linear::backward`] computes besides those of the low-rank update. The others cost nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NeedsGrad {
    pub(crate) input: bool,
    pub(crate) weight: bool,
    pub(crate) bias: bool,
}

/// The gradients of a linear layer.
#[derive(Debug, Default)]
pub(crate) struct LinearGradients {
    pub(crate) input: Option<Tensor>,
    pub(crate) weight: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
    pub(crate) update: Option<LowRankGradients>,
}

/// The factor on each column of a DoRA product, and the reciprocal norms that it contains.
struct ColumnFactors {
    factors: Tensor,
    reciprocal_norms: Tensor,
}

impl Linear {
    /// The layer's output, plus `residual` if given. A dropout seed means training.
    ///
    /// # Shapes
    /// `x: [tokens, in_features]`, `residual` and the result `[tokens, out_features]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        update: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(self.forward_saving(x, update, dropout_seed, residual)?.0)
    }

    /// The output without a backward pass. On the CPU the result of a row does not depend on the other rows, bit for
    /// bit.
    pub(crate) fn infer(&self, x: &Tensor, update: Option<&LowRank>, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.output(Order::ByRow, x, update, None, residual)?.0)
    }

    /// [`Linear::infer`] with low-rank updates that may differ by row. The weight is read once.
    pub(crate) fn infer_adapted(
        &self,
        x: &Tensor,
        updates: &LayerUpdates,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let runs = match updates {
            LayerUpdates::Same(update) => return self.infer(x, *update, residual),
            LayerUpdates::ByRows(runs) => runs,
        };
        let run_of = |x: &Tensor, rows: &Range<usize>| x.narrow(0, rows.start, rows.len());
        let is_simple =
            |update: &LowRank| update.magnitude.is_none() && (on_cpu(x) || update.initial_factors.is_none());
        let mut parts = Vec::with_capacity(runs.len());
        if !runs.iter().all(|(_, update)| update.is_none_or(is_simple)) {
            for (rows, update) in runs {
                let residual = residual.map(|residual| run_of(residual, rows)).transpose()?;
                parts.push(self.infer(&run_of(x, rows)?, *update, residual.as_ref())?);
            }
            return Ok(Tensor::cat(&parts, 0)?);
        }
        let y = self.base(Order::ByRow, x, None, None, self.accumulator(residual))?;
        if on_cpu(x) {
            let updates = runs.iter().filter_map(|(rows, update)| Some((rows.clone(), (*update)?)));
            return self.finished(add_updates(y, x, &updates.collect::<Vec<_>>())?, residual);
        }
        for (rows, update) in runs {
            let part = run_of(&y, rows)?;
            let Some(update) = update else {
                parts.push(part);
                continue;
            };
            let z = product_in(Order::ByRow, &run_of(x, rows)?, &update.a)?;
            let product = [ScaledProduct::transposed(&z, &update.b, update.scale)];
            parts.push(sum_in(Order::ByRow, Accumulator::InPlace(part.force_contiguous()?), &product)?);
        }
        self.finished(Tensor::cat(&parts, 0)?, residual)
    }

    /// [`Linear::forward`], and the product with A of the low-rank update if [`Linear::backward`] benefits from it.
    pub(crate) fn forward_saving(
        &self,
        x: &Tensor,
        update: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.output(Order::ByShape, x, update, dropout_seed, residual)
    }

    fn output(
        &self,
        order: Order,
        x: &Tensor,
        update: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Some(update) = update else {
            return Ok((self.finished(self.base(order, x, None, None, self.accumulator(residual))?, residual)?, None));
        };
        if let Some(magnitude) = &update.magnitude {
            return Ok((self.decomposed(order, x, (update, magnitude), dropout_seed, residual)?, None));
        }
        let (y, z) = self.updated(order, x, update, dropout_seed, self.accumulator(residual))?;
        Ok((self.finished(y, residual)?, z))
    }

    /// The output without magnitudes, added to `accumulator`, and the product with A if the backward pass benefits from
    /// it.
    fn updated(
        &self,
        order: Order,
        x: &Tensor,
        update: &LowRank,
        dropout_seed: Option<u64>,
        accumulator: Accumulator,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if order == Order::ByRow && on_cpu(x) {
            let y = self.base(order, x, None, None, accumulator)?;
            return Ok((add_updates(y, x, &[(0..x.dim(0)?, update)])?, None));
        }
        let z = product_in(order, &dropped(x, update, dropout_seed)?, &update.a)?;
        let y = self.base(order, x, Some(update), Some(&z), accumulator)?;
        Ok((y, gpu::has_products(x).then_some(z)))
    }

    /// The output with a low-rank update that has DoRA magnitudes.
    fn decomposed(
        &self,
        order: Order,
        x: &Tensor,
        (update, magnitude): (&LowRank, &Magnitude),
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let factors = self.factors(update, magnitude)?.factors;
        if !drops_elements(update, dropout_seed) {
            let y = scale_columns(self.updated(order, x, update, None, Accumulator::Zero)?.0, &factors)?;
            let y = if let Some(bias) = &self.bias { add_bias(y, bias)? } else { y };
            return if let Some(residual) = residual { add_scaled(y, 1.0, residual) } else { Ok(y) };
        }
        // dropout applies to the input of the DoRA product only, not to that of the base product
        let dropped = dropped(x, update, dropout_seed)?;
        let y = self.finished(self.base(order, x, Some(update), None, self.accumulator(residual))?, residual)?;
        let base = self.base(order, &dropped, Some(update), None, Accumulator::Zero)?;
        let y = add_scaled(y, -1.0, &base)?;
        let z = product_in(order, &dropped, &update.a)?;
        let adapted =
            sum_in(order, Accumulator::InPlace(base), &[ScaledProduct::transposed(&z, &update.b, update.scale)])?;
        add_scaled(y, 1.0, &scale_columns(adapted, &factors)?)
    }

    /// The gradients from `dy: [tokens, out_features]`. The gradient with respect to the input is added to `dx` if
    /// given. The input `x` is required only for gradients of the weight or a low-rank update. `z` is the saved result
    /// of the forward pass.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        x: Option<&Tensor>,
        update: Option<&LowRank>,
        dropout_seed: Option<u64>,
        dy: &Tensor,
        needs_grad: NeedsGrad,
        dx: Option<Tensor>,
        z: Option<&Tensor>,
    ) -> Result<LinearGradients> {
        let mut gradients = LinearGradients::default();
        let x = || {
            x.ok_or_else(|| {
                Error::Bug("the gradient of a weight or low-rank update was computed without the layer's input".into())
            })
        };
        if needs_grad.weight {
            gradients.weight = Some(outer(dy, x()?)?);
        }
        if needs_grad.bias && self.bias.is_some() {
            gradients.bias = Some(column_sums(dy)?);
        }
        let Some(update) = update else {
            gradients.input = needs_grad.input.then(|| self.base_backward(dx, dy, None, None)).transpose()?;
            return Ok(gradients);
        };
        let dropped_x = dropped(x()?, update, dropout_seed)?;
        let Some(magnitude) = &update.magnitude else {
            let (of_update, dz) = low_rank_gradients(&dropped_x, update, dy, z)?;
            if needs_grad.input && drops_elements(update, dropout_seed) {
                let dx = self.base_backward(dx, dy, Some(update), None)?;
                let through = sum(Accumulator::Zero, &[ScaledProduct::plain(&dz, &update.a, 1.0)])?;
                gradients.input = Some(add_scaled(dx, 1.0, &dropped(&through, update, dropout_seed)?)?);
            } else if needs_grad.input {
                gradients.input = Some(self.base_backward(dx, dy, Some(update), Some(&dz))?);
            }
            gradients.update = Some(of_update);
            return Ok(gradients);
        };

        // y = g p + b with p = base(x) + update(x); with dropout, y = base(x) - base(drop(x)) + g p + b
        let ColumnFactors { factors, reciprocal_norms } = self.factors(update, magnitude)?;
        let z = product(&dropped_x, &update.a)?;
        let p = self.base(Order::ByShape, &dropped_x, Some(update), Some(&z), Accumulator::Zero)?;
        let d_magnitude = (column_dots(dy, &p)? * reciprocal_norms)?;
        drop(p);
        let dp = scale_columns(dy.force_contiguous()?, &factors)?;
        let (of_update, dz) = low_rank_gradients(&dropped_x, update, &dp, Some(&z))?;
        gradients.update = Some(LowRankGradients { magnitude: Some(d_magnitude), ..of_update });
        if !needs_grad.input {
            return Ok(gradients);
        }
        gradients.input = Some(if drops_elements(update, dropout_seed) {
            let through = self.base_backward(None, &add_scaled(dp, -1.0, dy)?, Some(update), Some(&dz))?;
            let dx = self.base_backward(dx, dy, Some(update), None)?;
            add_scaled(dx, 1.0, &dropped(&through, update, dropout_seed)?)?
        } else {
            self.base_backward(dx, &dp, Some(update), Some(&dz))?
        });
        Ok(gradients)
    }

    /// `x (W - scale B0 A0)^T`, the layer before training, plus `scale z B^T` if `z` is given, added to `accumulator`.
    fn base(
        &self,
        order: Order,
        x: &Tensor,
        update: Option<&LowRank>,
        z: Option<&Tensor>,
        accumulator: Accumulator,
    ) -> Result<Tensor> {
        let mut parts = vec![ScaledProduct::transposed(x, &self.weight, 1.0)];
        if let (Some(update), Some(z)) = (update, z) {
            parts.push(ScaledProduct::transposed(z, &update.b, update.scale));
        }
        let first = update.and_then(|update| Some((update.scale, update.initial_factors.as_ref()?)));
        let z0 = first.map(|(_, (a, _))| product_in(order, x, a)).transpose()?;
        if let (Some((scale, (_, b))), Some(z0)) = (first, &z0) {
            parts.push(ScaledProduct::transposed(z0, b, -scale));
        }
        sum_in(order, accumulator, &parts)
    }

    /// The initial value of an output: the bias, else the residual. [`Linear::finished`] adds the residual if there is
    /// a bias.
    fn accumulator<'a>(&'a self, residual: Option<&'a Tensor>) -> Accumulator<'a> {
        match (&self.bias, residual) {
            (Some(bias), _) => Accumulator::Row(bias),
            (None, Some(residual)) => Accumulator::Matrix(residual),
            (None, None) => Accumulator::Zero,
        }
    }

    /// Completes an output that was accumulated onto [`Linear::accumulator`].
    fn finished(&self, y: Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match residual {
            Some(residual) if self.bias.is_some() => add_scaled(y, 1.0, residual),
            _ => Ok(y),
        }
    }

    /// The gradient of [`Linear::base`] with respect to `x`, where `dz` is the gradient with respect to `z`, added to
    /// `dx` if given.
    fn base_backward(
        &self,
        dx: Option<Tensor>,
        dy: &Tensor,
        update: Option<&LowRank>,
        dz: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut parts = vec![ScaledProduct::plain(dy, &self.weight, 1.0)];
        if let (Some(update), Some(dz)) = (update, dz) {
            parts.push(ScaledProduct::plain(dz, &update.a, 1.0));
        }
        let first = update.and_then(|update| Some((update.scale, update.initial_factors.as_ref()?)));
        let dz0 = first.map(|(_, (_, b))| sum(Accumulator::Zero, &[ScaledProduct::plain(dy, b, 1.0)])).transpose()?;
        if let (Some((scale, (a, _))), Some(dz0)) = (first, &dz0) {
            parts.push(ScaledProduct::plain(dz0, a, -scale));
        }
        sum(dx.map_or(Accumulator::Zero, Accumulator::InPlace), &parts)
    }

    fn factors(&self, update: &LowRank, magnitude: &Magnitude) -> Result<ColumnFactors> {
        let reciprocal_norms = update.reciprocal_norms(magnitude, &self.weight, false)?;
        let factors = (magnitude.m.to_dtype(DType::F32)? * &reciprocal_norms)?;
        Ok(ColumnFactors { factors, reciprocal_norms })
    }
}

/// The gradients of A and B, and the gradient with respect to `z = x A^T`. `z` is recomputed if it is not given.
fn low_rank_gradients(
    x: &Tensor,
    update: &LowRank,
    dy: &Tensor,
    z: Option<&Tensor>,
) -> Result<(LowRankGradients, Tensor)> {
    let z = z.map_or_else(|| product(x, &update.a), |z| Ok(z.clone()))?;
    let dz = sum(Accumulator::Zero, &[ScaledProduct::plain(dy, &update.b, update.scale)])?;
    let b = scaled_outer(update.scale, dy, &z)?;
    let a = outer(&dz, x)?;
    Ok((LowRankGradients { a, b, magnitude: None }, dz))
}

/// Whether dropout applies to the input of the low-rank update.
fn drops_elements(update: &LowRank, seed: Option<u64>) -> bool {
    seed.is_some() && update.dropout > 0.0
}

/// Applies dropout to the input of a low-rank update in training. The gradient of dropout is dropout of the gradient.
pub(super) fn dropped(x: &Tensor, update: &LowRank, seed: Option<u64>) -> Result<Tensor> {
    let (Some(seed), true) = (seed, update.dropout > 0.0) else {
        return Ok(x.clone());
    };
    if gpu::has_kernels(x) {
        let y = gpu::empty(x.shape(), x)?;
        let (count, threshold) = (x.elem_count(), kernels::dropout_threshold(update.dropout));
        let words = [
            count.into(),
            (1.0 / (1.0 - update.dropout)).into(),
            (threshold as u32).into(),
            ((threshold >> 32) as u32).into(),
            (seed as u32).into(),
            ((seed >> 32) as u32).into(),
        ];
        let kernel = Kernel::new(Source::Elementwise, "dropout", x.dtype());
        gpu::launch(&kernel, Grid::elements(count), &[Arg::In(x), Arg::Out(&y)], &words)?;
        return Ok(y);
    }
    if on_cpu(x) {
        let mut y = vec![0.0; x.elem_count()];
        kernels::dropout(Host::new(x)?.f32()?, update.dropout, seed, &mut y);
        return tensor(y, x.shape());
    }
    let mut factors = vec![0.0; x.elem_count()];
    kernels::dropout(&vec![1.0; x.elem_count()], update.dropout, seed, &mut factors);
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
    Ok((x * factors)?)
}
