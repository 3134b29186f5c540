//! Block formats and matrices stored in them.

use super::codebooks::{IQ1M, IQ1S, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS, TQ1_0, TQ2_0};
use super::decode::{IQ4NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, widen_blocks};
use super::superblocks::{IQ4XS, Q2K, Q3K, Q4K, Q5K, Q6K};
use std::ops::Range;

/// A block format of ggml. Names are ggml's names in camel case: `Q4K` is `q4_k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the underscore separates two digits
pub enum BlockFormat {
    /// 4 bits with a scale.
    Q4_0,
    /// 4 bits with a scale and a minimum.
    Q4_1,
    /// 5 bits with a scale.
    Q5_0,
    /// 5 bits with a scale and a minimum.
    Q5_1,
    /// 8 bits with a scale.
    Q8_0,
    /// 2 bits, in groups with scales and minimums of 4 bits.
    Q2K,
    /// 3 bits, in groups with scales of 6 bits.
    Q3K,
    /// 4 bits, in groups with scales and minimums of 6 bits.
    Q4K,
    /// 5 bits, in groups with scales and minimums of 6 bits.
    Q5K,
    /// 6 bits, in groups with scales of 8 bits.
    Q6K,
    /// 4 bits as an index into a table, with a scale.
    IQ4NL,
    /// 4 bits as an index into a table, in groups with scales of 6 bits.
    IQ4XS,
    /// 4-bit floats with a power of two as the scale.
    MXFP4,
    /// Entries of a codebook of 2,048 for eight weights, in groups with scales of 3 bits: 1.56 bits a weight.
    IQ1S,
    /// The codebook of `IQ1S`, in smaller groups: 1.75 bits a weight.
    IQ1M,
    /// Entries of a codebook of 256 for eight weights, and signs: 2.06 bits a weight.
    IQ2XXS,
    /// Entries of a codebook of 512 for eight weights, and signs: 2.31 bits a weight.
    IQ2XS,
    /// Entries of a codebook of 1,024 for eight weights, and signs: 2.56 bits a weight.
    IQ2S,
    /// Entries of a codebook of 256 for four weights, and signs: 3.06 bits a weight.
    IQ3XXS,
    /// Entries of a codebook of 512 for four weights, and signs: 3.44 bits a weight.
    IQ3S,
    /// Ternary weights, five in a byte: 1.69 bits a weight.
    TQ1_0,
    /// Ternary weights, four in a byte: 2.06 bits a weight.
    TQ2_0,
}

/// Calls `$run` with the decoder of a format as the type `$decoder`.
macro_rules! with_decoder {
    ($format:expr, $decoder:ident => $run:expr) => {
        with_decoder!(
            $format, $decoder => $run,
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K IQ4NL IQ4XS MXFP4
            IQ1S IQ1M IQ2XXS IQ2XS IQ2S IQ3XXS IQ3S TQ1_0 TQ2_0
        )
    };
    ($format:expr, $decoder:ident => $run:expr, $($name:ident)*) => {
        match $format {
            $(BlockFormat::$name => {
                type $decoder = $name;
                $run
            })*
        }
    };
}

/// Like `with_decoder`, for a format of [`BlockFormat::WRITABLE`]; `$other` for read-only formats.
macro_rules! with_writable {
    ($format:expr, $decoder:ident => $run:expr, $other:expr) => {
        with_writable!(
            $format, $decoder => $run, $other,
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K IQ4NL IQ4XS MXFP4
        )
    };
    ($format:expr, $decoder:ident => $run:expr, $other:expr, $($name:ident)*) => {
        match $format {
            $(BlockFormat::$name => {
                type $decoder = $name;
                $run
            })*
            _ => $other,
        }
    };
}

pub(super) use with_writable;

