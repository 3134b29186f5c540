//! The linear layer with an optional low-rank term: `y = x W^T + b + scale (drop(x) A^T) B^T`.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, edit, on_cpu, tensor};
use super::low_rank::{LowRank, Magnitude};
use super::weight::{Factor, Weight};
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, DType, Tensor};
use metal_candle_kernels as kernels;

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

    /// The same, and the product with A of a term, where keeping it for [`Linear::backward`] is worth while.
    pub(crate) fn forward_keeping(
        &self,
        x: &Tensor,
        term: Option<&LowRank>,
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Some(term) = term else {
            return Ok((self.finished(self.base(x, None, None, self.start(residual))?, residual)?, None));
        };
        if let Some(magnitude) = &term.magnitude {
            return Ok((self.decomposed(x, (term, magnitude), dropout_seed, residual)?, None));
        }
        let z = product(&dropped(x, term, dropout_seed)?, &term.a)?;
        let y = self.finished(self.base(x, Some(term), Some(&z), self.start(residual))?, residual)?;
        Ok((y, gpu::has_products(x).then_some(z)))
    }

    /// The output with a term that has magnitudes.
    fn decomposed(
        &self,
        x: &Tensor,
        (term, magnitude): (&LowRank, &Magnitude),
        dropout_seed: Option<u64>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let factors = self.factors(term, magnitude)?.factors;
        if !is_dropping(term, dropout_seed) {
            let z = product(x, &term.a)?;
            let y = scale_columns(self.base(x, Some(term), Some(&z), Start::Zero)?, &factors)?;
            let y = if let Some(bias) = &self.bias { add_bias(y, bias)? } else { y };
            return if let Some(residual) = residual { add_scaled(y, 1.0, residual) } else { Ok(y) };
        }
        // the plain product sees the whole input, the weight-decomposed one what dropout left of it
        let dropped = dropped(x, term, dropout_seed)?;
        let y = self.finished(self.base(x, Some(term), None, self.start(residual))?, residual)?;
        let base = self.base(&dropped, Some(term), None, Start::Zero)?;
        let y = add_scaled(y, -1.0, &base)?;
        let z = product(&dropped, &term.a)?;
        let adapted = sum(Start::Sum(base), &[Part::transposed(&z, &term.b, term.scale)])?;
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
        let p = self.base(&dropped_x, Some(term), Some(&z), Start::Zero)?;
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
    fn base(&self, x: &Tensor, term: Option<&LowRank>, z: Option<&Tensor>, start: Start) -> Result<Tensor> {
        let mut parts = vec![Part::transposed(x, &self.weight, 1.0)];
        if let (Some(term), Some(z)) = (term, z) {
            parts.push(Part::transposed(z, &term.b, term.scale));
        }
        let first = term.and_then(|term| Some((term.scale, term.start.as_ref()?)));
        let z0 = first.map(|(_, (a, _))| product(x, a)).transpose()?;
        if let (Some((scale, (_, b))), Some(z0)) = (first, &z0) {
            parts.push(Part::transposed(z0, b, -scale));
        }
        sum(start, &parts)
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

/// What products are added to.
pub(super) enum Start<'a> {
    Zero,
    /// A row that is the same for all: `[columns]`.
    Row(&'a Tensor),
    /// A matrix, which is left as it is.
    Matrix(&'a Tensor),
    /// A matrix whose place is taken.
    Sum(Tensor),
}

/// One of the products of a sum.
pub(super) struct Part<'a> {
    x: &'a Tensor,
    w: Factor<'a>,
    is_transposed: bool,
    scale: f32,
}

impl<'a> Part<'a> {
    /// `scale X W` with `x: [m, k]`, `w: [k, n]`.
    pub(super) fn plain(x: &'a Tensor, w: impl Into<Factor<'a>>, scale: f32) -> Self {
        Self { x, w: w.into(), is_transposed: false, scale }
    }

    /// `scale X W^T` with `x: [m, k]`, `w: [n, k]`.
    pub(super) fn transposed(x: &'a Tensor, w: impl Into<Factor<'a>>, scale: f32) -> Self {
        Self { x, w: w.into(), is_transposed: true, scale }
    }

    fn columns(&self) -> Result<usize> {
        match self.w.dims() {
            &[rows, columns] => Ok(if self.is_transposed { rows } else { columns }),
            dims => Err(Error::argument("weight", format!("expected a matrix, found the shape {dims:?}"))),
        }
    }

    fn plain_product(&self) -> Result<Tensor> {
        let w = self.w.tensor()?;
        let product = if self.is_transposed { self.x.matmul(&w.t()?)? } else { self.x.matmul(&w)? };
        Ok(if (self.scale - 1.0).abs() > f32::EPSILON { product.affine(f64::from(self.scale), 0.0)? } else { product })
    }
}

/// The sum of a start and one or more products of the same shape: one pass over the result on the CPU.
pub(super) fn sum(start: Start, parts: &[Part]) -> Result<Tensor> {
    let (rows, columns) = (parts[0].x.dim(0)?, parts[0].columns()?);
    if gpu::has_products(parts[0].x) {
        return gpu_sum(start, parts, (rows, columns));
    }
    if !on_cpu(parts[0].x) {
        let mut y = parts[0].plain_product()?;
        for part in &parts[1..] {
            y = add_scaled(y, 1.0, &part.plain_product()?)?;
        }
        return match start {
            Start::Zero => Ok(y),
            Start::Row(row) => add_bias(y, row),
            Start::Matrix(matrix) => add_scaled(y, 1.0, matrix),
            Start::Sum(matrix) => add_scaled(matrix, 1.0, &y),
        };
    }
    let _span = span("product", Kind::Gemm);
    let hosts: Vec<(Host, Host)> =
        parts.iter().map(|part| Ok((Host::new(part.x)?, part.w.host()?))).collect::<Result<_>>()?;
    let mut products = Vec::with_capacity(parts.len());
    for (part, (x, w)) in parts.iter().zip(&hosts) {
        let k = part.x.dim(1)?;
        let b_strides = if part.is_transposed { (1, k) } else { (columns, 1) };
        let (a, b) = (x.f32()?, w.matrix()?);
        products.push(kernels::Product { a, a_strides: (k, 1), b, b_strides, k, alpha: part.scale });
    }
    let shape = (rows, columns);
    let new = |start: kernels::Start| tensor(kernels::gemm_sum(shape, start, &products), shape);
    match start {
        Start::Zero => new(kernels::Start::Zero),
        Start::Row(row) => new(kernels::Start::Row(Host::new(row)?.f32()?)),
        Start::Matrix(matrix) => new(kernels::Start::Matrix(Host::new(matrix)?.f32()?)),
        Start::Sum(matrix) => edit(matrix, |y| kernels::gemm_sum_to(shape, kernels::Start::Result, &products, y)),
    }
}

/// The same by products that add to what is there.
fn gpu_sum(start: Start, parts: &[Part], shape: (usize, usize)) -> Result<Tensor> {
    let _span = span("product", Kind::Gemm);
    let (y, bias, mut beta) = match start {
        Start::Zero => (gpu::empty(shape, parts[0].x)?, None, 0.0),
        Start::Row(row) => (gpu::empty(shape, parts[0].x)?, Some(row), 0.0),
        Start::Matrix(matrix) => (matrix.force_contiguous()?, None, 1.0),
        Start::Sum(matrix) => (matrix, None, 1.0),
    };
    for part in parts {
        gpu::product(&y, (part.x, false), (part.w.dense()?, part.is_transposed), part.scale, beta)?;
        beta = 1.0;
    }
    if let Some(bias) = bias { add_bias(y, bias) } else { Ok(y) }
}

/// `X W^T` with `x: [m, k]`, `w: [n, k]`.
pub(super) fn product<'a>(x: &'a Tensor, w: impl Into<Factor<'a>>) -> Result<Tensor> {
    sum(Start::Zero, &[Part::transposed(x, w, 1.0)])
}

/// `X^T Y` in f32 with `x: [k, m]`, `y: [k, n]`: the gradient of a weight.
pub(crate) fn outer(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    add_outer(None, 1.0, x, y)
}

/// `scale X^T Y` in f32.
pub(super) fn scaled_outer(scale: f32, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    add_outer(None, scale, x, y)
}

/// `scale X^T Y` in f32, added to `sum` in place if there is one, with `x: [k, m]`, `y: [k, n]`.
pub(crate) fn add_outer(sum: Option<Tensor>, scale: f32, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if gpu::has_products(x) {
        let _span = span("outer product", Kind::Gemm);
        let beta = if sum.is_some() { 1.0 } else { 0.0 };
        let sum = sum.map_or_else(|| gpu::empty_f32((x.dim(1)?, y.dim(1)?), x), Ok)?;
        gpu::product(&sum, (x, true), (y, false), scale, beta)?;
        return Ok(sum);
    }
    if !on_cpu(x) {
        let product = x.t()?.contiguous()?.matmul(y)?.to_dtype(DType::F32)?;
        let product = if (scale - 1.0).abs() > f32::EPSILON { product.affine(f64::from(scale), 0.0)? } else { product };
        return match sum {
            Some(sum) => Ok((sum + product)?),
            None => Ok(product),
        };
    }
    let _span = span("outer product", Kind::Gemm);
    let ((k, m), n) = (x.dims2()?, y.dim(1)?);
    let (x, y) = (Host::new(x)?, Host::new(y)?);
    let (x, y) = (x.f32()?, y.f32()?);
    let multiply = |beta: f32, z: &mut [f32]| kernels::gemm((m, n, k), scale, x, (1, m), y.into(), (n, 1), beta, z);
    if let Some(sum) = sum {
        return edit(sum, |z| multiply(1.0, z));
    }
    let mut z = vec![0.0; m * n];
    multiply(0.0, &mut z);
    tensor(z, (m, n))
}

/// The sums of the columns of `x: [rows, width]`, f32.
pub(crate) fn column_sums(x: &Tensor) -> Result<Tensor> {
    if gpu::has_kernels(x) {
        let (rows, width) = x.dims2()?;
        let sums = gpu::empty_f32(width, x)?;
        let kernel = Kernel::new(Source::Norm, "column_sums", x.dtype());
        let args = [Arg::In(x), Arg::Out(&sums)];
        let threads = gpu::threads(&kernel, x, 512)?;
        gpu::launch(&kernel, Grid::row(width.div_ceil(32), threads), &args, &[rows.into(), width.into()])?;
        return Ok(sums);
    }
    if !on_cpu(x) {
        return Ok(x.to_dtype(DType::F32)?.sum(0)?);
    }
    let mut sums = vec![0.0; x.dim(1)?];
    kernels::column_sums(Host::new(x)?.f32()?, &mut sums);
    let width = sums.len();
    tensor(sums, width)
}

/// `sum over rows of x[:, j] y[:, j]` for each column, f32.
pub(super) fn column_dots(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(0)?)
}

