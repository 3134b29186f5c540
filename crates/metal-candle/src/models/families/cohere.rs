//! Command R (`cohere`) and Command R7B (`cohere2`): attention and MLP in parallel after one layer norm.

use super::common::{decoder, layer_types, set_windows, sliding_by_pattern, sliding_window};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, NormPlacement, NormSpec, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;
use crate::ops::norm::NormKind;
use crate::ops::rotary::Pairs;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 8192,
    intermediate_size: 22_528,
    num_hidden_layers: 40,
    num_attention_heads: 64,
    max_position_embeddings: 8192,
    norm_eps: ("layer_norm_eps", 1e-5),
    rope_theta: 500_000.0,
    tie_word_embeddings: true,
    eos_token_ids: &[255_001],
    ..Defaults::BASE
};

pub(super) const COHERE: Family =
    Family { model_type: "cohere", architecture: "CohereForCausalLM", defaults: DEFAULTS, describe: cohere };

pub(super) const COHERE2: Family = Family {
    model_type: "cohere2",
    architecture: "Cohere2ForCausalLM",
    defaults: Defaults { rope_theta: 10_000.0, ..DEFAULTS },
    describe: cohere2,
};

/// The description that both share.
fn base(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    for table in &mut description.rotary {
        table.pairs = Pairs::Adjacent;
    }
    description.norm = NormSpec { kind: NormKind::Layer, ..description.norm };
    description.head.scale = keys.number("logit_scale")?.unwrap_or(0.0625) as f32;
    for layer in &mut description.layers {
        layer.is_parallel = true;
        layer.norms = NormPlacement { before_attention: Some("input_layernorm"), ..NormPlacement::default() };
    }
    description.for_each_attention(|_, attention| attention.has_output_bias = attention.has_bias);
    Ok(description)
}

fn cohere(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = base(config, keys)?;
    if keys.flag("use_qk_norm")?.unwrap_or(false) {
        let (norm, names) = (description.norm, ["q_norm", "k_norm"]);
        let norm = QkNormSpec { norm, extent: QkNormExtent::OwnHead, names, is_after_rotary: false };
        description.for_each_attention(|_, attention| attention.qk_norm = Some(norm));
    }
    Ok(description)
}

/// Only sliding-window layers have rotary positions.
fn cohere2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = base(config, keys)?;
    // not read beside layer types
    keys.contains("sliding_window_pattern");
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => sliding_by_pattern(config, keys, 4)?,
    };
    set_windows(&mut description, config, keys, &is_sliding, sliding_window(keys, Some(4096))?)?;
    description.for_each_attention(|layer, attention| {
        attention.rotary = is_sliding.get(layer).copied().unwrap_or(false).then_some(0);
    });
    Ok(description)
}
