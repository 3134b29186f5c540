//! GLM-4 of 2024 (`glm`) and GLM-4-0414 (`glm4`): adjacent elements of half of each head are rotated.

use super::common::decoder_with_rotary;
use super::family::Family;
use super::rotary::RopeOptions;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, GatedProjections, NormPlacement};
use crate::models::keys::Keys;
use crate::ops::rotary::Pairs;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_552,
    intermediate_size: 13_696,
    num_hidden_layers: 40,
    max_position_embeddings: 131_072,
    norm_eps: ("rms_norm_eps", 1.5625e-7),
    head_dim: Some(128),
    num_key_value_heads: KeyValueHeads::Of(2),
    attention_bias: true,
    eos_token_ids: &[151_329, 151_336, 151_338],
    ..Defaults::BASE
};

pub(super) const GLM: Family =
    Family { model_type: "glm", architecture: "GlmForCausalLM", defaults: DEFAULTS, describe: glm };

pub(super) const GLM4: Family =
    Family { model_type: "glm4", architecture: "Glm4ForCausalLM", defaults: DEFAULTS, describe: glm4 };

fn glm(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let options = RopeOptions { partial: Some(0.5), ..RopeOptions::default() };
    let mut description = decoder_with_rotary(config, keys, options)?;
    for table in &mut description.rotary {
        table.pairs = Pairs::Adjacent;
    }
    description.for_each_gated_mlp(|mlp| mlp.projections = GatedProjections::Fused(["gate_up_proj", "down_proj"]));
    Ok(description)
}

/// [`glm`] with norms around the parts.
fn glm4(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = glm(config, keys)?;
    for layer in &mut description.layers {
        layer.norms = NormPlacement {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_self_attn_layernorm"),
            before_feed_forward: Some("post_attention_layernorm"),
            after_feed_forward: Some("post_mlp_layernorm"),
        };
    }
    Ok(description)
}
