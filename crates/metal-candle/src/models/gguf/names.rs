//! Maps tensor names and the order of rows between checkpoints and GGUF files.

use super::architecture::Architecture;
use crate::error::{Error, Result};
use crate::models::ModelConfig;
use crate::models::registry::{ParameterSpec, Role};

/// Module names of a layer, in the file and in a checkpoint.
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

/// The layer of a parameter, its module in the layer, and whether it is a weight or a bias.
fn in_layer(parameter: &str) -> Option<(&str, &str, &str)> {
    let (layer, rest) = parameter.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    Some((layer, module, kind))
}

/// The differences between the tensors of a checkpoint and of a GGUF file, for one architecture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GgufNames {
    pub(super) architecture: &'static Architecture,
    pub(super) head_dim: usize,
}

impl GgufNames {
    /// The names of a model's architecture.
    ///
    /// # Errors
    /// GGUF has no architecture for the family.
    pub(crate) fn for_config(config: &ModelConfig) -> Result<Self> {
        let architecture = Architecture::for_family(&config.model_type).ok_or_else(|| {
            let known = Architecture::families().join("`, `");
            let family = &config.model_type;
            Error::Unsupported(format!("a GGUF file for a model of type `{family}`; supported are: `{known}`"))
        })?;
        Ok(Self { architecture, head_dim: config.head_dim })
    }

    /// The name of the architecture.
    pub(crate) fn architecture(self) -> &'static str {
        self.architecture.name
    }

    /// The name of a parameter in the file.
    pub(crate) fn tensor(self, parameter: &str) -> Option<String> {
        let known = match parameter {
            "model.embed_tokens.weight" => Some("token_embd.weight"),
            "model.norm.weight" => Some("output_norm.weight"),
            "model.norm.bias" => Some("output_norm.bias"),
            "lm_head.weight" => Some("output.weight"),
            _ => None,
        };
        if let Some(name) = known {
            return Some(name.into());
        }
        let (layer, module, kind) = in_layer(parameter)?;
        let modules = self.architecture.modules.iter().chain(MODULES);
        let (name, _) = modules.into_iter().find(|(_, own)| *own == module)?;
        Some(format!("blk.{layer}.{name}.{kind}"))
    }

    /// The names in the file of a parameter: two if the file stores the halves of its rows as separate tensors.
    pub(super) fn parts(self, parameter: &str) -> Vec<String> {
        let halves = in_layer(parameter).and_then(|(layer, module, kind)| {
            let (names, _) = self.architecture.halves.iter().find(|(_, own)| *own == module)?;
            Some(names.map(|name| format!("blk.{layer}.{name}.{kind}")))
        });
        halves.map_or_else(|| self.tensor(parameter).into_iter().collect(), Vec::from)
    }

    /// Whether the file stores the rows of a tensor interleaved within each head.
    pub(crate) fn is_interleaved(self, tensor: &str) -> bool {
        let module = tensor.split('.').nth(2);
        self.architecture.has_interleaved_rows && matches!(module, Some("attn_q" | "attn_k"))
    }

    /// The offset that the file adds to the elements of a parameter.
    pub(super) fn offset(self, spec: &ParameterSpec) -> f32 {
        if self.architecture.has_norm_offset && matches!(spec.role, Role::Norm { .. }) { 1.0 } else { 0.0 }
    }

    /// Reorders rows of a file, each of `row_bytes`, for a checkpoint: the even rows of each head, followed by its odd
    /// rows.
    pub(crate) fn in_halves(self, rows: &[u8], row_bytes: usize) -> Vec<u8> {
        let mut ordered = Vec::with_capacity(rows.len());
        for head in rows.chunks((row_bytes * self.head_dim).max(1)) {
            for parity in 0..2 {
                for row in head.chunks_exact(row_bytes.max(1)).skip(parity).step_by(2) {
                    ordered.extend_from_slice(row);
                }
            }
        }
        ordered
    }

    /// The inverse of [`Self::in_halves`]: alternates rows of the two halves of each head.
    pub(crate) fn interleaved(self, rows: &[u8], row_bytes: usize) -> Vec<u8> {
        let mut ordered = Vec::with_capacity(rows.len());
        for head in rows.chunks((row_bytes * self.head_dim).max(1)) {
            let (first, second) = head.split_at(head.len() / 2);
            for (first, second) in first.chunks_exact(row_bytes.max(1)).zip(second.chunks_exact(row_bytes.max(1))) {
                ordered.extend_from_slice(first);
                ordered.extend_from_slice(second);
            }
        }
        ordered
    }
}
