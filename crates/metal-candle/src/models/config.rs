//! `ModelConfig`: the sizes and options of a model, read from the keys of `config.json`.

use super::generation_defaults::GenerationDefaults;
use super::keys::Keys;
use super::packed::Quantization;
use crate::error::Result;
use candle_core::DType;
use serde_json::{Map, Value, json};
use std::fmt;

/// Sizes and options of a model, named as in `config.json`.
///
/// The fields are common to all families. Other keys of a family are stored with the configuration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family: `qwen2`, `llama`, `gemma3_text`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless the file or the family says otherwise.
    pub head_dim: usize,
    /// The maximum sequence length of the model, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding; that of the full-attention layers if layers differ.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Whether the head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub attention_bias: bool,
    /// Ids of the end-of-sequence tokens: `eos_token_id` of `generation_config.json` if present, otherwise of
    /// `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of newly initialized weights.
    pub initializer_range: f64,
    /// Recommended sampling settings of the model.
    pub generation: GenerationDefaults,
    /// Warnings about the files, such as values of `generation_config.json` that are out of range.
    pub notes: Vec<String>,
    /// The factor by which sequences may exceed `max_position_embeddings`.
    pub(crate) length_factor: f64,
    /// All keys as they were read; for a multimodal model, those of its text model.
    pub(crate) keys: Map<String, Value>,
    /// Whether the model is the text model of a multimodal one.
    pub(crate) is_text_part: bool,
    /// How the weights of the checkpoint are quantized. Saved models are dense, so `config.json` files omit it.
    pub(crate) quantization: Option<Quantization>,
}

/// Two configurations are equal if they write the same files, whatever style of keys they were read from.
impl PartialEq for ModelConfig {
    fn eq(&self, other: &Self) -> bool {
        self.to_map("", DType::F32) == other.to_map("", DType::F32)
            && self.generation == other.generation
            && self.notes == other.notes
            && self.eos_token_ids == other.eos_token_ids
    }
}

/// The defaults of absent keys, as in transformers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) max_position_embeddings: usize,
    /// The key of the norms' epsilon, and its default.
    pub(crate) norm_eps: (&'static str, f64),
    pub(crate) rope_theta: f64,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) head_dim: Option<usize>,
    pub(crate) num_key_value_heads: KeyValueHeads,
    pub(crate) attention_bias: bool,
    pub(crate) eos_token_ids: &'static [u32],
}

/// The number of key/value heads if the key is absent. A null key always means the number of query heads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KeyValueHeads {
    /// The number of query heads.
    AsQueries,
    /// This number.
    Of(usize),
}

impl Defaults {
    /// The defaults of most families.
    pub(crate) const BASE: Self = Self {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        max_position_embeddings: 32_768,
        norm_eps: ("rms_norm_eps", 1e-6),
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        head_dim: None,
        num_key_value_heads: KeyValueHeads::AsQueries,
        attention_bias: false,
        eos_token_ids: &[],
    };
}

impl ModelConfig {
    /// Reads the fields that all families have from the keys of a file.
    pub(crate) fn read(model_type: &str, defaults: &Defaults, keys: &Keys) -> Result<Self> {
        let num_attention_heads = keys.size_or("num_attention_heads", defaults.num_attention_heads)?;
        let hidden_size = keys.size_or("hidden_size", defaults.hidden_size)?;
        let num_key_value_heads = match (keys.size("num_key_value_heads")?, defaults.num_key_value_heads) {
            (Some(heads), _) | (None, KeyValueHeads::Of(heads)) if !keys.is_null("num_key_value_heads") => heads,
            _ => num_attention_heads,
        };
        let default_head_dim = defaults.head_dim.filter(|_| !keys.contains("head_dim"));
        let head_dim = match keys.size("head_dim")?.or(default_head_dim) {
            Some(size) => size,
            None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!("a multiple of `num_attention_heads` {num_attention_heads}, or a `head_dim`");
                return Err(keys.wrong("hidden_size", &expected, &Value::from(hidden_size)));
            }
        };
        let (eps, default_eps) = defaults.norm_eps;
        let eos_token_ids = match keys.token_ids("eos_token_id")? {
            Some(ids) => ids,
            None if keys.contains("eos_token_id") => Vec::new(),
            None => defaults.eos_token_ids.to_vec(),
        };
        let max_position_embeddings = keys.size_or("max_position_embeddings", defaults.max_position_embeddings)?;
        Ok(Self {
            model_type: model_type.to_string(),
            vocab_size: keys.size_or("vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: keys.size_or("intermediate_size", defaults.intermediate_size)?,
            num_hidden_layers: keys.size_or("num_hidden_layers", defaults.num_hidden_layers)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            length_factor: 1.0,
            rope_theta: defaults.rope_theta,
            rms_norm_eps: keys.number(eps)?.unwrap_or(default_eps),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            attention_bias: keys.flag("attention_bias")?.unwrap_or(defaults.attention_bias),
            eos_token_ids,
            initializer_range: keys.number("initializer_range")?.unwrap_or(0.02),
            generation: GenerationDefaults::default(),
            notes: Vec::new(),
            keys: keys.map().clone(),
            is_text_part: false,
            quantization: None,
        })
    }

