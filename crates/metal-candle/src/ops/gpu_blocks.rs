//! Quantized weight matrices on a GPU, and products with them.
//!
//! Decoding reads the blocks directly. Other products dequantize a chunk of rows at a time into a reused buffer, so a
//! whole dequantized matrix exists only if it is small.

use super::gpu::{self, Arg, Formats, Grid, Kernel, Source, Word};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use metal_candle_kernels::BlockFormat;

/// The maximum number of weights that are dequantized at a time.
pub(super) const MAX_WEIGHTS: usize = 1 << 25;

/// The maximum number of vectors that are multiplied with blocks without dequantizing them.
pub(crate) const MAX_VECTORS: usize = 64;

/// A matrix of quantized blocks on a GPU; each row is a whole number of blocks. Cloning is cheap.
#[derive(Debug, Clone)]
pub(super) struct GpuBlocks {
    /// The blocks, row by row: `[bytes]`.
    bytes: Tensor,
    format: BlockFormat,
    shape: Shape,
    rows: usize,
    columns: usize,
    dtype: DType,
}

impl GpuBlocks {
    /// Uploads the blocks of a matrix `[rows, columns]` to `device`. Its products are of type `dtype`.
    pub(super) fn upload(
        blocks: &[u8],
        (rows, columns): (usize, usize),
        format: BlockFormat,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let bytes = Tensor::from_slice(blocks, blocks.len(), device)?;
        Ok(Self { bytes, format, shape: Shape::from((rows, columns)), rows, columns, dtype })
    }

    /// The same matrix on another GPU.
    pub(super) fn to_device(&self, device: &Device, dtype: DType) -> Result<Self> {
        Ok(Self { bytes: self.bytes.to_device(device)?, dtype, ..self.clone() })
    }

    pub(super) fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    pub(super) fn format(&self) -> BlockFormat {
        self.format
    }

    /// The dtype of dequantized weights and of products.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The blocks: `[bytes]`.
    pub(super) fn bytes(&self) -> &Tensor {
        &self.bytes
    }

    /// Rows `start..start + len`, without a copy.
    pub(super) fn narrow_rows(&self, start: usize, len: usize) -> Result<Self> {
        if start.checked_add(len).is_none_or(|end| end > self.rows) {
            let message =
                format!("expected rows within the {} rows of the weight, found {start} to {start} + {len}", self.rows);
            return Err(Error::argument("rows", message));
        }
        let row = self.bytes.elem_count().checked_div(self.rows).unwrap_or(0);
        let bytes = self.bytes.narrow(0, start * row, len * row)?;
        Ok(Self { bytes, shape: Shape::from((len, self.columns)), rows: len, ..self.clone() })
    }

