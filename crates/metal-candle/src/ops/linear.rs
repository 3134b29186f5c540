//! The linear layer with an optional low-rank term: `y = x W^T + b + scale (drop(x) A^T) B^T`.

use super::host::{Host, edit, on_cpu, tensor};
use super::low_rank::{LowRank, Magnitude};
use crate::error::Result;
use candle_core::{D, DType, Tensor};
use metal_candle_kernels as kernels;

/// The weights of a linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[out_features, in_features]`.
    pub(crate) weight: Tensor,
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
    /// The layer's output. A dropout seed means training.
    ///
    /// # Shapes
    /// `x: [tokens, in_features]`, result `[tokens, out_features]`.
    pub(crate) fn forward(&self, x: &Tensor, term: Option<&LowRank>, dropout_seed: Option<u64>) -> Result<Tensor> {
        let y = self.base(x, term)?;
        let Some(term) = term else { return self.biased(y) };
        let Some(magnitude) = &term.magnitude else {
            return add_term(self.biased(y)?, &dropped(x, term, dropout_seed)?, term);
        };
        let factors = self.factors(term, magnitude)?.factors;
        if !is_dropping(term, dropout_seed) {
            return self.biased(scale_columns(add_term(y, x, term)?, &factors)?);
        }
        // the plain product sees the whole input, the weight-decomposed one what dropout left of it
        let dropped = dropped(x, term, dropout_seed)?;
        let base = self.base(&dropped, Some(term))?;
        let y = add_scaled(self.biased(y)?, -1.0, &base)?;
        add_scaled(y, 1.0, &scale_columns(add_term(base, &dropped, term)?, &factors)?)
    }

    /// The gradients from `dy: [tokens, out_features]`; that of the input is added to `dx` if it is given.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        dy: &Tensor,
        wanted: Wanted,
        dx: Option<Tensor>,
    ) -> Result<LinearGradients> {
        let mut gradients = LinearGradients::default();
        if wanted.weight {
            gradients.weight = Some(outer(dy, x)?);
        }
        if wanted.bias && self.bias.is_some() {
            gradients.bias = Some(column_sums(dy)?);
        }
        let Some(term) = term else {
            gradients.input = wanted.input.then(|| self.base_backward(dx, dy, None)).transpose()?;
            return Ok(gradients);
        };
        let dropped_x = dropped(x, term, dropout_seed)?;
        let Some(magnitude) = &term.magnitude else {
            let (of_term, dz) = term_gradients(&dropped_x, term, dy)?;
            if wanted.input {
                let dx = self.base_backward(dx, dy, Some(term))?;
                gradients.input = Some(term_backward(dx, &dz, term, dropout_seed)?);
            }
            gradients.term = Some(of_term);
            return Ok(gradients);
        };

        // y = g p + b with p = base(x) + term(x); with dropout y = base(x) - base(drop(x)) + g p + b
        let Factors { factors, reciprocal_norms } = self.factors(term, magnitude)?;
        let p = add_term(self.base(&dropped_x, Some(term))?, &dropped_x, term)?;
        let d_magnitude = (column_dots(dy, &p)? * reciprocal_norms)?;
        drop(p);
        let dp = scale_columns(dy.copy()?, &factors)?;
        let (of_term, dz) = term_gradients(&dropped_x, term, &dp)?;
        gradients.term = Some(TermGradients { magnitude: Some(d_magnitude), ..of_term });
        if !wanted.input {
            return Ok(gradients);
        }
        gradients.input = Some(if is_dropping(term, dropout_seed) {
            let through = self.base_backward(None, &add_scaled(dp, -1.0, dy)?, Some(term))?;
            let through = add_product_transposed(Some(through), &dz, &term.a)?;
            let dx = self.base_backward(dx, dy, Some(term))?;
            add_scaled(dx, 1.0, &dropped(&through, term, dropout_seed)?)?
        } else {
            term_backward(self.base_backward(dx, &dp, Some(term))?, &dz, term, None)?
        });
        Ok(gradients)
    }

    /// What training starts from: `x (W - scale B0 A0)^T`, without the bias.
    fn base(&self, x: &Tensor, term: Option<&LowRank>) -> Result<Tensor> {
        let y = product(x, &self.weight)?;
        match term.and_then(|term| Some((term.scale, term.start.as_ref()?))) {
            Some((scale, (a, b))) => add_product(y, -scale, &product(x, a)?, b),
            None => Ok(y),
        }
    }

    /// The gradient of [`Linear::base`], added to `dx` if it is given.
    fn base_backward(&self, dx: Option<Tensor>, dy: &Tensor, term: Option<&LowRank>) -> Result<Tensor> {
        let dx = add_product_transposed(dx, dy, &self.weight)?;
        match term.and_then(|term| Some((term.scale, term.start.as_ref()?))) {
            Some((scale, (a, b))) => {
                let dz = add_product_transposed(None, dy, b)?.affine(f64::from(-scale), 0.0)?;
                add_product_transposed(Some(dx), &dz, a)
            }
            None => Ok(dx),
        }
    }

    fn factors(&self, term: &LowRank, magnitude: &Magnitude) -> Result<Factors> {
        let reciprocal_norms = term.reciprocal_norms(magnitude, &self.weight)?;
        let factors = (magnitude.m.to_dtype(DType::F32)? * &reciprocal_norms)?;
        Ok(Factors { factors, reciprocal_norms })
    }

    fn biased(&self, y: Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => add_bias(y, bias),
            None => Ok(y),
        }
    }
}

