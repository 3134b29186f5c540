//! The linear layer with an optional low-rank term: `y = x W^T + b + scale (drop(x) A^T) B^T`.

use super::adapters::LayerTerms;
use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, on_cpu, tensor};
pub(super) use super::low_rank::TermGradients;
use super::low_rank::{LowRank, Magnitude, add_updates};
pub(super) use super::products::{Order, Part, Start, column_dots, product, scale_columns, scaled_outer, sum, sum_in};
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

/// Which gradients [`Linear::backward`] computes beside those of the term; the others cost nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
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
    pub(crate) term: Option<TermGradients>,
}

/// The factor on each column of a weight-decomposed product, and the reciprocal norms in it.
struct Factors {
    factors: Tensor,
    reciprocal_norms: Tensor,
}

impl Linear {
    /// The layer's output, added to `residual` if there is one. A dropout seed means training.
    ///
    /// # Shapes
    /// `x: [tokens, in_features]`, `residual` and the result `[tokens, out_features]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(self.forward_keeping(x, term, dropout_seed, residual)?.0)
    }

    /// The output where no backward pass follows: on the CPU each row has the same bits alone and among any others.
    pub(crate) fn infer(&self, x: &Tensor, term: Option<&LowRank>, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.output(Order::ByRow, x, term, None, residual)?.0)
    }

    /// As [`Linear::infer`] with low-rank updates that may differ by row. The weight is read once.
    pub(crate) fn infer_terms(&self, x: &Tensor, terms: &LayerTerms, residual: Option<&Tensor>) -> Result<Tensor> {
        let runs = match terms {
            LayerTerms::Same(term) => return self.infer(x, *term, residual),
            LayerTerms::ByRows(runs) => runs,
        };
        let run_of = |x: &Tensor, rows: &Range<usize>| x.narrow(0, rows.start, rows.len());
        let is_simple = |term: &LowRank| term.magnitude.is_none() && (on_cpu(x) || term.start.is_none());
        let mut parts = Vec::with_capacity(runs.len());
        if !runs.iter().all(|(_, term)| term.is_none_or(is_simple)) {
            for (rows, term) in runs {
                let residual = residual.map(|residual| run_of(residual, rows)).transpose()?;
                parts.push(self.infer(&run_of(x, rows)?, *term, residual.as_ref())?);
            }
            return Ok(Tensor::cat(&parts, 0)?);
        }
        let y = self.base(Order::ByRow, x, None, None, self.start(residual))?;
        if on_cpu(x) {
            let terms = runs.iter().filter_map(|(rows, term)| Some((rows.clone(), (*term)?)));
            return self.finished(add_updates(y, x, &terms.collect::<Vec<_>>())?, residual);
        }
        for (rows, term) in runs {
            let part = run_of(&y, rows)?;
            let Some(term) = term else {
                parts.push(part);
                continue;
            };
            let z = product_in(Order::ByRow, &run_of(x, rows)?, &term.a)?;
            let update = [Part::transposed(&z, &term.b, term.scale)];
            parts.push(sum_in(Order::ByRow, Start::Sum(part.force_contiguous()?), &update)?);
        }
        self.finished(Tensor::cat(&parts, 0)?, residual)
    }

    /// [`Linear::forward`], and the product with A of a term, where keeping it for [`Linear::backward`] is worth while.
    pub(crate) fn forward_keeping(
        &self,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.output(Order::ByShape, x, term, dropout_seed, residual)
    }

    fn output(
        &self,
        order: Order,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Some(term) = term else {
            return Ok((self.finished(self.base(order, x, None, None, self.start(residual))?, residual)?, None));
        };
        if let Some(magnitude) = &term.magnitude {
            return Ok((self.decomposed(order, x, (term, magnitude), dropout_seed, residual)?, None));
        }
        let (y, z) = self.updated(order, x, term, dropout_seed, self.start(residual))?;
        Ok((self.finished(y, residual)?, z))
    }

    /// The output without magnitudes, added to `start`, and the product with A where keeping it is worth while.
    fn updated(
        &self,
        order: Order,
        x: &Tensor,
        term: &LowRank,
        dropout_seed: Option<u64>,
        start: Start,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if order == Order::ByRow && on_cpu(x) {
            let y = self.base(order, x, None, None, start)?;
            return Ok((add_updates(y, x, &[(0..x.dim(0)?, term)])?, None));
        }
        let z = product_in(order, &dropped(x, term, dropout_seed)?, &term.a)?;
        let y = self.base(order, x, Some(term), Some(&z), start)?;
        Ok((y, gpu::has_products(x).then_some(z)))
    }

    /// The output with a term that has magnitudes.
    fn decomposed(
        &self,
        order: Order,
        x: &Tensor,
        (term, magnitude): (&LowRank, &Magnitude),
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let factors = self.factors(term, magnitude)?.factors;
        if !is_dropping(term, dropout_seed) {
            let y = scale_columns(self.updated(order, x, term, None, Start::Zero)?.0, &factors)?;
            let y = if let Some(bias) = &self.bias { add_bias(y, bias)? } else { y };
            return if let Some(residual) = residual { add_scaled(y, 1.0, residual) } else { Ok(y) };
        }
        // the plain product sees the whole input, the weight-decomposed one what dropout left of it
        let dropped = dropped(x, term, dropout_seed)?;
        let y = self.finished(self.base(order, x, Some(term), None, self.start(residual))?, residual)?;
        let base = self.base(order, &dropped, Some(term), None, Start::Zero)?;
        let y = add_scaled(y, -1.0, &base)?;
        let z = product_in(order, &dropped, &term.a)?;
        let adapted = sum_in(order, Start::Sum(base), &[Part::transposed(&z, &term.b, term.scale)])?;
        add_scaled(y, 1.0, &scale_columns(adapted, &factors)?)
    }

    /// The gradients from `dy: [tokens, out_features]`; that of the input is added to `dx` if it is given. Only those of a
    /// weight or a term need the input `x`; `z` is what the forward pass kept.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        x: Option<&Tensor>,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        dy: &Tensor,
        wanted: Wanted,
        dx: Option<Tensor>,
        z: Option<&Tensor>,
    ) -> Result<LinearGradients> {
        let mut gradients = LinearGradients::default();
        let x = || x.ok_or_else(|| Error::argument("x", "the gradient of a weight or a term needs the layer's input"));
        if wanted.weight {
            gradients.weight = Some(outer(dy, x()?)?);
        }
        if wanted.bias && self.bias.is_some() {
            gradients.bias = Some(column_sums(dy)?);
        }
        let Some(term) = term else {
            gradients.input = wanted.input.then(|| self.base_backward(dx, dy, None, None)).transpose()?;
            return Ok(gradients);
        };
        let dropped_x = dropped(x()?, term, dropout_seed)?;
        let Some(magnitude) = &term.magnitude else {
            let (of_term, dz) = term_gradients(&dropped_x, term, dy, z)?;
            if wanted.input && is_dropping(term, dropout_seed) {
                let dx = self.base_backward(dx, dy, Some(term), None)?;
                let through = sum(Start::Zero, &[Part::plain(&dz, &term.a, 1.0)])?;
                gradients.input = Some(add_scaled(dx, 1.0, &dropped(&through, term, dropout_seed)?)?);
            } else if wanted.input {
                gradients.input = Some(self.base_backward(dx, dy, Some(term), Some(&dz))?);
            }
            gradients.term = Some(of_term);
            return Ok(gradients);
        };

        // y = g p + b with p = base(x) + term(x); with dropout y = base(x) - base(drop(x)) + g p + b
        let Factors { factors, reciprocal_norms } = self.factors(term, magnitude)?;
        let z = product(&dropped_x, &term.a)?;
        let p = self.base(Order::ByShape, &dropped_x, Some(term), Some(&z), Start::Zero)?;
        let d_magnitude = (column_dots(dy, &p)? * reciprocal_norms)?;
        drop(p);
        let dp = scale_columns(dy.force_contiguous()?, &factors)?;
        let (of_term, dz) = term_gradients(&dropped_x, term, &dp, Some(&z))?;
        gradients.term = Some(TermGradients { magnitude: Some(d_magnitude), ..of_term });
        if !wanted.input {
            return Ok(gradients);
        }
        gradients.input = Some(if is_dropping(term, dropout_seed) {
            let through = self.base_backward(None, &add_scaled(dp, -1.0, dy)?, Some(term), Some(&dz))?;
            let dx = self.base_backward(dx, dy, Some(term), None)?;
            add_scaled(dx, 1.0, &dropped(&through, term, dropout_seed)?)?
        } else {
            self.base_backward(dx, &dp, Some(term), Some(&dz))?
        });
        Ok(gradients)
    }

    /// `x (W - scale B0 A0)^T`, what training starts from, plus `scale z B^T` if `z` is given, added to `start`.
    fn base(
        &self,
        order: Order,
        x: &Tensor,
        term: Option<&LowRank>,
        z: Option<&Tensor>,
        start: Start,
    ) -> Result<Tensor> {
        let mut parts = vec![Part::transposed(x, &self.weight, 1.0)];
        if let (Some(term), Some(z)) = (term, z) {
            parts.push(Part::transposed(z, &term.b, term.scale));
        }
        let first = term.and_then(|term| Some((term.scale, term.start.as_ref()?)));
        let z0 = first.map(|(_, (a, _))| product_in(order, x, a)).transpose()?;
        if let (Some((scale, (_, b))), Some(z0)) = (first, &z0) {
            parts.push(Part::transposed(z0, b, -scale));
        }
        sum_in(order, start, &parts)
    }

    /// Where the sum of an output begins; a layer with a bias adds the residual at the end.
    fn start<'a>(&'a self, residual: Option<&'a Tensor>) -> Start<'a> {
        match (&self.bias, residual) {
            (Some(bias), _) => Start::Row(bias),
            (None, Some(residual)) => Start::Matrix(residual),
            (None, None) => Start::Zero,
        }
    }

    /// An output that began with [`Linear::start`].
    fn finished(&self, y: Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match residual {
            Some(residual) if self.bias.is_some() => add_scaled(y, 1.0, residual),
            _ => Ok(y),
        }
    }

    /// The gradient of [`Linear::base`] with respect to `x`, with `dz` that of `z`, added to `dx` if it is given.
    fn base_backward(
        &self,
        dx: Option<Tensor>,
        dy: &Tensor,
        term: Option<&LowRank>,
        dz: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut parts = vec![Part::plain(dy, &self.weight, 1.0)];
        if let (Some(term), Some(dz)) = (term, dz) {
            parts.push(Part::plain(dz, &term.a, 1.0));
        }
        let first = term.and_then(|term| Some((term.scale, term.start.as_ref()?)));
        let dz0 = first.map(|(_, (_, b))| sum(Start::Zero, &[Part::plain(dy, b, 1.0)])).transpose()?;
        if let (Some((scale, (a, _))), Some(dz0)) = (first, &dz0) {
            parts.push(Part::plain(dz0, a, -scale));
        }
        sum(dx.map_or(Start::Zero, Start::Sum), &parts)
    }

    fn factors(&self, term: &LowRank, magnitude: &Magnitude) -> Result<Factors> {
        let reciprocal_norms = term.reciprocal_norms(magnitude, &self.weight, false)?;
        let factors = (magnitude.m.to_dtype(DType::F32)? * &reciprocal_norms)?;
        Ok(Factors { factors, reciprocal_norms })
    }
}