    /// All weights: `[rows, columns]`.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let all = gpu::empty_of((self.rows, self.columns), self.dtype, self.bytes.device())?;
        self.dequantize(None, &all)?;
        Ok(all)
    }

    /// The rows with these indices, which must exist: `[ids, columns]`.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let device = self.bytes.device();
        let rows = gpu::empty_of((ids.len(), self.columns), self.dtype, device)?;
        self.dequantize(Some(&Tensor::new(ids, device)?), &rows)?;
        Ok(rows)
    }

    /// `y = scale x W + beta y`, or with the transpose of W, on CUDA. `scratch` is a buffer for dequantized weights;
    /// without it, memory is allocated.
    pub(super) fn multiply(
        &self,
        y: &Tensor,
        x: &Tensor,
        is_transposed: bool,
        scale: f32,
        beta: f32,
        scratch: Option<&Tensor>,
    ) -> Result<()> {
        if is_transposed && self.supports_block_product(x, y) {
            return block_product(x, &[(self, y)], scale, beta);
        }
        self.multiply_in_parts(y, x, is_transposed, (scale, beta), scratch, MAX_WEIGHTS)
    }

    /// [`Self::multiply`] with at most `max_weights` dequantized weights at a time, or 128 rows. Sums of parts are in f32.
    pub(super) fn multiply_in_parts(
        &self,
        y: &Tensor,
        x: &Tensor,
        is_transposed: bool,
        (scale, beta): (f32, f32),
        scratch: Option<&Tensor>,
        max_weights: usize,
    ) -> Result<()> {
        let chunk_rows = rows_per_chunk(self.rows, self.columns, max_weights);
        let scratch = match scratch {
            Some(scratch) => scratch.narrow(0, 0, chunk_rows * self.columns)?,
            None => gpu::empty_of(chunk_rows * self.columns, self.dtype, self.bytes.device())?,
        };
        let has_sum = !is_transposed && chunk_rows < self.rows && y.dtype() != DType::F32;
        let sum = match has_sum {
            true if beta == 0.0 => Some(gpu::empty_f32(y.shape(), y)?),
            true => Some(y.to_dtype(DType::F32)?),
            false => None,
        };
        for start in (0..self.rows).step_by(chunk_rows) {
            let len = chunk_rows.min(self.rows - start);
            let part = scratch.narrow(0, 0, len * self.columns)?.reshape((len, self.columns))?;
            self.narrow_rows(start, len)?.dequantize(None, &part)?;
            if is_transposed {
                gpu::product(&y.narrow(1, start, len)?, (x, false), (&part, true), scale, beta)?;
            } else {
                let beta = if start == 0 { beta } else { 1.0 };
                let sum = sum.as_ref().unwrap_or(y);
                gpu::product(sum, (&x.narrow(1, start, len)?, false), (&part, false), scale, beta)?;
            }
        }
        if let Some(sum) = sum {
            y.slice_set(&sum.to_dtype(y.dtype())?, 0, 0)?;
        }
        Ok(())
    }

    /// `X W`, or with the transpose of W, by candle's products on parts of at most `max_weights` dequantized weights, or 128 rows.
    /// Sums of parts are in f32.
    pub(super) fn plain_product(&self, x: &Tensor, is_transposed: bool, max_weights: usize) -> Result<Tensor> {
        let chunk_rows = rows_per_chunk(self.rows, self.columns, max_weights);
        if chunk_rows == self.rows {
            let w = self.tensor()?;
            return Ok(if is_transposed { x.matmul(&w.t()?)? } else { x.matmul(&w)? });
        }
        let parts = (0..self.rows).step_by(chunk_rows).map(|start| (start, chunk_rows.min(self.rows - start)));
        if is_transposed {
            let y = gpu::empty((x.dim(0)?, self.rows), x)?;
            for (start, len) in parts {
                let w = self.narrow_rows(start, len)?.tensor()?;
                y.slice_set(&x.matmul(&w.t()?)?, 1, start)?;
            }
            return Ok(y);
        }
        let mut sum = Tensor::zeros((x.dim(0)?, self.columns), DType::F32, x.device())?;
        for (start, len) in parts {
            let w = self.narrow_rows(start, len)?.tensor()?;
            let product = x.narrow(1, start, len)?.contiguous()?.matmul(&w)?;
            sum = (sum + product.to_dtype(DType::F32)?)?;
        }
        Ok(sum.to_dtype(x.dtype())?)
    }

    /// Whether [`block_product`] can multiply `x` and write `y`.
    pub(super) fn supports_block_product(&self, x: &Tensor, y: &Tensor) -> bool {
        let is_few = x.dims().first().is_some_and(|rows| *rows <= MAX_VECTORS);
        let is_half = matches!(self.dtype, DType::F16 | DType::BF16) && x.dtype() == self.dtype;
        let is_written = y.is_contiguous() && (y.dtype() == self.dtype || y.dtype() == DType::F32);
        is_few && is_half && is_written && gpu::supports_vector_loads(x, self.dtype)
    }

    /// Dequantizes all rows, or those with the given indices, into `to`.
    fn dequantize(&self, ids: Option<&Tensor>, to: &Tensor) -> Result<()> {
        let kernel = Kernel::new(Source::Blocks, "dequantize", self.dtype);
        let kernel = kernel.with("FORMATS", Formats::default().with(Some(self.format)).constant());
        let eights = to.elem_count() / 8;
        let args = [Arg::In(&self.bytes), ids.map_or(Arg::None, Arg::In), Arg::Out(to)];
        let words =
            [self.columns.into(), Formats::number(Some(self.format)).into(), eights.into(), ids.is_some().into()];
        gpu::launch(&kernel, Grid::elements(eights), &args, &words)
    }
}

