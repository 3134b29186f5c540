//! Quantizes matrices to blocks.

mod batch;
mod blocks;
mod lanes;
mod registers;
mod search;
mod superblocks;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use super::decode::{IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use super::matrix::{BlockFormat, with_writable};
use super::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};
use crate::isa::{Arithmetic, dispatch};
use crate::parallel::{Shared, for_each, rows_per_task};
use batch::{Batch, Encoder, Importance, sum_of_squares};
use half::f16;
use lanes::LANES;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The largest magnitude that a format with f16 scales can represent (`Q6_K`). Its squares and cubes are finite.
const LARGEST: f32 = 65504.0 * 128.0 * 32.0;

/// The smallest importance relative to the largest. Otherwise groups whose inputs were all zero would lose their weights.
const MIN_IMPORTANCE: f64 = 1.0 / (1_u64 << 40) as f64;

/// Why weights cannot be quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QuantizeError {
    /// The format is read-only.
    ReadOnly {
        /// The requested format.
        format: BlockFormat,
    },
    /// The width of the matrix is not a multiple of the block length.
    Columns {
        /// The requested format.
        format: BlockFormat,
        /// The width of the matrix.
        columns: usize,
    },
    /// The values are not whole rows.
    Values {
        /// The number of values.
        count: usize,
        /// The width of the matrix.
        columns: usize,
    },
    /// The importance does not have one number per column.
    ImportanceLength {
        /// The number of importances.
        count: usize,
        /// The width of the matrix.
        columns: usize,
    },
    /// An importance is negative or not finite.
    Importance {
        /// The column.
        column: usize,
        /// Its importance.
        value: f32,
    },
    /// A value is infinite or NaN.
    NotFinite {
        /// The index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The scale of a block does not fit in f16.
    TooLarge {
        /// The requested format.
        format: BlockFormat,
        /// The index of the value with the largest magnitude in the first such block.
        index: usize,
        /// The value.
        value: f32,
    },
}

impl fmt::Display for QuantizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadOnly { format } => {
                let known = BlockFormat::WRITABLE.map(BlockFormat::name).join("`, `");
                write!(f, "cannot quantize to `{}`, which is read-only; use one of `{known}`", format.name())
            }
            Self::Columns { format, columns } => {
                let (name, len) = (format.name(), format.len());
                write!(f, "`{name}` needs rows of a multiple of {len} values, found {columns}; choose another format")
            }
            Self::Values { count, columns } => {
                write!(f, "expected whole rows of {columns} values, found {count} values")
            }
            Self::ImportanceLength { count, columns } => {
                write!(f, "expected an importance for each of {columns} columns, found {count}")
            }
            Self::Importance { column, value } => {
                write!(f, "the importance of column {column} is {value}; expected a finite number that is not negative")
            }
            Self::NotFinite { index, value } => write!(f, "value {index} is {value}; expected a finite number"),
            Self::TooLarge { format, index, value } => {
                let name = format.name();
                write!(f, "value {index} is {value}, too large for the f16 scales of `{name}`; choose bf16 or f32")
            }
        }
    }
}

impl std::error::Error for QuantizeError {}

impl BlockFormat {
    /// Quantizes a row-major matrix of `columns` columns. Returns its blocks in the same order, as [`super::BlockMatrix`] reads
    /// them.
    ///
    /// `importance` weights the errors of each column: it is the mean square of the column's input. Only ratios matter. Columns
    /// have at least 2^-40 of the largest importance, and equal importance if all are zero. `Q8_0` and `MXFP4` ignore it.
    ///
    /// The blocks do not depend on the machine or the number of threads. They are identical to the blocks of ggml compiled
    /// without fused multiply-add, as for x86-64.
    ///
    /// # Errors
    /// The format is not one of [`BlockFormat::WRITABLE`], the sizes do not match, a value is not finite or too large, or an
    /// importance is negative or not finite.
    pub fn quantize(
        self,
        values: &[f32],
        columns: usize,
        importance: Option<&[f32]>,
    ) -> Result<Vec<u8>, QuantizeError> {
        if !self.is_writable() {
            return Err(QuantizeError::ReadOnly { format: self });
        }
        if !columns.is_multiple_of(self.len()) {
            return Err(QuantizeError::Columns { format: self, columns });
        }
        if !values.len().is_multiple_of(columns) {
            return Err(QuantizeError::Values { count: values.len(), columns });
        }
        let importance = importance.map(|importance| normalized(importance, columns)).transpose()?;
        let importance = importance.as_deref().filter(|importance| importance.iter().any(|&value| value > 0.0));
        let mut blocks = vec![0; values.len() / self.len() * self.bytes()];
        let rows = rows_per_task(columns);
        let count = values.len().checked_div(columns).unwrap_or(0).div_ceil(rows);
        let (len, bytes) = (self.len(), self.bytes());
        let to = Shared::new(&mut blocks);
        let failed = AtomicUsize::new(usize::MAX);
        for_each(count, values.len(), |task| {
            let start = task * rows * columns;
            let values = &values[start..values.len().min(start + rows * columns)];
            // SAFETY: the tasks have different rows, and the blocks outlive them.
            let blocks = unsafe { to.part(start / len * bytes, values.len() / len * bytes) };
            let rows = Rows { values, columns, importance };
            if let Err(index) = with_writable!(self, D => encode_rows::<D>(&rows, blocks), Ok(())) {
                failed.fetch_min(start + index, Ordering::Relaxed);
            }
        });
        match failed.into_inner() {
            usize::MAX => Ok(blocks),
            index => Err(self.failure(values, index)),
        }
    }

