//! Converts weights between float dtypes while they are read.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// The number of elements converted at a time, small enough for the L1 cache.
const CHUNK: usize = 4096;

/// Creates a CPU tensor of dtype `to` from little-endian `bytes` of dtype `from`, without a second copy of the tensor.
///
/// Returns `None` if a finite value is not finite in `to`.
pub(crate) fn from_bytes(bytes: &[u8], from: DType, to: DType, shape: &[usize]) -> Result<Option<Tensor>> {
    if from == to {
        return Ok(Some(Tensor::from_raw_buffer(bytes, to, shape, &Device::Cpu)?));
    }
    match to {
        DType::F32 => make::<f32>(bytes, from, shape),
        DType::F16 => make::<f16>(bytes, from, shape),
        DType::BF16 => make::<bf16>(bytes, from, shape),
        other => {
            let found = other.as_str();
            Err(Error::argument("dtype", format!("expected f32, f16 or bf16, found {found}")))
        }
    }
}

/// A dtype that weights are converted to.
trait Weight: WithDType + Default {
    fn from_f32s(values: &[f32], into: &mut [Self]);
    fn has_infinity(values: &[Self]) -> bool;
}

impl Weight for f32 {
    fn from_f32s(values: &[f32], into: &mut [Self]) {
        into.copy_from_slice(values);
    }

    fn has_infinity(values: &[Self]) -> bool {
        values.iter().any(|value| value.is_infinite())
    }
}

impl Weight for f16 {
    fn from_f32s(values: &[f32], into: &mut [Self]) {
        into.convert_from_f32_slice(values);
    }

    fn has_infinity(values: &[Self]) -> bool {
        values.iter().any(|value| value.is_infinite())
    }
}

impl Weight for bf16 {
    fn from_f32s(values: &[f32], into: &mut [Self]) {
        into.convert_from_f32_slice(values);
    }

    fn has_infinity(values: &[Self]) -> bool {
        values.iter().any(|value| value.is_infinite())
    }
}

fn make<T: Weight>(bytes: &[u8], from: DType, shape: &[usize]) -> Result<Option<Tensor>> {
    let width = from.size_in_bytes();
    let mut values = vec![T::default(); bytes.len() / width];
    let fits = values
        .par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(CHUNK * width))
        .map(|(into, bytes)| {
            let mut buffer = [0.0_f32; CHUNK];
            let read = &mut buffer[..into.len()];
            let lost = read_f32s(bytes, from, read);
            T::from_f32s(read, into);
            !lost && (!T::has_infinity(into) || read.iter().zip(&*into).all(|(&x, y)| x.is_infinite() || is_finite(y)))
        })
        .reduce(|| true, |left, right| left && right);
    if !fits {
        return Ok(None);
    }
    Ok(Some(Tensor::from_vec(values, shape, &Device::Cpu)?))
}

fn is_finite<T: Weight>(value: &T) -> bool {
    !T::has_infinity(std::slice::from_ref(value))
}

/// Decodes a chunk; returns whether a finite f64 is not finite in f32.
fn read_f32s(bytes: &[u8], from: DType, into: &mut [f32]) -> bool {
    match from {
        DType::F32 => {
            for (value, bytes) in into.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        DType::F64 => {
            let mut lost = false;
            for (value, bytes) in into.iter_mut().zip(bytes.as_chunks::<8>().0) {
                let wide = f64::from_le_bytes(*bytes);
                *value = wide as f32;
                lost |= value.is_infinite() && wide.is_finite();
            }
            return lost;
        }
        DType::BF16 => {
            for (value, bytes) in into.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            let mut halves = [f16::ZERO; CHUNK];
            let halves = &mut halves[..into.len()];
            for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *half = f16::from_le_bytes(*bytes);
            }
            halves.convert_to_f32_slice(into);
        }
    }
    false
}
