//! Reads quantized matrices of GPTQ and AWQ, which are stored transposed: a row of weights is a column of words.

use super::codes::Codes;
use super::integers::{Groups, Integers, Offsets};
use super::matrix::{PackedMatrix, Values};
use super::module::{Checked, FLOATS, Module, Part, whole_ratio};
use super::quantization::GptqSettings;
use crate::error::Result;
use candle_core::DType;

/// The number of bits in a word.
const WORD: usize = 32;

/// The matrix `[rows, columns]` of a GPTQ module; `None` if it is not quantized.
pub(super) fn find<'a>(
    module: &Module<'a>,
    [rows, columns]: [usize; 2],
    settings: &GptqSettings,
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    if module.find("qweight").is_none() {
        return Ok(None);
    }
    let path = &module.path;
    let (weight, [words, out]) = module.require_matrix("qweight", &["I32"])?;
    let bits = words.checked_mul(WORD).and_then(|bits| whole_ratio(bits, columns)).filter(|_| out == rows);
    let Some(bits) = bits else {
        return Err(format!("`{path}.qweight`: {:?} does not make {rows} rows of {columns}", weight.shape()));
    };
    if !matches!(bits, 2 | 3 | 4 | 8) || !(settings.is_mixed || bits == settings.bits) {
        let expected = if settings.is_mixed { "2, 3, 4 or 8".to_owned() } else { settings.bits.to_string() };
        return Err(format!("`{path}.qweight`: expected {expected} bits per weight, found {bits}"));
    }
    let zeros_are_less_one = settings.zeros_are_less_one;
    let (scales, [groups, _]) = module.require_matrix("scales", FLOATS)?;
    module.require_shape("scales", FLOATS, &[groups, rows])?;
    let zeros_row = (rows * bits).div_ceil(WORD);
    let zeros = module.require_shape("qzeros", &["I32"], &[groups, zeros_row])?;
    let listed = match module.find("g_idx") {
        Some(_) => Some(module.require_shape("g_idx", &["I32"], &[columns])?),
        None => None,
    };
    // with a list the last group may be shorter; otherwise all groups have the same size
    let group = if listed.is_some() { Some(0) } else { whole_ratio(columns, groups) };
    let Some(group) = group.filter(|_| groups > 0) else {
        return Err(format!("`{path}.scales`: {groups} groups do not divide {columns} columns"));
    };
    let read = move || {
        let groups_of_columns = match listed {
            Some(part) => listed_groups(part, groups)?,
            None => Groups::Adjacent { len: group, count: groups },
        };
        let zero_codes = Codes::in_rows(zeros.bytes(), bits as u32, zeros_row * 4);
        let mask = (1 << bits) - 1;
        // a zero point of 0 wraps around
        let zero = |code: u8| if zeros_are_less_one { (i16::from(code) + 1) & mask } else { i16::from(code) };
        Ok(Values::Integers(Integers {
            codes: Codes::in_columns(weight.bytes(), bits as u32, rows),
            scales: transposed(&scales.floats()?, rows),
            offsets: Offsets::Zeros(transposed_codes(&zero_codes, [groups, rows], zero)),
            groups: groups_of_columns,
            dtype: scales.half_dtype().unwrap_or(dense_dtype),
        }))
    };
    let mut parts = vec![weight, scales, zeros];
    parts.extend(listed);
    Ok(Some(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) }))
}

/// The matrix `[rows, columns]` of an AWQ module; `None` if it is not quantized.
pub(super) fn find_awq<'a>(
    module: &Module<'a>,
    [rows, columns]: [usize; 2],
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    if module.find("qweight").is_none() {
        return Ok(None);
    }
    let path = &module.path;
    if !rows.is_multiple_of(8) {
        return Err(format!("`{path}.qweight`: expected a multiple of 8 rows, found {rows}"));
    }
    let weight = module.require_shape("qweight", &["I32"], &[columns, rows / 8])?;
    let (scales, [groups, _]) = module.require_matrix("scales", FLOATS)?;
    module.require_shape("scales", FLOATS, &[groups, rows])?;
    let zeros = module.require_shape("qzeros", &["I32"], &[groups, rows / 8])?;
    let Some(group) = whole_ratio(columns, groups) else {
        return Err(format!("`{path}.scales`: {groups} groups do not divide {columns} columns"));
    };
    let read = move || {
        let zero_codes = Codes::of_awq(zeros.bytes(), rows);
        let mut zeros = vec![0; rows * groups];
        let mut codes = vec![0; groups];
        for (row, zeros) in zeros.chunks_exact_mut(groups).enumerate() {
            zero_codes.row(row, &mut codes);
            for (zero, code) in zeros.iter_mut().zip(&codes) {
                *zero = i16::from(*code);
            }
        }
        Ok(Values::Integers(Integers {
            codes: Codes::of_awq(weight.bytes(), rows),
            scales: transposed(&scales.floats()?, rows),
            offsets: Offsets::Zeros(zeros),
            groups: Groups::Adjacent { len: group, count: groups },
            dtype: scales.half_dtype().unwrap_or(dense_dtype),
        }))
    };
    Ok(Some(PackedMatrix { shape: [rows, columns], parts: vec![weight, scales, zeros], read: Box::new(read) }))
}

/// The groups of columns listed in a tensor. Contiguous groups of the same size are detected.
pub(super) fn listed_groups(part: Part, count: usize) -> Result<Groups> {
    let of_columns: Vec<u32> = part.bytes().as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    if let Some(group) = of_columns.iter().find(|&&group| group as usize >= count) {
        return Err(part.error(&format!("expected groups below {count}, found {}", group.cast_signed())));
    }
    let adjacent = whole_ratio(of_columns.len(), count)
        .filter(|len| of_columns.iter().enumerate().all(|(column, &group)| column / len == group as usize));
    Ok(match adjacent {
        Some(len) => Groups::Adjacent { len, count },
        None => Groups::Listed { of_columns, count },
    })
}

/// The values of a matrix with `columns` columns, in column-major order.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// The zero points for the codes `[groups, rows]`, as `[rows, groups]`.
pub(super) fn transposed_codes(codes: &Codes, [groups, rows]: [usize; 2], zero: impl Fn(u8) -> i16) -> Vec<i16> {
    let (mut zeros, mut line) = (vec![0; rows * groups], vec![0; rows]);
    for group in 0..groups {
        codes.row(group, &mut line);
        for (zeros, code) in zeros.chunks_exact_mut(groups).zip(&line) {
            zeros[group] = zero(*code);
        }
    }
    zeros
}
