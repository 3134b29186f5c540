//! Builds the plain Llama decoder that each family modifies, and reads keys that several families share.

use super::rotary::{RopeKeys, RopeOptions};
use crate::error::Result;
use crate::models::config::ModelConfig;
use crate::models::description::{
    AttentionSpec, Description, EmbeddingSpec, FeedForwardSpec, GatedMlpSpec, GatedProjections, HeadSpec, LayerSpec,
    NormPlacement, NormSpec,
};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;
use crate::ops::rotary::RotaryScaling;
use metal_candle_kernels::Mask;
use serde_json::Value;

/// The Llama decoder without rotary scaling: RMS norms before attention and before a gated MLP with `silu`, rotary
/// positions over whole heads, and no biases except those of q, k and v if `attention_bias`.
pub(super) fn decoder(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    decoder_with_rotary(config, keys, RopeOptions::default())
}

/// [`decoder`] with its rotary settings read according to `options`.
pub(super) fn decoder_with_rotary(config: &mut ModelConfig, keys: &Keys, options: RopeOptions) -> Result<Description> {
    let rope = RopeKeys::read(config, keys, options)?;
    decoder_with(config, keys, &rope)
}

/// [`decoder`] with a separate rotary table for sliding-window layers, with base `local` unless the key `local_key` is
/// present.
pub(super) fn decoder_with_windows(
    config: &mut ModelConfig,
    keys: &Keys,
    is_sliding: &[bool],
    (local_key, local): (&str, f64),
) -> Result<Description> {
    let of = |layer_type| RopeOptions { layer_type: Some(layer_type), ..RopeOptions::default() };
    let full = RopeKeys::read(config, keys, of("full_attention"))?;
    let mut description = decoder_with(config, keys, &full)?;
    let local = ModelConfig { rope_theta: keys.number(local_key)?.unwrap_or(local), ..config.clone() };
    let of_windows = RopeKeys::read(&local, keys, of("sliding_attention"))?;
    description.rotary.push(of_windows.table(config));
    description.for_each_attention(|layer, attention| {
        attention.rotary = Some(usize::from(is_sliding.get(layer).copied().unwrap_or(false)));
    });
    Ok(description)
}

fn decoder_with(config: &mut ModelConfig, keys: &Keys, rope: &RopeKeys) -> Result<Description> {
    config.rope_theta = rope.theta;
    if let RotaryScaling::Dynamic { factor } = rope.scaling {
        config.length_factor = factor.max(1.0);
    }
    let attention = AttentionSpec {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: (1.0 / (config.head_dim as f64).sqrt()) as f32,
        mask: Mask::Causal,
        soft_cap: None,
        clip: None,
        has_sinks: false,
        is_fused: false,
        has_bias: config.attention_bias,
        has_output_bias: false,
        qk_norm: None,
        rotary: Some(0),
        query_scaling: None,
    };
    let feed_forward = FeedForwardSpec::Gated(GatedMlpSpec {
        inner: config.intermediate_size,
        activation: activation(keys, "hidden_act", Activation::Silu)?,
        has_bias: false,
        path: "mlp",
        projections: GatedProjections::Separate(["gate_proj", "up_proj", "down_proj"]),
    });
    let layer =
        LayerSpec { attention, feed_forward, norms: NormPlacement::PRE, is_parallel: false, residual_scale: 1.0 };
    Ok(Description {
        embedding: EmbeddingSpec { scale: 1.0 },
        layers: vec![layer; config.num_hidden_layers],
        norm: rms_norm(config),
        head: HeadSpec { scale: 1.0, soft_cap: None },
        rotary: vec![rope.table(config)],
    })
}

/// An RMS norm with a weight.
pub(super) fn rms_norm(config: &ModelConfig) -> NormSpec {
    let kind = NormKind::Rms { offset: 0.0 };
    NormSpec { kind, eps: config.rms_norm_eps, has_weight: true, has_bias: false }
}

/// The activation named by `key`.
pub(super) fn activation(keys: &Keys, key: &str, default: Activation) -> Result<Activation> {
    Ok(match keys.text(key)? {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh") => {
            Activation::GeluTanh
        }
        Some("gelu" | "gelu_python") => Activation::Gelu,
        Some("relu") => Activation::Relu,
        Some("relu2") => Activation::Relu2,
        Some(name) => {
            let known = "expected `silu`, `gelu`, `gelu_pytorch_tanh`, `relu` or `relu2`";
            return Err(keys.unsupported(key, &format!("the activation `{name}` ({known})")));
        }
    })
}

