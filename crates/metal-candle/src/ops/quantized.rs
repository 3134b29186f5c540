//! Quantized weight matrices on the CPU, in a mapped file or in memory.

use super::host::tensor;
use crate::error::{Error, Result};
use candle_core::{Shape, Tensor};
use metal_candle_kernels::{BlockFormat, BlockMatrix, MappedFile};
use std::ops::Range;
use std::sync::Arc;

/// A matrix of quantized blocks; each row is a whole number of blocks. Cloning is cheap.
#[derive(Debug, Clone)]
pub(super) struct Quantized {
    source: Source,
    bytes: Range<usize>,
    shape: Shape,
    rows: usize,
    columns: usize,
    format: BlockFormat,
}

#[derive(Debug, Clone)]
enum Source {
    File(Arc<MappedFile>),
    Memory(Arc<[u8]>),
}

impl Quantized {
    /// The blocks in a byte range of `file`; `None` if the range does not have the size of such a matrix.
    pub(super) fn mapped(
        file: &Arc<MappedFile>,
        bytes: Range<usize>,
        dims: (usize, usize),
        format: BlockFormat,
    ) -> Option<Self> {
        BlockMatrix::new(format, file.get(bytes.clone())?, dims.0, dims.1)?;
        Some(Self::new(Source::File(file.clone()), bytes, dims, format))
    }

    /// The blocks in memory; `None` if their number does not match the size of the matrix.
    pub(super) fn in_memory(blocks: Vec<u8>, dims: (usize, usize), format: BlockFormat) -> Option<Self> {
        BlockMatrix::new(format, &blocks, dims.0, dims.1)?;
        let bytes = 0..blocks.len();
        Some(Self::new(Source::Memory(blocks.into()), bytes, dims, format))
    }

    fn new(source: Source, bytes: Range<usize>, (rows, columns): (usize, usize), format: BlockFormat) -> Self {
        Self { source, bytes, shape: Shape::from((rows, columns)), rows, columns, format }
    }

    pub(super) fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    pub(super) fn format(&self) -> BlockFormat {
        self.format
    }

    pub(super) fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The file that the blocks are mapped from, and their offset.
    pub(super) fn file(&self) -> Option<(&Arc<MappedFile>, usize)> {
        match &self.source {
            Source::File(file) => Some((file, self.bytes.start)),
            Source::Memory(_) => None,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.source {
            Source::File(file) => file.check().map_err(|error| Error::read(file.path(), error)),
            Source::Memory(_) => Ok(()),
        }
    }

    pub(super) fn matrix(&self) -> Result<BlockMatrix<'_>> {
        let bytes = match &self.source {
            Source::File(file) => file.get(self.bytes.clone()),
            Source::Memory(bytes) => bytes.get(self.bytes.clone()),
        };
        let matrix = bytes.and_then(|bytes| BlockMatrix::new(self.format, bytes, self.rows, self.columns));
        matrix.ok_or_else(|| Error::Bug("the quantized blocks do not have the size of their matrix".into()))
    }

    /// Rows `start..start + len`, without a copy.
    pub(super) fn narrow_rows(&self, start: usize, len: usize) -> Result<Self> {
        if start.checked_add(len).is_none_or(|end| end > self.rows) {
            let message =
                format!("expected rows within the {} rows of the weight, found {start} to {start} + {len}", self.rows);
            return Err(Error::argument("rows", message));
        }
        let row = self.bytes.len().checked_div(self.rows).unwrap_or(0);
        let begin = self.bytes.start + start * row;
        Ok(Self::new(self.source.clone(), begin..begin + len * row, (len, self.columns), self.format))
    }

    /// The rows with these indices, which must exist: `[ids, columns]`, f32.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        tensor(self.dequantized(ids.iter().map(|&id| id as usize))?, (ids.len(), self.columns))
    }

    /// All elements, f32.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let values = self.dequantized(0..self.rows)?;
        self.check()?;
        tensor(values, self.dims())
    }

    fn dequantized(&self, rows: impl ExactSizeIterator<Item = usize>) -> Result<Vec<f32>> {
        let matrix = self.matrix()?;
        let mut values = vec![0.0; rows.len() * self.columns];
        for (row, to) in rows.zip(values.chunks_exact_mut(self.columns.max(1))) {
            matrix.widen_row(row, 0..self.columns, to);
        }
        Ok(values)
    }
}