/// Warps of a thread group of [`block_product`], and the weight rows that it processes.
const WARPS: usize = 8;
const TILE_ROWS: usize = 16;

/// For rows of `columns` columns, the columns that a warp loads at a time, and their bytes in one row.
fn stage_of(format: BlockFormat, columns: usize) -> (usize, usize) {
    let stage = [128, 64].into_iter().find(|stage| columns.is_multiple_of(*stage));
    let stage = if format.len() > 128 { format.len() } else { stage.unwrap_or(format.len()) };
    (stage, stage / format.len() * format.bytes())
}

/// `y = scale x W^T + beta y` for up to three matrices that share `x`, without dequantizing them.
pub(super) fn block_product(x: &Tensor, products: &[(&GpuBlocks, &Tensor)], scale: f32, beta: f32) -> Result<()> {
    let (tokens, columns) = x.dims2()?;
    let n_tiles = tokens.div_ceil(8).next_power_of_two();
    let Some(format) = products.first().map(|(blocks, _)| blocks.format) else { return Ok(()) };
    let is_f32 = products.iter().any(|(_, y)| y.dtype() == DType::F32);
    let (stage, stage_bytes) = stage_of(format, columns);
    let row_bytes = 16 * (((stage_bytes + 30) / 16) | 1);
    let kernel = Kernel::new(Source::BlockProduct, "block_product", x.dtype())
        .with("FORMATS", Formats::default().with(Some(format)).constant())
        .with("FORMAT", Formats::number(Some(format)))
        .with("STAGE", stage)
        .with("STAGE_BYTES", stage_bytes)
        .with("ROW_BYTES", row_bytes)
        .with("WARPS", WARPS)
        .with("NTILES", n_tiles)
        .with("OUT_F32", usize::from(is_f32))
        .with("BLOCKS_BESIDE", if n_tiles == 1 { 3 } else { 2 });
    let each = |count: usize| products.get(count).or(products.last());
    let of_each = [0, 1, 2].map(each);
    let mut args = vec![Arg::In(x)];
    args.extend(of_each.iter().map(|product| product.map_or(Arg::None, |(blocks, _)| Arg::In(&blocks.bytes))));
    args.extend(of_each.iter().map(|product| product.map_or(Arg::None, |(_, y)| Arg::Out(y))));
    let mut words: Vec<Word> = vec![tokens.into(), columns.into()];
    words.extend(of_each.iter().map(|product| Word::from(product.map_or(0, |(blocks, _)| blocks.rows))));
    words.extend([Word::from(scale), beta.into()]);
    let tiles: usize = products.iter().map(|(blocks, _)| blocks.rows.div_ceil(TILE_ROWS)).sum();
    // each warp has two stages and the scales of one; later, the memory holds a sum for each row and vector
    let shared_bytes = WARPS * TILE_ROWS * (2 * row_bytes + stage / 16 * 8).max((8 * n_tiles + 1) * 4);
    gpu::launch(&kernel, Grid { shared_bytes, ..Grid::row(tiles, 32 * WARPS) }, &args, &words)
}

/// The rows of a matrix that are dequantized at a time, of at most `max_weights` weights: all, or a multiple of 128.
fn rows_per_chunk(rows: usize, columns: usize, max_weights: usize) -> usize {
    rows.min((max_weights / columns.max(1) / 128 * 128).max(128))
}

/// The number of weights of a matrix of this shape that are dequantized at a time.
pub(crate) fn scratch_len(dims: &[usize]) -> usize {
    match *dims {
        [rows, columns] => rows_per_chunk(rows, columns, MAX_WEIGHTS) * columns,
        _ => 0,
    }
}
