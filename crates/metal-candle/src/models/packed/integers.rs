//! Matrices of whole numbers of a few bits with scales: how they are decoded, and the block formats that hold the same values.

use super::codes::Codes;
use candle_core::DType;
use half::f16;
use metal_candle_kernels::BlockFormat;
use rayon::prelude::*;

/// The number of weights of the blocks that are made.
const BLOCK: usize = 32;

/// A matrix of whole numbers, each group of columns of a row with a scale.
pub(super) struct Integers<'a> {
    pub(super) codes: Codes<'a>,
    /// `[rows, groups]`.
    pub(super) scales: Vec<f32>,
    pub(super) offsets: Offsets,
    pub(super) groups: Groups,
    /// The dtype of the matrix where it is dense.
    pub(super) dtype: DType,
}

/// What makes a weight of a whole number and its scale.
pub(super) enum Offsets {
    /// `scale * code + bias`, with biases `[rows, groups]`.
    Biases(Vec<f32>),
    /// `scale * (code - zero)`, with zeros `[rows, groups]`.
    Zeros(Vec<i16>),
    /// `scale * (code - zero)` with one zero.
    Zero(i16),
}

/// The group of each column.
pub(super) enum Groups {
    /// Groups of as many adjacent columns.
    Adjacent { len: usize, count: usize },
    /// Any, each below `count`.
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

/// Makes values of codes: zeros are 0 beside biases, and biases beside zeros.
#[derive(Clone, Copy)]
struct Line {
    scale: f32,
    zero: f32,
    bias: f32,
}

impl Line {
    #[inline]
    fn at(self, code: u8) -> f32 {
        self.scale * (f32::from(code) - self.zero) + self.bias
    }
}

/// Block formats and how they hold `scale * (code - zero)`.
struct Home {
    format: BlockFormat,
    /// What is added to `code - zero` in the block.
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
                    let line = self.line(group);
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = line.at(*code);
                    }
                }
            }
            groups @ Groups::Listed { .. } => {
                for (column, (value, code)) in values.iter_mut().zip(&codes).enumerate() {
                    *value = self.line(first + groups.of(column)).at(*code);
                }
            }
        }
    }

    /// What makes values of the codes of a group, counted over all rows.
    #[inline]
    fn line(&self, group: usize) -> Line {
        let bias = match &self.offsets {
            Offsets::Biases(biases) => biases[group],
            Offsets::Zeros(_) | Offsets::Zero(_) => 0.0,
        };
        Line { scale: self.scales[group], zero: f32::from(self.zero(group)), bias }
    }

    fn zero(&self, group: usize) -> i16 {
        match &self.offsets {
            Offsets::Biases(_) => 0,
            Offsets::Zeros(zeros) => zeros[group],
            Offsets::Zero(zero) => *zero,
        }
    }

    /// The smallest format that holds all values that the codes could be.
    fn home(&self) -> Option<Home> {
        let bits = self.codes.bits();
        let (lowest, highest) = match &self.offsets {
            Offsets::Biases(_) if bits <= 4 => return Some(Home { format: BlockFormat::Q4_1, center: 0 }),
            Offsets::Biases(_) if bits == 5 => return Some(Home { format: BlockFormat::Q5_1, center: 0 }),
            Offsets::Biases(_) => return None,
            Offsets::Zero(zero) => (*zero, *zero),
            Offsets::Zeros(zeros) => (zeros.iter().copied().min()?, zeros.iter().copied().max()?),
        };
        let (least, most) = (-highest, (1 << bits) - 1 - lowest);
        let formats = [(BlockFormat::Q4_0, 8), (BlockFormat::Q5_0, 16), (BlockFormat::Q8_0, 128)];
        let fits = |&(_, center): &(BlockFormat, i16)| least >= -center && most < center;
        formats.into_iter().find(fits).map(|(format, center)| Home { format, center })
    }

    /// Blocks with exactly these values, if there is a format for them and f16 holds the scales.
    pub(super) fn blocks(&self, [rows, columns]: [usize; 2]) -> Option<(BlockFormat, Vec<u8>)> {
        let Groups::Adjacent { len, count } = &self.groups else { return None };
        let Home { format, center } = self.home()?;
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

    /// Writes codes of a group, counted over all rows, as a block; none if f16 does not hold its scale.
    fn write(&self, block: &mut [u8], codes: &mut [u8; BLOCK], group: usize, center: i16) -> Option<()> {
        let zero = self.zero(group);
        // the scale of zeros does not matter: MLX writes 1e-7 for rows of zeros
        let is_zero = codes.iter().all(|&code| i16::from(code) == zero);
        let scale = to_f16(if is_zero { 0.0 } else { self.scales[group] })?;
        let minimum = match &self.offsets {
            Offsets::Biases(biases) => Some(to_f16(biases[group])?),
            Offsets::Zeros(_) | Offsets::Zero(_) => None,
        };
        // the sum fits: the format was chosen by the codes and zeros that there can be
        let shift = (center - zero) as u8;
        for code in codes.iter_mut() {
            *code = code.wrapping_add(shift);
        }
        write_block(block, scale, minimum, codes);
        Some(())
    }
}

/// The same value as f16, if there is one.
fn to_f16(value: f32) -> Option<f16> {
    let half = f16::from_f32(value);
    (half.to_f32().to_bits() == value.to_bits()).then_some(half)
}

/// Writes a block of `q4_0`, `q4_1`, `q5_0` or `q5_1`: scale, minimum, the fifth bits, and the lower four bits of the first 16 codes
/// beside those of the others; or one of `q8_0`, of codes less 128.
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
    for (place, nibble) in nibbles.iter_mut().enumerate() {
        *nibble = codes[place] & 15 | codes[place + BLOCK / 2] << 4;
    }
    if !fifths.is_empty() {
        let bits = codes.iter().enumerate().map(|(place, code)| u32::from(code >> 4 & 1) << place);
        fifths.copy_from_slice(&bits.sum::<u32>().to_le_bytes());
    }
}
