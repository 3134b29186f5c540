//! Gemma 1 (<https://arxiv.org/abs/2403.08295>, section 2), Gemma 2 (<https://arxiv.org/abs/2408.00118>, section 2) and
//! the text model of Gemma 3 (<https://arxiv.org/abs/2503.19786>, section 2).

use super::common::{
    activation, decoder, decoder_with_windows, layer_types, rms_norm, set_windows, sliding_by_pattern, sliding_window,
    soft_cap,
};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, NormPlacement, NormSpec, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;
use serde_json::Value;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    num_hidden_layers: 26,
    num_attention_heads: 8,
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    head_dim: Some(256),
    num_key_value_heads: KeyValueHeads::Of(4),
    eos_token_ids: &[1],
    ..Defaults::BASE
};

pub(super) const GEMMA: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    defaults: Defaults {
        hidden_size: 3072,
        intermediate_size: 24_576,
        num_hidden_layers: 28,
        num_attention_heads: 16,
        num_key_value_heads: KeyValueHeads::Of(16),
        ..DEFAULTS
    },
    describe: gemma,
};

pub(super) const GEMMA2: Family =
    Family { model_type: "gemma2", architecture: "Gemma2ForCausalLM", defaults: DEFAULTS, describe: gemma2 };

pub(super) const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    defaults: Defaults { vocab_size: 262_208, max_position_embeddings: 131_072, rope_theta: 1e6, ..DEFAULTS },
    describe: gemma3,
};

/// Norm weights are `1 + w`, and embeddings are multiplied by the square root of their width.
fn base(config: &ModelConfig, keys: &Keys, description: &mut Description) -> Result<()> {
    if keys.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(keys.unsupported("use_bidirectional_attention", "attention to later tokens"));
    }
    description.norm = offset_norm(config);
    description.embedding.scale = (config.hidden_size as f64).sqrt() as f32;
    description.for_each_attention(|_, attention| attention.has_output_bias = attention.has_bias);
    Ok(())
}

fn offset_norm(config: &ModelConfig) -> NormSpec {
    NormSpec { kind: NormKind::Rms { offset: 1.0 }, ..rms_norm(config) }
}

fn gemma(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    base(config, keys, &mut description)?;
    // `gelu` in early files means the tanh approximation, and `hidden_activation` of later files takes precedence
    let activation = match activation(keys, "hidden_act", Activation::GeluTanh)? {
        Activation::Gelu => Activation::GeluTanh,
        other => other,
    };
    description.for_each_gated_mlp(|mlp| mlp.activation = activation);
    Ok(description)
}

/// The settings that Gemma 2 and 3 share: norms around the parts, a score scale from `query_pre_attn_scalar`, a cap on
/// logits, and the key `hidden_activation`. In transformers, only Gemma 2 caps scores.
fn second(mut description: Description, config: &ModelConfig, keys: &Keys, cap: Option<f64>) -> Result<Description> {
    base(config, keys, &mut description)?;
    let activation = activation(keys, "hidden_activation", Activation::GeluTanh)?;
    description.for_each_gated_mlp(|mlp| mlp.activation = activation);
    let scalar = keys.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    if scalar <= 0.0 {
        return Err(keys.wrong("query_pre_attn_scalar", "a number above 0", &Value::from(scalar)));
    }
    description.for_each_attention(|_, attention| attention.scale = scalar.powf(-0.5) as f32);
    description.head.soft_cap = soft_cap(keys, "final_logit_softcapping", cap)?;
    for layer in &mut description.layers {
        layer.norms = NormPlacement::SANDWICH;
    }
    Ok(description)
}

fn gemma2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = second(decoder(config, keys)?, config, keys, Some(30.0))?;
    let cap = soft_cap(keys, "attn_logit_softcapping", Some(50.0))?;
    description.for_each_attention(|_, attention| attention.soft_cap = cap);
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => (0..config.num_hidden_layers).map(|layer| layer.is_multiple_of(2)).collect(),
    };
    set_windows(&mut description, config, keys, &is_sliding, sliding_window(keys, Some(4096))?)?;
    Ok(description)
}

fn gemma3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    // not read beside layer types
    keys.contains("sliding_window_pattern");
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => sliding_by_pattern(config, keys, 6)?,
    };
    let decoder = decoder_with_windows(config, keys, &is_sliding, ("rope_local_base_freq", 10_000.0))?;
    let mut description = second(decoder, config, keys, None)?;
    set_windows(&mut description, config, keys, &is_sliding, sliding_window(keys, Some(4096))?)?;
    let names = ["q_norm", "k_norm"];
    let norm = QkNormSpec { norm: offset_norm(config), extent: QkNormExtent::Head, names, is_after_rotary: false };
    description.for_each_attention(|_, attention| attention.qk_norm = Some(norm));
    Ok(description)
}
