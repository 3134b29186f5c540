//! `StableLM` 3B, Zephyr 3B and `StableLM` 2 (<https://arxiv.org/abs/2402.17834>, section 2): layer norms with a bias, and
//! positions in a quarter of each head.

use super::common::decoder_with_rotary;
use super::family::Family;
use super::rotary::RopeOptions;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, NormPlacement, NormSpec};
use crate::models::keys::Keys;
use crate::ops::norm::NormKind;
use serde_json::Value;

pub(super) const STABLELM: Family = Family {
    model_type: "stablelm",
    architecture: "StableLmForCausalLM",
    defaults: Defaults {
        vocab_size: 50_304,
        hidden_size: 2560,
        intermediate_size: 6912,
        num_key_value_heads: KeyValueHeads::Of(32),
        max_position_embeddings: 4096,
        norm_eps: ("layer_norm_eps", 1e-5),
        eos_token_ids: &[0],
        ..Defaults::BASE
    },
    describe: stablelm,
};

fn stablelm(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    config.attention_bias = keys.flag("use_qkv_bias")?.unwrap_or(false);
    if config.head_dim.saturating_mul(config.num_attention_heads) != config.hidden_size {
        let expected = "`hidden_size / num_attention_heads`, or no such key";
        return Err(keys.wrong("head_dim", expected, &Value::from(config.head_dim)));
    }
    if keys.flag("qk_layernorm")?.unwrap_or(false) {
        return Err(keys.unsupported("qk_layernorm", "norms of q and k with one tensor per head"));
    }
    let options = RopeOptions { partial: Some(0.25), ..RopeOptions::default() };
    let mut description = decoder_with_rotary(config, keys, options)?;
    if let Some(table) = description.rotary.iter().find(|table| !table.dim.is_multiple_of(2)) {
        // transformers cannot rotate these
        let what = format!("an odd number of rotated elements in a head, {}", table.dim);
        return Err(keys.unsupported("partial_rotary_factor", &what));
    }
    description.norm = NormSpec { kind: NormKind::Layer, has_bias: true, ..description.norm };
    if keys.flag("use_parallel_residual")?.unwrap_or(false) {
        for layer in &mut description.layers {
            layer.is_parallel = true;
            layer.norms = NormPlacement { before_attention: Some("input_layernorm"), ..NormPlacement::default() };
        }
    }
    Ok(description)
}
