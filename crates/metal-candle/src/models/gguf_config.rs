//! The configuration of models in GGUF files, as the keys of a `config.json`.

use super::ModelConfig;
use super::gguf_floats::floats;
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufValue, JsonObject, end_of_generation_ids};
use serde_json::{Map, Value, json};

/// An architecture of GGUF files.
pub(super) struct Architecture {
    /// The value of `general.architecture`.
    name: &'static str,
    model_type: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    pub(super) has_interleaved_rows: bool,
    /// Whether 1 was added to the weights of the norms.
    pub(super) has_norm_offset: bool,
    /// Names of modules of a layer, in the file and in a checkpoint, that differ from the usual ones.
    pub(super) modules: &'static [(&'static str, &'static str)],
    /// Those of [`FORWARD_KEYS`] that `keys` reads.
    reads: &'static [&'static str],
    /// Further keys of `config.json`.
    keys: fn(&Metadata, &mut Map<String, Value>) -> Result<()>,
}

/// Keys that change what a model computes and that not every architecture has. A file with one that is not read is refused.
const FORWARD_KEYS: &[&str] = &[
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.dimension_count_swa",
    "rope.freq_base_swa",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
];

const GEMMA_KEYS: &[&str] = &[
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
];
const GRANITE_KEYS: &[&str] = &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"];

/// Norms before and after each part.
const SANDWICH: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

const BASE: Architecture = Architecture {
    name: "",
    model_type: "",
    has_interleaved_rows: false,
    has_norm_offset: false,
    modules: &[],
    reads: &[],
    keys: |_, _| Ok(()),
};

const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        model_type: "llama",
        has_interleaved_rows: true,
        reads: &["attention.sliding_window"],
        keys: llama,
        ..BASE
    },
    Architecture { name: "qwen2", model_type: "qwen2", ..BASE },
    Architecture { name: "qwen3", model_type: "qwen3", ..BASE },
    Architecture { name: "gemma", model_type: "gemma", has_norm_offset: true, ..BASE },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        has_norm_offset: true,
        modules: SANDWICH,
        reads: GEMMA_KEYS,
        keys: gemma2,
        ..BASE
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        has_norm_offset: true,
        modules: SANDWICH,
        reads: GEMMA_KEYS,
        keys: gemma3,
        ..BASE
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        modules: &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
        reads: &["attention.sliding_window", "rope.scaling.attn_factor"],
        keys: phi3,
        ..BASE
    },
    Architecture { name: "smollm3", model_type: "smollm3", has_interleaved_rows: true, ..BASE },
    Architecture {
        name: "granite",
        model_type: "granite",
        has_interleaved_rows: true,
        reads: GRANITE_KEYS,
        keys: granite,
        ..BASE
    },
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        modules: &[
            ("post_attention_norm", "post_attention_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ],
        keys: olmo2,
        ..BASE
    },
];

/// The metadata of an architecture: keys below its name.
pub(super) struct Metadata<'a> {
    file: &'a GgufFile,
    pub(super) architecture: &'static Architecture,
}