impl BlockFormat {
    /// All formats, first those of [`BlockFormat::WRITABLE`].
    pub const ALL: [Self; 22] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::IQ4NL,
        Self::IQ4XS,
        Self::MXFP4,
        Self::IQ1S,
        Self::IQ1M,
        Self::IQ2XXS,
        Self::IQ2XS,
        Self::IQ2S,
        Self::IQ3XXS,
        Self::IQ3S,
        Self::TQ1_0,
        Self::TQ2_0,
    ];

    /// The formats that [`BlockFormat::quantize`] writes. Inference multiplies them with 8-bit activations; other formats are
    /// dequantized for f32 products.
    pub const WRITABLE: [Self; 13] = {
        let mut formats = [Self::Q4_0; 13];
        let mut i = 0;
        while i < formats.len() {
            formats[i] = Self::ALL[i];
            i += 1;
        }
        formats
    };

    /// Whether the format is one of [`BlockFormat::WRITABLE`].
    #[must_use]
    pub fn is_writable(self) -> bool {
        Self::WRITABLE.contains(&self)
    }

    /// The format with this id in `enum ggml_type`.
    #[must_use]
    pub fn from_ggml_type(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.ggml_type() == id)
    }

    /// The id in `enum ggml_type`.
    #[must_use]
    pub fn ggml_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::IQ4NL => 20,
            Self::IQ4XS => 23,
            Self::MXFP4 => 39,
            Self::IQ1S => 19,
            Self::IQ1M => 29,
            Self::IQ2XXS => 16,
            Self::IQ2XS => 17,
            Self::IQ2S => 22,
            Self::IQ3XXS => 18,
            Self::IQ3S => 21,
            Self::TQ1_0 => 34,
            Self::TQ2_0 => 35,
        }
    }

    /// The name in ggml, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::IQ4NL => "iq4_nl",
            Self::IQ4XS => "iq4_xs",
            Self::MXFP4 => "mxfp4",
            Self::IQ1S => "iq1_s",
            Self::IQ1M => "iq1_m",
            Self::IQ2XXS => "iq2_xxs",
            Self::IQ2XS => "iq2_xs",
            Self::IQ2S => "iq2_s",
            Self::IQ3XXS => "iq3_xxs",
            Self::IQ3S => "iq3_s",
            Self::TQ1_0 => "tq1_0",
            Self::TQ2_0 => "tq2_0",
        }
    }

    /// The number of weights of a block.
    #[allow(clippy::len_without_is_empty)]
    #[must_use]
    pub fn len(self) -> usize {
        use super::decode::Decoder;
        with_decoder!(self, D => D::LEN)
    }

    /// The number of bytes of a block.
    #[must_use]
    pub fn bytes(self) -> usize {
        use super::decode::Decoder;
        with_decoder!(self, D => D::BYTES)
    }

    /// The number of bytes of a row. `None` unless `columns` is a multiple of the block length.
    #[must_use]
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        if columns.is_multiple_of(self.len()) { (columns / self.len()).checked_mul(self.bytes()) } else { None }
    }
}

/// A row-major matrix `[rows, columns]` of blocks. Each row is a whole number of blocks.
#[derive(Debug, Clone, Copy)]
pub struct BlockMatrix<'a> {
    format: BlockFormat,
    bytes: &'a [u8],
    rows: usize,
    columns: usize,
}

impl<'a> BlockMatrix<'a> {
    /// Creates a matrix from `bytes`. `None` if their number does not match the shape.
    #[must_use]
    pub fn new(format: BlockFormat, bytes: &'a [u8], rows: usize, columns: usize) -> Option<Self> {
        // also check that the number of weights does not overflow
        rows.checked_mul(columns)?.checked_mul(size_of::<f32>())?;
        let expected = format.row_bytes(columns)?.checked_mul(rows)?;
        (bytes.len() == expected).then_some(Self { format, bytes, rows, columns })
    }

    /// The format of the blocks.
    #[must_use]
    pub fn format(&self) -> BlockFormat {
        self.format
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The blocks.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Rows `start..start + len`. `None` if the matrix does not have them.
    #[must_use]
    pub fn narrow_rows(&self, start: usize, len: usize) -> Option<Self> {
        let end = start.checked_add(len).filter(|&end| end <= self.rows)?;
        let row = self.row_bytes();
        Some(Self { bytes: self.bytes.get(start * row..end * row)?, rows: len, ..*self })
    }

    fn row_bytes(&self) -> usize {
        self.columns / self.format.len() * self.format.bytes()
    }

    /// The bytes of columns `columns` of row `row`; empty if the matrix does not have them.
    pub(super) fn blocks(&self, row: usize, columns: Range<usize>) -> &'a [u8] {
        let (len, bytes, row) = (self.format.len(), self.format.bytes(), row * self.row_bytes());
        self.bytes.get(row + columns.start / len * bytes..row + columns.end / len * bytes).unwrap_or_default()
    }

    /// Dequantizes columns `columns` of row `row`. `to` has the length of `columns`.
    ///
    /// # Panics
    /// The range is outside the row, does not start and end at blocks, or the length of `to` does not match.
    pub fn widen_row(&self, row: usize, columns: Range<usize>, to: &mut [f32]) {
        let len = self.format.len();
        assert!(row < self.rows && columns.end <= self.columns, "the matrix does not have these elements");
        assert!(columns.start.is_multiple_of(len) && columns.end.is_multiple_of(len), "the range splits a block");
        assert!(columns.len() == to.len(), "the lengths of the result and the range differ");
        let blocks = self.blocks(row, columns);
        with_decoder!(self.format, D => widen_blocks::<D>(blocks, to));
    }

    /// Dequantizes whole rows to `to`, `[rows.len(), columns]`.
    ///
    /// # Panics
    /// The matrix does not have these rows, or the length of `to` does not match.
    pub(crate) fn widen_rows(&self, rows: Range<usize>, to: &mut [f32]) {
        assert!(to.len() == rows.len() * self.columns, "the lengths of the result and the rows differ");
        let blocks = &self.bytes[rows.start * self.row_bytes()..rows.end * self.row_bytes()];
        with_decoder!(self.format, D => widen_blocks::<D>(blocks, to));
    }
}
