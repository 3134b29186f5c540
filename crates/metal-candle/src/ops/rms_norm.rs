//! RMSNorm (<https://arxiv.org/abs/1910.07467>): `y = x / sqrt(mean(x^2) + eps) * w`.

use super::gpu::{self, Arg, Grid, Kernel, ROW_THREADS, Source};
use super::host::{Host, edit, on_cpu, tensor};
use super::linear::column_sums;
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::{D, DType, Tensor};
use metal_candle_kernels as kernels;
use std::cell::RefCell;

/// The weight of a norm and its epsilon.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    /// `[hidden]`, f32 on the CPU.
    pub(crate) weight: Tensor,
    pub(crate) eps: f64,
}

impl RmsNorm {
    /// # Shapes
    /// `x: [tokens, hidden]`, result the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_kernels(x) {
            let y = gpu::empty(x.shape(), x)?;
            self.forward_into(x, &y)?;
            return Ok(y);
        }
        if !on_cpu(x) {
            return self.plain_forward(x);
        }
        let _span = span("rms_norm", Kind::Elementwise);
        tensor(kernels::rms_norm(Host::new(x)?.f32()?, Host::new(&self.weight)?.f32()?, self.eps as f32), x.shape())
    }

    /// The same by a kernel, written to `y`.
    pub(crate) fn forward_into(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let _span = span("rms_norm", Kind::Elementwise);
        let args = [Arg::In(x), Arg::In(&self.weight), Arg::Out(y)];
        self.launch("rms_norm", x, &args)
    }

    /// Launches a kernel that takes a row a warp.
    fn launch(&self, name: &'static str, x: &Tensor, args: &[Arg]) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let is_aligned = width.is_multiple_of(8) && gpu::begin_at_eights(args);
        let words = [rows.into(), width.into(), (self.eps as f32).into(), is_aligned.into()];
        let kernel = Kernel::new(Source::Norm, name, x.dtype());
        gpu::launch(&kernel, Grid::row(rows.div_ceil(ROW_THREADS / 32), ROW_THREADS), args, &words)
    }

    /// `dx`, in place, plus the gradient with respect to `x`, and that with respect to the weight if wanted.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: Tensor,
        weight: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if self.has_kernels(x) {
            return self.gpu_backward(x, dy, dx, weight);
        }
        if !on_cpu(x) {
            return self.plain_backward(x, dy, &dx, weight);
        }
        let _span = span("rms_norm", Kind::Elementwise);
        let (x, w, dy) = (Host::new(x)?, Host::new(&self.weight)?, Host::new(dy)?);
        let (x, w, dy) = (x.f32()?, w.f32()?, dy.f32()?);
        let dw = RefCell::new(weight.then(|| vec![0.0; w.len()]));
        let dx = edit(dx, |dx| {
            kernels::rms_norm_backward(x, w, self.eps as f32, dy, dx, dw.borrow_mut().as_deref_mut());
        })?;
        let dw = dw.into_inner().map(|dw| tensor(dw, self.weight.shape())).transpose()?;
        Ok((dx, dw))
    }

    fn has_kernels(&self, x: &Tensor) -> bool {
        gpu::has_kernels(x) && self.weight.dtype() == x.dtype()
    }

    fn gpu_backward(&self, x: &Tensor, dy: &Tensor, dx: Tensor, weight: bool) -> Result<(Tensor, Option<Tensor>)> {
        let _span = span("rms_norm", Kind::Elementwise);
        let (rows, width) = x.dims2()?;
        let scales = gpu::empty_f32(rows, x)?;
        let args = [Arg::In(x), Arg::In(&self.weight), Arg::In(dy), Arg::Out(&dx), Arg::Out(&scales)];
        self.launch("rms_norm_backward", x, &args)?;
        if !weight {
            return Ok((dx, None));
        }
        let dw = gpu::empty_f32(width, x)?;
        let args = [Arg::In(x), Arg::In(dy), Arg::In(&scales), Arg::Out(&dw)];
        let kernel = Kernel::new(Source::Norm, "rms_norm_weight_gradient", x.dtype());
        let threads = gpu::threads(&kernel, x, 512)?;
        gpu::launch(&kernel, Grid::row(width.div_ceil(32), threads), &args, &[rows.into(), width.into()])?;
        Ok((dx, Some(dw)))
    }

    /// The forward pass in candle's operations, f32 inside.
    pub(crate) fn plain_forward(&self, x: &Tensor) -> Result<Tensor> {
        let normalized = self.normalized(x)?.0;
        Ok(normalized.broadcast_mul(&self.weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
    }

    /// `x / rms(x)` and `1 / rms(x)`, f32.
    fn normalized(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = x.to_dtype(DType::F32)?;
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        Ok((x.broadcast_mul(&scale)?, scale))
    }

    /// The backward pass in candle's operations, f32 inside.
    pub(crate) fn plain_backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        weight: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (normalized, scale) = self.normalized(x)?;
        let dy = dy.to_dtype(DType::F32)?;
        let weighted = dy.broadcast_mul(&self.weight.to_dtype(DType::F32)?)?;
        let mean = (&weighted * &normalized)?.mean_keepdim(D::Minus1)?;
        let through = (weighted - normalized.broadcast_mul(&mean)?)?.broadcast_mul(&scale)?;
        let dw = if weight { Some(column_sums(&(dy * normalized)?)?) } else { None };
        Ok(((dx + through.to_dtype(dx.dtype())?)?, dw))
    }
}
