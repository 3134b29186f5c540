//! The linear layer with an optional low-rank term: `y = x W^T + b + scale (drop(x) A^T) B^T`.

use super::host::{Host, edit, on_cpu, tensor};
use super::low_rank::LowRank;
use crate::error::Result;
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;

/// The weights of a linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[out_features, in_features]`.
    pub(crate) weight: Tensor,
    /// `[out_features]`.
    pub(crate) bias: Option<Tensor>,
}

/// Which gradients [`Linear::backward`] computes; the others cost nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) input: bool,
    pub(crate) weight: bool,
}

/// The gradients of a linear layer.
#[derive(Debug, Default)]
pub(crate) struct LinearGradients {
    pub(crate) input: Option<Tensor>,
    pub(crate) weight: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
    pub(crate) term: Option<(Tensor, Tensor)>,
}

impl Linear {
    /// The layer's output. A dropout seed means training.
    ///
    /// # Shapes
    /// `x: [tokens, in_features]`, result `[tokens, out_features]`.
    pub(crate) fn forward(&self, x: &Tensor, term: Option<&LowRank>, dropout_seed: Option<u64>) -> Result<Tensor> {
        let mut y = product(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            y = add_bias(y, bias)?;
        }
        if let Some(term) = term {
            let z = product(&dropped(x, term, dropout_seed)?, &term.a)?;
            y = add_scaled(y, f64::from(term.scale), &product(&z, &term.b)?)?;
        }
        Ok(y)
    }

    /// The gradients from `dy: [tokens, out_features]`.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        dy: &Tensor,
        wanted: Wanted,
    ) -> Result<LinearGradients> {
        let mut gradients = LinearGradients::default();
        if wanted.input {
            gradients.input = Some(product_transposed(dy, &self.weight)?);
        }
        if wanted.weight {
            gradients.weight = Some(outer(dy, x)?);
            if self.bias.is_some() {
                gradients.bias = Some(column_sums(dy)?);
            }
        }
        if let Some(term) = term {
            let x = dropped(x, term, dropout_seed)?;
            let z = product(&x, &term.a)?;
            let dz = product_transposed(dy, &term.b)?.affine(f64::from(term.scale), 0.0)?;
            let db = outer(dy, &z)?.affine(f64::from(term.scale), 0.0)?;
            let da = outer(&dz, &x)?;
            if let Some(dx) = gradients.input.take() {
                let through = product_transposed(&dz, &term.a)?;
                gradients.input = Some(add_scaled(dx, 1.0, &dropped(&through, term, dropout_seed)?)?);
            }
            gradients.term = Some((da, db));
        }
        Ok(gradients)
    }
}

/// `X W^T` with `x: [m, k]`, `w: [n, k]`.
pub(crate) fn product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return Ok(x.matmul(&w.t()?)?);
    }
    let ((m, k), n) = (x.dims2()?, w.dim(0)?);
    let mut y = vec![0.0; m * n];
    kernels::linear((m, n, k), Host::new(x)?.f32()?, Host::new(w)?.matrix()?, &mut y);
    tensor(y, (m, n))
}

/// `X W` with `x: [m, k]`, `w: [k, n]`.
pub(crate) fn product_transposed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return Ok(x.matmul(w)?);
    }
    let ((m, k), n) = (x.dims2()?, w.dim(1)?);
    let mut y = vec![0.0; m * n];
    kernels::gemm((m, n, k), Host::new(x)?.f32()?, (k, 1), Host::new(w)?.matrix()?, (n, 1), 0.0, &mut y);
    tensor(y, (m, n))
}

/// `X^T Y` in f32 with `x: [k, m]`, `y: [k, n]`: the gradient of a weight.
pub(crate) fn outer(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return Ok(x.t()?.contiguous()?.matmul(y)?.to_dtype(DType::F32)?);
    }
    let ((k, m), n) = (x.dims2()?, y.dim(1)?);
    let mut z = vec![0.0; m * n];
    kernels::gemm((m, n, k), Host::new(x)?.f32()?, (1, m), Host::new(y)?.f32()?.into(), (n, 1), 0.0, &mut z);
    tensor(z, (m, n))
}

/// The sums of the columns of `x: [rows, width]`, f32.
pub(crate) fn column_sums(x: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        return Ok(x.to_dtype(DType::F32)?.sum(0)?);
    }
    let mut sums = vec![0.0; x.dim(1)?];
    kernels::column_sums(Host::new(x)?.f32()?, &mut sums);
    let width = sums.len();
    tensor(sums, width)
}

fn add_bias(y: Tensor, bias: &Tensor) -> Result<Tensor> {
    if !on_cpu(&y) {
        return Ok(y.broadcast_add(bias)?);
    }
    let bias = Host::new(bias)?;
    let bias = bias.f32()?;
    edit(y, |y| kernels::add_bias(y, bias))
}

/// `y + scale x`, in place of `y`.
pub(crate) fn add_scaled(y: Tensor, scale: f64, x: &Tensor) -> Result<Tensor> {
    if !on_cpu(&y) {
        let x = if (scale - 1.0).abs() > f64::EPSILON { x.affine(scale, 0.0)? } else { x.clone() };
        return Ok((y + x)?);
    }
    let x = Host::new(x)?;
    let x = x.f32()?;
    edit(y, |y| kernels::add_scaled(scale as f32, x, y))
}

/// Dropout of a term's input in training; the gradient of dropout is dropout of the gradient.
fn dropped(x: &Tensor, term: &LowRank, seed: Option<u64>) -> Result<Tensor> {
    let (Some(seed), true) = (seed, term.dropout > 0.0) else {
        return Ok(x.clone());
    };
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
