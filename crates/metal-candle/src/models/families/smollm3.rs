//! `SmolLM3`: Llama in which some layers have no positions (`NoPE`, <https://arxiv.org/abs/2501.18795>, section 3).

use super::common::{layer_types, set_windows, sliding_window};
use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;
use serde_json::Value;

pub(super) const SMOLLM3: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    defaults: Defaults {
        vocab_size: 128_256,
        hidden_size: 2048,
        num_hidden_layers: 36,
        num_attention_heads: 16,
        rope_theta: 2e6,
        tie_word_embeddings: true,
        num_key_value_heads: KeyValueHeads::Of(4),
        eos_token_ids: &[128_001],
        ..Defaults::BASE
    },
    describe: smollm3,
};

fn smollm3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    let has_rotary = rotary_layers(config, keys)?;
    let is_used = keys.flag("use_sliding_window")?.unwrap_or(false);
    let size = sliding_window(keys, None)?;
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => has_rotary.iter().map(|has_rotary| is_used && size.is_some() && !has_rotary).collect(),
    };
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    description.for_each_attention(|layer, attention| {
        attention.rotary = has_rotary.get(layer).copied().unwrap_or(true).then_some(0);
    });
    Ok(description)
}

/// Whether each layer has rotary positions: in `no_rope_layers`, 1 means that it has.
fn rotary_layers(config: &ModelConfig, keys: &Keys) -> Result<Vec<bool>> {
    let layers = config.num_hidden_layers;
    let Some(value) = keys.get("no_rope_layers") else {
        let interval = keys.size("no_rope_layer_interval")?.unwrap_or(4).max(1);
        return Ok((1..=layers).map(|layer| layer % interval != 0).collect());
    };
    let expected = format!("a list of at least {layers} numbers, 1 for rotary positions and 0 for none");
    let list = value.as_array().and_then(|list| list.get(..layers));
    let list = list.ok_or_else(|| keys.wrong("no_rope_layers", &expected, value))?;
    let flag = |value: &Value| match value {
        Value::Bool(flag) => Ok(*flag),
        value => value.as_u64().map(|n| n != 0).ok_or_else(|| keys.wrong("no_rope_layers", &expected, value)),
    };
    list.iter().map(flag).collect()
}