    /// Quantizes whole blocks of values for a KV cache, which must store any value. The blocks are identical to those of
    /// [`BlockFormat::quantize`] without an importance. A block with a value that is not finite or too large for its scale
    /// becomes NaN, so results computed from it are not finite either.
    ///
    /// # Panics
    /// The format has no f16 at the start of a block, or `blocks` does not have the size of the quantized values.
    pub fn quantize_or_nan(self, values: &[f32], blocks: &mut [u8]) {
        let (len, bytes) = (self.len(), self.bytes());
        assert!(matches!(self, Self::Q8_0 | Self::Q4_0), "`{}` is not a type of the KV cache", self.name());
        assert!(values.len().is_multiple_of(len), "the values are not whole blocks");
        assert!(blocks.len() == values.len() / len * bytes, "the lengths of the blocks and the values differ");
        let num_blocks = rows_per_task(len);
        let to = Shared::new(blocks);
        for_each((values.len() / len).div_ceil(num_blocks), values.len(), |task| {
            let start = task * num_blocks * len;
            let mut values = &values[start..values.len().min(start + num_blocks * len)];
            // SAFETY: the tasks have different blocks.
            let mut blocks = unsafe { to.part(start / len * bytes, values.len() / len * bytes) };
            loop {
                let rows = Rows { values, columns: len, importance: None };
                let Err(index) = with_writable!(self, D => encode_rows::<D>(&rows, blocks), Ok(())) else { break };
                let (failed, rest) = std::mem::take(&mut blocks)[index / len * bytes..].split_at_mut(bytes);
                failed.fill(0);
                failed[..2].copy_from_slice(&f16::NAN.to_le_bytes());
                (values, blocks) = (&values[index + len..], rest);
            }
        });
    }

    /// Why the block of value `index` cannot be quantized.
    fn failure(self, values: &[f32], index: usize) -> QuantizeError {
        let start = index / self.len() * self.len();
        let block = || (start..).zip(&values[start..start + self.len()]);
        if let Some((index, &value)) = block().find(|(_, value)| !value.is_finite()) {
            return QuantizeError::NotFinite { index, value };
        }
        let largest = block().max_by(|(_, a), (_, b)| a.abs().total_cmp(&b.abs()));
        let (index, value) = largest.map_or((index, 0.0), |(index, &value)| (index, value));
        QuantizeError::TooLarge { format: self, index, value }
    }
}

/// The importance times a power of two, such that the largest value is between 1 and 2.
fn normalized(importance: &[f32], columns: usize) -> Result<Vec<f32>, QuantizeError> {
    if importance.len() != columns {
        return Err(QuantizeError::ImportanceLength { count: importance.len(), columns });
    }
    if let Some(column) = importance.iter().position(|value| !(value.is_finite() && *value >= 0.0)) {
        return Err(QuantizeError::Importance { column, value: importance[column] });
    }
    let largest = f64::from(importance.iter().fold(0.0_f32, |largest, &value| largest.max(value)));
    // without the bits of the mantissa
    let unit = if largest > 0.0 { f64::from_bits(largest.to_bits() & 0x7ff << 52) } else { 1.0 };
    let min_importance = largest / unit * MIN_IMPORTANCE;
    Ok(importance.iter().map(|&value| (f64::from(value) / unit).max(min_importance) as f32).collect())
}

/// Rows of a matrix.
struct Rows<'a> {
    values: &'a [f32],
    columns: usize,
    importance: Option<&'a [f32]>,
}

dispatch! {
    /// Quantizes rows. Fails with the index of a value of the first block that cannot be quantized.
    fn encode_rows<E: Encoder>(rows: &Rows, blocks: &mut [u8]) -> Result<(), usize> = encode_rows_body
}

#[inline(always)]
fn encode_rows_body<A: Arithmetic, E: Encoder>(rows: &Rows, blocks: &mut [u8]) -> Result<(), usize> {
    let mut mean_squares = Vec::new();
    if E::NEEDS_MEAN_SQUARES && rows.importance.is_some() {
        for row in rows.values.chunks_exact(rows.columns) {
            mean_squares.push(sum_of_squares(row) / rows.columns as f32);
        }
    }
    let importance = rows.importance.map(|columns| Importance { columns, mean_squares: &mean_squares });
    let limit = if E::HAS_HALF_SCALES { LARGEST } else { f32::MAX };
    let batches = rows.values.chunks(LANES * E::GROUP).zip(blocks.chunks_mut(LANES * E::GROUP / E::LEN * E::BYTES));
    for (number, (values, blocks)) in batches.enumerate() {
        let first = number * LANES * E::GROUP;
        let batch = Batch { values, first, importance };
        if is_within(values, limit) && E::encode(&batch, blocks) {
            continue;
        }
        for (block, (values, to)) in values.chunks_exact(E::LEN).zip(blocks.chunks_exact_mut(E::BYTES)).enumerate() {
            let first = first + block * E::LEN;
            let batch = Batch { values, first, importance };
            if !(is_within(values, limit) && E::encode(&batch, to)) {
                return Err(first);
            }
        }
    }
    Ok(())
}

/// Whether each magnitude is at most `limit`; false for NaN.
#[inline(always)]
fn is_within(values: &[f32], limit: f32) -> bool {
    let mut is_within = true;
    for value in values {
        is_within &= value.abs() <= limit;
    }
    is_within
}