/// The gradients of A and B, and that of `z = x A^T`, which may be known.
fn term_gradients(x: &Tensor, term: &LowRank, dy: &Tensor, z: Option<&Tensor>) -> Result<(TermGradients, Tensor)> {
    let z = z.map_or_else(|| product(x, &term.a), |z| Ok(z.clone()))?;
    let dz = sum(Start::Zero, &[Part::plain(dy, &term.b, term.scale)])?;
    let b = scaled_outer(term.scale, dy, &z)?;
    let a = outer(&dz, x)?;
    Ok((TermGradients { a, b, magnitude: None }, dz))
}

/// Whether the term's input loses elements.
fn is_dropping(term: &LowRank, seed: Option<u64>) -> bool {
    seed.is_some() && term.dropout > 0.0
}

/// Dropout of a term's input in training; the gradient of dropout is dropout of the gradient.
pub(super) fn dropped(x: &Tensor, term: &LowRank, seed: Option<u64>) -> Result<Tensor> {
    let (Some(seed), true) = (seed, term.dropout > 0.0) else {
        return Ok(x.clone());
    };
    if gpu::has_kernels(x) {
        let y = gpu::empty(x.shape(), x)?;
        let (count, threshold) = (x.elem_count(), kernels::dropout_threshold(term.dropout));
        let words = [
            count.into(),
            (1.0 / (1.0 - term.dropout)).into(),
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
        kernels::dropout(Host::new(x)?.f32()?, term.dropout, seed, &mut y);
        return tensor(y, x.shape());
    }
    let mut factors = vec![0.0; x.elem_count()];
    kernels::dropout(&vec![1.0; x.elem_count()], term.dropout, seed, &mut factors);
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
    Ok((x * factors)?)
}