impl<'a> Metadata<'a> {
    pub(super) fn of(file: &'a GgufFile) -> Result<Self> {
        let name = file.text("general.architecture")?;
        let name =
            name.ok_or_else(|| Error::format(file.path(), "expected the key `general.architecture`, found none"))?;
        if let Some(kind) = file.text("general.type")?.filter(|kind| *kind != "model") {
            return Err(Error::format(file.path(), format!("expected a model, found a file of type `{kind}`")));
        }
        let architecture = ARCHITECTURES.iter().find(|known| known.name == name).ok_or_else(|| {
            let known = ARCHITECTURES.iter().map(|known| known.name).collect::<Vec<_>>().join("`, `");
            Error::Unsupported(format!(
                "`{}`: GGUF files of architecture `{name}`; supported are: `{known}`",
                file.path().display()
            ))
        })?;
        Ok(Self { file, architecture })
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    /// A size that is the same for all layers, if there is one.
    fn size(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        let Some(GgufValue::List(values)) = self.file.metadata().get(&key) else { return self.file.size(&key) };
        let first = values.first();
        if values.iter().any(|value| Some(value) != first) {
            return Err(self.unsupported(&format!("`{key}` differs between layers")));
        }
        Ok(match first {
            Some(GgufValue::Integer(size)) => usize::try_from(*size).ok(),
            _ => None,
        })
    }

    fn required_size(&self, name: &str) -> Result<usize> {
        let missing = || Error::format(self.file.path(), format!("expected the key `{}`, found none", self.key(name)));
        self.size(name)?.ok_or_else(missing)
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.file.number(&self.key(name))
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.file.text(&self.key(name))
    }

    pub(super) fn head_dim(&self) -> Result<usize> {
        let heads = self.required_size("attention.head_count")?;
        let width = self.required_size("embedding_length")?.checked_div(heads).unwrap_or(0);
        Ok(self.size("attention.key_length")?.unwrap_or(width))
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::Unsupported(format!("`{}`: {what}", self.file.path().display()))
    }

    /// Refuses what the architecture does not read.
    fn check(&self) -> Result<()> {
        for name in FORWARD_KEYS.iter().filter(|name| !self.architecture.reads.contains(name)) {
            let value = self.file.metadata().get(&self.key(name));
            let is_neutral = match value {
                None => true,
                Some(GgufValue::Integer(value)) => *value == 0,
                // factors of 1 and bounds of 0 change nothing
                Some(GgufValue::Float(value)) => {
                    *value == 0.0 || ((*value - 1.0).abs() < f64::EPSILON && !name.ends_with("softcapping"))
                }
                Some(_) => false,
            };
            if !is_neutral {
                return Err(self.unsupported(&format!("`{}` in a model of this architecture", self.key(name))));
            }
        }
        if self.file.flag(&self.key("attention.causal"))? == Some(false) {
            return Err(self.unsupported("attention to later tokens (`attention.causal`)"));
        }
        let (rotated, head_dim) = (self.size("rope.dimension_count")?, self.head_dim()?);
        if self.architecture.model_type != "phi3" && rotated.is_some_and(|rotated| rotated != head_dim) {
            return Err(
                self.unsupported(&format!("`{}` other than the width of a head", self.key("rope.dimension_count")))
            );
        }
        Ok(())
    }

    /// The keys of `config.json` that most families have.
    fn config(&self) -> Result<Map<String, Value>> {
        self.check()?;
        let mut map = Map::new();
        let mut set = |key: &str, value: Value| {
            map.insert(key.into(), value);
        };
        set("model_type", self.architecture.model_type.into());
        if self.size("expert_count")?.unwrap_or(0) > 0 {
            return Err(self.unsupported(&format!("a mixture of experts (`{}`)", self.key("expert_count"))));
        }
        let embedding = self.file.tensor("token_embd.weight");
        let embedding = embedding
            .ok_or_else(|| Error::format(self.file.path(), "expected the tensor `token_embd.weight`, found none"))?;
        set("vocab_size", embedding.shape.first().copied().unwrap_or(0).into());
        set("hidden_size", self.required_size("embedding_length")?.into());
        let layers = self.required_size("block_count")?;
        set("num_hidden_layers", layers.saturating_sub(self.size("nextn_predict_layers")?.unwrap_or(0)).into());
        set("intermediate_size", self.required_size("feed_forward_length")?.into());
        let heads = self.required_size("attention.head_count")?;
        set("num_attention_heads", heads.into());
        set("num_key_value_heads", self.size("attention.head_count_kv")?.unwrap_or(heads).into());
        set("head_dim", self.head_dim()?.into());
        set("max_position_embeddings", self.required_size("context_length")?.into());
        if let Some(eps) = self.number("attention.layer_norm_rms_epsilon")? {
            set("rms_norm_eps", shortest(eps));
        }
        if let Some(theta) = self.number("rope.freq_base")? {
            set("rope_theta", shortest(theta));
        }
        set("tie_word_embeddings", (!self.has_tensor("output.weight")).into());
        if let Some(scaling) = self.rope_scaling()? {
            set("rope_scaling", scaling);
        }
        let ids = end_of_generation_ids(self.file)?;
        if !ids.is_empty() {
            set("eos_token_id", ids.into());
        }
        if let Some(id) = self.file.size("tokenizer.ggml.bos_token_id")? {
            set("bos_token_id", id.into());
        }
        Ok(map)
    }

    fn rope_scaling(&self) -> Result<Option<Value>> {
        let original = self.size("rope.scaling.original_context_length")?;
        let factor = self.number("rope.scaling.factor")?;
        match (self.text("rope.scaling.type")?, factor) {
            (Some("linear"), Some(factor)) => {
                return Ok(Some(json!({"rope_type": "linear", "factor": shortest(factor)})));
            }
            (Some("yarn"), Some(factor)) => {
                let mut scaling = json!({"rope_type": "yarn", "factor": shortest(factor)});
                for (key, name) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                    if let Some(beta) = self.number(&format!("rope.scaling.{name}"))? {
                        scaling[key] = shortest(beta);
                    }
                }
                if let Some(original) = original {
                    scaling["original_max_position_embeddings"] = original.into();
                }
                return Ok(Some(scaling));
            }
            (None | Some("none" | "longrope" | "linear" | "yarn"), _) => {}
            (Some(other), _) => {
                return Err(self.unsupported(&format!("rotary scaling of type `{other}`")));
            }
        }
        let Some(tensor) = self.file.tensor("rope_freqs.weight") else { return Ok(None) };
        let factors = floats(self.file, tensor)?;
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        Ok(Some(llama3_scaling(&factors, theta, self.required_size("context_length")?)))
    }
}

