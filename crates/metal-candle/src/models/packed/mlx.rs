//! Reads quantized matrices of MLX: affine, mxfp4, mxfp8 and nvfp4.

use super::codes::Codes;
use super::integers::{Groups, Integers, Offsets};
use super::matrix::{PackedMatrix, Values};
use super::module::{Checked, FLOATS, Module, Part, whole_ratio};
use super::quantization::MlxSettings;
use super::small_floats::{e2m1, e4m3, e8m0};
use candle_core::DType;
use metal_candle_kernels::BlockFormat;

/// The number of bits in a word.
const WORD: usize = 32;

/// The matrix of a module with `columns` columns; `None` if it is not quantized.
///
/// As in mlx-lm, bits and group size are derived from the shapes: the configuration has one setting for all modules,
/// and some modules differ.
pub(super) fn find<'a>(
    module: &Module<'a>,
    settings: &MlxSettings,
    columns: usize,
) -> Checked<Option<PackedMatrix<'a>>> {
    let path = &module.path;
    let is_packed = module.find("weight").is_some_and(|weight| weight.float_dtype().is_none());
    if module.find("scales").is_none() && !is_packed {
        return Ok(None);
    }
    let (weight, [rows, words]) = module.require_matrix("weight", &["U32"])?;
    let (scales, [_, groups]) = module.require_matrix("scales", &["F32", "F16", "BF16", "U8"])?;
    let word_bits = words.checked_mul(WORD).unwrap_or(0);
    let (Some(bits), Some(group)) = (whole_ratio(word_bits, columns), whole_ratio(columns, groups)) else {
        let (weight, scales) = (weight.shape(), scales.shape());
        return Err(format!("`{path}.weight`: {weight:?} and scales {scales:?} do not make {columns} columns"));
    };
    module.require_shape("scales", &["F32", "F16", "BF16", "U8"], &[rows, groups])?;
    settings.check(path, bits, group)?;
    let shape = [rows, columns];
    let Some(dtype) = scales.float_dtype() else {
        return small_floats(module, shape, (bits, group), [weight, scales]).map(Some);
    };
    if !matches!(bits, 2..=6 | 8) {
        return Err(format!("`{path}.weight`: expected 2, 3, 4, 5, 6 or 8 bits per weight, found {bits}"));
    }
    let biases = module.require_shape("biases", FLOATS, &[rows, groups])?;
    let read = move || {
        let codes = Codes::in_rows(weight.bytes(), bits as u32, words * 4);
        let groups = Groups::Adjacent { len: group, count: groups };
        let offsets = Offsets::Biases(biases.floats()?);
        Ok(Values::Integers(Integers { codes, scales: scales.floats()?, offsets, groups, dtype }))
    };
    Ok(Some(PackedMatrix { shape, parts: vec![weight, scales, biases], read: Box::new(read) }))
}

/// A matrix of 4-bit or 8-bit floats with 8-bit scales.
fn small_floats<'a>(
    module: &Module<'a>,
    shape: [usize; 2],
    (bits, group): (usize, usize),
    [weight, scales]: [Part<'a>; 2],
) -> Checked<PackedMatrix<'a>> {
    let read = move || {
        let (bytes, part, scales) = (weight.bytes(), scales, scales.bytes());
        if group == 32 && scales.contains(&u8::MAX) {
            return Err(part.error("expected powers of two, found 255, which is not a number"));
        }
        let (row_bytes, groups) = (shape[1] * bits / 8, shape[1] / group);
        let of_row = move |row: usize| {
            let bytes = &bytes[row * row_bytes..(row + 1) * row_bytes];
            bytes.chunks_exact(group * bits / 8).zip(&scales[row * groups..(row + 1) * groups])
        };
        Ok(match (bits, group) {
            (4, 32) => Values::Blocks(BlockFormat::MXFP4, mxfp4_blocks(bytes, scales)),
            (4, _) => {
                let row = move |row: usize, values: &mut [f32]| {
                    for (values, (bytes, scale)) in values.chunks_exact_mut(group).zip(of_row(row)) {
                        let scale = e4m3(*scale);
                        for (values, byte) in values.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                            *values = [e2m1(*byte) * scale, e2m1(byte >> 4) * scale];
                        }
                    }
                };
                Values::Rows(Box::new(row), DType::BF16)
            }
            _ => {
                let row = move |row: usize, values: &mut [f32]| {
                    for (values, (bytes, scale)) in values.chunks_exact_mut(group).zip(of_row(row)) {
                        let scale = e8m0(*scale);
                        for (value, byte) in values.iter_mut().zip(bytes) {
                            *value = e4m3(*byte) * scale;
                        }
                    }
                };
                Values::Rows(Box::new(row), DType::BF16)
            }
        })
    };
    match (bits, group) {
        (4, 32 | 16) | (8, 32) => Ok(PackedMatrix { shape, parts: vec![weight, scales], read: Box::new(read) }),
        _ => Err(format!(
            "`{}.weight`: expected mxfp4 (4 bits in groups of 32), nvfp4 (4 in 16) or mxfp8 (8 in 32), found {bits} bits in groups of \
             {group}",
            module.path
        )),
    }
}

/// GGUF blocks: the scale, and the first 16 codes beside the other 16.
fn mxfp4_blocks(bytes: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut blocks = Vec::with_capacity(bytes.len() + scales.len());
    for (codes, scale) in bytes.as_chunks::<16>().0.iter().zip(scales) {
        let code = |number: usize| codes[number / 2] >> (4 * (number % 2)) & 15;
        blocks.push(*scale);
        blocks.extend((0..16).map(|number| code(number) | code(number + 16) << 4));
    }
    blocks
}
