//! Sums of matrix products and the row and column operations of linear layers, on every device.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::{Host, edit, on_cpu, tensor};
use super::weight::Operand;
use crate::error::{Error, Result};
use crate::profile::{Kind, span};
use candle_core::{D, DType, Tensor};
use metal_candle_kernels::{self as kernels, BlockMatrix};

/// The summation order of a product on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The order depends on the number of rows. Training uses it, so that a resumed run writes the same bytes.
    ByShape,
    /// The order is the same for any number of rows: the result of a row does not depend on the other rows, bit for
    /// bit.
    ByRow,
}

/// The initial value of a sum of products.
pub(super) enum Accumulator<'a> {
    Zero,
    /// One row `[columns]`, repeated for each row of the result, such as a bias.
    Row(&'a Tensor),
    /// A matrix, which is not modified.
    Matrix(&'a Tensor),
    /// A matrix that is overwritten by the result.
    InPlace(Tensor),
}

/// A product of a sum.
#[derive(Clone, Copy)]
pub(super) struct ScaledProduct<'a> {
    x: &'a Tensor,
    w: Operand<'a>,
    is_transposed: bool,
    scale: f32,
}

impl<'a> ScaledProduct<'a> {
    /// `scale X W` with `x: [m, k]`, `w: [k, n]`.
    pub(super) fn plain(x: &'a Tensor, w: impl Into<Operand<'a>>, scale: f32) -> Self {
        Self { x, w: w.into(), is_transposed: false, scale }
    }

    /// `scale X W^T` with `x: [m, k]`, `w: [n, k]`.
    pub(super) fn transposed(x: &'a Tensor, w: impl Into<Operand<'a>>, scale: f32) -> Self {
        Self { x, w: w.into(), is_transposed: true, scale }
    }

    fn columns(&self) -> Result<usize> {
        match self.w.dims() {
            &[rows, columns] => Ok(if self.is_transposed { rows } else { columns }),
            dims => Err(Error::argument("weight", format!("expected a matrix, found the shape {dims:?}"))),
        }
    }

    fn plain_product(&self) -> Result<Tensor> {
        let product = self.w.plain_product(self.x, self.is_transposed)?;
        Ok(if (self.scale - 1.0).abs() > f32::EPSILON { product.affine(f64::from(self.scale), 0.0)? } else { product })
    }
}

/// The sum of an accumulator and one or more products of the same shape. On the CPU it is one pass over the result.
pub(super) fn sum(accumulator: Accumulator, parts: &[ScaledProduct]) -> Result<Tensor> {
    sum_in(Order::ByShape, accumulator, parts)
}

/// [`sum`] with a given summation order on the CPU. [`Order::ByRow`] applies only if all products are transposed.
pub(super) fn sum_in(order: Order, accumulator: Accumulator, parts: &[ScaledProduct]) -> Result<Tensor> {
    let (rows, columns) = (parts[0].x.dim(0)?, parts[0].columns()?);
    if gpu::has_products(parts[0].x) {
        return gpu_sum(accumulator, parts, (rows, columns));
    }
    if !on_cpu(parts[0].x) {
        let mut y = parts[0].plain_product()?;
        for part in &parts[1..] {
            y = add_scaled(y, 1.0, &part.plain_product()?)?;
        }
        return match accumulator {
            Accumulator::Zero => Ok(y),
            Accumulator::Row(row) => add_bias(y, row),
            Accumulator::Matrix(matrix) => add_scaled(y, 1.0, matrix),
            Accumulator::InPlace(matrix) => add_scaled(matrix, 1.0, &y),
        };
    }
    let _span = span("product", Kind::Gemm);
    let mut accumulator = accumulator;
    let mut dense: Vec<ScaledProduct> = Vec::with_capacity(parts.len());
    for &part in parts {
        match part.w.block_matrix()? {
            Some(blocks) => {
                accumulator = Accumulator::InPlace(block_sum(order, accumulator, &part, blocks, (rows, columns))?);
            }
            None => dense.push(part),
        }
    }
    let parts = &dense[..];
    if let (Accumulator::InPlace(y), []) = (&accumulator, parts) {
        return Ok(y.clone());
    }
    let hosts: Vec<(Host, Host)> =
        parts.iter().map(|part| Ok((Host::new(part.x)?, part.w.host()?))).collect::<Result<_>>()?;
    if order == Order::ByRow && parts.iter().all(|part| part.is_transposed) {
        return sum_by_row(accumulator, parts, &hosts, (rows, columns));
    }
    let mut products = Vec::with_capacity(parts.len());
    for (part, (x, w)) in parts.iter().zip(&hosts) {
        let k = part.x.dim(1)?;
        let b_strides = if part.is_transposed { (1, k) } else { (columns, 1) };
        let (a, b) = (x.f32()?, w.matrix()?);
        let precision = part.w.precision();
        products.push(kernels::Product { a, a_strides: (k, 1), b, b_strides, k, alpha: part.scale, precision });
    }
    let shape = (rows, columns);
    let new = |accumulator: kernels::Start| tensor(kernels::gemm_sum(shape, accumulator, &products), shape);
    match accumulator {
        Accumulator::Zero => new(kernels::Start::Zero),
        Accumulator::Row(row) => new(kernels::Start::Row(Host::new(row)?.f32()?)),
        Accumulator::Matrix(matrix) => new(kernels::Start::Matrix(Host::new(matrix)?.f32()?)),
        Accumulator::InPlace(matrix) => {
            edit(matrix, |y| kernels::gemm_sum_to(shape, kernels::Start::Result, &products, y))
        }
    }
}

