//! RMS norm (<https://arxiv.org/abs/1910.07467>) and layer norm (<https://arxiv.org/abs/1607.06450>) over whole rows or
//! over each head, and their gradients.

use super::gpu::{self, Arg, Grid, Kernel, ROW_THREADS, Source};
use super::host::{Host, edit, on_cpu, tensor};
use super::linear::column_sums;
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, DType, Tensor};
use metal_candle_kernels as kernels;
pub(crate) use metal_candle_kernels::NormKind;
use std::cell::RefCell;

/// A norm of each run of `width` elements of a row.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    /// `[m * width]`, f32 on the CPU: run `i` of a row is multiplied by part `i % m`. `None` means a weight of 1.
    pub(crate) weight: Option<Tensor>,
    /// The same length as the weight, or `[width]` without a weight; f32 on the CPU.
    pub(crate) bias: Option<Tensor>,
    pub(crate) eps: f64,
    pub(crate) width: usize,
}

/// The gradients of a norm that are required besides that of its input.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NormNeedsGrad {
    pub(crate) weight: bool,
    pub(crate) bias: bool,
}

/// The gradients of a norm's weight and bias, f32.
#[derive(Debug, Default)]
pub(crate) struct NormGradients {
    pub(crate) weight: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
}

impl Norm {
    /// RMS norm of whole rows.
    #[cfg(test)]
    pub(crate) fn rms(weight: Tensor, eps: f64) -> Self {
        let width = weight.elem_count();
        Self { kind: NormKind::Rms { offset: 0.0 }, weight: Some(weight), bias: None, eps, width }
    }

