//! Reads from `config.json` how the weights of a checkpoint are quantized.

use super::module::Checked;
use crate::error::{Error, Result};
use crate::models::keys::Keys;
use serde_json::{Map, Value};
use std::fmt;

/// The quantization keys of a `config.json`: that of mlx-lm, and that of transformers.
const KEYS: [&str; 2] = ["quantization", "quantization_config"];

/// How the weights of a checkpoint are quantized.
#[derive(Debug, Clone)]
pub(crate) enum Quantization {
    /// By MLX.
    Mlx(MlxSettings),
    /// By bitsandbytes.
    BitsAndBytes {
        /// The name of the type.
        kind: String,
    },
    /// 8-bit floats, with a scale for each block if `block` is set, otherwise for the matrix or each row.
    Float8 { block: Option<[usize; 2]> },
    /// By GPTQ.
    Gptq(GptqSettings),
    /// By AWQ.
    Awq,
    /// By compressed-tensors.
    Compressed(CompressedSettings),
}

/// The settings of GPTQ.
#[derive(Debug, Clone)]
pub(crate) struct GptqSettings {
    pub(super) bits: usize,
    /// Whether some modules have other bits.
    pub(super) is_mixed: bool,
    /// Whether a zero point of 8 is stored as 7.
    pub(super) zeros_are_less_one: bool,
}

/// The settings of compressed-tensors.
#[derive(Debug, Clone)]
pub(crate) struct CompressedSettings {
    format: String,
    /// The bits of weights that the configuration lists.
    pub(super) bits: Vec<u64>,
    /// Rows and columns of the blocks that share a scale.
    pub(super) block: Option<[usize; 2]>,
}

/// The settings of a quantized model of mlx-lm.
#[derive(Debug, Clone)]
pub(crate) struct MlxSettings {
    bits: usize,
    group_size: usize,
    mode: String,
    /// All keys; the settings of modules that differ are stored under their paths.
    keys: Map<String, Value>,
}

impl Quantization {
    /// Reads the keys of a configuration; `None` if its weights are not quantized.
    pub(crate) fn read(keys: &Keys) -> Result<Option<Self>> {
        // files of mlx-lm have both keys, with the same value: both are read
        let found = KEYS.map(|key| Some((key, keys.get(key)?)));
        let Some((key, value)) = found.into_iter().flatten().next() else { return Ok(None) };
        let Value::Object(map) = value else { return Err(keys.wrong(key, "an object", value)) };
        let settings = Settings { keys, key, map };
        let method = settings.text("quant_method")?;
        Ok(Some(match method {
            None if map.contains_key("bits") && map.contains_key("group_size") => {
                Self::Mlx(MlxSettings::read(&settings)?)
            }
            Some("bitsandbytes") => {
                let kind = if map.get("load_in_8bit").is_some_and(|flag| flag == true) {
                    "int8"
                } else {
                    settings.text("bnb_4bit_quant_type")?.unwrap_or("fp4")
                };
                Self::BitsAndBytes { kind: kind.to_owned() }
            }
            Some("fp8") => {
                // absent is not the same as null
                let default = Value::from([128, 128].to_vec());
                Self::Float8 { block: settings.block(map.get("weight_block_size").unwrap_or(&default))? }
            }
            Some("fbgemm_fp8") => Self::Float8 { block: None },
            Some("gptq") => {
                let format = settings.text("checkpoint_format")?.or(settings.text("format")?).unwrap_or("gptq");
                if !matches!(format, "gptq" | "gptq_v2") || map.get("is_marlin_format").is_some_and(|flag| flag == true)
                {
                    return Err(settings.unsupported(&format!("gptq` of format `{format}")));
                }
                Self::Gptq(GptqSettings {
                    bits: settings.size("bits")?,
                    is_mixed: map.get("dynamic").is_some_and(|modules| !modules.is_null()),
                    zeros_are_less_one: format == "gptq",
                })
            }
            Some("awq") => {
                for name in ["version", "format", "checkpoint_format"] {
                    if let Some(format) = settings.text(name)?.filter(|format| !format.eq_ignore_ascii_case("gemm")) {
                        return Err(settings.unsupported(&format!("awq` of format `{format}")));
                    }
                }
                if settings.number("bits")? != 4 {
                    return Err(settings.unsupported(&format!("awq` of `{} bits", map["bits"])));
                }
                Self::Awq
            }
            Some("compressed-tensors") => settings.compressed()?,
            method => return Err(settings.unsupported(method.unwrap_or("unknown"))),
        }))
    }

