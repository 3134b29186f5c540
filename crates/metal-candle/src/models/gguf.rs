//! Models in GGUF files: their configuration, and the names, the order of rows and the values that differ from a checkpoint of
//! transformers.

use super::ModelConfig;
use crate::error::{Error, Result};
use crate::files::{GgufFile, GgufTensor, GgufValue, JsonObject, end_of_generation_ids, ggml_type_name};
use crate::ops::Weight;
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::BlockFormat;
use serde_json::{Map, Value, json};

/// An architecture of GGUF files.
struct Architecture {
    /// The value of `general.architecture`.
    name: &'static str,
    model_type: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    has_interleaved_rows: bool,
    /// Whether 1 was added to the weights of the norms.
    has_norm_offset: bool,
    /// Names of modules of a layer, in the file and in a checkpoint, that differ from [`MODULES`].
    modules: &'static [(&'static str, &'static str)],
    /// Further keys of `config.json`.
    keys: fn(&Metadata, &mut Map<String, Value>) -> Result<()>,
}

/// Names of modules of a layer, in the file and in a checkpoint.
const MODULES: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

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
    keys: |_, _| Ok(()),
};

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", model_type: "llama", has_interleaved_rows: true, keys: llama, ..BASE },
    Architecture { name: "qwen2", model_type: "qwen2", ..BASE },
    Architecture { name: "qwen3", model_type: "qwen3", ..BASE },
    Architecture { name: "gemma", model_type: "gemma", has_norm_offset: true, ..BASE },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        has_norm_offset: true,
        modules: SANDWICH,
        keys: gemma2,
        ..BASE
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        has_norm_offset: true,
        modules: SANDWICH,
        keys: gemma3,
        ..BASE
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        modules: &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
        keys: phi3,
        ..BASE
    },
    Architecture { name: "smollm3", model_type: "smollm3", has_interleaved_rows: true, ..BASE },
    Architecture { name: "granite", model_type: "granite", has_interleaved_rows: true, keys: granite, ..BASE },
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
struct Metadata<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
}

