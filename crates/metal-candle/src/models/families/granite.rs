//! Granite 3, and the dense models of Granite 4 without recurrent layers: Llama with multipliers on embeddings,
//! residual branches, scores and logits.

use super::common::{factor, layer_types, layer_types_at};
use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, GatedProjections};
use crate::models::keys::Keys;
use serde_json::Value;

pub(super) const GRANITE: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    defaults: Defaults { max_position_embeddings: 2048, eos_token_ids: &[2], ..Defaults::BASE },
    describe: granite,
};

pub(super) const GRANITE_HYBRID: Family = Family {
    model_type: "granitemoehybrid",
    architecture: "GraniteMoeHybridForCausalLM",
    defaults: Defaults { max_position_embeddings: 2048, eos_token_ids: &[2], ..Defaults::BASE },
    describe: granite_hybrid,
};

/// Only the shared MLP, and rotary positions only if `position_embedding_type` is `rope`.
fn granite_hybrid(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    if keys.size("num_local_experts")?.unwrap_or(8) != 0 {
        return Err(keys.unsupported("num_local_experts", "a mixture of experts (expected 0)"));
    }
    let is_sliding = match layer_types(config, keys)? {
        None => layer_types_at(config, keys, "layers_block_type")?,
        found => found,
    };
    if is_sliding.is_none_or(|is_sliding| is_sliding.contains(&true)) {
        return Err(keys.unsupported("layer_types", "recurrent layers (expected `full_attention` for each layer)"));
    }
    let mut description = granite(config, keys)?;
    let inner = keys.size("shared_intermediate_size")?.unwrap_or(1024);
    description.for_each_gated_mlp(|mlp| {
        mlp.inner = inner;
        mlp.path = "shared_mlp";
        mlp.projections = GatedProjections::Fused(["input_linear", "output_linear"]);
    });
    if keys.text("position_embedding_type")? != Some("rope") {
        description.for_each_attention(|_, attention| attention.rotary = None);
    }
    Ok(description)
}

fn granite(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    let (scale, residual) = (factor(keys, "attention_multiplier")?, factor(keys, "residual_multiplier")?);
    description.for_each_attention(|_, attention| attention.scale = scale);
    for layer in &mut description.layers {
        layer.residual_scale = residual;
    }
    description.embedding.scale = factor(keys, "embedding_multiplier")?;
    let divisor = keys.number("logits_scaling")?.unwrap_or(1.0);
    if divisor == 0.0 {
        return Err(keys.wrong("logits_scaling", "a number other than 0", &Value::from(divisor)));
    }
    description.head.scale = (1.0 / divisor) as f32;
    Ok(description)
}