    /// Removes the quantization keys, because saved models are dense.
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
                let mode = if mode == "affine" { String::new() } else { format!(" {mode}") };
                write!(f, "{bits} bits in groups of {group_size} (MLX{mode})")
            }
            Self::BitsAndBytes { kind } => write!(f, "{kind} (bitsandbytes)"),
            Self::Float8 { block: Some([rows, columns]) } => write!(f, "fp8 in blocks of {rows} x {columns}"),
            Self::Float8 { block: None } => write!(f, "fp8"),
            Self::Gptq(GptqSettings { bits, .. }) => write!(f, "{bits} bits (GPTQ)"),
            Self::Awq => write!(f, "4 bits (AWQ)"),
            Self::Compressed(CompressedSettings { format, .. }) => write!(f, "{format} (compressed-tensors)"),
        }
    }
}

/// The settings at one of the keys.
struct Settings<'a> {
    keys: &'a Keys<'a>,
    key: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    fn wrong(&self, name: &str, expected: &str, found: &Value) -> Error {
        self.keys.wrong(&format!("{}.{name}", self.key), expected, found)
    }

    fn unsupported(&self, method: &str) -> Error {
        let what = format!(
            "weights quantized by method `{method}`; use the unquantized model, or a GGUF or MLX version of it"
        );
        self.keys.unsupported(self.key, &what)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let value = self.map.get(name).filter(|value| !value.is_null());
        value.map(|value| value.as_str().ok_or_else(|| self.wrong(name, "a string", value))).transpose()
    }

    fn number(&self, name: &str) -> Result<u64> {
        let value = self.map.get(name).unwrap_or(&Value::Null);
        value.as_u64().ok_or_else(|| self.wrong(name, "a whole number", value))
    }

    fn size(&self, name: &str) -> Result<usize> {
        let size = usize::try_from(self.number(name)?);
        size.map_err(|_| self.wrong(name, "a whole number", &self.map[name]))
    }

    /// The rows and columns of blocks; `None` if the value is null.
    fn block(&self, value: &Value) -> Result<Option<[usize; 2]>> {
        let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
        match value {
            Value::Null => Ok(None),
            Value::Array(sizes) => match sizes.iter().map(size).collect::<Option<Vec<_>>>().as_deref() {
                Some(&[rows, columns]) => Ok(Some([rows, columns])),
                _ => Err(self.wrong("weight_block_size", "two whole numbers above 0", value)),
            },
            other => Err(self.wrong("weight_block_size", "two whole numbers above 0", other)),
        }
    }

    fn compressed(&self) -> Result<Quantization> {
        const FORMATS: [&str; 6] =
            ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"];
        let format = self.text("format")?.unwrap_or("unknown");
        if !FORMATS.contains(&format) {
            return Err(self.unsupported(&format!("compressed-tensors` of format `{format}")));
        }
        let is_set = |value: &Value| match value {
            Value::Object(map) => !map.is_empty() && map.get("format").is_none_or(|format| format != "dense"),
            other => !other.is_null(),
        };
        for name in ["transform_config", "sparsity_config"] {
            if self.map.get(name).is_some_and(is_set) {
                return Err(self.unsupported(&format!("compressed-tensors` with `{name}")));
            }
        }
        let groups = self.map.get("config_groups").and_then(Value::as_object);
        let weights: Vec<&Value> =
            groups.into_iter().flat_map(Map::values).filter_map(|group| group.get("weights")).collect();
        let block = weights.iter().filter_map(|weights| weights.get("block_structure")).find(|block| !block.is_null());
        Ok(Quantization::Compressed(CompressedSettings {
            format: format.to_owned(),
            bits: weights.iter().filter_map(|weights| weights.get("num_bits")?.as_u64()).collect(),
            block: self.block(block.unwrap_or(&Value::Null))?,
        }))
    }
}

impl MlxSettings {
    fn read(settings: &Settings) -> Result<Self> {
        let mode = settings.text("mode")?.unwrap_or("affine");
        if !matches!(mode, "affine" | "mxfp4" | "mxfp8" | "nvfp4") {
            return Err(settings.unsupported(&format!("mlx` of mode `{mode}")));
        }
        let bits = settings.size("bits")?;
        if !matches!(bits, 2..=6 | 8) {
            return Err(settings.wrong("bits", "2, 3, 4, 5, 6 or 8", &settings.map["bits"]));
        }
        Ok(Self { bits, group_size: settings.size("group_size")?, mode: mode.to_owned(), keys: settings.map.clone() })
    }

    /// Checks bits and group size of a module against its own settings.
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
