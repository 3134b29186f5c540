//! Reads quantized matrices of compressed-tensors: packed integers, bytes and 8-bit floats.

use super::codes::Codes;
use super::float8;
use super::gptq::{listed_groups, transposed_codes};
use super::integers::{Groups, Integers, Offsets};
use super::matrix::{PackedMatrix, Values};
use super::module::{Checked, FLOATS, Module, whole_ratio};
use super::quantization::CompressedSettings;
use candle_core::DType;

/// The number of bits in a word.
const WORD: usize = 32;

/// The matrix `[rows, columns]` of a module; `None` if it is not quantized.
pub(super) fn find<'a>(
    module: &Module<'a>,
    shape: [usize; 2],
    settings: &CompressedSettings,
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    if module.find("weight_packed").is_some() {
        return packed(module, shape, settings, dense_dtype).map(Some);
    }
    if module.find("weight").is_some_and(|weight| weight.dtype() == "I8") {
        return signed_bytes(module, shape, dense_dtype).map(Some);
    }
    float8::find(module, shape, "weight_scale", settings.block, dense_dtype)
}

/// Codes of 2, 4 or 8 bits in words along a row.
fn packed<'a>(
    module: &Module<'a>,
    [rows, columns]: [usize; 2],
    settings: &CompressedSettings,
    dense_dtype: DType,
) -> Checked<PackedMatrix<'a>> {
    let path = &module.path;
    let (weight, [_, words]) = module.require_matrix("weight_packed", &["I32"])?;
    let fits = |&bits: &usize| columns.checked_mul(bits).is_some_and(|bits| bits.div_ceil(WORD) == words);
    let Some(bits) = [4, 8, 2].into_iter().find(fits).filter(|_| weight.shape() == [rows, words]) else {
        return Err(format!(
            "`{path}.weight_packed`: {:?} does not make {rows} rows of {columns} weights of 2, 4 or 8 bits",
            weight.shape()
        ));
    };
    if !settings.bits.is_empty() && !settings.bits.contains(&(bits as u64)) {
        let expected = &settings.bits;
        return Err(format!("`{path}.weight_packed`: expected {expected:?} bits per weight, found {bits}"));
    }
    let (scales, [_, groups]) = module.require_matrix("weight_scale", FLOATS)?;
    module.require_shape("weight_scale", FLOATS, &[rows, groups])?;
    let Some(group) = whole_ratio(columns, groups) else {
        return Err(format!("`{path}.weight_scale`: {groups} groups do not divide {columns} columns"));
    };
    let zero_words = (rows * bits).div_ceil(WORD);
    let zeros = module.find("weight_zero_point");
    let zeros =
        zeros.map(|_| module.require_shape("weight_zero_point", &["I32"], &[zero_words, groups])).transpose()?;
    let listed = module.find("weight_g_idx");
    let listed = listed.map(|_| module.require_shape("weight_g_idx", &["I32"], &[columns])).transpose()?;
    let read = move || {
        Ok(Values::Integers(Integers {
            codes: Codes::in_rows(weight.bytes(), bits as u32, words * 4),
            scales: scales.floats()?,
            offsets: match zeros {
                Some(zeros) => {
                    let codes = Codes::in_columns(zeros.bytes(), bits as u32, groups);
                    Offsets::Zeros(transposed_codes(&codes, [groups, rows], i16::from))
                }
                None => Offsets::Zero(1 << (bits - 1)),
            },
            groups: match listed {
                Some(part) => listed_groups(part, groups)?,
                None => Groups::Adjacent { len: group, count: groups },
            },
            dtype: scales.half_dtype().unwrap_or(dense_dtype),
        }))
    };
    let mut parts = vec![weight, scales];
    parts.extend([zeros, listed, module.find("weight_shape")].into_iter().flatten());
    parts.extend(module.of_activations());
    Ok(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) })
}

/// Signed bytes, with a scale for the matrix or for each row.
fn signed_bytes<'a>(module: &Module<'a>, [rows, columns]: [usize; 2], dense_dtype: DType) -> Checked<PackedMatrix<'a>> {
    let weight = module.require_shape("weight", &["I8"], &[rows, columns])?;
    let scales = module.require("weight_scale", FLOATS)?;
    let is_one = scales.shape().iter().all(|&size| size == 1);
    if !is_one && !matches!(scales.shape(), [found] | [found, 1] if *found == rows) {
        let found = scales.shape();
        return Err(format!("`{}`: expected one scale, or {rows}, found {found:?}", scales.name()));
    }
    if let Some(zeros) = module.find("weight_zero_point") {
        return Err(format!("`{}`: zero points of bytes are not supported", zeros.name()));
    }
    let read = move || {
        let scales_read = scales.floats()?;
        Ok(Values::Integers(Integers {
            codes: Codes::signed(weight.bytes(), columns),
            scales: if is_one { vec![scales_read[0]; rows] } else { scales_read },
            offsets: Offsets::Zero(128),
            groups: Groups::Adjacent { len: columns, count: 1 },
            dtype: scales.half_dtype().unwrap_or(dense_dtype),
        }))
    };
    let mut parts = vec![weight, scales];
    parts.extend(module.of_activations());
    Ok(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) })
}