/// The sum of an accumulator and a product with quantized blocks.
fn block_sum(
    order: Order,
    accumulator: Accumulator,
    part: &ScaledProduct,
    w: BlockMatrix,
    shape: (usize, usize),
) -> Result<Tensor> {
    let x = Host::new(part.x)?;
    let (x, scale) = (x.f32()?, part.scale);
    let multiply = |accumulator: kernels::Start| {
        let y = match (part.is_transposed, order) {
            (true, Order::ByRow) => kernels::block_row_products(shape, accumulator, x, w, scale),
            (true, Order::ByShape) => kernels::block_products(shape, accumulator, x, w, scale),
            (false, _) => kernels::block_transposed_products(shape, accumulator, x, w, scale),
        };
        tensor(y, shape)
    };
    match accumulator {
        Accumulator::Zero => multiply(kernels::Start::Zero),
        Accumulator::Row(row) => multiply(kernels::Start::Row(Host::new(row)?.f32()?)),
        Accumulator::Matrix(matrix) => multiply(kernels::Start::Matrix(Host::new(matrix)?.f32()?)),
        Accumulator::InPlace(matrix) => multiply(kernels::Start::Matrix(Host::new(&matrix)?.f32()?)),
    }
}

fn sum_by_row(
    accumulator: Accumulator,
    parts: &[ScaledProduct],
    hosts: &[(Host, Host)],
    shape: (usize, usize),
) -> Result<Tensor> {
    let mut products = Vec::with_capacity(parts.len());
    for (part, (x, w)) in parts.iter().zip(hosts) {
        let (a, b, k) = (x.f32()?, w.matrix()?, part.x.dim(1)?);
        products.push(kernels::RowProduct { a, b, k, alpha: part.scale, precision: part.w.precision() });
    }
    let new = |accumulator: kernels::Start| tensor(kernels::row_products(shape, accumulator, &products), shape);
    match accumulator {
        Accumulator::Zero => new(kernels::Start::Zero),
        Accumulator::Row(row) => new(kernels::Start::Row(Host::new(row)?.f32()?)),
        Accumulator::Matrix(matrix) => new(kernels::Start::Matrix(Host::new(matrix)?.f32()?)),
        Accumulator::InPlace(matrix) => new(kernels::Start::Matrix(Host::new(&matrix)?.f32()?)),
    }
}

/// [`sum`] on a GPU, with matrix products that accumulate into the result.
fn gpu_sum(accumulator: Accumulator, parts: &[ScaledProduct], shape: (usize, usize)) -> Result<Tensor> {
    let _span = span("product", Kind::Gemm);
    let (y, bias, mut beta) = match accumulator {
        Accumulator::Zero => (gpu::empty(shape, parts[0].x)?, None, 0.0),
        Accumulator::Row(row) => (gpu::empty(shape, parts[0].x)?, Some(row), 0.0),
        Accumulator::Matrix(matrix) => (matrix.force_contiguous()?, None, 1.0),
        Accumulator::InPlace(matrix) => (matrix, None, 1.0),
    };
    for part in parts {
        part.w.multiply_on_gpu(&y, part.x, part.is_transposed, (part.scale, beta))?;
        beta = 1.0;
    }
    if let Some(bias) = bias { add_bias(y, bias) } else { Ok(y) }
}

/// `X W^T` with `x: [m, k]`, `w: [n, k]`.
pub(super) fn product<'a>(x: &'a Tensor, w: impl Into<Operand<'a>>) -> Result<Tensor> {
    product_in(Order::ByShape, x, w)
}

/// [`product`] with a given summation order on the CPU.
pub(super) fn product_in<'a>(order: Order, x: &'a Tensor, w: impl Into<Operand<'a>>) -> Result<Tensor> {
    sum_in(order, Accumulator::Zero, &[ScaledProduct::transposed(x, w, 1.0)])
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

/// Adds `bias` to each row of `y` in place.
pub(super) fn add_bias(y: Tensor, bias: &Tensor) -> Result<Tensor> {
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

/// `y + scale x`, written over `y`.
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
