//! Converts the metadata of a GGUF file to a `ModelConfig`.

use super::architecture::Architecture;
use super::metadata::{Metadata, shortest};
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufValue, JsonObject, end_of_generation_ids};
use crate::models::ModelConfig;
use serde_json::{Map, Value, json};

/// Keys that change what a model computes and that some architectures lack. A file with a key that its architecture
/// does not read is refused.
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

/// The metadata of a model whose architecture is supported.
struct GgufModel<'a> {
    metadata: Metadata<'a>,
    architecture: &'static Architecture,
}

impl GgufModel<'_> {
    /// Refuses keys that the architecture does not read.
    fn check(&self) -> Result<()> {
        for name in FORWARD_KEYS.iter().filter(|name| !self.architecture.reads.contains(name)) {
            let value = self.metadata.file.metadata().get(&self.metadata.key(name));
            let is_neutral = match value {
                None => true,
                Some(GgufValue::Integer(value)) => *value == 0,
                // factors of 1 and bounds of 0 have no effect
                Some(GgufValue::Float(value)) => {
                    *value == 0.0 || ((*value - 1.0).abs() < f64::EPSILON && !name.ends_with("softcapping"))
                }
                Some(_) => false,
            };
            if !is_neutral {
                return Err(self
                    .metadata
                    .unsupported(&format!("`{}` in a model of this architecture", self.metadata.key(name))));
            }
        }
        for name in self.architecture.unread {
            let name = format!("blk.0.{name}");
            if self.metadata.has_tensor(&name) {
                return Err(self.metadata.unsupported(&format!("the tensor `{name}` in a model of this architecture")));
            }
        }
        if self.metadata.file.flag(&self.metadata.key("attention.causal"))? == Some(false) {
            return Err(self.metadata.unsupported("attention to later tokens (`attention.causal`)"));
        }
        let (rotated, head_dim) = (self.metadata.size("rope.dimension_count")?, self.metadata.head_dim()?);
        if !self.architecture.reads.contains(&"rope.dimension_count")
            && rotated.is_some_and(|rotated| rotated != head_dim)
        {
            return Err(self.metadata.unsupported(&format!(
                "`{}` other than the width of a head",
                self.metadata.key("rope.dimension_count")
            )));
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
        if self.metadata.size("expert_count")?.unwrap_or(0) > 0 {
            return Err(self
                .metadata
                .unsupported(&format!("a mixture of experts (`{}`)", self.metadata.key("expert_count"))));
        }
        let embedding = self.metadata.file.tensor("token_embd.weight");
        let embedding = embedding.ok_or_else(|| {
            Error::format(self.metadata.file.path(), "expected the tensor `token_embd.weight`, found none")
        })?;
        set("vocab_size", embedding.shape.first().copied().unwrap_or(0).into());
        set("hidden_size", self.metadata.required_size("embedding_length")?.into());
        let layers = self.metadata.required_size("block_count")?;
        set(
            "num_hidden_layers",
            layers.saturating_sub(self.metadata.size("nextn_predict_layers")?.unwrap_or(0)).into(),
        );
        set("intermediate_size", self.metadata.required_size("feed_forward_length")?.into());
        let heads = self.metadata.required_size("attention.head_count")?;
        set("num_attention_heads", heads.into());
        set("num_key_value_heads", self.metadata.size("attention.head_count_kv")?.unwrap_or(heads).into());
        set("head_dim", self.metadata.head_dim()?.into());
        set("max_position_embeddings", self.metadata.required_size("context_length")?.into());
        if let Some(eps) = self.metadata.number("attention.layer_norm_rms_epsilon")? {
            set("rms_norm_eps", shortest(eps));
        }
        if let Some(theta) = self.metadata.number("rope.freq_base")? {
            set("rope_theta", shortest(theta));
        }
        if let Some(key) = self.architecture.bias_key {
            set(key, self.metadata.has_tensor("blk.0.attn_q.bias").into());
        }
        if self.metadata.has_tensor("blk.0.ffn_gate.bias") {
            set("mlp_bias", true.into());
        }
        set("tie_word_embeddings", (!self.metadata.has_tensor("output.weight")).into());
        if let Some(scaling) = self.rope_scaling()? {
            set("rope_scaling", scaling);
        }
        let ids = end_of_generation_ids(self.metadata.file)?;
        if !ids.is_empty() {
            set("eos_token_id", ids.into());
        }
        if let Some(id) = self.metadata.file.size("tokenizer.ggml.bos_token_id")? {
            set("bos_token_id", id.into());
        }
        Ok(map)
    }

    fn rope_scaling(&self) -> Result<Option<Value>> {
        let original = self.metadata.size("rope.scaling.original_context_length")?;
        // `rope.scale_linear` is the name in files of 2023
        let factor = match self.metadata.number("rope.scaling.factor")? {
            None => self.metadata.number("rope.scale_linear")?,
            factor => factor,
        };
        let factor = factor.filter(|factor| *factor != 0.0 && (*factor - 1.0).abs() > f64::EPSILON);
        let kind = self.metadata.text("rope.scaling.type")?;
        if matches!((kind, factor), (None | Some("linear" | "yarn"), Some(_)))
            && self.metadata.has_tensor("rope_freqs.weight")
        {
            return Err(self.metadata.unsupported("rotary scaling by a factor and by `rope_freqs.weight`"));
        }
        match (kind, factor) {
            // as in llama.cpp, a factor without a type is linear
            (None | Some("linear"), Some(factor)) => {
                return Ok(Some(json!({"rope_type": "linear", "factor": shortest(factor)})));
            }
            (Some("yarn"), Some(factor)) => {
                let mut scaling = json!({"rope_type": "yarn", "factor": shortest(factor)});
                for (key, name) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                    if let Some(beta) = self.metadata.number(&format!("rope.scaling.{name}"))? {
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
                return Err(self.metadata.unsupported(&format!("rotary scaling of type `{other}`")));
            }
        }
        let Some(tensor) = self.metadata.file.tensor("rope_freqs.weight") else { return Ok(None) };
        let factors = self.metadata.file.floats(tensor)?;
        let theta = self.metadata.number("rope.freq_base")?.unwrap_or(10_000.0);
        Ok(Some(llama3_scaling(&factors, theta, self.metadata.required_size("context_length")?)))
    }
}

/// The settings of Llama 3 that result in these divisors of the frequencies, or the divisors themselves.
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

impl ModelConfig {
    /// The configuration of a model in a GGUF file.
    ///
    /// # Errors
    /// The architecture is not supported, or a key is missing or has an invalid value.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let metadata = Metadata::of(file)?;
        let model = GgufModel { architecture: Architecture::of(&metadata)?, metadata };
        let mut map = model.config()?;
        (model.architecture.keys)(&model.metadata, &mut map)?;
        Self::from_object(&JsonObject::from_map(file.path(), map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::files::gguf_testing::write;
    use crate::files::{GgufFile, GgufValue};
    use crate::models::ModelConfig;
    use crate::ops::rotary::RotaryScaling;

    /// Reads the configuration of a small model with additional metadata.
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
    fn keys_that_an_architecture_does_not_read_are_refused() {
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
        assert!(read("qwen3", &[("attention.sliding_window", GgufValue::Integer(8))]).is_err());
        assert!(read("t5", &[]).unwrap_err().to_string().contains("`t5`; supported are: `llama`"));
    }

    #[test]
    fn a_rotary_factor_without_a_type_is_linear() {
        let factor = |more: &[(&str, GgufValue)]| {
            let config = read("llama", more).unwrap().describe().unwrap();
            match config.rotary.first().unwrap().scaling {
                RotaryScaling::Linear { factor } => factor as u32,
                _ => 1,
            }
        };
        let kind = |kind: &str| ("rope.scaling.type", GgufValue::Text(kind.into()));
        let number = GgufValue::Float;
        assert_eq!(factor(&[]), 1);
        assert_eq!(factor(&[("rope.scaling.factor", number(4.0))]), 4);
        assert_eq!(factor(&[("rope.scale_linear", number(2.0))]), 2);
        assert_eq!(factor(&[("rope.scale_linear", number(2.0)), kind("linear")]), 2);
        assert_eq!(factor(&[("rope.scaling.factor", number(4.0)), kind("none")]), 1);
        assert_eq!(factor(&[("rope.scaling.factor", number(0.0))]), 1);
    }

    #[test]
    fn multipliers_of_zero_have_no_effect() {
        let zero = || GgufValue::Float(0.0);
        let names = ["embedding_scale", "residual_scale", "attention.scale", "logit_scale"];
        let config = read("granite", &names.map(|name| (name, zero()))).unwrap();
        let (found, expected) = (config.describe().unwrap(), read("granite", &[]).unwrap().describe().unwrap());
        assert_eq!(found, expected);
    }

    #[test]
    fn a_granite_without_positions_is_refused() {
        let key = "rope.scaling.finetuned";
        let error = read("granite", &[(key, GgufValue::Flag(false))]).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        assert!(read("granite", &[(key, GgufValue::Flag(true))]).is_ok());
        assert!(read("llama", &[(key, GgufValue::Flag(false))]).is_ok());
    }

    #[test]
    fn a_gemma_3_without_windows_is_refused() {
        let window = |size| [("attention.sliding_window", GgufValue::Integer(size))];
        assert!(read("gemma3", &window(8)).is_ok());
        for more in [&window(0)[..], &[]] {
            let error = read("gemma3", more).unwrap_err().to_string();
            assert!(error.contains("without windows"), "{error}");
        }
    }

    #[test]
    fn a_llama_with_a_window_is_a_mistral() {
        let config = read("llama", &[("attention.sliding_window", GgufValue::Integer(16))]).unwrap();
        assert_eq!(config.model_type, "mistral");
    }
}
