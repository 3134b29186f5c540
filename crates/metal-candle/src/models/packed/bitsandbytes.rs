//! Reads quantized matrices of bitsandbytes: nf4 and fp4, with and without double quantization, and int8.

use super::matrix::{PackedMatrix, Values};
use super::module::{Checked, Module, Part};
use crate::error::Result;
use candle_core::DType;
use serde::Deserialize;

/// The JSON that bitsandbytes stores with a 4-bit matrix.
#[derive(Debug, Clone, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The matrix `[rows, columns]` of a module; `None` if it is not quantized.
pub(super) fn find<'a>(
    module: &Module<'a>,
    shape: [usize; 2],
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    if module.find("SCB").is_some() {
        return int8(module, shape, dense_dtype).map(Some);
    }
    let state = ["nf4", "fp4"]
        .into_iter()
        .find_map(|kind| Some((kind, module.find(&format!("weight.quant_state.bitsandbytes__{kind}"))?)));
    match state {
        Some((kind, state)) => four_bits(module, shape, kind, state).map(Some),
        None if module.find("weight").is_some_and(|weight| matches!(weight.dtype(), "U8" | "I8")) => {
            let (path, expected) = (&module.path, "weight.quant_state.bitsandbytes__nf4` or `SCB");
            Err(format!("`{path}.weight`: expected `{expected}` beside quantized weights, found no such tensor"))
        }
        None => Ok(None),
    }
}

/// Signed bytes, and for each row the magnitude that 127 stands for.
fn int8<'a>(module: &Module<'a>, [rows, columns]: [usize; 2], dtype: DType) -> Checked<PackedMatrix<'a>> {
    let weight = module.require_shape("weight", &["I8"], &[rows, columns])?;
    let largest = module.require_shape("SCB", &["F32"], &[rows])?;
    let format = module.find("weight_format");
    if let Some(format) = format.filter(|format| format.bytes() != [0]) {
        return Err(format!("`{}`: expected 0 (rows), found {:?}", format.name(), format.bytes()));
    }
    let read = move || {
        let (bytes, largest) = (weight.bytes(), largest.floats()?);
        let row = move |row: usize, values: &mut [f32]| {
            for (value, byte) in values.iter_mut().zip(&bytes[row * columns..]) {
                *value = f32::from(byte.cast_signed()) * largest[row] * (1.0 / 127.0);
            }
        };
        Ok(Values::Rows(Box::new(row), dtype))
    };
    let mut parts = vec![weight, largest];
    parts.extend(format);
    Ok(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) })
}

/// 4-bit indices into a table, with a scale for each block of the flattened matrix.
fn four_bits<'a>(
    module: &Module<'a>,
    [rows, columns]: [usize; 2],
    kind: &str,
    state_part: Part<'a>,
) -> Checked<PackedMatrix<'a>> {
    let wrong = |what: &str| format!("`{}`: {what}", state_part.name());
    let state: State = serde_json::from_slice(state_part.bytes()).map_err(|e| wrong(&format!("expected JSON: {e}")))?;
    if state.quant_type != kind {
        return Err(wrong(&format!("expected `quant_type` {kind}, found `{}`", state.quant_type)));
    }
    if state.shape != [rows, columns] {
        return Err(wrong(&format!("expected the shape {:?}, found {:?}", [rows, columns], state.shape)));
    }
    if state.blocksize == 0 {
        return Err(wrong("expected a `blocksize` above 0, found 0"));
    }
    let dtype = match state.dtype.as_str() {
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        other => return Err(wrong(&format!("expected `dtype` float32, float16 or bfloat16, found `{other}`"))),
    };
    // the bytes may be stored as floats, so that FSDP can shard them
    let weight = module.require("weight", &["U8", "I8", "F16", "BF16", "F32"])?;
    let (elements, blocks) = (rows * columns, (rows * columns).div_ceil(state.blocksize));
    if weight.num_bytes() != elements.div_ceil(2) {
        let (expected, found) = (elements.div_ceil(2), weight.num_bytes());
        return Err(format!("`{}`: expected {expected} bytes for {elements} weights, found {found}", weight.name()));
    }
    let table = module.require_shape("weight.quant_map", &["F32"], &[16])?;
    let scales = module.require_shape("weight.absmax", &["F32", "U8"], &[blocks])?;
    let mut parts = vec![weight, scales, table, state_part];
    let nested = if scales.dtype() == "U8" {
        let size = state.nested_blocksize.filter(|size| *size > 0);
        let size = size.ok_or_else(|| wrong("expected a `nested_blocksize` above 0, found none"))?;
        let offset = state.nested_offset.ok_or_else(|| wrong("expected a `nested_offset`, found none"))?;
        let table = module.require_shape("weight.nested_quant_map", &["F32"], &[256])?;
        let largest = module.require_shape("weight.nested_absmax", &["F32"], &[blocks.div_ceil(size)])?;
        parts.extend([table, largest]);
        Some(Nested { size, offset, table, largest })
    } else {
        None
    };
    let read = move || {
        let (bytes, table) = (weight.bytes(), table.floats()?);
        let scales = match &nested {
            Some(nested) => nested.scales(scales)?,
            None => scales.floats()?,
        };
        let row = move |row: usize, values: &mut [f32]| {
            for (index, value) in (row * columns..).zip(values) {
                // the upper half of a byte comes first
                let code = bytes[index / 2] >> (4 * (1 - index % 2)) & 15;
                *value = table[usize::from(code)] * scales[index / state.blocksize];
            }
        };
        Ok(Values::Rows(Box::new(row), dtype))
    };
    Ok(PackedMatrix { shape: [rows, columns], parts, read: Box::new(read) })
}

/// The tensors of double quantization: scales that are quantized themselves.
struct Nested<'a> {
    size: usize,
    offset: f32,
    table: Part<'a>,
    largest: Part<'a>,
}

impl Nested<'_> {
    fn scales(&self, codes: Part) -> Result<Vec<f32>> {
        let (table, largest) = (self.table.floats()?, self.largest.floats()?);
        let scale = |(block, code): (usize, &u8)| table[usize::from(*code)] * largest[block / self.size] + self.offset;
        Ok(codes.bytes().iter().enumerate().map(scale).collect())
    }
}
