//! Reads the weights of a model from a GGUF file.

use super::architecture::Architecture;
use super::metadata::Metadata;
use super::names::GgufNames;
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufTensor, GgufType};
use crate::models::registry::ParameterSpec;
use crate::ops::Weight;
use candle_core::{Device, Tensor};

/// The tensors of a GGUF file, by their names in a checkpoint.
pub(crate) struct GgufWeights<'a> {
    file: &'a GgufFile,
    names: GgufNames,
}

impl<'a> GgufWeights<'a> {
    pub(crate) fn new(file: &'a GgufFile) -> Result<Self> {
        let metadata = Metadata::of(file)?;
        let names = GgufNames { architecture: Architecture::of(&metadata)?, head_dim: metadata.head_dim()? };
        Ok(Self { file, names })
    }

    /// The name of a parameter in the file.
    pub(crate) fn name(&self, parameter: &str) -> Option<String> {
        self.names.tensor(parameter)
    }

    /// Reads a parameter on the CPU. Matrices stay in the mapped file unless their rows must be reordered.
    pub(crate) fn weight(&self, spec: &ParameterSpec, tensor: &GgufTensor) -> Result<Weight> {
        let names = self.names;
        let is_interleaved = names.is_interleaved(&tensor.name);
        if tensor.shape.len() < 2 {
            let (mut values, offset) = (self.file.floats(tensor)?, names.offset(spec));
            if offset != 0.0 {
                for value in &mut values {
                    *value -= offset;
                }
            }
            if is_interleaved {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let bytes = names.in_halves(&bytes, 4);
                values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            }
            let len = values.len();
            return Ok(Tensor::from_vec(values, len, &Device::Cpu)?.into());
        }
        let &[rows, columns] = tensor.shape.as_slice() else {
            let (name, count) = (&tensor.name, tensor.shape.len());
            return Err(Error::Unsupported(format!("the tensor `{name}` with {count} dimensions")));
        };
        let kind = GgufType::from_id(tensor.ggml_type).ok_or_else(|| {
            let (path, name, kind) = (self.file.path(), &tensor.name, GgufType::name_of(tensor.ggml_type));
            Error::Unsupported(format!(
                "`{}`: the tensor `{name}` of type `{kind}`; use a file of another type, such as q4_k_m or q8_0",
                path.display()
            ))
        })?;
        let wrong_width = || {
            let (name, kind, len) = (&tensor.name, kind.name(), kind.block_len());
            let message = if columns.is_multiple_of(len) {
                format!("`{name}` is larger than any memory")
            } else {
                format!("`{name}`: expected rows of blocks of {len} ({kind}), found rows of {columns}")
            };
            Error::format(self.file.path(), message)
        };
        let num_bytes = kind.num_bytes(&tensor.shape).ok_or_else(wrong_width)?;
        let (map, range) = self.file.bytes(tensor, num_bytes)?;
        let row_bytes = num_bytes.checked_div(rows).unwrap_or(0);
        let ordered = is_interleaved.then(|| names.in_halves(&map[range.clone()], row_bytes));
        let weight = match (kind, ordered) {
            (GgufType::Blocks(format), Some(bytes)) => Weight::blocks(bytes, (rows, columns), format),
            (GgufType::Blocks(format), None) => Weight::mapped_blocks(map, range, (rows, columns), format),
            (kind, ordered) => {
                let dtype = kind.dtype().ok_or_else(wrong_width)?;
                if ordered.is_none()
                    && let Some(weight) = Weight::mapped(map, range.clone(), &tensor.shape, dtype)
                {
                    return Ok(weight);
                }
                let bytes = ordered.as_deref().unwrap_or(&map[range]);
                Some(Tensor::from_raw_buffer(bytes, dtype, &tensor.shape, &Device::Cpu)?.into())
            }
        };
        weight.ok_or_else(wrong_width)
    }
}