/// `y + scale (x A^T) B^T`, in place of `y`.
fn add_term(y: Tensor, x: &Tensor, term: &LowRank) -> Result<Tensor> {
    add_product(y, term.scale, &product(x, &term.a)?, &term.b)
}

/// The gradients of A and B, and that of `x A^T`.
fn term_gradients(x: &Tensor, term: &LowRank, dy: &Tensor) -> Result<(TermGradients, Tensor)> {
    let scale = f64::from(term.scale);
    let z = product(x, &term.a)?;
    let dz = add_product_transposed(None, dy, &term.b)?.affine(scale, 0.0)?;
    let b = outer(dy, &z)?.affine(scale, 0.0)?;
    let a = outer(&dz, x)?;
    Ok((TermGradients { a, b, magnitude: None }, dz))
}

/// The gradient with respect to the term's input, added to `dx`.
fn term_backward(dx: Tensor, dz: &Tensor, term: &LowRank, dropout_seed: Option<u64>) -> Result<Tensor> {
    if !is_dropping(term, dropout_seed) {
        return add_product_transposed(Some(dx), dz, &term.a);
    }
    let through = add_product_transposed(None, dz, &term.a)?;
    add_scaled(dx, 1.0, &dropped(&through, term, dropout_seed)?)
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

/// `Y + scale X W^T` in place of `y: [m, n]`, with `x: [m, k]`, `w: [n, k]`.
pub(crate) fn add_product(y: Tensor, scale: f32, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !on_cpu(&y) {
        return add_scaled(y, f64::from(scale), &product(x, w)?);
    }
    let ((m, k), n) = (x.dims2()?, w.dim(0)?);
    let (x, w) = (Host::new(x)?, Host::new(w)?);
    let (x, w) = (x.f32()?, w.matrix()?);
    edit(y, |y| kernels::gemm((m, n, k), scale, x, (k, 1), w, (1, k), 1.0, y))
}

/// `X W`, added to `sum` in place if there is one, with `x: [m, k]`, `w: [k, n]`.
pub(crate) fn add_product_transposed(sum: Option<Tensor>, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        let product = x.matmul(w)?;
        return match sum {
            Some(sum) => Ok((sum + product)?),
            None => Ok(product),
        };
    }
    let ((m, k), n) = (x.dims2()?, w.dim(1)?);
    let (x, w) = (Host::new(x)?, Host::new(w)?);
    let (x, w) = (x.f32()?, w.matrix()?);
    let multiply = |beta: f32, y: &mut [f32]| kernels::gemm((m, n, k), 1.0, x, (k, 1), w, (n, 1), beta, y);
    if let Some(sum) = sum {
        return edit(sum, |y| multiply(1.0, y));
    }
    let mut y = vec![0.0; m * n];
    multiply(0.0, &mut y);
    tensor(y, (m, n))
}

/// `X^T Y` in f32 with `x: [k, m]`, `y: [k, n]`: the gradient of a weight.
pub(crate) fn outer(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    add_outer(None, x, y)
}

/// `X^T Y` in f32, added to `sum` in place if there is one, with `x: [k, m]`, `y: [k, n]`.
pub(crate) fn add_outer(sum: Option<Tensor>, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if !on_cpu(x) {
        let product = x.t()?.contiguous()?.matmul(y)?.to_dtype(DType::F32)?;
        return match sum {
            Some(sum) => Ok((sum + product)?),
            None => Ok(product),
        };
    }
    let ((k, m), n) = (x.dims2()?, y.dim(1)?);
    let (x, y) = (Host::new(x)?, Host::new(y)?);
    let (x, y) = (x.f32()?, y.f32()?);
    let multiply = |beta: f32, z: &mut [f32]| kernels::gemm((m, n, k), 1.0, x, (1, m), y.into(), (n, 1), beta, z);
    if let Some(sum) = sum {
        return edit(sum, |z| multiply(1.0, z));
    }
    let mut z = vec![0.0; m * n];
    multiply(0.0, &mut z);
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

/// `sum over rows of x[:, j] y[:, j]` for each column, f32.
fn column_dots(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(0)?)
}

/// `x[i] . y[i]` for each row, f32.
pub(super) fn row_dots(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(D::Minus1)?)
}

/// Column `j` of `y` times `factors[j]`.
fn scale_columns(y: Tensor, factors: &Tensor) -> Result<Tensor> {
    if !on_cpu(&y) {
        return Ok(y.broadcast_mul(&factors.to_dtype(y.dtype())?)?);
    }
    let factors = Host::new(factors)?;
    let factors = factors.f32()?;
    edit(y, |y| kernels::scale_columns(y, factors))
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

/// Whether the term's input loses elements.
fn is_dropping(term: &LowRank, seed: Option<u64>) -> bool {
    seed.is_some() && term.dropout > 0.0
}

/// Dropout of a term's input in training; the gradient of dropout is dropout of the gradient.
pub(super) fn dropped(x: &Tensor, term: &LowRank, seed: Option<u64>) -> Result<Tensor> {
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
