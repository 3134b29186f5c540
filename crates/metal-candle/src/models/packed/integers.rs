//! Dequantizes integer matrices with scales, and converts them to block formats with the same values.

use super::codes::Codes;
use candle_core::DType;
use half::f16;
use metal_candle_kernels::BlockFormat;
use rayon::prelude::*;

/// The number of weights per block.
const BLOCK: usize = 32;

/// A matrix of integers, with a scale for each group of columns of a row.
pub(super) struct Integers<'a> {
    pub(super) codes: Codes<'a>,
    /// `[rows, groups]`.
    pub(super) scales: Vec<f32>,
    pub(super) offsets: Offsets,
    pub(super) groups: Groups,
    /// The dtype of the matrix if it becomes dense.
    pub(super) dtype: DType,
}

/// How a weight is computed from its code and scale.
pub(super) enum Offsets {
    /// `scale * code + bias`, with biases `[rows, groups]`.
    Biases(Vec<f32>),
    /// `scale * (code - zero)`, with zero points `[rows, groups]`.
    Zeros(Vec<i16>),
    /// `scale * (code - zero)` with one zero point.
    Zero(i16),
}

/// The group of each column.
pub(super) enum Groups {
    /// Groups of `len` adjacent columns.
    Adjacent { len: usize, count: usize },
    /// Any group below `count` for each column.
    Listed { of_columns: Vec<u32>, count: usize },
}

impl Groups {
    /// The number of groups of a row.
    fn count(&self) -> usize {
        match self {
            Self::Adjacent { count, .. } | Self::Listed { count, .. } => *count,
        }
    }

    /// The group of a column.
    fn of(&self, column: usize) -> usize {
        match self {
            Self::Adjacent { len, .. } => column / len,
            Self::Listed { of_columns, .. } => of_columns[column] as usize,
        }
    }
}

/// Decodes the codes of a group: zero points are 0 if there are biases, and biases are 0 if there are zero points.
#[derive(Clone, Copy)]
struct AffineDecode {
    scale: f32,
    zero: f32,
    bias: f32,
}

impl AffineDecode {
    #[inline]
    fn at(self, code: u8) -> f32 {
        self.scale * (f32::from(code) - self.zero) + self.bias
    }
}

/// A block format that can represent the values, and its offset.
struct BlockEncoding {
    format: BlockFormat,
    /// The offset that the format adds to `code - zero`.
    center: i16,
}