impl<'a> Metadata<'a> {
    fn of(file: &'a GgufFile) -> Result<Self> {
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
            return Err(Error::Unsupported(format!(
                "`{}`: `{key}` differs between layers",
                self.file.path().display()
            )));
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

    fn head_dim(&self) -> Result<usize> {
        let heads = self.required_size("attention.head_count")?;
        let width = self.required_size("embedding_length")?.checked_div(heads).unwrap_or(0);
        Ok(self.size("attention.key_length")?.unwrap_or(width))
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// The keys of `config.json` that most families have.
    fn config(&self) -> Result<Map<String, Value>> {
        let mut map = Map::new();
        let mut set = |key: &str, value: Value| {
            map.insert(key.into(), value);
        };
        set("model_type", self.architecture.model_type.into());
        if self.size("expert_count")?.unwrap_or(0) > 0 {
            let path = self.file.path().display();
            return Err(Error::Unsupported(format!("`{path}`: a mixture of experts (`{}`)", self.key("expert_count"))));
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
                let path = self.file.path().display();
                return Err(Error::Unsupported(format!("`{path}`: rotary scaling of type `{other}`")));
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

#[allow(clippy::unnecessary_wraps)] // one of several functions of this type
fn llama(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("attention_bias".into(), metadata.has_tensor("blk.0.attn_q.bias").into());
    map.insert("mlp_bias".into(), metadata.has_tensor("blk.0.ffn_gate.bias").into());
    Ok(())
}

fn gemma2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    for (key, name) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("sliding_window", "attention.sliding_window"),
    ] {
        if let Some(number) = metadata.number(name)? {
            map.insert(key.into(), if key == "sliding_window" { (number as u64).into() } else { shortest(number) });
        }
    }
    // of the published sizes, only the one of 46 layers scales by another width than that of its heads
    let layers = metadata.required_size("block_count")?;
    let heads = metadata.required_size("attention.head_count")?;
    let width = metadata.required_size("embedding_length")?;
    let scalar = if layers == 46 { width.checked_div(heads).unwrap_or(0) } else { metadata.head_dim()? };
    map.insert("query_pre_attn_scalar".into(), scalar.into());
    Ok(())
}

fn gemma3(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if let Some(window) = metadata.size("attention.sliding_window")? {
        map.insert("sliding_window".into(), window.into());
    }
    let local = metadata.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
    map.insert("rope_local_base_freq".into(), shortest(local));
    let layers = metadata.required_size("block_count")?;
    let heads = metadata.required_size("attention.head_count")?;
    let width = metadata.required_size("embedding_length")?;
    let scalar = if layers == 62 { width.checked_div(heads).unwrap_or(0) } else { metadata.head_dim()? };
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

fn olmo2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if metadata.size("attention.sliding_window")?.is_some() {
        let path = metadata.file.path().display();
        return Err(Error::Unsupported(format!("`{path}`: OLMo 3 in a GGUF file: take its safetensors files")));
    }
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

/// The tensors of a model in a GGUF file, by the names of a checkpoint.
pub(super) struct GgufWeights<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
    head_dim: usize,
}

impl<'a> GgufWeights<'a> {
    pub(super) fn new(file: &'a GgufFile) -> Result<Self> {
        let metadata = Metadata::of(file)?;
        Ok(Self { file, architecture: metadata.architecture, head_dim: metadata.head_dim()? })
    }

    /// The name in the file of a parameter.
    pub(super) fn name(&self, parameter: &str) -> Option<String> {
        let known = match parameter {
            "model.embed_tokens.weight" => Some("token_embd.weight"),
            "model.norm.weight" => Some("output_norm.weight"),
            "lm_head.weight" => Some("output.weight"),
            _ => None,
        };
        if let Some(name) = known {
            return Some(name.into());
        }
        let (layer, rest) = parameter.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        let modules = self.architecture.modules.iter().chain(MODULES);
        let (name, _) = modules.into_iter().find(|(_, own)| *own == module)?;
        Some(format!("blk.{layer}.{name}.{kind}"))
    }

    /// Whether a tensor that is no parameter is none of the model's weights.
    pub(super) fn is_aside(name: &str) -> bool {
        matches!(name, "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight")
    }

    /// A parameter on the CPU. Matrices stay where they are in the file unless their rows are in another order.
    pub(super) fn weight(&self, parameter: &str, tensor: &GgufTensor) -> Result<Weight> {
        if tensor.shape.len() < 2 {
            let mut values = floats(self.file, tensor)?;
            let has_offset = self.architecture.has_norm_offset && parameter.ends_with("norm.weight");
            if has_offset {
                for value in &mut values {
                    *value -= 1.0;
                }
            }
            let is_interleaved = self.is_interleaved(parameter);
            if is_interleaved {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let bytes = in_halves(&bytes, 4, self.head_dim);
                values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            }
            let len = values.len();
            return Ok(Tensor::from_vec(values, len, &Device::Cpu)?.into());
        }
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(Error::Unsupported(format!(
                "the tensor `{}` with {} dimensions",
                tensor.name,
                tensor.shape.len()
            )));
        };
        let too_large = || Error::format(self.file.path(), format!("`{}` is larger than any memory", tensor.name));
        let elements = rows.checked_mul(columns).ok_or_else(too_large)?;
        if let Some(dtype) = dense_type(tensor.ggml_type) {
            let num_bytes = elements.checked_mul(dtype.size_in_bytes()).ok_or_else(too_large)?;
            let (map, range) = self.file.bytes(tensor, num_bytes)?;
            if !self.is_interleaved(parameter)
                && let Some(weight) = Weight::mapped(map, range.clone(), &tensor.shape, dtype)
            {
                return Ok(weight);
            }
            let bytes = &map[range];
            let row_bytes = columns * dtype.size_in_bytes();
            let ordered = if self.is_interleaved(parameter) {
                in_halves(bytes, row_bytes, self.head_dim)
            } else {
                bytes.to_vec()
            };
            return Ok(Tensor::from_raw_buffer(&ordered, dtype, &tensor.shape, &Device::Cpu)?.into());
        }
        let format = block_format(self.file, tensor)?;
        let wrong_width = || {
            let (name, format, len) = (&tensor.name, format.name(), format.len());
            let message = format!("`{name}`: expected rows of blocks of {len} ({format}), found rows of {columns}");
            Error::format(self.file.path(), message)
        };
        let row_bytes = format.row_bytes(columns).ok_or_else(wrong_width)?;
        let (map, range) = self.file.bytes(tensor, row_bytes.checked_mul(rows).ok_or_else(too_large)?)?;
        let weight = if self.is_interleaved(parameter) {
            Weight::blocks(in_halves(&map[range], row_bytes, self.head_dim), (rows, columns), format)
        } else {
            Weight::mapped_blocks(map, range, (rows, columns), format)
        };
        weight.ok_or_else(wrong_width)
    }

    /// Whether the rows of a parameter are interleaved within each head.
    fn is_interleaved(&self, parameter: &str) -> bool {
        self.architecture.has_interleaved_rows && (parameter.contains(".q_proj.") || parameter.contains(".k_proj."))
    }
}

/// Rows in the order of a checkpoint: the even rows of each head, then its odd rows.
fn in_halves(rows: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(rows.len());
    for head in rows.chunks(row_bytes * head_dim) {
        for parity in 0..2 {
            for row in head.chunks_exact(row_bytes).skip(parity).step_by(2) {
                ordered.extend_from_slice(row);
            }
        }
    }
    ordered
}

/// candle's counterpart of a type that is not quantized.
fn dense_type(ggml_type: u32) -> Option<DType> {
    match ggml_type {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        30 => Some(DType::BF16),
        _ => None,
    }
}

fn block_format(file: &GgufFile, tensor: &GgufTensor) -> Result<BlockFormat> {
    BlockFormat::from_ggml_type(tensor.ggml_type).ok_or_else(|| {
        Error::Unsupported(format!(
            "`{}`: the tensor `{}` of type `{}`: take a file of another type, such as q4_k_m or q8_0",
            file.path().display(),
            tensor.name,
            ggml_type_name(tensor.ggml_type)
        ))
    })
}

/// The elements of a tensor that is not quantized.
fn floats(file: &GgufFile, tensor: &GgufTensor) -> Result<Vec<f32>> {
    let wrong = || {
        let expected = "expected f32, f16 or bf16";
        Error::format(
            file.path(),
            format!("`{}`: {expected}, found `{}`", tensor.name, ggml_type_name(tensor.ggml_type)),
        )
    };
    let dtype = dense_type(tensor.ggml_type).ok_or_else(wrong)?;
    let elements = tensor.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    let num_bytes = elements.and_then(|count| count.checked_mul(dtype.size_in_bytes())).ok_or_else(wrong)?;
    let (map, range) = file.bytes(tensor, num_bytes)?;
    let values = Tensor::from_raw_buffer(&map[range], dtype, &tensor.shape, &Device::Cpu)?;
    Ok(values.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}
