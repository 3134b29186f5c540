//! What the families share: the plain decoder that each of them changes, and keys that several of them read.

use crate::error::Result;
use crate::files::JsonObject;
use crate::models::config::ModelConfig;
use crate::models::description::{
    AttentionSpec, Description, EmbeddingSpec, FeedForwardSpec, GatedMlpSpec, GatedProjections, HeadSpec, LayerSpec,
    NormPlacement, NormSpec,
};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;
use crate::ops::rotary::{Pairs, RotaryScaling, RotarySpec};
use metal_candle_kernels::Mask;
use serde_json::Value;

/// The decoder of Llama without scaled positions: RMS norms before attention and a gated MLP with `silu`, rotary positions over
/// whole heads, no biases but those of q, k and v if `attention_bias`.
pub(super) fn decoder(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let rope = RopeKeys::read(config, keys, None)?;
    decoder_with(config, keys, &rope)
}

/// The same decoder whose layers with a window have a rotary table of their own, with base `local` if no key says otherwise.
pub(super) fn decoder_with_windows(
    config: &mut ModelConfig,
    keys: &Keys,
    is_sliding: &[bool],
    (local_key, local): (&str, f64),
) -> Result<Description> {
    let full = RopeKeys::read(config, keys, Some("full_attention"))?;
    let mut description = decoder_with(config, keys, &full)?;
    let of_windows = if full.is_nested {
        let default = ModelConfig { rope_theta: local, ..config.clone() };
        RopeKeys::read(&default, keys, Some("sliding_attention"))?
    } else {
        let theta = keys.number(local_key)?.unwrap_or(local);
        RopeKeys { rope: None, theta, share: full.share, scaling: RotaryScaling::Default, is_nested: false }
    };
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

/// RMSNorm with a weight.
pub(super) fn rms_norm(config: &ModelConfig) -> NormSpec {
    let kind = NormKind::Rms { offset: 0.0 };
    NormSpec { kind, eps: config.rms_norm_eps, has_weight: true, has_bias: false }
}

/// The activation that `key` names.
pub(super) fn activation(keys: &Keys, key: &str, default: Activation) -> Result<Activation> {
    Ok(match keys.text(key)? {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
        Some("gelu") => Activation::Gelu,
        Some("relu") => Activation::Relu,
        Some("relu2") => Activation::Relu2,
        Some(name) => {
            let known = "expected `silu`, `gelu`, `gelu_pytorch_tanh`, `relu` or `relu2`";
            return Err(keys.unsupported(key, &format!("the activation `{name}` ({known})")));
        }
    })
}

/// A factor that is 1 where the key is absent.
pub(super) fn factor(keys: &Keys, key: &str) -> Result<f32> {
    Ok(keys.number(key)?.unwrap_or(1.0) as f32)
}

/// A positive cap, or none where the key is absent or null.
pub(super) fn soft_cap(keys: &Keys, key: &str, default: Option<f64>) -> Result<Option<f32>> {
    let value = if keys.contains(key) { keys.number(key)? } else { default };
    match value {
        Some(cap) if cap <= 0.0 => Err(keys.wrong(key, "a number above 0, or null", &Value::from(cap))),
        value => Ok(value.map(|cap| cap as f32)),
    }
}

/// Attention to `window` tokens, itself included; everything where a window covers the longest sequence.
pub(super) fn window(config: &ModelConfig, window: Option<usize>) -> Mask {
    match window {
        Some(window) if window > 0 && window < config.max_position_embeddings => Mask::Window(window),
        _ => Mask::Causal,
    }
}

/// The window of `sliding_window`: `default` where the key is absent, none where it is null.
pub(super) fn sliding_window(keys: &Keys, default: Option<usize>) -> Result<Option<usize>> {
    if keys.contains("sliding_window") { keys.size("sliding_window") } else { Ok(default) }
}

/// For each layer whether `layer_types` names it a sliding one; none if the key is absent.
pub(super) fn layer_types(config: &ModelConfig, keys: &Keys) -> Result<Option<Vec<bool>>> {
    let kinds = match keys.get("layer_types") {
        None => return Ok(None),
        Some(Value::Array(kinds)) => kinds,
        Some(other) => return Err(keys.wrong("layer_types", "a list of names", other)),
    };
    if kinds.len() != config.num_hidden_layers {
        let expected = format!("a list of `num_hidden_layers` {} names", config.num_hidden_layers);
        return Err(keys.wrong("layer_types", &expected, &Value::Array(kinds.clone())));
    }
    let is_sliding = |kind: &Value| match kind.as_str() {
        Some("full_attention" | "attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        Some(name) => Err(keys.unsupported("layer_types", &format!("layers of type `{name}`"))),
        None => Err(keys.wrong("layer_types", "a list of names", kind)),
    };
    kinds.iter().map(is_sliding).collect::<Result<_>>().map(Some)
}

/// Gives the sliding layers a window.
///
/// # Errors
/// A layer is sliding, but there is no window.
pub(super) fn set_windows(
    description: &mut Description,
    config: &ModelConfig,
    keys: &Keys,
    is_sliding: &[bool],
    size: Option<usize>,
) -> Result<()> {
    if size.is_none() && is_sliding.contains(&true) {
        let what = "sliding attention without a `sliding_window` that is in use";
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

/// The rotary settings of a configuration, in the old style or the new one.
pub(super) struct RopeKeys {
    /// The keys of `rope_scaling` or `rope_parameters`, and which of them.
    rope: Option<(&'static str, JsonObject)>,
    pub(super) theta: f64,
    /// The rotated share of a head.
    pub(super) share: f64,
    scaling: RotaryScaling,
    /// Whether they were given by type of layer.
    is_nested: bool,
}

impl RopeKeys {
    /// The settings of all layers, or of layers of type `kind`, below whose name they may be nested.
    pub(super) fn read(config: &ModelConfig, keys: &Keys, kind: Option<&str>) -> Result<Self> {
        let mut is_any_nested = false;
        let mut found = None;
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(object) = keys.object(key)?.filter(|object| !object.map().is_empty()) {
                found = Some((key, object));
            }
        }
        let found_key = found.as_ref().map_or("partial_rotary_factor", |(key, _)| key);
        let (theta, share) = (keys.number("rope_theta")?, keys.number("partial_rotary_factor")?);
        let mut rope = None;
        if let Some((key, object)) = found {
            let is_nested = object.map().values().any(Value::is_object);
            is_any_nested = is_nested;
            rope = match kind {
                _ if !is_nested => Some((key, object)),
                Some(kind) => object.object(kind)?.map(|object| (key, object)),
                None => return Err(keys.unsupported(key, "rotary settings that differ by layer")),
            };
        }
        let number = |name: &str| match &rope {
            Some((_, object)) => object.number(name),
            None => Ok(None),
        };
        let theta = number("rope_theta")?.or(theta.filter(|_| kind != Some("sliding_attention")));
        let theta = theta.unwrap_or(config.rope_theta);
        let share = number("partial_rotary_factor")?.or(share).unwrap_or(default_share(config));
        let scaling = match &rope {
            Some((key, object)) => scaling(config, keys, key, object)?,
            None => RotaryScaling::Default,
        };
        if !(1.0..=1e30).contains(&theta) {
            return Err(keys.wrong("rope_theta", "a number from 1 to 1e30", &Value::from(theta)));
        }
        let is_whole = (share - 1.0).abs() < f64::EPSILON;
        if !is_whole && !PARTIAL.contains(&config.model_type.as_str()) {
            return Err(keys.unsupported(found_key, "a `partial_rotary_factor` other than 1"));
        }
        if !(share > 0.0 && share <= 1.0) {
            return Err(keys.wrong("partial_rotary_factor", "a number above 0 and at most 1", &Value::from(share)));
        }
        Ok(Self { rope, theta, share, scaling, is_nested: is_any_nested })
    }

    /// The table for the heads of `config`.
    pub(super) fn table(&self, config: &ModelConfig) -> RotarySpec {
        // an odd share is rounded up to whole pairs
        let dim = ((config.head_dim as f64 * self.share) as usize).next_multiple_of(2);
        RotarySpec {
            dim,
            theta: self.theta,
            scaling: self.scaling.clone(),
            pairs: Pairs::Halves,
            max_position_embeddings: config.max_position_embeddings,
        }
    }

    /// Whether the configuration has rotary settings beside `rope_theta`.
    pub(super) fn is_given(&self) -> bool {
        self.rope.is_some()
    }

    /// The number of another key among the settings.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>> {
        match &self.rope {
            Some((_, object)) => object.number(name),
            None => Ok(None),
        }
    }
}

/// The families that rotate a part of each head.
const PARTIAL: [&str; 3] = ["glm", "glm4", "phi3"];

/// The scaling of rotary frequencies.
fn scaling(config: &ModelConfig, keys: &Keys, key: &str, rope: &JsonObject) -> Result<RotaryScaling> {
    let kind = match rope.text("rope_type")? {
        Some(kind) => Some(kind),
        None => rope.text("type")?,
    };
    let kind = kind.unwrap_or("default");
    // old files of Phi-3 have other names for it
    let kind = if config.model_type == "phi3" && matches!(kind, "su" | "yarn") { "longrope" } else { kind };
    let longest = config.max_position_embeddings;
    let original = if config.model_type == "phi3" {
        // beside the settings, never among them
        keys.size("original_max_position_embeddings")?.unwrap_or(4096)
    } else {
        rope.size("original_max_position_embeddings")?.unwrap_or(longest)
    };
    if original == 0 {
        return Err(rope.wrong("original_max_position_embeddings", "at least 1", &Value::from(0)));
    }
    let factor = |name: &str| -> Result<f64> {
        let value = rope.number(name)?.ok_or_else(|| rope.missing(name, "a number"))?;
        if value > 0.0 { Ok(value) } else { Err(rope.wrong(name, "a number above 0", &Value::from(value))) }
    };
    Ok(match kind {
        "default" => RotaryScaling::Default,
        "linear" => RotaryScaling::Linear { factor: factor("factor")? },
        "dynamic" => RotaryScaling::Dynamic { factor: factor("factor")? },
        "llama3" => RotaryScaling::Llama3 {
            factor: factor("factor")?,
            low_freq_factor: factor("low_freq_factor")?,
            high_freq_factor: factor("high_freq_factor")?,
            original_max_position_embeddings: original,
        },
        "yarn" => RotaryScaling::Yarn {
            factor: rope.number("factor")?,
            original_max_position_embeddings: original,
            beta_fast: rope.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: rope.number("beta_slow")?.unwrap_or(1.0),
            truncate: rope.flag("truncate")?.unwrap_or(true),
            attention_factor: rope.number("attention_factor")?,
            mscale: rope.number("mscale")?,
            mscale_all_dim: rope.number("mscale_all_dim")?,
        },
        "longrope" => {
            let pairs = (config.head_dim as f64 * share_of(config, keys, rope)?) as usize / 2;
            RotaryScaling::LongRope {
                short_factor: factors(rope, "short_factor", pairs)?,
                long_factor: factors(rope, "long_factor", pairs)?,
                original_max_position_embeddings: original,
                factor: rope.number("factor")?,
                attention_factor: rope.number("attention_factor")?,
            }
        }
        other => return Err(keys.unsupported(key, &format!("rotary scaling of type `{other}`"))),
    })
}

fn share_of(config: &ModelConfig, keys: &Keys, rope: &JsonObject) -> Result<f64> {
    let share = rope.number("partial_rotary_factor")?.or(keys.number("partial_rotary_factor")?);
    Ok(share.unwrap_or(default_share(config)))
}

/// The rotated share of a head where no key says it.
fn default_share(config: &ModelConfig) -> f64 {
    if matches!(config.model_type.as_str(), "glm" | "glm4") { 0.5 } else { 1.0 }
}

/// A list of one positive number for each rotated pair.
fn factors(rope: &JsonObject, name: &str, pairs: usize) -> Result<Vec<f64>> {
    let expected = format!("a list of {pairs} numbers above 0, one for each rotated pair");
    let value = rope.get(name).ok_or_else(|| rope.missing(name, &expected))?;
    let list = value.as_array().filter(|list| list.len() == pairs);
    let list = list.ok_or_else(|| rope.wrong(name, &expected, value))?;
    let number = |value: &Value| {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| rope.wrong(name, &expected, value))
    };
    list.iter().map(number).collect()
}
