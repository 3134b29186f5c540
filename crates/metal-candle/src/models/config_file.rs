//! Reads, validates and writes `config.json` files, and derives the parameters of a model from them.

use super::config::ModelConfig;
use super::description::{Description, LayerSpec};
use super::families::{self, Family};
use super::generation_defaults::GenerationConfigFile;
use super::keys::Keys;
use super::layout::Layout;
use super::packed::Quantization;
use super::registry::ParameterSpec;
use crate::error::{Error, Result};
use crate::files::{JsonObject, element_count};
use crate::ops::rotary::RotaryScaling;
use candle_core::DType;
use metal_candle_kernels::Mask;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Maximum number of rows, columns, heads or tokens in a configuration.
const MAX_SIZE: usize = 1 << 24;
/// Maximum number of blocks in a configuration.
pub(super) const MAX_LAYERS: usize = 1 << 12;

/// The keys of Qwen2 that [`ModelConfig::identity`] omits: it reads them from fields or does not need them.
const KEYS_IN_FIELDS: &[&str] = &[
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

impl ModelConfig {
    /// Reads a `config.json`, or the one in a folder, and the `generation_config.json` beside it, if there is one.
    ///
    /// The keys of transformers 4 and 5 are supported. For a multimodal model, its text model is read.
    ///
    /// Values of `generation_config.json` that are out of range are ignored and listed in [`ModelConfig::notes`].
    ///
    /// # Errors
    /// `config.json` cannot be read, a key is missing or has an invalid value, or the model is not supported.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let mut config = Self::from_object(&JsonObject::read(&file)?)?;
        let generation = file.with_file_name("generation_config.json");
        if generation != file {
            let generation_config = GenerationConfigFile::read(&generation, config.vocab_size);
            config.generation = generation_config.defaults;
            config.notes.extend(generation_config.notes);
            config.eos_token_ids = generation_config.eos_token_ids.unwrap_or(config.eos_token_ids);
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn from_json_str(text: &str) -> Result<Self> {
        Self::from_object(&JsonObject::parse(text, Path::new("config.json"))?)
    }

    pub(super) fn from_object(object: &JsonObject) -> Result<Self> {
        let model_type =
            object.text("model_type")?.ok_or_else(|| object.missing("model_type", "the name of a model family"))?;
        if let Some(text_type) = families::text_type(model_type) {
            let text = object.object("text_config")?;
            let text = text.ok_or_else(|| object.missing("text_config", "the configuration of the text model"))?;
            let text = text.with_defaults(
                object,
                &["eos_token_id", "torch_dtype", "dtype", "quantization", "quantization_config"],
            );
            // the head belongs to the multimodal model, so its keys override those of the text model
            let mut map = text.map().clone();
            map.insert("tie_word_embeddings".into(), object.flag("tie_word_embeddings")?.unwrap_or(true).into());
            if model_type == "gemma3" {
                map.insert("final_logit_softcapping".into(), Value::Null);
            }
            let text = JsonObject::from_map(object.path(), map);
            let found = text.text("model_type")?.unwrap_or(text_type).to_string();
            let mut config = Self::of_family(&found, &text)?;
            config.is_text_part = true;
            config.notes.push(format!(
                "`{}` is the multimodal model `{model_type}`: only its text part, `{found}`, is used",
                object.path().display()
            ));
            return Ok(config);
        }
        Self::of_family(model_type, object)
    }

    fn of_family(model_type: &str, object: &JsonObject) -> Result<Self> {
        let Some(family) = families::find(model_type) else {
            let (path, supported) = (object.path().display(), families::names());
            return Err(Error::Unsupported(format!(
                "`{path}` has `model_type` `{model_type}`; supported are: `{supported}`"
            )));
        };
        let keys = Keys::new(object);
        let quantization = Quantization::read(&keys)?;
        if keys.get("per_layer_config").is_some() {
            return Err(keys.unsupported("per_layer_config", "settings that differ by layer"));
        }
        if keys.flag("is_causal")? == Some(false) {
            return Err(keys.unsupported("is_causal", "attention to later tokens"));
        }
        let mut config = Self::read(model_type, &family.defaults, &keys)?;
        Quantization::remove_keys(&mut config.keys);
        config.quantization = quantization;
        config.check_sizes().map_err(|error| in_file(error, object.path()))?;
        let description = (family.describe)(&mut config, &keys)?;
        for key in keys.unread() {
            config.notes.push(format!(
                "`{}`: `{key}` has no meaning in a model of type `{model_type}` and is not used",
                object.path().display()
            ));
        }
        if let unknown @ [_, ..] = keys.unknown().as_slice() {
            config.notes.push(format!(
                "`{}`: unknown keys are not used; is one of them misspelled? `{}`",
                object.path().display(),
                unknown.join("`, `")
            ));
        }
        config.check(&description).map_err(|error| in_file(error, object.path()))?;
        Ok(config)
    }

    fn family(&self) -> Result<&'static Family> {
        families::find(&self.model_type).ok_or_else(|| {
            let (found, supported) = (&self.model_type, families::names());
            Error::Unsupported(format!("`model_type` `{found}`; supported are: `{supported}`"))
        })
    }

    /// The description of the model, from which it is built.
    pub(crate) fn describe(&self) -> Result<Description> {
        let object = JsonObject::from_map(Path::new("config.json"), self.keys.clone());
        (self.family()?.describe)(&mut self.clone(), &Keys::new(&object))
    }

    pub(super) fn layout(&self) -> Result<Layout> {
        let sizes = [self.vocab_size, self.hidden_size];
        Ok(Layout::new(&self.describe()?, sizes, self.tie_word_embeddings))
    }

    /// Name, shape and role of each tensor of a checkpoint, in the order of the model's parameters.
    ///
    /// # Errors
    /// The configuration is not valid.
    pub fn parameter_specs(&self) -> Result<Vec<ParameterSpec>> {
        Ok(self.layout()?.parameters)
    }

    /// Checks that all sizes and settings are valid.
    ///
    /// # Errors
    /// The first key with an invalid value, and what was expected.
    pub fn validate(&self) -> Result<()> {
        self.family()?;
        self.check_sizes()?;
        self.check(&self.describe()?)
    }

    fn check_sizes(&self) -> Result<()> {
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
        Ok(())
    }

    fn check(&self, description: &Description) -> Result<()> {
        for (name, number, range, fits) in [
            ("rope_theta", self.rope_theta, "1 to 1e30", (1.0..=1e30).contains(&self.rope_theta)),
            ("rms_norm_eps", self.rms_norm_eps, "0 to less than 1", (0.0..1.0).contains(&self.rms_norm_eps)),
            (
                "initializer_range",
                self.initializer_range,
                "0 to less than 1000",
                (0.0..1e3).contains(&self.initializer_range),
            ),
        ] {
            if !fits {
                return Err(Error::argument(name, format!("expected {range}, found {number}")));
            }
        }
        let layout = Layout::new(description, [self.vocab_size, self.hidden_size], self.tie_word_embeddings);
        if count_elements(&layout.parameters).is_none_or(|count| count > isize::MAX as u64 / 4) {
            return Err(Error::argument("num_hidden_layers", "the model is larger than any memory"));
        }
        Ok(())
    }

    /// Number of parameters; a tied head is counted once.
    pub fn num_parameters(&self) -> usize {
        let count = self.layout().ok().and_then(|layout| count_elements(&layout.parameters));
        count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX)
    }

    /// Memory of the weights in `dtype`, in bytes.
    pub fn num_bytes(&self, dtype: DType) -> usize {
        self.num_parameters().saturating_mul(dtype.size_in_bytes())
    }

    /// The text of a `config.json` for weights in `dtype`, which transformers and this library can load.
    pub fn to_json(&self, dtype: DType) -> String {
        format!("{:#}\n", Value::Object(self.to_json_map(dtype)))
    }

    /// The keys of this text.
    pub(crate) fn to_json_map(&self, dtype: DType) -> Map<String, Value> {
        let architecture = families::find(&self.model_type).map_or("", |family| family.architecture);
        self.to_map(architecture, dtype)
    }

    /// A string that differs between configurations of different models. Checkpoints store its digest, so it must not
    /// change for models that earlier versions could train.
    pub(crate) fn identity(&self) -> String {
        let is_plain = |description: Description| {
            let is_full = |layer: &LayerSpec| layer.attention.mask == Mask::Causal;
            description.rotary.iter().all(|table| table.scaling == RotaryScaling::Default)
                && description.layers.iter().all(is_full)
        };
        let is_old = self.model_type == "qwen2" && self.describe().is_ok_and(is_plain);
        let is_other = |key: &str| !is_old || !KEYS_IN_FIELDS.contains(&key);
        let other_keys: Map<String, Value> = self
            .keys
            .iter()
            .filter(|(key, _)| is_other(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let quantization = self.quantization().unwrap_or_default();
        format!("{:?}{quantization}", self.with_other_keys(&other_keys))
    }

    /// The path of the `config.json` for weights at `path`.
    pub(crate) fn path_beside(path: &Path) -> PathBuf {
        if path.is_dir() { path.join("config.json") } else { path.with_file_name("config.json") }
    }
}

/// Converts the error of an argument to one of the file it was read from.
fn in_file(error: Error, path: &Path) -> Error {
    match error {
        Error::Argument { name, message } => Error::format(path, format!("`{name}`: {message}")),
        other => other,
    }
}

fn count_elements(parameters: &[ParameterSpec]) -> Option<u64> {
    parameters.iter().try_fold(0_u64, |sum, parameter| sum.checked_add(element_count(&parameter.shape)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEYS: &str = r#""model_type": "qwen2", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1"#;

    #[test]
    fn the_identity_does_not_depend_on_notes() {
        let in_folder = || {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), format!("{{{KEYS}, \"misspelled\": 3}}")).unwrap();
            std::fs::write(folder.path().join("generation_config.json"), r#"{"temperature": -1}"#).unwrap();
            ModelConfig::from_json(folder.path()).unwrap()
        };
        let (config, moved) = (in_folder(), in_folder());
        assert!(config.notes.len() == 2 && config.notes != moved.notes, "{:?}", config.notes);
        assert_eq!(config.identity(), moved.identity());
        let without_notes = ModelConfig { notes: Vec::new(), ..config.clone() };
        assert_eq!(config.identity(), without_notes.identity());
        // as checkpoints of earlier versions have it
        let plain = ModelConfig::from_json_str(&format!("{{{KEYS}}}")).unwrap().identity();
        assert!(plain.contains("notes: [], other_keys: {}"), "{plain}");
        assert_ne!(config.identity(), plain);
    }
}
