//! Writes safetensors files.

use super::write::{Access, write_contents};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::Path;

/// The header is padded with spaces to a multiple of this, as in the reference implementation.
const ALIGNMENT: usize = 8;

/// Writes tensors (f32, f16, bf16, f64, u8, u32 or i64) and `__metadata__` strings as one safetensors file.
///
/// The file is replaced atomically: readers see the old file or the new one, even after a crash.
///
/// # Errors
/// The file cannot be written, a name is given twice, or a tensor has a different dtype or a value that is not finite.
pub fn write_safetensors<S: AsRef<str>>(
    path: impl AsRef<Path>,
    tensors: &[(S, Tensor)],
    metadata: &[(&str, &str)],
) -> Result<()> {
    let path = path.as_ref();
    let mut tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_ref(), tensor)).collect();
    // wide dtypes first, so that every tensor starts at a multiple of its width
    tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let header = header(&tensors, metadata)?;
    write_contents(path, Access::Shared, |file| {
        let written = |done: io::Result<()>| done.map_err(|error| Error::write(path, error));
        written(file.write_all(&(header.len() as u64).to_le_bytes()))?;
        written(file.write_all(&header))?;
        for (name, tensor) in &tensors {
            check_finite(name, tensor)?;
            written(write_tensor(file, tensor)?)?;
        }
        Ok(())
    })
}

fn header(tensors: &[(&str, &Tensor)], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        let strings: Map<String, Value> = metadata.iter().map(|(key, text)| ((*key).into(), json!(text))).collect();
        map.insert("__metadata__".into(), Value::Object(strings));
    }
    let mut begin = 0;
    for (name, tensor) in tensors {
        let dtype = dtype_name(tensor.dtype())
            .ok_or_else(|| Error::argument(*name, format!("{} cannot be written", tensor.dtype().as_str())))?;
        let end = begin + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let entry = json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [begin, end]});
        if map.insert((*name).into(), entry).is_some() {
            return Err(Error::argument(*name, "two tensors have this name"));
        }
        begin = end;
    }
    let mut bytes = Value::Object(map).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), b' ');
    Ok(bytes)
}

fn dtype_name(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F64 => "F64",
        DType::U8 => "U8",
        DType::U32 => "U32",
        DType::I64 => "I64",
        _ => return None,
    })
}

/// Returns an error for a tensor with NaN or infinity; these are never written to files.
///
/// # Errors
/// A value is not finite.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.dtype().is_float() || tensor.elem_count() == 0 {
        return Ok(());
    }
    let tensor = to_host(tensor)?.flatten_all()?;
    let index = match tensor.dtype() {
        DType::F16 => tensor.to_vec1::<f16>()?.iter().position(|value| !value.is_finite()),
        DType::BF16 => tensor.to_vec1::<bf16>()?.iter().position(|value| !value.is_finite()),
        DType::F64 => tensor.to_vec1::<f64>()?.iter().position(|value| !value.is_finite()),
        _ => tensor.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().position(|value| !value.is_finite()),
    };
    match index {
        None => Ok(()),
        Some(index) => Err(Error::argument(
            name,
            format!(
                "element {index} is not finite (NaN or infinity), so nothing is written; the values may have overflowed"
            ),
        )),
    }
}

/// Writes the elements of a tensor, little-endian and row by row.
pub(crate) fn write_tensor(file: &mut dyn Write, tensor: &Tensor) -> candle_core::Result<io::Result<()>> {
    let tensor = to_host(tensor)?.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F32 => write_all(file, &tensor.to_vec1::<f32>()?, f32::to_le_bytes),
        DType::F16 => write_all(file, &tensor.to_vec1::<f16>()?, f16::to_le_bytes),
        DType::BF16 => write_all(file, &tensor.to_vec1::<bf16>()?, bf16::to_le_bytes),
        DType::F64 => write_all(file, &tensor.to_vec1::<f64>()?, f64::to_le_bytes),
        DType::U32 => write_all(file, &tensor.to_vec1::<u32>()?, u32::to_le_bytes),
        DType::I64 => write_all(file, &tensor.to_vec1::<i64>()?, i64::to_le_bytes),
        _ => write_all(file, &tensor.to_vec1::<u8>()?, u8::to_le_bytes),
    })
}

/// Copies a tensor to the CPU. candle's `to_device` copies the whole buffer behind a view, so a view of a device buffer (such
/// as an optimizer moment) is first copied to its own buffer on the device.
fn to_host(tensor: &Tensor) -> candle_core::Result<Tensor> {
    if tensor.device().is_cpu() { Ok(tensor.clone()) } else { tensor.force_contiguous()?.to_device(&Device::Cpu) }
}

fn write_all<T: Copy, const WIDTH: usize>(
    file: &mut dyn Write,
    values: &[T],
    to_bytes: impl Fn(T) -> [u8; WIDTH],
) -> io::Result<()> {
    const VALUES_AT_ONCE: usize = 8192;
    let mut bytes = Vec::with_capacity(VALUES_AT_ONCE * WIDTH);
    for values in values.chunks(VALUES_AT_ONCE) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|&value| to_bytes(value)));
        file.write_all(&bytes)?;
    }
    Ok(())
}