/// `x[i] . y[i]` for each row, f32.
pub(super) fn row_dots(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?.sum(D::Minus1)?)
}

/// Column `j` of `y` times `factors[j]`.
pub(super) fn scale_columns(y: Tensor, factors: &Tensor) -> Result<Tensor> {
    if gpu::has_kernels(&y) && factors.dtype() == DType::F32 {
        gpu::by_row("scale_columns", &y, &[Arg::In(factors), Arg::Out(&y)])?;
        return Ok(y);
    }
    if !on_cpu(&y) {
        return Ok(y.broadcast_mul(&factors.to_dtype(y.dtype())?)?);
    }
    let factors = Host::new(factors)?;
    let factors = factors.f32()?;
    edit(y, |y| kernels::scale_columns(y, factors))
}

fn add_bias(y: Tensor, bias: &Tensor) -> Result<Tensor> {
    if gpu::has_kernels(&y) && bias.dtype() == y.dtype() {
        gpu::by_row("add_row", &y, &[Arg::In(bias), Arg::Out(&y)])?;
        return Ok(y);
    }
    if !on_cpu(&y) {
        return Ok(y.broadcast_add(bias)?);
    }
    let bias = Host::new(bias)?;
    let bias = bias.f32()?;
    edit(y, |y| kernels::add_bias(y, bias))
}

/// `y + scale x`, in place of `y`.
pub(crate) fn add_scaled(y: Tensor, scale: f64, x: &Tensor) -> Result<Tensor> {
    if gpu::has_kernels(&y) && x.dtype() == y.dtype() {
        let args = [Arg::In(x), Arg::Out(&y)];
        gpu::by_four("add_scaled", &[&y, x], &args, &[(scale as f32).into()])?;
        return Ok(y);
    }
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
