//! The activation of the gated MLP: `y = silu(gate) * up` (<https://arxiv.org/abs/2002.05202>).

use super::host::{Host, tensor};
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::Tensor;
use metal_candle_kernels::{self as kernels, Matrix};

/// # Shapes
/// `gate`, `up` and the result: `[tokens, intermediate]`; on the CPU `gate` and `up` may be rounded to bf16.
pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _span = span("swiglu", Kind::Elementwise);
    if !gate.device().is_cpu() {
        return plain_forward(gate, up);
    }
    let mut y = vec![0.0; gate.elem_count()];
    let (g, u) = (Host::new(gate)?, Host::new(up)?);
    match (g.matrix()?, u.matrix()?) {
        (Matrix::BF16(gate), Matrix::BF16(up)) => kernels::swiglu(gate, up, &mut y),
        _ => kernels::swiglu(g.f32()?, u.f32()?, &mut y),
    }
    tensor(y, gate.shape())
}

/// The gradients with respect to `gate` and `up`.
pub(crate) fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let _span = span("swiglu", Kind::Elementwise);
    if !gate.device().is_cpu() {
        return plain_backward(gate, up, dy);
    }
    let (mut d_gate, mut d_up) = (vec![0.0; gate.elem_count()], vec![0.0; gate.elem_count()]);
    let (g, u, dy) = (Host::new(gate)?, Host::new(up)?, Host::new(dy)?);
    let dy = dy.f32()?;
    match (g.matrix()?, u.matrix()?) {
        (Matrix::BF16(gate), Matrix::BF16(up)) => kernels::swiglu_backward(gate, up, dy, &mut d_gate, &mut d_up),
        _ => kernels::swiglu_backward(g.f32()?, u.f32()?, dy, &mut d_gate, &mut d_up),
    }
    Ok((tensor(d_gate, gate.shape())?, tensor(d_up, gate.shape())?))
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
