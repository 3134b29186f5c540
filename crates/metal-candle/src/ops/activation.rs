//! Activation functions and their gradients: gated, `y = f(gate) * up` (<https://arxiv.org/abs/2002.05202>), or plain,
//! `y = f(x)`.

use super::gpu::{self, Arg, Kernel, Source};
use super::host::{Host, edit, tensor};
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::Tensor;
pub(crate) use metal_candle_kernels::Activation;
use metal_candle_kernels::{self as kernels, Matrix};
use std::cell::RefCell;

/// `f(gate) * up`.
///
/// # Shapes
/// `gate`, `up` and the result: `[tokens, intermediate]`; on the CPU `gate` and `up` may be rounded to bf16.
pub(crate) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _span = span("activation", Kind::Elementwise);
    if gpu::has_kernels(gate) {
        let y = gpu::empty(gate.shape(), gate)?;
        gated_into(activation, gate, up, &y)?;
        return Ok(y);
    }
    if !gate.device().is_cpu() {
        return plain_gated(activation, gate, up);
    }
    let (g, u) = (Host::new(gate)?, Host::new(up)?);
    let y = match (g.matrix()?, u.matrix()?) {
        (Matrix::BF16(gate), Matrix::BF16(up)) => kernels::gated(activation, gate, up),
        _ => kernels::gated(activation, g.f32()?, u.f32()?),
    };
    tensor(y, gate.shape())
}

/// Writes the result of [`gated`] to `y`, with a GPU kernel.
pub(crate) fn gated_into(activation: Activation, gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()> {
    launch("gated", activation, &[gate, up], &[Arg::In(gate), Arg::In(up), Arg::Out(y)])
}

/// The id of an activation in the kernels, and its limit and alpha.
pub(crate) fn kernel_kind(activation: Activation) -> (usize, [f32; 2]) {
    match activation {
        Activation::Silu => (0, [0.0; 2]),
        Activation::GeluTanh => (1, [0.0; 2]),
        Activation::Gelu => (2, [0.0; 2]),
        Activation::Relu => (3, [0.0; 2]),
        Activation::Relu2 => (4, [0.0; 2]),
        Activation::Clamped { limit, alpha } => (5, [limit, alpha]),
        Activation::Sigmoid => (6, [0.0; 2]),
    }
}

/// Launches an activation kernel on tensors of the same length.
fn launch(name: &'static str, activation: Activation, tensors: &[&Tensor], args: &[Arg]) -> Result<()> {
    let (kind, [limit, alpha]) = kernel_kind(activation);
    let kernel = Kernel::new(Source::Elementwise, name, tensors[0].dtype()).with("ACTIVATION", kind);
    gpu::by_four_of(&kernel, tensors, args, &[limit.into(), alpha.into()])
}

/// The gradients of [`gated`] with respect to `gate`, written over `dy`, and to `up`.
pub(crate) fn gated_backward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    dy: Tensor,
) -> Result<(Tensor, Tensor)> {
    let _span = span("activation", Kind::Elementwise);
    if gpu::has_kernels(gate) {
        let d_up = gpu::empty(gate.shape(), gate)?;
        let args = [Arg::In(gate), Arg::In(up), Arg::Out(&dy), Arg::Out(&d_up)];
        launch("gated_backward", activation, &[gate, up, &dy, &d_up], &args)?;
        return Ok((dy, d_up));
    }
    if !gate.device().is_cpu() {
        return plain_gated_backward(activation, gate, up, &dy);
    }
    let (g, u) = (Host::new(gate)?, Host::new(up)?);
    let d_up = RefCell::new(Vec::new());
    let d_gate = if let (Matrix::BF16(gate), Matrix::BF16(up)) = (g.matrix()?, u.matrix()?) {
        edit(dy, |dy| *d_up.borrow_mut() = kernels::gated_backward(activation, gate, up, dy))?
    } else {
        let (gate, up) = (g.f32()?, u.f32()?);
        edit(dy, |dy| *d_up.borrow_mut() = kernels::gated_backward(activation, gate, up, dy))?
    };
    Ok((d_gate, tensor(d_up.into_inner(), gate.shape())?))
}

/// `f(x)`: `[tokens, width]`; on the CPU `x` may be rounded to bf16.
pub(crate) fn plain(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let _span = span("activation", Kind::Elementwise);
    if gpu::has_kernels(x) {
        let y = gpu::empty(x.shape(), x)?;
        launch("activate", activation, &[x, &y], &[Arg::In(x), Arg::Out(&y)])?;
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return Ok(curve(activation, x)?.0);
    }
    let host = Host::new(x)?;
    let y = match host.matrix()? {
        Matrix::BF16(x) => kernels::activate(activation, x),
        _ => kernels::activate(activation, host.f32()?),
    };
    tensor(y, x.shape())
}

