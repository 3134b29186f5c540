//! The activation of the gated MLP: `y = silu(gate) * up` (<https://arxiv.org/abs/2002.05202>).

use super::gpu::{self, Arg};
use super::host::{Host, edit, tensor};
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::Tensor;
use metal_candle_kernels::{self as kernels, Matrix};
use std::cell::RefCell;

/// # Shapes
/// `gate`, `up` and the result: `[tokens, intermediate]`; on the CPU `gate` and `up` may be rounded to bf16.
pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _span = span("swiglu", Kind::Elementwise);
    if gpu::has_kernels(gate) {
        let y = gpu::empty(gate.shape(), gate)?;
        forward_into(gate, up, &y)?;
        return Ok(y);
    }
    if !gate.device().is_cpu() {
        return plain_forward(gate, up);
    }
    let (g, u) = (Host::new(gate)?, Host::new(up)?);
    let y = match (g.matrix()?, u.matrix()?) {
        (Matrix::BF16(gate), Matrix::BF16(up)) => kernels::swiglu(gate, up),
        _ => kernels::swiglu(g.f32()?, u.f32()?),
    };
    tensor(y, gate.shape())
}

/// The same by a kernel, written to `y`.
pub(crate) fn forward_into(gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()> {
    gpu::by_four("swiglu", &[gate, up], &[Arg::In(gate), Arg::In(up), Arg::Out(y)], &[])
}

/// The gradients with respect to `gate`, in place of `dy`, and `up`.
pub(crate) fn backward(gate: &Tensor, up: &Tensor, dy: Tensor) -> Result<(Tensor, Tensor)> {
    let _span = span("swiglu", Kind::Elementwise);
    if gpu::has_kernels(gate) {
        let d_up = gpu::empty(gate.shape(), gate)?;
        let args = [Arg::In(gate), Arg::In(up), Arg::Out(&dy), Arg::Out(&d_up)];
        gpu::by_four("swiglu_backward", &[gate, up, &dy], &args, &[])?;
        return Ok((dy, d_up));
    }
    if !gate.device().is_cpu() {
        return plain_backward(gate, up, &dy);
    }
    let (g, u) = (Host::new(gate)?, Host::new(up)?);
    let d_up = RefCell::new(Vec::new());
    let d_gate = if let (Matrix::BF16(gate), Matrix::BF16(up)) = (g.matrix()?, u.matrix()?) {
        edit(dy, |dy| *d_up.borrow_mut() = kernels::swiglu_backward(gate, up, dy))?
    } else {
        let (gate, up) = (g.f32()?, u.f32()?);
        edit(dy, |dy| *d_up.borrow_mut() = kernels::swiglu_backward(gate, up, dy))?
    };
    Ok((d_gate, tensor(d_up.into_inner(), gate.shape())?))
}

/// The forward pass in candle's operations.
pub(crate) fn plain_forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((gate.silu()? * up)?)
}

/// The backward pass in candle's operations.
pub(crate) fn plain_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let d_up = ((dy * gate)? * &s)?;
    let slope = ((gate * s.affine(-1.0, 1.0)?)? + 1.0)?;
    let d_gate = (((dy * up)? * s)? * slope)?;
    Ok((d_gate, d_up))
}