impl Integers<'_> {
    /// Writes the values of a row.
    pub(super) fn row(&self, row: usize, values: &mut [f32]) {
        let mut codes = vec![0; values.len()];
        self.codes.row(row, &mut codes);
        let first = row * self.groups.count();
        match &self.groups {
            Groups::Adjacent { len, .. } => {
                let groups = values.chunks_mut(*len).zip(codes.chunks(*len)).zip(first..);
                for ((values, codes), group) in groups {
                    let decoder = self.decoder(group);
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = decoder.at(*code);
                    }
                }
            }
            groups @ Groups::Listed { .. } => {
                for (column, (value, code)) in values.iter_mut().zip(&codes).enumerate() {
                    *value = self.decoder(first + groups.of(column)).at(*code);
                }
            }
        }
    }

    /// The decoder of a group; groups are numbered across all rows.
    #[inline]
    fn decoder(&self, group: usize) -> AffineDecode {
        let bias = match &self.offsets {
            Offsets::Biases(biases) => biases[group],
            Offsets::Zeros(_) | Offsets::Zero(_) => 0.0,
        };
        AffineDecode { scale: self.scales[group], zero: f32::from(self.zero(group)), bias }
    }

    fn zero(&self, group: usize) -> i16 {
        match &self.offsets {
            Offsets::Biases(_) => 0,
            Offsets::Zeros(zeros) => zeros[group],
            Offsets::Zero(zero) => *zero,
        }
    }

    /// The smallest format that can represent all possible values of the codes.
    fn block_encoding(&self) -> Option<BlockEncoding> {
        let bits = self.codes.bits();
        let (lowest, highest) = match &self.offsets {
            Offsets::Biases(_) if bits <= 4 => return Some(BlockEncoding { format: BlockFormat::Q4_1, center: 0 }),
            Offsets::Biases(_) if bits == 5 => return Some(BlockEncoding { format: BlockFormat::Q5_1, center: 0 }),
            Offsets::Biases(_) => return None,
            Offsets::Zero(zero) => (*zero, *zero),
            Offsets::Zeros(zeros) => (zeros.iter().copied().min()?, zeros.iter().copied().max()?),
        };
        let (least, most) = (-highest, (1 << bits) - 1 - lowest);
        let formats = [(BlockFormat::Q4_0, 8), (BlockFormat::Q5_0, 16), (BlockFormat::Q8_0, 128)];
        let fits = |&(_, center): &(BlockFormat, i16)| least >= -center && most < center;
        formats.into_iter().find(fits).map(|(format, center)| BlockEncoding { format, center })
    }

    /// Blocks with exactly these values, if there is a format for them and f16 can represent the scales.
    pub(super) fn blocks(&self, [rows, columns]: [usize; 2]) -> Option<(BlockFormat, Vec<u8>)> {
        let Groups::Adjacent { len, count } = &self.groups else { return None };
        let BlockEncoding { format, center } = self.block_encoding()?;
        if !len.is_multiple_of(BLOCK) || columns == 0 {
            return None;
        }
        let row_bytes = format.row_bytes(columns)?;
        let block_bytes = row_bytes / (columns / BLOCK);
        let mut blocks = vec![0; rows * row_bytes];
        let is_exact = blocks
            .par_chunks_mut(row_bytes)
            .enumerate()
            .map_init(
                || vec![0; columns],
                |codes, (row, blocks)| {
                    self.codes.row(row, codes);
                    let columns = blocks.chunks_exact_mut(block_bytes).zip(codes.as_chunks_mut::<BLOCK>().0);
                    let write = |(number, (block, codes)): (usize, _)| {
                        self.write(block, codes, row * count + number * BLOCK / len, center)
                    };
                    columns.enumerate().map(write).collect::<Option<()>>().is_some()
                },
            )
            .reduce(|| true, |left, right| left && right);
        is_exact.then_some((format, blocks))
    }

    /// Writes codes of a group (numbered across all rows) as a block; `None` if f16 cannot represent its scale.
    fn write(&self, block: &mut [u8], codes: &mut [u8; BLOCK], group: usize, center: i16) -> Option<()> {
        let zero = self.zero(group);
        // the scale of a zero block has no effect: MLX writes 1e-7 for rows of zeros
        let is_zero = codes.iter().all(|&code| i16::from(code) == zero);
        let scale = to_f16(if is_zero { 0.0 } else { self.scales[group] })?;
        let minimum = match &self.offsets {
            Offsets::Biases(biases) => Some(to_f16(biases[group])?),
            Offsets::Zeros(_) | Offsets::Zero(_) => None,
        };
        // the sum fits, because the format was chosen for all possible codes and zero points
        let shift = (center - zero) as u8;
        for code in codes.iter_mut() {
            *code = code.wrapping_add(shift);
        }
        write_block(block, scale, minimum, codes);
        Some(())
    }
}

/// The same value in f16; `None` if f16 cannot represent it.
fn to_f16(value: f32) -> Option<f16> {
    let half = f16::from_f32(value);
    (half.to_f32().to_bits() == value.to_bits()).then_some(half)
}

/// Writes a block of `q4_0`, `q4_1`, `q5_0` or `q5_1` (scale, minimum, the fifth bits, and the lower four bits of the
/// first 16 codes beside those of the others), or of `q8_0` (codes minus 128).
fn write_block(block: &mut [u8], scale: f16, minimum: Option<f16>, codes: &[u8; BLOCK]) {
    let (scales, rest) = block.split_at_mut(if minimum.is_some() { 4 } else { 2 });
    scales[..2].copy_from_slice(&scale.to_le_bytes());
    if let Some(minimum) = minimum {
        scales[2..].copy_from_slice(&minimum.to_le_bytes());
    }
    if rest.len() == BLOCK {
        for (to, code) in rest.iter_mut().zip(codes) {
            *to = code ^ 0x80;
        }
        return;
    }
    let (fifths, nibbles) = rest.split_at_mut(rest.len() - BLOCK / 2);
    for (index, nibble) in nibbles.iter_mut().enumerate() {
        *nibble = codes[index] & 15 | codes[index + BLOCK / 2] << 4;
    }
    if !fifths.is_empty() {
        let bits = codes.iter().enumerate().map(|(index, code)| u32::from(code >> 4 & 1) << index);
        fifths.copy_from_slice(&bits.sum::<u32>().to_le_bytes());
    }
}
