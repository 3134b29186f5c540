//! Tensors of GGUF files that are not quantized.

use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufTensor, ggml_type_name};
use candle_core::{DType, Device, Tensor};

/// candle's counterpart of a type that is not quantized.
pub(super) fn dense_type(ggml_type: u32) -> Option<DType> {
    match ggml_type {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        30 => Some(DType::BF16),
        _ => None,
    }
}

/// The elements of a tensor that is not quantized.
pub(super) fn floats(file: &GgufFile, tensor: &GgufTensor) -> Result<Vec<f32>> {
    let wrong = || {
        let expected = "expected f32, f16 or bf16";
        Error::format(
            file.path(),
            format!("`{}`: {expected}, found `{}`", tensor.name, ggml_type_name(tensor.ggml_type)),
        )
    };
    let dtype = dense_type(tensor.ggml_type).ok_or_else(wrong)?;
    let elements = tensor.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    let num_bytes = elements.and_then(|count| count.checked_mul(dtype.size_in_bytes())).ok_or_else(wrong)?;
    let (map, range) = file.bytes(tensor, num_bytes)?;
    let values = Tensor::from_raw_buffer(&map[range], dtype, &tensor.shape, &Device::Cpu)?;
    Ok(values.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}
