//! `PackedMatrix`: a quantized matrix of a checkpoint whose tensors have been found, but not read.

use super::dense::{RowFunction, dense};
use super::integers::Integers;
use super::module::Part;
use crate::error::{Error, Result};
use crate::ops::Weight;
use candle_core::DType;
use metal_candle_kernels::BlockFormat;

/// A matrix stored in other tensors, whose dtypes and shapes have been checked.
pub(super) struct PackedMatrix<'a> {
    /// Rows and columns.
    pub(super) shape: [usize; 2],
    /// The tensors that store it. Errors name the first.
    pub(super) parts: Vec<Part<'a>>,
    pub(super) read: Box<dyn Fn() -> Result<Values<'a>> + 'a>,
}

/// The values of a matrix.
pub(super) enum Values<'a> {
    /// GGUF blocks with the same values.
    Blocks(BlockFormat, Vec<u8>),
    /// Integers with scales.
    Integers(Integers<'a>),
    /// A function that writes a row, and the preferred dtype of the matrix.
    Rows(Box<RowFunction<'a>>, DType),
}

impl PackedMatrix<'_> {
    /// The size of its tensors in the files, in bytes.
    pub(super) fn num_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.num_bytes()).sum()
    }

    /// The matrix on the CPU in `dtype`. Without a dtype, it consists of quantized blocks if they can represent the
    /// same values, otherwise it has the dtype of its scales.
    pub(super) fn weight(&self, dtype: Option<DType>) -> Result<Weight> {
        let [rows, columns] = self.shape;
        let too_large = |dtype: DType| {
            let message = format!("values too large for {}; load them as bf16 or f32", dtype.as_str());
            self.parts[0].error(&message)
        };
        let in_rows = |row: &RowFunction, dtype: DType| {
            Ok::<Weight, Error>(dense(self.shape, dtype, row)?.ok_or_else(|| too_large(dtype))?.into())
        };
        let blocks = |format: BlockFormat, blocks: Vec<u8>| {
            let wrong = || self.parts[0].error(&format!("expected rows of blocks of {}", format.len()));
            Weight::blocks(blocks, (rows, columns), format).ok_or_else(wrong)
        };
        let weight = match ((self.read)()?, dtype) {
            (Values::Blocks(format, bytes), None) => blocks(format, bytes)?,
            (Values::Blocks(format, bytes), Some(dtype)) => blocks(format, bytes)?.to_dtype(dtype)?.into(),
            (Values::Integers(integers), None) => match integers.blocks(self.shape) {
                Some((format, bytes)) => blocks(format, bytes)?,
                None => in_rows(&|row, values| integers.row(row, values), integers.dtype)?,
            },
            (Values::Integers(integers), Some(dtype)) => in_rows(&|row, values| integers.row(row, values), dtype)?,
            (Values::Rows(row, own), dtype) => in_rows(&*row, dtype.unwrap_or(own))?,
        };
        for part in &self.parts {
            part.finish()?;
        }
        Ok(weight)
    }
}