/// A number of a file, which is f32, with no more digits than f32 needs.
fn shortest(number: f64) -> Value {
    let narrow = number as f32;
    if f64::from(narrow).to_bits() == number.to_bits() {
        return narrow.to_string().parse::<f64>().map_or(Value::Null, Value::from);
    }
    number.into()
}

/// The settings of Llama 3 that give these divisors of the frequencies, or the divisors themselves.
fn llama3_scaling(divisors: &[f32], theta: f64, context: usize) -> Value {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let divisor = |pair: usize| {
        let wave = std::f64::consts::TAU * theta.powf(pair as f64 / divisors.len() as f64);
        let smooth = (original / wave - low) / (high - low);
        1.0 / ((1.0 - smooth.clamp(0.0, 1.0)) / factor + smooth.clamp(0.0, 1.0))
    };
    let is_close = |(pair, found): (usize, &f32)| (f64::from(*found) / divisor(pair) - 1.0).abs() < 1e-4;
    if divisors.iter().enumerate().all(is_close) {
        return json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original as usize,
        });
    }
    json!({
        "rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    })
}

fn llama(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("attention_bias".into(), metadata.has_tensor("blk.0.attn_q.bias").into());
    map.insert("mlp_bias".into(), metadata.has_tensor("blk.0.ffn_gate.bias").into());
    if let Some(window) = metadata.size("attention.sliding_window")?.filter(|&window| window > 0) {
        if metadata.has_tensor("blk.0.attn_q.bias") || metadata.has_tensor("blk.0.ffn_gate.bias") {
            return Err(metadata.unsupported("biases and a window (`attention.sliding_window`) in one model"));
        }
        // Llama has no windows, Mistral has
        map.retain(|key, _| !key.ends_with("_bias"));
        map.insert("model_type".into(), "mistral".into());
        map.insert("sliding_window".into(), window.into());
    }
    Ok(())
}

fn gemma2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    gemma(metadata, map, 46)
}

fn gemma3(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    let local = metadata.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
    map.insert("rope_local_base_freq".into(), shortest(local));
    gemma(metadata, map, 62)
}

/// Windows, caps and the scale of scores. The file does not say the latter: of the published sizes, only the one of
/// `odd_layers` layers scales by another width than that of its heads.
fn gemma(metadata: &Metadata, map: &mut Map<String, Value>, odd_layers: usize) -> Result<()> {
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = metadata.number(name)? {
            map.insert(name.into(), shortest(cap));
        }
    }
    if let Some(window) = metadata.size("attention.sliding_window")? {
        map.insert("sliding_window".into(), window.into());
    }
    let key = metadata.key("attention.sliding_window_pattern");
    match metadata.file.metadata().get(&key) {
        None => {}
        Some(GgufValue::List(layers)) => {
            let name = |is_sliding| if is_sliding { "sliding_attention" } else { "full_attention" };
            let types = layers.iter().map(|layer| match layer {
                GgufValue::Flag(is_sliding) => Ok(Value::from(name(*is_sliding))),
                _ => Err(metadata.unsupported(&format!("`{key}`: expected booleans"))),
            });
            map.insert("layer_types".into(), Value::Array(types.collect::<Result<_>>()?));
        }
        Some(_) => return Err(metadata.unsupported(&format!("`{key}`: expected a list of booleans"))),
    }
    let width = metadata.required_size("embedding_length")?;
    let heads = metadata.required_size("attention.head_count")?;
    let is_odd = metadata.required_size("block_count")? == odd_layers;
    let scalar = if is_odd { width.checked_div(heads).unwrap_or(0) } else { metadata.head_dim()? };
    map.insert("query_pre_attn_scalar".into(), scalar.into());
    Ok(())
}

