//! What a model is: the keys of `config.json`.

use super::families;
use super::generation_defaults::{Advice, GenerationDefaults};
use crate::error::{Error, Result};
use crate::files::{JsonObject, element_count};
use candle_core::DType;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Most rows, columns, heads or tokens a configuration may name.
const MAX_SIZE: usize = 1 << 24;
/// Most blocks a configuration may name.
const MAX_LAYERS: usize = 1 << 12;

/// Sizes and options of a decoder, in the words of `config.json`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family, `qwen2`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless the file says otherwise.
    pub head_dim: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of the `RMSNorm` layers.
    pub rms_norm_eps: f64,
    /// Whether the head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias (Qwen2 has).
    pub attention_bias: bool,
    /// Ids that end a text: `eos_token_id` of `generation_config.json` if there is one, else of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of newly drawn weights.
    pub initializer_range: f64,
    /// Sampling settings the model's makers advise.
    pub generation: GenerationDefaults,
    /// What is odd about the files read and does no harm, such as values of `generation_config.json` that make no sense.
    pub notes: Vec<String>,
    /// The keys that the decoder does not need, kept for [`ModelConfig::to_json`].
    pub(crate) other_keys: Map<String, Value>,
}

impl ModelConfig {
    /// Reads a `config.json` (or the one in a folder) and the `generation_config.json` beside it, if there is one.
    ///
    /// Both the keys of transformers 4 and of transformers 5 are understood.
    ///
    /// What `generation_config.json` says is advice: values that make no sense are ignored and listed in
    /// [`ModelConfig::notes`].
    ///
    /// # Errors
    /// `config.json` cannot be read, a key is missing or has a wrong value, or the model is not supported.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let mut config = Self::from_object(&JsonObject::read(&file)?)?;
        let generation = file.with_file_name("generation_config.json");
        if generation != file {
            let advice = Advice::read(&generation, config.vocab_size);
            config.generation = advice.defaults;
            config.notes = advice.notes;
            config.eos_token_ids = advice.eos_token_ids.unwrap_or(config.eos_token_ids);
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn from_json_str(text: &str) -> Result<Self> {
        Self::from_object(&JsonObject::parse(text, Path::new("config.json"))?)
    }

    fn from_object(object: &JsonObject) -> Result<Self> {
        let config = match object.text("model_type")? {
            Some("qwen2") => families::qwen2::config(object)?,
            Some(other) => {
                let path = object.path().display();
                let supported = families::SUPPORTED.join("`, `");
                return Err(Error::Unsupported(format!(
                    "`{path}` has `model_type` `{other}`; supported are: `{supported}`"
                )));
            }
            None => return Err(object.missing("model_type", "the name of a model family")),
        };
        config.validate().map_err(|error| match error {
            Error::Argument { name, message } => Error::format(object.path(), format!("`{name}`: {message}")),
            other => other,
        })?;
        Ok(config)
    }

    /// Checks that the sizes make a decoder that can exist.
    ///
    /// # Errors
    /// The first key whose value cannot be, with what was expected.
    pub fn validate(&self) -> Result<()> {
        if !families::SUPPORTED.contains(&self.model_type.as_str()) {
            let supported = families::SUPPORTED.join("`, `");
            let found = &self.model_type;
            return Err(Error::Unsupported(format!("`model_type` `{found}`; supported are: `{supported}`")));
        }
        for (name, size, most) in [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", self.num_key_value_heads, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, MAX_SIZE),
            ("num_attention_heads * head_dim", self.num_attention_heads.saturating_mul(self.head_dim), MAX_SIZE),
        ] {
            if size == 0 || size > most {
                return Err(Error::argument(name, format!("expected 1 to {most}, found {size}")));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            let found = self.head_dim;
            return Err(Error::argument("head_dim", format!("expected an even number, found {found}")));
        }
        let (queries, keys) = (self.num_attention_heads, self.num_key_value_heads);
        if !queries.is_multiple_of(keys) {
            return Err(Error::argument(
                "num_key_value_heads",
                format!("expected a divisor of `num_attention_heads` {queries}, found {keys}"),
            ));
        }
        for (name, number, fits) in [
            ("rope_theta", self.rope_theta, self.rope_theta >= 1.0 && self.rope_theta <= 1e30),
            ("rms_norm_eps", self.rms_norm_eps, self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0),
            ("initializer_range", self.initializer_range, (0.0..1e3).contains(&self.initializer_range)),
        ] {
            if !fits {
                return Err(Error::argument(name, format!("expected a value in its range, found {number}")));
            }
        }
        if self.count_parameters().is_none_or(|count| count > isize::MAX as u64 / 4) {
            return Err(Error::argument("num_hidden_layers", "the model is larger than any memory"));
        }
        Ok(())
    }

    /// Number of parameters; a tied head is counted once.
    pub fn num_parameters(&self) -> usize {
        self.count_parameters().and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX)
    }

    /// Memory of the weights in `dtype`, in bytes.
    pub fn num_bytes(&self, dtype: DType) -> usize {
        self.num_parameters().saturating_mul(dtype.size_in_bytes())
    }

    fn count_parameters(&self) -> Option<u64> {
        let one_layer = Self { num_hidden_layers: 1, ..self.clone() };
        let no_layer = Self { num_hidden_layers: 0, ..self.clone() };
        let (rest, one) = (count_elements(&no_layer)?, count_elements(&one_layer)?);
        (one - rest).checked_mul(self.num_hidden_layers as u64)?.checked_add(rest)
    }

    /// The text of a `config.json` for weights in `dtype` that transformers and this library load.
    pub fn to_json(&self, dtype: DType) -> String {
        let mut map = Map::new();
        map.insert("architectures".into(), json!(["Qwen2ForCausalLM"]));
        map.insert("model_type".into(), json!(self.model_type));
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
        map.insert("hidden_act".into(), json!("silu"));
        map.insert("rms_norm_eps".into(), json!(self.rms_norm_eps));
        map.insert("rope_theta".into(), json!(self.rope_theta));
        map.insert("initializer_range".into(), json!(self.initializer_range));
        map.insert("tie_word_embeddings".into(), json!(self.tie_word_embeddings));
        map.insert("use_sliding_window".into(), json!(false));
        if let Some(ids) = self.eos_json() {
            map.insert("eos_token_id".into(), ids);
        }
        map.insert("torch_dtype".into(), json!(dtype_name(dtype)));
        for (key, value) in &self.other_keys {
            map.entry(key.clone()).or_insert_with(|| value.clone());
        }
        format!("{:#}\n", Value::Object(map))
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

    fn eos_json(&self) -> Option<Value> {
        match self.eos_token_ids.as_slice() {
            [] => None,
            [id] => Some(json!(id)),
            ids => Some(json!(ids)),
        }
    }

    /// The `config.json` that belongs to weights at `path`.
    pub(crate) fn path_beside(path: &Path) -> PathBuf {
        if path.is_dir() { path.join("config.json") } else { path.with_file_name("config.json") }
    }
}

/// The name torch has for a dtype.
fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F64 => "float64",
        _ => "float32",
    }
}

fn count_elements(config: &ModelConfig) -> Option<u64> {
    families::qwen2::parameters(config).iter().try_fold(0_u64, |sum, (_, shape)| sum.checked_add(element_count(shape)?))
}
