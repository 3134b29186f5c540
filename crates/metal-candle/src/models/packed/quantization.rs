//! How the weights of a checkpoint are quantized, by its `config.json`.

use super::module::Checked;
use crate::error::Result;
use crate::models::keys::Keys;
use serde_json::{Map, Value};
use std::fmt;

/// The keys of a `config.json` about quantization: that of mlx-lm, and that of transformers.
const KEYS: [&str; 2] = ["quantization", "quantization_config"];

/// How the weights of a checkpoint are quantized.
#[derive(Debug, Clone)]
pub(crate) enum Quantization {
    /// By MLX.
    Mlx(MlxSettings),
}

/// The settings of a quantized model of mlx-lm.
#[derive(Debug, Clone)]
pub(crate) struct MlxSettings {
    bits: usize,
    group_size: usize,
    mode: String,
    /// All keys: those of modules that differ are paths.
    keys: Map<String, Value>,
}

impl Quantization {
    /// Reads the keys of a configuration; none if its weights are not quantized.
    pub(crate) fn read(keys: &Keys) -> Result<Option<Self>> {
        let found = KEYS.into_iter().find_map(|key| Some((key, keys.get(key)?)));
        let Some((key, value)) = found else { return Ok(None) };
        let Value::Object(map) = value else { return Err(keys.wrong(key, "an object", value)) };
        match map.get("quant_method").and_then(Value::as_str) {
            None if map.contains_key("bits") && map.contains_key("group_size") => {
                Ok(Some(Self::Mlx(MlxSettings::read(keys, key, map)?)))
            }
            method => {
                let method = method.unwrap_or("unknown");
                let what = format!(
                    "weights quantized by method `{method}`: take the unquantized model, or a version of it for llama.cpp (GGUF) or MLX"
                );
                Err(keys.unsupported(key, &what))
            }
        }
    }

    /// Removes what is said of quantization: a model that is saved has dense weights.
    pub(crate) fn remove_keys(keys: &mut Map<String, Value>) {
        for key in KEYS {
            keys.remove(key);
        }
    }
}

/// `4 bits in groups of 64 (MLX)`.
impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Mlx(MlxSettings { bits, group_size, mode, .. }) => {
                let mode = if mode == "affine" { "" } else { mode };
                let space = if mode.is_empty() { "" } else { " " };
                write!(f, "{bits} bits in groups of {group_size} (MLX{space}{mode})")
            }
        }
    }
}

impl MlxSettings {
    fn read(keys: &Keys, key: &str, map: &Map<String, Value>) -> Result<Self> {
        let size = |name: &str| {
            let value = &map[name];
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            size.ok_or_else(|| keys.wrong(&format!("{key}.{name}"), "a whole number", value))
        };
        let mode = match map.get("mode") {
            None | Some(Value::Null) => "affine",
            Some(Value::String(mode)) => mode,
            Some(other) => return Err(keys.wrong(&format!("{key}.mode"), "a string", other)),
        };
        if !matches!(mode, "affine" | "mxfp4" | "mxfp8" | "nvfp4") {
            let what = format!("weights of MLX's mode `{mode}`: take a version of mode `affine`, or a GGUF file");
            return Err(keys.unsupported(key, &what));
        }
        let bits = size("bits")?;
        if !matches!(bits, 2..=6 | 8) {
            return Err(keys.wrong(&format!("{key}.bits"), "2, 3, 4, 5, 6 or 8", &map["bits"]));
        }
        Ok(Self { bits, group_size: size("group_size")?, mode: mode.to_owned(), keys: map.clone() })
    }

    /// Checks bits and group of a module against what is said of it.
    pub(super) fn check(&self, path: &str, bits: usize, group: usize) -> Checked<()> {
        let Some(settings) = self.keys.get(path).and_then(Value::as_object) else { return Ok(()) };
        for (key, found) in [("bits", bits), ("group_size", group)] {
            if let Some(expected) = settings.get(key).filter(|value| value.as_u64() != Some(found as u64)) {
                let message = format!("expected {key} {expected}, as the configuration says, found {found}");
                return Err(format!("`{path}.weight`: {message}"));
            }
        }
        Ok(())
    }
}
