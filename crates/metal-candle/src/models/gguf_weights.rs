//! The tensors of models in GGUF files: names, the order of rows and values that differ from a checkpoint of transformers.

use super::gguf_config::{Architecture, Metadata};
use super::gguf_floats::{dense_type, floats};
use super::registry::{ParameterSpec, Role};
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufTensor, ggml_type_name};
use crate::ops::Weight;
use candle_core::{Device, Tensor};
use metal_candle_kernels::BlockFormat;

/// Names of modules of a layer, in the file and in a checkpoint.
const MODULES: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The tensors of a model in a GGUF file, by the names of a checkpoint.
pub(super) struct GgufWeights<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
    head_dim: usize,
}

impl<'a> GgufWeights<'a> {
    pub(super) fn new(file: &'a GgufFile) -> Result<Self> {
        let metadata = Metadata::of(file)?;
        Ok(Self { file, architecture: metadata.architecture, head_dim: metadata.head_dim()? })
    }

    /// The name in the file of a parameter.
    pub(super) fn name(&self, parameter: &str) -> Option<String> {
        let known = match parameter {
            "model.embed_tokens.weight" => Some("token_embd.weight"),
            "model.norm.weight" => Some("output_norm.weight"),
            "lm_head.weight" => Some("output.weight"),
            _ => None,
        };
        if let Some(name) = known {
            return Some(name.into());
        }
        let (layer, rest) = parameter.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        let modules = self.architecture.modules.iter().chain(MODULES);
        let (name, _) = modules.into_iter().find(|(_, own)| *own == module)?;
        Some(format!("blk.{layer}.{name}.{kind}"))
    }

    /// A parameter on the CPU. Matrices stay where they are in the file unless their rows are in another order.
    pub(super) fn weight(&self, spec: &ParameterSpec, tensor: &GgufTensor) -> Result<Weight> {
        let is_interleaved = self.is_interleaved(tensor);
        if tensor.shape.len() < 2 {
            let mut values = floats(self.file, tensor)?;
            if self.architecture.has_norm_offset && matches!(spec.role, Role::Norm { .. }) {
                for value in &mut values {
                    *value -= 1.0;
                }
            }
            if is_interleaved {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let bytes = in_halves(&bytes, 4, self.head_dim);
                values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            }
            let len = values.len();
            return Ok(Tensor::from_vec(values, len, &Device::Cpu)?.into());
        }
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(Error::Unsupported(format!(
                "the tensor `{}` with {} dimensions",
                tensor.name,
                tensor.shape.len()
            )));
        };
        let too_large = || Error::format(self.file.path(), format!("`{}` is larger than any memory", tensor.name));
        let elements = rows.checked_mul(columns).ok_or_else(too_large)?;
        if let Some(dtype) = dense_type(tensor.ggml_type) {
            let num_bytes = elements.checked_mul(dtype.size_in_bytes()).ok_or_else(too_large)?;
            let (map, range) = self.file.bytes(tensor, num_bytes)?;
            if !is_interleaved && let Some(weight) = Weight::mapped(map, range.clone(), &tensor.shape, dtype) {
                return Ok(weight);
            }
            let bytes = &map[range];
            let row_bytes = columns * dtype.size_in_bytes();
            let ordered = if is_interleaved { in_halves(bytes, row_bytes, self.head_dim) } else { bytes.to_vec() };
            return Ok(Tensor::from_raw_buffer(&ordered, dtype, &tensor.shape, &Device::Cpu)?.into());
        }
        let format = block_format(self.file, tensor)?;
        let wrong_width = || {
            let (name, format, len) = (&tensor.name, format.name(), format.len());
            let message = format!("`{name}`: expected rows of blocks of {len} ({format}), found rows of {columns}");
            Error::format(self.file.path(), message)
        };
        let row_bytes = format.row_bytes(columns).ok_or_else(wrong_width)?;
        let (map, range) = self.file.bytes(tensor, row_bytes.checked_mul(rows).ok_or_else(too_large)?)?;
        let weight = if is_interleaved {
            Weight::blocks(in_halves(&map[range], row_bytes, self.head_dim), (rows, columns), format)
        } else {
            Weight::mapped_blocks(map, range, (rows, columns), format)
        };
        weight.ok_or_else(wrong_width)
    }

    /// Whether the rows of a tensor are interleaved within each head.
    fn is_interleaved(&self, tensor: &GgufTensor) -> bool {
        let module = tensor.name.split('.').nth(2);
        self.architecture.has_interleaved_rows && matches!(module, Some("attn_q" | "attn_k"))
    }
}

/// Rows in the order of a checkpoint: the even rows of each head, then its odd rows.
fn in_halves(rows: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(rows.len());
    for head in rows.chunks(row_bytes * head_dim) {
        for parity in 0..2 {
            for row in head.chunks_exact(row_bytes).skip(parity).step_by(2) {
                ordered.extend_from_slice(row);
            }
        }
    }
    ordered
}

fn block_format(file: &GgufFile, tensor: &GgufTensor) -> Result<BlockFormat> {
    BlockFormat::from_ggml_type(tensor.ggml_type).ok_or_else(|| {
        Error::Unsupported(format!(
            "`{}`: the tensor `{}` of type `{}`: take a file of another type, such as q4_k_m or q8_0",
            file.path().display(),
            tensor.name,
            ggml_type_name(tensor.ggml_type)
        ))
    })
}