fn phi3(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if let Some(window) = metadata.size("attention.sliding_window")?.filter(|&window| window > 0) {
        map.insert("sliding_window".into(), window.into());
    }
    if let Some(rotated) = metadata.size("rope.dimension_count")? {
        let share = rotated as f64 / metadata.head_dim()?.max(1) as f64;
        map.insert("partial_rotary_factor".into(), share.into());
    }
    let original = metadata.size("rope.scaling.original_context_length")?;
    if let Some(original) = original {
        map.insert("original_max_position_embeddings".into(), original.into());
    }
    let factors = |name: &str| metadata.file.tensor(name).map(|tensor| floats(metadata.file, tensor)).transpose();
    if let (Some(short), Some(long)) = (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?) {
        let mut scaling = json!({"rope_type": "longrope", "short_factor": short, "long_factor": long});
        if let Some(factor) = metadata.number("rope.scaling.attn_factor")? {
            scaling["attention_factor"] = shortest(factor);
        }
        map.insert("rope_scaling".into(), scaling);
    }
    Ok(())
}

fn granite(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    for (key, name) in [
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("attention_multiplier", "attention.scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(number) = metadata.number(name)? {
            map.insert(key.into(), shortest(number));
        }
    }
    Ok(())
}

#[allow(clippy::unnecessary_wraps)] // one of several functions of this type
fn olmo2(_: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("attention_bias".into(), false.into());
    Ok(())
}

impl ModelConfig {
    /// The configuration of a model in a GGUF file.
    ///
    /// # Errors
    /// The architecture is not supported, or a key is missing or has a wrong value.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let metadata = Metadata::of(file)?;
        let mut map = metadata.config()?;
        (metadata.architecture.keys)(&metadata, &mut map)?;
        Self::from_object(&JsonObject::from_map(file.path(), map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::files::gguf_testing::write;
    use crate::files::{GgufFile, GgufValue};
    use crate::models::ModelConfig;

    /// The configuration of a small Llama with further metadata.
    fn read(architecture: &str, more: &[(&str, GgufValue)]) -> crate::Result<ModelConfig> {
        let mut metadata = vec![("general.architecture".to_string(), GgufValue::Text(architecture.into()))];
        for (name, size) in [
            ("block_count", 2),
            ("context_length", 128),
            ("embedding_length", 32),
            ("feed_forward_length", 48),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            metadata.push((format!("{architecture}.{name}"), GgufValue::Integer(size)));
        }
        metadata.extend(more.iter().map(|(name, value)| (format!("{architecture}.{name}"), value.clone())));
        let metadata: Vec<(&str, GgufValue)> =
            metadata.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        let tensors = [("token_embd.weight", &[10, 32][..], 0, vec![0; 4 * 320])];
        std::fs::write(file.path(), write(&metadata, &tensors)).unwrap();
        ModelConfig::from_gguf(&GgufFile::open(file.path())?)
    }

    #[test]
    fn what_an_architecture_does_not_read_is_refused() {
        let config = read("llama", &[]).unwrap();
        assert_eq!((config.model_type.as_str(), config.vocab_size, config.head_dim), ("llama", 10, 8));
        let number = GgufValue::Float;
        for (name, value) in [
            ("logit_scale", number(0.5)),
            ("attention.scale", number(0.1)),
            ("final_logit_softcapping", number(30.0)),
            ("attention.clamp_kqv", number(8.0)),
            ("rope.scaling.attn_factor", number(1.5)),
            ("rope.dimension_count", GgufValue::Integer(4)),
            ("attention.causal", GgufValue::Flag(false)),
            ("expert_count", GgufValue::Integer(8)),
            ("rope.scaling.type", GgufValue::Text("other".into())),
        ] {
            let error = read("llama", &[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) || error.contains("scaling of type `other`"), "{name}: {error}");
        }
        for (name, value) in [
            ("logit_scale", number(1.0)),
            ("attention.clamp_kqv", number(0.0)),
            ("rope.dimension_count", GgufValue::Integer(8)),
        ] {
            assert!(read("llama", &[(name, value)]).is_ok(), "{name}");
        }
        assert!(read("olmo2", &[("attention.sliding_window", GgufValue::Integer(8))]).is_err());
        assert!(read("t5", &[]).unwrap_err().to_string().contains("`t5`; supported are: `llama`"));
    }

    #[test]
    fn a_llama_with_a_window_is_a_mistral() {
        let config = read("llama", &[("attention.sliding_window", GgufValue::Integer(16))]).unwrap();
        assert_eq!(config.model_type, "mistral");
    }
}