    /// # Shapes
    /// `x` and the result: `[tokens, n * width]`, where `n` is a multiple of the number of parts of the weight.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        if self.has_kernels(x) {
            let y = gpu::empty(x.shape(), x)?;
            self.forward_into(x, &y)?;
            return Ok(y);
        }
        if !on_cpu(x) {
            return self.plain_forward(x);
        }
        let _span = span("norm", Kind::Elementwise);
        self.with_host(|norm| tensor(norm.forward(Host::new(x)?.f32()?), x.shape()))
    }

    /// [`Self::forward`] with a kernel that writes to `y`. The caller checks [`Self::has_kernels`] first.
    pub(crate) fn forward_into(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        if !self.has_kernels(x) {
            return Err(Error::Bug("`Norm::forward_into` was called for a norm without kernels".into()));
        }
        let _span = span("norm", Kind::Elementwise);
        self.launch("norm_forward", x, &[Arg::In(x), self.weight_arg(), optional(self.bias.as_ref()), Arg::Out(y)])
    }

    fn weight_arg(&self) -> Arg<'_> {
        optional(self.weight.as_ref())
    }

    /// Adds the gradient with respect to `x` to `dx` in place; also returns the gradients of weight and bias.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: Option<Tensor>,
        needs_grad: NormNeedsGrad,
    ) -> Result<(Tensor, NormGradients)> {
        self.check(x)?;
        let needs_grad = NormNeedsGrad {
            weight: needs_grad.weight && self.weight.is_some(),
            bias: needs_grad.bias && self.bias.is_some(),
        };
        let dx = match dx {
            Some(dx) => dx,
            None => x.zeros_like()?,
        };
        if self.has_kernels(x) {
            return self.gpu_backward(x, dy, dx, needs_grad);
        }
        if !on_cpu(x) {
            return self.plain_backward(x, dy, &dx, needs_grad);
        }
        let _span = span("norm", Kind::Elementwise);
        let (x, dy) = (Host::new(x)?, Host::new(dy)?);
        let (x, dy) = (x.f32()?, dy.f32()?);
        let zeros = |needs_grad: bool, like: &Option<Tensor>| {
            let like = like.as_ref().filter(|_| needs_grad);
            RefCell::new(like.map(|like| vec![0.0; like.elem_count()]))
        };
        let (dw, db) = (zeros(needs_grad.weight, &self.weight), zeros(needs_grad.bias, &self.bias));
        let dx = self.with_host(|norm| {
            edit(dx, |dx| {
                norm.backward(x, dy, dx, dw.borrow_mut().as_deref_mut(), db.borrow_mut().as_deref_mut());
            })
        })?;
        let shaped = |values: RefCell<Option<Vec<f32>>>, like: &Option<Tensor>| -> Result<Option<Tensor>> {
            let Some((values, like)) = values.into_inner().zip(like.as_ref()) else { return Ok(None) };
            Ok(Some(tensor(values, like.shape())?))
        };
        Ok((dx, NormGradients { weight: shaped(dw, &self.weight)?, bias: shaped(db, &self.bias)? }))
    }

    /// Whether this is an RMS norm of whole rows with a weight of type `dtype`, no offset and no bias.
    pub(crate) fn is_plain_rms(&self, dtype: DType) -> bool {
        self.plain_weight().is_some_and(|weight| weight.dtype() == dtype && weight.elem_count() == self.width)
    }

    /// The weight, if this is an RMS norm without offset and bias.
    pub(crate) fn plain_weight(&self) -> Option<&Tensor> {
        let is_plain = self.kind == NormKind::Rms { offset: 0.0 } && self.bias.is_none();
        self.weight.as_ref().filter(|_| is_plain)
    }

    /// The number of elements after which the weights repeat.
    fn period(&self) -> usize {
        self.weight.as_ref().or(self.bias.as_ref()).map_or(self.width, Tensor::elem_count)
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let (width, period) = (x.dim(D::Minus1)?, self.period());
        let bias = self.bias.as_ref().map_or(period, Tensor::elem_count);
        let fits = self.width > 0 && period.is_multiple_of(self.width) && width.is_multiple_of(period.max(1));
        if fits && bias == period {
            return Ok(());
        }
        let message = format!(
            "rows of {width} elements do not fit a norm of runs of {} with {period} weights and {bias} biases",
            self.width
        );
        Err(Error::Bug(message))
    }

    fn with_host<R>(&self, run: impl FnOnce(kernels::Norm) -> Result<R>) -> Result<R> {
        let (weight, bias) =
            (self.weight.as_ref().map(Host::new).transpose()?, self.bias.as_ref().map(Host::new).transpose()?);
        run(kernels::Norm {
            kind: self.kind,
            weight: weight.as_ref().map(Host::f32).transpose()?,
            bias: bias.as_ref().map(Host::f32).transpose()?,
            eps: self.eps as f32,
            width: self.width,
        })
    }

    fn has_kernels(&self, x: &Tensor) -> bool {
        let fits = |tensor: &Option<Tensor>| tensor.as_ref().is_none_or(|tensor| tensor.dtype() == x.dtype());
        gpu::has_kernels(x) && fits(&self.weight) && fits(&self.bias)
    }

    fn kernel(&self, name: &'static str, x: &Tensor) -> Kernel {
        Kernel::new(Source::Norm, name, x.dtype())
            .with("IS_LAYER", usize::from(self.kind == NormKind::Layer))
            .with("HAS_WEIGHT", usize::from(self.weight.is_some()))
            .with("HAS_BIAS", usize::from(self.bias.is_some()))
    }

    /// Launches a kernel in which each warp processes one run.
    fn launch(&self, name: &'static str, x: &Tensor, args: &[Arg]) -> Result<()> {
        let (width, runs) = (self.width, x.elem_count() / self.width);
        let is_aligned = width.is_multiple_of(8) && gpu::are_aligned_to_eight(args);
        let offset = if let NormKind::Rms { offset } = self.kind { offset } else { 0.0 };
        let words = [
            runs.into(),
            width.into(),
            (self.eps as f32).into(),
            is_aligned.into(),
            offset.into(),
            (self.period() / width).into(),
        ];
        let grid = Grid::row(runs.div_ceil(ROW_THREADS / 32), ROW_THREADS);
        gpu::launch(&self.kernel(name, x), grid, args, &words)
    }

    fn gpu_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: Tensor,
        needs_grad: NormNeedsGrad,
    ) -> Result<(Tensor, NormGradients)> {
        let _span = span("norm", Kind::Elementwise);
        let (runs, period) = (x.elem_count() / self.width, self.period());
        // for a layer norm, the shifts follow the scales
        let scales = gpu::empty_f32(if self.kind == NormKind::Layer { 2 * runs } else { runs }, x)?;
        let args = [Arg::In(x), self.weight_arg(), Arg::In(dy), Arg::Out(&dx), Arg::Out(&scales)];
        self.launch("norm_backward", x, &args)?;
        let mut gradients = NormGradients::default();
        let rows = x.elem_count() / period;
        if needs_grad.weight {
            let dw = gpu::empty_f32(period, x)?;
            let args = [Arg::In(x), Arg::In(dy), Arg::In(&scales), Arg::Out(&dw)];
            let kernel = self.kernel("norm_weight_gradient", x);
            let threads = gpu::threads(&kernel, x, 512)?;
            let words = [rows, period, self.width, period / self.width].map(Into::into);
            gpu::launch(&kernel, Grid::row(period.div_ceil(32), threads), &args, &words)?;
            gradients.weight = Some(dw);
        }
        if needs_grad.bias {
            gradients.bias = Some(column_sums(&dy.reshape((rows, period))?)?);
        }
        Ok((dx, gradients))
    }

    /// `x` as `[rows, parts, width]` in f32, and a weight or bias as `[parts, width]`.
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (period, width) = (self.period(), self.width);
        Ok(x.to_dtype(DType::F32)?.reshape((x.elem_count() / period, period / width, width))?)
    }

    /// Each run, minus its mean for a layer norm, times its scale; and the scale, f32.
    fn normalized(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = self.split(x)?;
        let x = match self.kind {
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            NormKind::Rms { .. } => x,
        };
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        Ok((x.broadcast_mul(&scale)?, scale))
    }

    /// `y` times the weight; `y` and the result are `[rows, parts, width]`.
    fn weighted(&self, y: &Tensor) -> Result<Tensor> {
        let Some(weight) = &self.weight else { return Ok(y.clone()) };
        let offset = if let NormKind::Rms { offset } = self.kind { f64::from(offset) } else { 0.0 };
        let weight = (weight.to_dtype(DType::F32)?.reshape(((), self.width))? + offset)?;
        Ok(y.broadcast_mul(&weight)?)
    }

    /// The forward pass with candle's operations, in f32.
    pub(crate) fn plain_forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weighted(&self.normalized(x)?.0)?;
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?.reshape(((), self.width))?)?,
            None => y,
        };
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// The backward pass with candle's operations, in f32.
    pub(crate) fn plain_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        needs_grad: NormNeedsGrad,
    ) -> Result<(Tensor, NormGradients)> {
        let (normalized, scale) = self.normalized(x)?;
        let dy = self.split(dy)?;
        let weighted = self.weighted(&dy)?;
        let mean = (&weighted * &normalized)?.mean_keepdim(D::Minus1)?;
        let through = (&weighted - normalized.broadcast_mul(&mean)?)?;
        let through = match self.kind {
            NormKind::Layer => through.broadcast_sub(&weighted.mean_keepdim(D::Minus1)?)?,
            NormKind::Rms { .. } => through,
        };
        let through = through.broadcast_mul(&scale)?.reshape(x.shape())?;
        let sums = |needs_grad: bool, terms: Tensor| -> Result<Option<Tensor>> {
            if !needs_grad {
                return Ok(None);
            }
            Ok(Some(column_sums(&terms.reshape(((), self.period()))?)?))
        };
        let weight = sums(needs_grad.weight, (&dy * normalized)?)?;
        Ok(((dx + through.to_dtype(dx.dtype())?)?, NormGradients { weight, bias: sums(needs_grad.bias, dy)? }))
    }
}

fn optional(tensor: Option<&Tensor>) -> Arg<'_> {
    tensor.map_or(Arg::None, Arg::In)
}
