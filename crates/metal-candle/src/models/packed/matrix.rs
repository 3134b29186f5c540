//! A matrix of a quantized checkpoint, before it is read.

use super::dense::{RowFunction, dense};
use super::integers::Integers;
use super::module::Part;
use crate::error::{Error, Result};
use crate::ops::Weight;
use candle_core::DType;
use metal_candle_kernels::BlockFormat;

/// A matrix that is stored in tensors of another form, whose dtypes and shapes fit each other.
pub(super) struct PackedMatrix<'a> {
    /// The numbers of rows and columns.
    pub(super) shape: [usize; 2],
    /// The tensors that it is stored in; errors name the first.
    pub(super) parts: Vec<Part<'a>>,
    pub(super) read: Box<dyn Fn() -> Result<Values<'a>> + 'a>,
}

/// The values of a matrix.
pub(super) enum Values<'a> {
    /// Blocks of ggml with the same values.
    Blocks(BlockFormat, Vec<u8>),
    /// Whole numbers with scales.
    Integers(Integers<'a>),
    /// A function that writes a row, and the dtype that the values are meant for.
    Rows(Box<RowFunction<'a>>, DType),
}

impl PackedMatrix<'_> {
    /// The size of its tensors, in bytes.
    pub(super) fn num_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.num_bytes()).sum()
    }

    /// The matrix on the CPU in `dtype`. Without one it is made of blocks where they hold the same values, else of the dtype of its
    /// scales.
    pub(super) fn weight(&self, dtype: Option<DType>) -> Result<Weight> {
        let [rows, columns] = self.shape;
        let too_large = |dtype: DType| {
            let message = format!("values too large for {}: load them as bf16 or f32", dtype.as_str());
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
