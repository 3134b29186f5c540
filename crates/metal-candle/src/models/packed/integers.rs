//! Matrices of whole numbers of a few bits with scales: how they are decoded, and the block formats that hold the same values.

use candle_core::DType;
use half::f16;
use metal_candle_kernels::BlockFormat;
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// The number of weights of the blocks that are made.
const BLOCK: usize = 32;

/// A matrix of whole numbers, each group of columns of a row with a scale.
pub(super) struct Integers<'a> {
    pub(super) codes: Codes<'a>,
    /// `[rows, groups]`.
    pub(super) scales: Vec<f32>,
    pub(super) offsets: Offsets,
    pub(super) groups: Groups,
    /// The dtype of the scales.
    pub(super) dtype: DType,
}

/// What makes a weight of a whole number and its scale.
pub(super) enum Offsets {
    /// `scale * code + bias`, with biases `[rows, groups]`.
    Biases(Vec<f32>),
}

/// The group of each column.
pub(super) enum Groups {
    /// Groups of as many adjacent columns.
    Adjacent { len: usize, count: usize },
}

/// Where the whole numbers are.
pub(super) struct Codes<'a> {
    /// Words of 32 bits, little-endian.
    pub(super) bytes: &'a [u8],
    pub(super) bits: u32,
    pub(super) order: Order,
}

/// The order of whole numbers in words.
#[derive(Clone, Copy)]
pub(super) enum Order {
    /// A row is a stream of bits, lowest first, in this number of bytes.
    Rows { row_bytes: usize },
}

impl Codes<'_> {
    /// Writes the codes of a row.
    fn row(&self, row: usize, codes: &mut [u8]) {
        match self.order {
            Order::Rows { row_bytes } => {
                let bytes = &self.bytes[row * row_bytes..(row + 1) * row_bytes];
                match self.bits {
                    2 => split::<4>(bytes, codes),
                    4 => split::<2>(bytes, codes),
                    8 => codes.copy_from_slice(bytes),
                    bits => stream(bytes, bits, codes),
                }
            }
        }
    }
}

/// Splits each byte into `N` codes, lowest bits first.
fn split<const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    let bits = 8 / N;
    for (byte, codes) in bytes.iter().zip(codes.as_chunks_mut::<N>().0) {
        for (number, code) in codes.iter_mut().enumerate() {
            *code = (byte >> (bits * number)) & (u8::MAX >> (8 - bits));
        }
    }
}

/// Reads codes of `bits` bits from a stream of them; `bytes` are a whole number of words.
fn stream(bytes: &[u8], bits: u32, codes: &mut [u8]) {
    let mask = (1_u64 << bits) - 1;
    let mut words = bytes.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_le_bytes(*word)));
    let (mut buffer, mut len) = (0_u64, 0);
    for code in codes {
        if len < bits {
            buffer |= words.next().unwrap_or(0) << len;
            len += 32;
        }
        *code = (buffer & mask) as u8;
        buffer >>= bits;
        len -= bits;
    }
}

impl Integers<'_> {
    /// Writes the values of a row.
    pub(super) fn row(&self, row: usize, values: &mut [f32]) {
        let mut codes = vec![0; values.len()];
        self.codes.row(row, &mut codes);
        match (&self.groups, &self.offsets) {
            (Groups::Adjacent { len, count }, Offsets::Biases(biases)) => {
                let of_row = row * count..(row + 1) * count;
                let groups = self.scales[of_row.clone()].iter().zip(&biases[of_row]);
                let columns = values.chunks_mut(*len).zip(codes.chunks(*len));
                for ((values, codes), (scale, bias)) in columns.zip(groups) {
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = scale * f32::from(*code) + bias;
                    }
                }
            }
        }
    }

    /// Blocks with exactly these values, if there is a format for them and f16 holds the scales.
    pub(super) fn blocks(&self, [rows, columns]: [usize; 2]) -> Option<(BlockFormat, Vec<u8>)> {
        let (Groups::Adjacent { len, count }, Offsets::Biases(biases)) = (&self.groups, &self.offsets);
        let format = match self.codes.bits {
            2..=4 => BlockFormat::Q4_1,
            5 => BlockFormat::Q5_1,
            _ => return None,
        };
        if !len.is_multiple_of(BLOCK) || columns == 0 {
            return None;
        }
        let row_bytes = format.row_bytes(columns)?;
        let block_bytes = row_bytes / (columns / BLOCK);
        let mut blocks = vec![0; rows * row_bytes];
        let is_exact = AtomicBool::new(true);
        blocks.par_chunks_mut(row_bytes).enumerate().for_each_init(
            || vec![0; columns],
            |codes, (row, blocks)| {
                self.codes.row(row, codes);
                let columns = blocks.chunks_exact_mut(block_bytes).zip(codes.as_chunks::<BLOCK>().0);
                for (number, (block, codes)) in columns.enumerate() {
                    let group = row * count + number * BLOCK / len;
                    // the scale of zeros does not matter: MLX writes 1e-7 for rows of zeros
                    let scale = if codes.iter().all(|&code| code == 0) { 0.0 } else { self.scales[group] };
                    match (to_f16(scale), to_f16(biases[group])) {
                        (Some(scale), Some(bias)) => write_block(block, scale, Some(bias), codes),
                        _ => is_exact.store(false, Ordering::Relaxed),
                    }
                }
            },
        );
        is_exact.into_inner().then_some((format, blocks))
    }
}

/// The same value as f16, if there is one.
fn to_f16(value: f32) -> Option<f16> {
    let half = f16::from_f32(value);
    (half.to_f32().to_bits() == value.to_bits()).then_some(half)
}

/// Writes a block of `q4_0`, `q4_1`, `q5_0` or `q5_1`: scale, minimum, the fifth bits, and the lower four bits of the first 16 codes beside
/// those of the others.
fn write_block(block: &mut [u8], scale: f16, minimum: Option<f16>, codes: &[u8; BLOCK]) {
    let (head, nibbles) = block.split_at_mut(block.len() - BLOCK / 2);
    let (scales, fifths) = head.split_at_mut(if minimum.is_some() { 4 } else { 2 });
    scales[..2].copy_from_slice(&scale.to_le_bytes());
    if let Some(minimum) = minimum {
        scales[2..].copy_from_slice(&minimum.to_le_bytes());
    }
    for (place, nibble) in nibbles.iter_mut().enumerate() {
        *nibble = codes[place] & 15 | codes[place + BLOCK / 2] << 4;
    }
    if !fifths.is_empty() {
        let bits = codes.iter().enumerate().map(|(place, code)| u32::from(code >> 4 & 1) << place);
        fifths.copy_from_slice(&bits.sum::<u32>().to_le_bytes());
    }
}
