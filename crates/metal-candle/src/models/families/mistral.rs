//! Mistral (<https://arxiv.org/abs/2310.06825>, section 2) and Ministral.

use super::common::{decoder, layer_types, set_windows, sliding_window};
use super::family::Family;
use super::rotary::{RopeKeys, RopeOptions};
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, QueryScaling};
use crate::models::keys::Keys;
use crate::ops::rotary::RotaryScaling;

const DEFAULTS: Defaults = Defaults {
    intermediate_size: 14_336,
    max_position_embeddings: 131_072,
    num_key_value_heads: KeyValueHeads::Of(8),
    eos_token_ids: &[2],
    ..Defaults::BASE
};

pub(super) const MISTRAL: Family =
    Family { model_type: "mistral", architecture: "MistralForCausalLM", defaults: DEFAULTS, describe: mistral };

pub(super) const MINISTRAL: Family =
    Family { model_type: "ministral", architecture: "MinistralForCausalLM", defaults: DEFAULTS, describe: ministral };

pub(super) const MINISTRAL3: Family = Family {
    model_type: "ministral3",
    architecture: "Ministral3ForCausalLM",
    defaults: Defaults {
        vocab_size: 131_072,
        num_hidden_layers: 34,
        max_position_embeddings: 262_144,
        norm_eps: ("rms_norm_eps", 1e-5),
        head_dim: Some(128),
        ..DEFAULTS
    },
    describe: ministral3,
};

/// All layers have the window, if there is one. As in transformers, a file with `layer_types` is a Ministral file.
fn mistral(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    if keys.contains("layer_types") {
        return ministral(config, keys);
    }
    config.attention_bias = false;
    let mut description = decoder(config, keys)?;
    let size = sliding_window(keys, Some(4096))?;
    let is_sliding = vec![size.is_some(); config.num_hidden_layers];
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    Ok(description)
}

/// The layers that `layer_types` lists have a window, or all layers if the key is absent.
fn ministral(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    config.attention_bias = false;
    let mut description = decoder(config, keys)?;
    let size = sliding_window(keys, Some(4096))?;
    let is_sliding = layer_types(config, keys)?.unwrap_or(vec![size.is_some(); config.num_hidden_layers]);
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    Ok(description)
}

/// Queries are scaled by the logarithm of the position.
fn ministral3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    config.attention_bias = false;
    let mut description = decoder(config, keys)?;
    let size = sliding_window(keys, None)?;
    let is_sliding = vec![size.is_some(); config.num_hidden_layers];
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    let rope = RopeKeys::read(config, keys, RopeOptions::default())?;
    if !rope.is_given() {
        set_released_rotary(&mut description, config);
        return Ok(description);
    }
    if let Some(beta) = rope.number("llama_4_scaling_beta")?.filter(|beta| *beta != 0.0) {
        let scaling = QueryScaling { beta, original_max_position_embeddings: rope.original };
        description.for_each_attention(|_, attention| attention.query_scaling = Some(scaling));
    }
    Ok(description)
}

/// The rotary settings of the released models, for files without any. A file that has only `rope_theta` counts as one
/// without.
fn set_released_rotary(description: &mut Description, config: &mut ModelConfig) {
    const ORIGINAL: usize = 16_384;
    config.rope_theta = 1e6;
    for table in &mut description.rotary {
        table.theta = config.rope_theta;
        table.scaling = RotaryScaling::Yarn {
            factor: Some(16.0),
            original_max_position_embeddings: ORIGINAL,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            attention_factor: None,
            truncate: true,
        };
    }
    let scaling = QueryScaling { beta: 0.1, original_max_position_embeddings: ORIGINAL };
    description.for_each_attention(|_, attention| attention.query_scaling = Some(scaling));
}