/// The gradient of [`plain`], written over `dy`.
pub(crate) fn plain_backward(activation: Activation, x: &Tensor, dy: Tensor) -> Result<Tensor> {
    let _span = span("activation", Kind::Elementwise);
    if gpu::has_kernels(x) {
        launch("activate_backward", activation, &[x, &dy], &[Arg::In(x), Arg::Out(&dy)])?;
        return Ok(dy);
    }
    if !x.device().is_cpu() {
        return Ok((dy * curve(activation, x)?.1)?);
    }
    let host = Host::new(x)?;
    if let Matrix::BF16(x) = host.matrix()? {
        return edit(dy, |dy| kernels::activate_backward(activation, x, dy));
    }
    let x = host.f32()?;
    edit(dy, |dy| kernels::activate_backward(activation, x, dy))
}

#[allow(dead_code, reason = "for gated attention, which no supported family uses yet")]
/// `x * sigmoid(gate)`, as in gated attention.
pub(crate) fn sigmoid_gate(x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    gated(Activation::Sigmoid, gate, x)
}

#[allow(dead_code, reason = "for gated attention, which no supported family uses yet")]
/// The gradients of [`sigmoid_gate`] with respect to `x`, and to `gate`, written over `dy`.
pub(crate) fn sigmoid_gate_backward(x: &Tensor, gate: &Tensor, dy: Tensor) -> Result<(Tensor, Tensor)> {
    let (d_gate, dx) = gated_backward(Activation::Sigmoid, gate, x, dy)?;
    Ok((dx, d_gate))
}

/// `1 / (1 + e^-x)` with candle's operations.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// `f(x)` and its derivative with candle's operations.
fn curve(activation: Activation, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let swish = |x: &Tensor, alpha: f64| -> Result<(Tensor, Tensor)> {
        let s = sigmoid(&x.affine(alpha, 0.0)?)?;
        let bend = (x * s.affine(-alpha, alpha)?)?;
        Ok(((x * &s)?, (&s * (bend + 1.0)?)?))
    };
    Ok(match activation {
        Activation::Silu => swish(x, 1.0)?,
        Activation::GeluTanh => {
            let factor = (2.0 / std::f64::consts::PI).sqrt();
            let square = x.sqr()?;
            let t = (x * square.affine(0.044_715 * factor, factor)?)?.tanh()?;
            let share = t.affine(0.5, 0.5)?;
            let bend = (x * t.sqr()?.affine(-0.5, 0.5)?)?;
            let bend = (bend * square.affine(3.0 * 0.044_715 * factor, factor)?)?;
            ((x * &share)?, (share + bend)?)
        }
        Activation::Gelu => {
            let share = x.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?.erf()?.affine(0.5, 0.5)?;
            let density = x.sqr()?.affine(-0.5, 0.0)?.exp()?;
            let bend = (x * density)?.affine(1.0 / (2.0 * std::f64::consts::PI).sqrt(), 0.0)?;
            ((x * &share)?, (share + bend)?)
        }
        Activation::Relu => (x.relu()?, x.gt(0.0)?.to_dtype(x.dtype())?),
        Activation::Relu2 => (x.relu()?.sqr()?, x.relu()?.affine(2.0, 0.0)?),
        Activation::Sigmoid => {
            let s = sigmoid(x)?;
            let slope = (&s * s.affine(-1.0, 1.0)?)?;
            (s, slope)
        }
        Activation::Clamped { limit, alpha } => {
            let (value, slope) = swish(&x.minimum(f64::from(limit))?, f64::from(alpha))?;
            (value, (slope * x.le(f64::from(limit))?.to_dtype(x.dtype())?)?)
        }
    })
}

/// The factor that `f(gate)` is multiplied by, and its derivative unless it is 1, with candle's operations.
fn up_curve(activation: Activation, up: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let Activation::Clamped { limit, .. } = activation else { return Ok((up.clone(), None)) };
    let limit = f64::from(limit);
    let slope = up.abs()?.le(limit)?.to_dtype(up.dtype())?;
    Ok(((up.clamp(-limit, limit)? + 1.0)?, Some(slope)))
}

/// The forward pass of [`gated`] with candle's operations.
pub(crate) fn plain_gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if activation == Activation::Silu {
        return Ok((gate.silu()? * up)?);
    }
    Ok((curve(activation, gate)?.0 * up_curve(activation, up)?.0)?)
}

/// The backward pass of [`gated`] with candle's operations.
pub(crate) fn plain_gated_backward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let ((value, slope), (up, up_slope)) = (curve(activation, gate)?, up_curve(activation, up)?);
    let d_up = (dy * value)?;
    let d_up = if let Some(slope) = up_slope { (d_up * slope)? } else { d_up };
    Ok((((dy * up)? * slope)?, d_up))
}
