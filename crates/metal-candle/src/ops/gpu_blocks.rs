//! Matrices of quantized blocks on a GPU.
//!
//! Decoding reads the blocks themselves. Other products dequantize a part of the rows at a time into memory that is reused, so a
//! whole matrix is never held beside its blocks unless it is small.

use super::gpu::{self, Arg, Formats, Grid, Kernel, Source};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use metal_candle_kernels::BlockFormat;

/// The most weights that are dequantized at a time.
const PART: usize = 1 << 25;

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
    /// The matrix `[rows, columns]` with these blocks, uploaded to `device`. Its products are of type `dtype`.
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

    pub(super) fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    pub(super) fn format(&self) -> BlockFormat {
        self.format
    }

    /// The type of what is dequantized.
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
            let message = format!("rows {start} to {start} + {len} of a weight with {} rows", self.rows);
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

    /// The rows with these indices, which exist: `[ids, columns]`.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let device = self.bytes.device();
        let rows = gpu::empty_of((ids.len(), self.columns), self.dtype, device)?;
        self.dequantize(Some(&Tensor::new(ids, device)?), &rows)?;
        Ok(rows)
    }

    /// `y = scale x W + beta y`, or with the transpose of W, on CUDA. `scratch` has room for a part of W; without it memory is
    /// allocated.
    pub(super) fn multiply(
        &self,
        y: &Tensor,
        x: &Tensor,
        is_transposed: bool,
        scale: f32,
        beta: f32,
        scratch: Option<&Tensor>,
    ) -> Result<()> {
        let of_part = rows_of_part(self.rows, self.columns);
        let scratch = match scratch {
            Some(scratch) => scratch.narrow(0, 0, of_part * self.columns)?,
            None => gpu::empty_of(of_part * self.columns, self.dtype, self.bytes.device())?,
        };
        for start in (0..self.rows).step_by(of_part) {
            let len = of_part.min(self.rows - start);
            let part = scratch.narrow(0, 0, len * self.columns)?.reshape((len, self.columns))?;
            self.narrow_rows(start, len)?.dequantize(None, &part)?;
            if is_transposed {
                gpu::product(&y.narrow(1, start, len)?, (x, false), (&part, true), scale, beta)?;
            } else {
                let beta = if start == 0 { beta } else { 1.0 };
                gpu::product(y, (&x.narrow(1, start, len)?, false), (&part, false), scale, beta)?;
            }
        }
        Ok(())
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

/// The rows of a matrix that are dequantized at a time: a multiple of 128 unless they are all.
fn rows_of_part(rows: usize, columns: usize) -> usize {
    let most = (PART / columns.max(1) / 128 * 128).max(128);
    rows.min(most)
}

/// The weights that are dequantized at a time of a matrix with this shape.
pub(crate) fn part_len(dims: &[usize]) -> usize {
    match *dims {
        [rows, columns] => rows_of_part(rows, columns) * columns,
        _ => 0,
    }
}
