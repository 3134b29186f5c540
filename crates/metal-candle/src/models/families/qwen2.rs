//! Qwen2 and Qwen2.5 (`model_type` `qwen2`): <https://arxiv.org/abs/2412.15115>, section 2.

use crate::error::{Error, Result};
use crate::files::JsonObject;
use crate::models::config::ModelConfig;
use crate::models::generation_defaults::GenerationDefaults;
use serde_json::Value;

/// The keys that are read here and written anew by [`ModelConfig::to_json`].
const KNOWN_KEYS: &[&str] = &[
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "hidden_act",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "eos_token_id",
    "torch_dtype",
    "dtype",
];

/// The configuration in a `config.json`; keys that are absent have the values transformers gives them.
pub(crate) fn config(object: &JsonObject) -> Result<ModelConfig> {
    let num_attention_heads = object.required_size("num_attention_heads")?;
    let hidden_size = object.required_size("hidden_size")?;
    let num_key_value_heads = match object.size("num_key_value_heads")? {
        Some(heads) => heads,
        None if object.map().contains_key("num_key_value_heads") => num_attention_heads,
        None => return Err(object.missing("num_key_value_heads", "a whole number")),
    };
    let head_dim = match object.size("head_dim")? {
        Some(size) => size,
        None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size / num_attention_heads
        }
        None => {
            let expected = format!("a multiple of `num_attention_heads` {num_attention_heads}, or a `head_dim`");
            return Err(object.wrong("hidden_size", &expected, &Value::from(hidden_size)));
        }
    };
    let config = ModelConfig {
        model_type: "qwen2".to_string(),
        vocab_size: object.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: object.required_size("intermediate_size")?,
        num_hidden_layers: object.required_size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        max_position_embeddings: object.size("max_position_embeddings")?.unwrap_or(32_768),
        rope_theta: rope_theta(object)?,
        rms_norm_eps: object.number("rms_norm_eps")?.unwrap_or(1e-6),
        tie_word_embeddings: object.flag("tie_word_embeddings")?.unwrap_or(false),
        // no key: the bias of q, k and v is part of the architecture
        attention_bias: true,
        eos_token_ids: object.token_ids("eos_token_id")?.unwrap_or_default(),
        initializer_range: object.number("initializer_range")?.unwrap_or(0.02),
        generation: GenerationDefaults::default(),
        notes: Vec::new(),
        other_keys: object.map().iter().filter(|(key, _)| !KNOWN_KEYS.contains(&key.as_str())).fold(
            serde_json::Map::new(),
            |mut others, (key, value)| {
                others.insert(key.clone(), value.clone());
                others
            },
        ),
    };
    refuse_unsupported(object, &config)?;
    Ok(config)
}

/// The base of the rotary embedding, at the top level or inside `rope_parameters`; scaled ones are refused.
fn rope_theta(object: &JsonObject) -> Result<f64> {
    let mut theta = object.number("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = object.object(key)? else { continue };
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        if let Some(kind) = kind.filter(|&kind| kind != "default") {
            return Err(unsupported(object, key, &format!("rotary scaling of type `{kind}`")));
        }
        if rope.number("partial_rotary_factor")?.is_some_and(|share| (share - 1.0).abs() > f64::EPSILON) {
            return Err(unsupported(object, key, "a `partial_rotary_factor` other than 1"));
        }
        if rope.map().values().any(Value::is_object) {
            return Err(unsupported(object, key, "rotary settings that differ by layer"));
        }
        theta = rope.number("rope_theta")?.or(theta);
    }
    Ok(theta.unwrap_or(10_000.0))
}

fn refuse_unsupported(object: &JsonObject, config: &ModelConfig) -> Result<()> {
    for key in ["quantization_config", "quantization"] {
        if let Some(value) = object.get(key) {
            let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            let what = format!("weights quantized by method `{method}`: take the unquantized model");
            return Err(unsupported(object, key, &what));
        }
    }
    if let Some(name) = object.text("hidden_act")?.filter(|&name| name != "silu" && name != "swish") {
        return Err(unsupported(object, "hidden_act", &format!("the activation `{name}` (expected `silu`)")));
    }
    if object.flag("use_mrope")?.unwrap_or(false) {
        return Err(unsupported(object, "use_mrope", "multimodal rotary embedding"));
    }
    if let Some(key) = sliding_window(object, config)? {
        return Err(unsupported(object, key, "sliding window attention"));
    }
    Ok(())
}

/// The key that makes a layer look at less than the whole sequence, if any does.
fn sliding_window(object: &JsonObject, config: &ModelConfig) -> Result<Option<&'static str>> {
    let window = object.size("sliding_window")?;
    let too_wide = window.is_some_and(|window| window >= config.max_position_embeddings);
    let used = object.flag("use_sliding_window")?.unwrap_or(false) && !too_wide;
    let first_windowed = object.size("max_window_layers")?.unwrap_or(28);
    match object.get("layer_types") {
        None => {
            // an absent key has a default, a null one means no window
            let has_window = window.is_some() || !object.map().contains_key("sliding_window");
            let applies = used && has_window && first_windowed < config.num_hidden_layers;
            Ok(applies.then_some("use_sliding_window"))
        }
        Some(Value::Array(kinds)) => {
            if kinds.len() != config.num_hidden_layers {
                let expected = format!("a list of `num_hidden_layers` {} names", config.num_hidden_layers);
                return Err(object.wrong("layer_types", &expected, &Value::Array(kinds.clone())));
            }
            let all_full = kinds.iter().all(|kind| kind.as_str() == Some("full_attention"));
            Ok((!all_full && !too_wide).then_some("layer_types"))
        }
        Some(other) => Err(object.wrong("layer_types", "a list of names", other)),
    }
}

fn unsupported(object: &JsonObject, key: &str, what: &str) -> Error {
    Error::Unsupported(format!("`{}`: `{key}`: {what}", object.path().display()))
}

/// Name and shape of every tensor of a checkpoint, layer by layer.
pub(crate) fn parameters(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads.saturating_mul(config.head_dim);
    let keys = config.num_key_value_heads.saturating_mul(config.head_dim);
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| list.push((format!("model.layers.{layer}.{name}"), shape));
        for (name, features) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
            add(&format!("self_attn.{name}.weight"), vec![features, hidden]);
            if config.attention_bias {
                add(&format!("self_attn.{name}.bias"), vec![features]);
            }
        }
        add("self_attn.o_proj.weight", vec![hidden, queries]);
        add("mlp.gate_proj.weight", vec![intermediate, hidden]);
        add("mlp.up_proj.weight", vec![intermediate, hidden]);
        add("mlp.down_proj.weight", vec![hidden, intermediate]);
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
    }
    list.push(("model.norm.weight".to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".to_string(), vec![config.vocab_size, hidden]));
    }
    list
}