/// A factor, 1 if the key is absent.
pub(super) fn factor(keys: &Keys, key: &str) -> Result<f32> {
    Ok(keys.number(key)?.unwrap_or(1.0) as f32)
}

/// A positive cap; `None` if the key is null, `default` if it is absent.
pub(super) fn soft_cap(keys: &Keys, key: &str, default: Option<f64>) -> Result<Option<f32>> {
    let value = if keys.contains(key) { keys.number(key)? } else { default };
    match value {
        Some(cap) if cap <= 0.0 => Err(keys.wrong(key, "a number above 0, or null", &Value::from(cap))),
        value => Ok(value.map(|cap| cap as f32)),
    }
}

/// Attention to `window` tokens, including the token itself; full attention if the window covers the longest sequence.
pub(super) fn window(config: &ModelConfig, window: Option<usize>) -> Mask {
    match window {
        Some(window) if window > 0 && window < config.max_position_embeddings => Mask::Window(window),
        _ => Mask::Causal,
    }
}

/// The value of `sliding_window`: `default` if the key is absent, `None` if it is null.
pub(super) fn sliding_window(keys: &Keys, default: Option<usize>) -> Result<Option<usize>> {
    if keys.contains("sliding_window") { keys.size("sliding_window") } else { Ok(default) }
}

/// Whether each layer is a sliding-window layer, according to `layer_types`; `None` if the key is absent.
pub(super) fn layer_types(config: &ModelConfig, keys: &Keys) -> Result<Option<Vec<bool>>> {
    layer_types_at(config, keys, "layer_types")
}

/// [`layer_types`] for another key.
pub(super) fn layer_types_at(config: &ModelConfig, keys: &Keys, key: &str) -> Result<Option<Vec<bool>>> {
    let kinds = match keys.get(key) {
        None => return Ok(None),
        Some(Value::Array(kinds)) => kinds,
        Some(other) => return Err(keys.wrong(key, "a list of names", other)),
    };
    if kinds.len() != config.num_hidden_layers {
        let expected = format!("a list of `num_hidden_layers` {} names", config.num_hidden_layers);
        return Err(keys.wrong(key, &expected, &Value::Array(kinds.clone())));
    }
    let is_sliding = |kind: &Value| match kind.as_str() {
        Some("full_attention" | "attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        Some(name) => Err(keys.unsupported(key, &format!("layers of type `{name}`"))),
        None => Err(keys.wrong(key, "a list of names", kind)),
    };
    kinds.iter().map(is_sliding).collect::<Result<_>>().map(Some)
}

/// Which layers have a window by `sliding_window_pattern`, in a configuration without a list of them: all but each `n`-th.
///
/// # Errors
/// The pattern is not a whole number of at least 1, which transformers refuses too.
pub(super) fn sliding_by_pattern(config: &ModelConfig, keys: &Keys, default: usize) -> Result<Vec<bool>> {
    const KEY: &str = "sliding_window_pattern";
    let pattern = keys.size_or(KEY, default)?;
    if pattern == 0 {
        return Err(keys.wrong(KEY, "a whole number of at least 1, or `layer_types`", &Value::from(pattern)));
    }
    Ok((1..=config.num_hidden_layers).map(|layer| !layer.is_multiple_of(pattern)).collect())
}

/// Sets the window of the sliding-window layers.
///
/// # Errors
/// A layer is a sliding-window layer, but there is no window.
pub(super) fn set_windows(
    description: &mut Description,
    config: &ModelConfig,
    keys: &Keys,
    is_sliding: &[bool],
    size: Option<usize>,
) -> Result<()> {
    if size.is_none() && is_sliding.contains(&true) {
        let what = "sliding-window layers without a `sliding_window`";
        return Err(keys.unsupported("layer_types", what));
    }
    let mask = window(config, size);
    description.for_each_attention(|layer, attention| {
        if is_sliding.get(layer).copied().unwrap_or(false) {
            attention.mask = mask;
        }
    });
    Ok(())
}