    /// The fields and these keys, to be shown. Notes are left out: they contain paths, and later versions have more of them.
    pub(super) fn with_other_keys<'a>(&'a self, other_keys: &'a Map<String, Value>) -> impl fmt::Debug + 'a {
        fmt::from_fn(move |f| {
            f.debug_struct("ModelConfig")
                .field("model_type", &self.model_type)
                .field("vocab_size", &self.vocab_size)
                .field("hidden_size", &self.hidden_size)
                .field("intermediate_size", &self.intermediate_size)
                .field("num_hidden_layers", &self.num_hidden_layers)
                .field("num_attention_heads", &self.num_attention_heads)
                .field("num_key_value_heads", &self.num_key_value_heads)
                .field("head_dim", &self.head_dim)
                .field("max_position_embeddings", &self.max_position_embeddings)
                .field("rope_theta", &self.rope_theta)
                .field("rms_norm_eps", &self.rms_norm_eps)
                .field("tie_word_embeddings", &self.tie_word_embeddings)
                .field("attention_bias", &self.attention_bias)
                .field("eos_token_ids", &self.eos_token_ids)
                .field("initializer_range", &self.initializer_range)
                .field("generation", &self.generation)
                .field("notes", &[""; 0])
                .field("other_keys", other_keys)
                .finish()
        })
    }

    /// Describes how the weights of the checkpoint are quantized: `4 bits in groups of 64 (MLX)`. `None` if they are
    /// dense, or in a GGUF file, in which each tensor has its own type.
    pub fn quantization(&self) -> Option<String> {
        self.quantization.as_ref().map(Quantization::to_string)
    }

    /// The maximum length of a sequence, in tokens: `max_position_embeddings`, times the factor of dynamic rotary
    /// scaling.
    pub fn max_sequence_length(&self) -> usize {
        (self.max_position_embeddings as f64 * self.length_factor) as usize
    }

    /// The text of a `generation_config.json`.
    pub fn generation_to_json(&self) -> String {
        let defaults = &self.generation;
        let mut map = Map::new();
        let values = [
            ("eos_token_id", self.eos_json()),
            ("do_sample", defaults.do_sample.map(Value::from)),
            ("temperature", defaults.temperature.map(Value::from)),
            ("top_k", defaults.top_k.map(Value::from)),
            ("top_p", defaults.top_p.map(Value::from)),
            ("min_p", defaults.min_p.map(Value::from)),
            ("repetition_penalty", defaults.repetition_penalty.map(Value::from)),
        ];
        for (key, value) in values {
            if let Some(value) = value {
                map.insert(key.into(), value);
            }
        }
        format!("{:#}\n", Value::Object(map))
    }

    /// The keys of a `config.json` for weights in `dtype`, with the class name `architecture` of transformers: the keys
    /// that were read, with the current values of the fields.
    pub(crate) fn to_map(&self, architecture: &str, dtype: DType) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("architectures".into(), json!([architecture]));
        map.insert("model_type".into(), json!(self.model_type));
        for (key, value) in &self.keys {
            map.entry(key.clone()).or_insert_with(|| value.clone());
        }
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            map.insert(key.into(), json!(size));
        }
        if self.head_dim.saturating_mul(self.num_attention_heads) != self.hidden_size {
            map.insert("head_dim".into(), json!(self.head_dim));
        }
        map.insert("initializer_range".into(), json!(self.initializer_range));
        map.insert("tie_word_embeddings".into(), json!(self.tie_word_embeddings));
        if let Some(ids) = self.eos_json() {
            map.insert("eos_token_id".into(), ids);
        }
        let is_nested = |rope: &Map<String, Value>| rope.values().any(Value::is_object);
        if !map.get("rope_parameters").and_then(Value::as_object).is_some_and(is_nested) {
            map.insert("rope_theta".into(), json!(self.rope_theta));
        }
        map.remove("dtype");
        map.insert("torch_dtype".into(), json!(dtype_name(dtype)));
        map
    }

    fn eos_json(&self) -> Option<Value> {
        match self.eos_token_ids.as_slice() {
            [] => None,
            [id] => Some(json!(id)),
            ids => Some(json!(ids)),
        }
    }
}

/// The name of a dtype in torch.
fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F64 => "float64",
        _ => "float32",
    }
}
