//! The supported architectures of GGUF files, and how each maps to a model family: names, keys and the order of rows.

use super::metadata::{Metadata, shortest};
use crate::error::{Error, Result};
use crate::files::GgufValue;
use crate::models::config_file::MAX_LAYERS;
use serde_json::{Map, Value, json};

/// An architecture of GGUF files.
#[derive(Debug)]
pub(super) struct Architecture {
    /// The value of `general.architecture`.
    pub(super) name: &'static str,
    pub(super) model_type: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    pub(super) has_interleaved_rows: bool,
    /// Whether the file stores norm weights with 1 added.
    pub(super) has_norm_offset: bool,
    /// The key of `config.json` for the biases of q, k and v, if the family has one.
    pub(super) bias_key: Option<&'static str>,
    /// Whether `logit_scale` divides the logits.
    pub(super) divides_logits: bool,
    /// Module names of a layer, in the file and in a checkpoint, that override the common ones.
    pub(super) modules: &'static [(&'static str, &'static str)],
    /// Modules of a layer whose rows the file stores as two tensors: their names in the file, and in a checkpoint.
    pub(super) halves: &'static [([&'static str; 2], &'static str)],
    /// The keys of [`FORWARD_KEYS`] that `keys` reads.
    pub(super) reads: &'static [&'static str],
    /// Tensors of a layer that llama.cpp refuses or does not use; a file with one is refused.
    pub(super) unread: &'static [&'static str],
    /// Adds the family's other keys of `config.json`.
    pub(super) keys: fn(&Metadata, &mut Map<String, Value>) -> Result<()>,
}

const GEMMA_KEYS: &[&str] = &[
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
];
const WINDOWS: &[&str] = &["attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"];
const GRANITE_KEYS: &[&str] = &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"];

/// Norms before and after each part.
const SANDWICH: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Norms after each part.
const POST: &[(&str, &str)] =
    &[("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")];

const BASE: Architecture = Architecture {
    name: "",
    model_type: "",
    has_interleaved_rows: false,
    has_norm_offset: false,
    bias_key: Some("attention_bias"),
    divides_logits: false,
    modules: &[],
    halves: &[],
    reads: &[],
    unread: &[],
    keys: |_, _| Ok(()),
};

/// Families that share the architecture of another one, and may have windows that the other does not have.
const ALIASES: &[(&str, &str)] = &[("mistral", "llama"), ("ministral", "llama"), ("olmo3", "olmo2")];

const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        model_type: "llama",
        has_interleaved_rows: true,
        reads: &["attention.sliding_window"],
        keys: llama,
        ..BASE
    },
    Architecture { name: "qwen2", model_type: "qwen2", bias_key: None, ..BASE },
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
        reads: &["attention.sliding_window", "rope.dimension_count", "rope.scaling.attn_factor"],
        keys: phi3,
        ..BASE
    },
    Architecture { name: "smollm3", model_type: "smollm3", has_interleaved_rows: true, ..BASE },
    Architecture {
        name: "granite",
        model_type: "granite",
        has_interleaved_rows: true,
        divides_logits: true,
        reads: GRANITE_KEYS,
        keys: granite,
        ..BASE
    },
    // read as the other family of this name, which has no fused tensors
    Architecture {
        name: "granite",
        model_type: "granitemoehybrid",
        has_interleaved_rows: true,
        divides_logits: true,
        modules: &[("ffn_down", "shared_mlp.output_linear")],
        halves: &[(["ffn_gate", "ffn_up"], "shared_mlp.input_linear")],
        reads: GRANITE_KEYS,
        keys: granite,
        ..BASE
    },
    Architecture { name: "olmo2", model_type: "olmo2", modules: POST, reads: WINDOWS, keys: olmo2, ..BASE },
    Architecture {
        name: "olmo",
        model_type: "olmo",
        has_interleaved_rows: true,
        reads: &["attention.clamp_kqv"],
        keys: olmo,
        ..BASE
    },
    Architecture {
        name: "starcoder2",
        model_type: "starcoder2",
        bias_key: Some("use_bias"),
        modules: &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")],
        reads: &["attention.sliding_window"],
        keys: starcoder2,
        ..BASE
    },
    Architecture {
        name: "stablelm",
        model_type: "stablelm",
        bias_key: Some("use_qkv_bias"),
        reads: &["rope.dimension_count", "use_parallel_residual"],
        keys: stablelm,
        ..BASE
    },
    Architecture { name: "command-r", model_type: "cohere", reads: &["logit_scale"], keys: cohere, ..BASE },
    Architecture {
        name: "cohere2",
        model_type: "cohere2",
        reads: &["logit_scale", "attention.sliding_window", "attention.sliding_window_pattern"],
        keys: cohere2,
        ..BASE
    },
    Architecture {
        name: "glm4",
        model_type: "glm4",
        modules: &[
            ("post_attention_norm", "post_self_attn_layernorm"),
            ("post_ffw_norm", "post_mlp_layernorm"),
            ("ffn_up", "mlp.gate_up_proj"),
        ],
        reads: &["rope.dimension_count"],
        keys: rotated_fraction,
        ..BASE
    },
    Architecture {
        name: "chatglm",
        model_type: "glm",
        modules: &[("ffn_up", "mlp.gate_up_proj")],
        reads: &["rope.dimension_count"],
        keys: chatglm,
        ..BASE
    },
    Architecture {
        name: "arcee",
        model_type: "arcee",
        has_interleaved_rows: true,
        unread: &["attn_output.bias", "ffn_up.bias"],
        ..BASE
    },
    Architecture {
        name: "ernie4_5",
        model_type: "ernie4_5",
        bias_key: None,
        unread: &["attn_q.bias", "attn_output.bias", "ffn_up.bias"],
        ..BASE
    },
    Architecture {
        name: "exaone4",
        model_type: "exaone4",
        bias_key: None,
        modules: POST,
        reads: WINDOWS,
        keys: exaone4,
        ..BASE
    },
    Architecture {
        name: "hunyuan-dense",
        model_type: "hunyuan_v1_dense",
        modules: &[("attn_q_norm", "self_attn.query_layernorm"), ("attn_k_norm", "self_attn.key_layernorm")],
        unread: &["attn_output.bias"],
        ..BASE
    },
    Architecture {
        name: "mistral3",
        model_type: "ministral3",
        has_interleaved_rows: true,
        bias_key: None,
        reads: &["attention.temperature_scale", "rope.scaling.yarn_log_multiplier"],
        keys: mistral3,
        ..BASE
    },
    Architecture { name: "jais2", model_type: "jais2", keys: jais2, ..BASE },
    Architecture {
        name: "seed_oss",
        model_type: "seed_oss",
        modules: &[("post_attention_norm", "post_attention_layernorm")],
        unread: &["attn_output.bias", "ffn_up.bias"],
        ..BASE
    },
];

impl Architecture {
    /// The architecture of a family, if GGUF has one.
    pub(super) fn for_family(model_type: &str) -> Option<&'static Self> {
        let model_type =
            ALIASES.iter().find(|(family, _)| *family == model_type).map_or(model_type, |(_, other)| other);
        ARCHITECTURES.iter().find(|known| known.model_type == model_type)
    }

    /// The families that GGUF has an architecture for.
    pub(super) fn families() -> Vec<&'static str> {
        ARCHITECTURES.iter().map(|known| known.model_type).chain(ALIASES.iter().map(|(family, _)| *family)).collect()
    }

    /// The architecture of a file.
    ///
    /// # Errors
    /// The architecture is not supported.
    pub(super) fn of(metadata: &Metadata) -> Result<&'static Self> {
        ARCHITECTURES.iter().find(|known| known.name == metadata.name).ok_or_else(|| {
            let known = ARCHITECTURES.iter().map(|known| known.name).collect::<Vec<_>>().join("`, `");
            Error::Unsupported(format!(
                "`{}`: GGUF architecture `{}`; supported are: `{known}`",
                metadata.file.path().display(),
                metadata.name
            ))
        })
    }
}

fn llama(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if let Some(window) = metadata.size("attention.sliding_window")?.filter(|&window| window > 0) {
        if metadata.has_tensor("blk.0.attn_q.bias") || metadata.has_tensor("blk.0.ffn_gate.bias") {
            return Err(metadata.unsupported("biases together with a window (`attention.sliding_window`)"));
        }
        // Llama has no windows, and Mistral has
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
    gemma(metadata, map, 62)?;
    if metadata.size("attention.sliding_window")?.unwrap_or(0) == 0 {
        let key = metadata.key("attention.sliding_window");
        return Err(metadata.unsupported(&format!("a Gemma 3 without windows (`{key}`)")));
    }
    Ok(())
}

/// Windows, caps and the scale of scores. The file does not contain the scale: of the published sizes, only the one
/// with `odd_layers` layers derives it from another width than that of its heads.
fn gemma(metadata: &Metadata, map: &mut Map<String, Value>, odd_layers: usize) -> Result<()> {
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = metadata.number(name)? {
            map.insert(name.into(), shortest(cap));
        }
    }
    windows(metadata, map)?;
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
    rotated_fraction(metadata, map)?;
    let original = metadata.size("rope.scaling.original_context_length")?;
    if let Some(original) = original {
        map.insert("original_max_position_embeddings".into(), original.into());
    }
    let factors = |name: &str| metadata.file.tensor(name).map(|tensor| metadata.file.floats(tensor)).transpose();
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
    let key = metadata.key("rope.scaling.finetuned");
    if metadata.file.flag(&key)? == Some(false) {
        return Err(metadata.unsupported(&format!("a model without rotary positions (`{key}`)")));
    }
    for (key, name) in [
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("attention_multiplier", "attention.scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        // as in llama.cpp, 0 stands for none
        if let Some(number) = metadata.number(name)?.filter(|number| *number != 0.0) {
            map.insert(key.into(), shortest(number));
        }
    }
    Ok(())
}

/// The size of the windows, and the layers that have one if the file lists them.
fn windows(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
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
    Ok(())
}

/// `OLMo` 3 is an `OLMo` 2 with windows.
fn olmo2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("attention_bias".into(), false.into());
    if metadata.size("attention.sliding_window")?.is_some_and(|window| window > 0) {
        map.insert("model_type".into(), "olmo3".into());
        windows(metadata, map)?;
        // only layers without a window have scaled positions
        let theta = map.remove("rope_theta").unwrap_or_else(|| 10_000.0.into());
        let local = metadata.number("rope.freq_base_swa")?.map_or_else(|| theta.clone(), shortest);
        let mut full = map.remove("rope_scaling").unwrap_or_else(|| json!({"rope_type": "default"}));
        full["rope_theta"] = theta;
        let sliding = json!({"rope_type": "default", "rope_theta": local});
        map.insert("rope_parameters".into(), json!({"full_attention": full, "sliding_attention": sliding}));
    }
    Ok(())
}

fn olmo(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if let Some(clip) = metadata.number("attention.clamp_kqv")?.filter(|clip| *clip > 0.0) {
        map.insert("clip_qkv".into(), shortest(clip));
    }
    Ok(())
}

/// The epsilon of layer norms, under the family's key.
fn layer_norm_eps(metadata: &Metadata, map: &mut Map<String, Value>, key: &str) -> Result<()> {
    if let Some(eps) = metadata.number("attention.layer_norm_epsilon")? {
        map.insert(key.into(), shortest(eps));
    }
    Ok(())
}

fn starcoder2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    if let Some(window) = metadata.size("attention.sliding_window")?.filter(|&window| window > 0) {
        map.insert("sliding_window".into(), window.into());
    }
    layer_norm_eps(metadata, map, "norm_epsilon")
}

fn jais2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("mlp_bias".into(), metadata.has_tensor("blk.0.ffn_up.bias").into());
    layer_norm_eps(metadata, map, "layer_norm_eps")
}

fn stablelm(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    rotated_fraction(metadata, map)?;
    // as in llama.cpp, the tensors decide, whatever `use_parallel_residual` says
    map.insert("use_parallel_residual".into(), (!metadata.has_tensor("blk.0.ffn_norm.weight")).into());
    map.insert("qk_layernorm".into(), metadata.has_tensor("blk.0.attn_q_norm.weight").into());
    layer_norm_eps(metadata, map, "layer_norm_eps")
}

fn cohere(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    map.insert("use_qk_norm".into(), metadata.has_tensor("blk.0.attn_q_norm.weight").into());
    map.insert("logit_scale".into(), shortest(metadata.number("logit_scale")?.unwrap_or(1.0)));
    layer_norm_eps(metadata, map, "layer_norm_eps")
}

fn cohere2(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    cohere(metadata, map)?;
    map.remove("use_qk_norm");
    windows(metadata, map)
}

/// The fraction of each head that is rotated: all of it by default.
fn rotated_fraction(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    let head_dim = metadata.head_dim()?;
    let rotated = metadata.size("rope.dimension_count")?.unwrap_or(head_dim);
    let quotient = rotated as f64 / head_dim.max(1) as f64;
    // the family rounds the product down, which must not be one less because the quotient was rounded
    let is_exact = (head_dim as f64 * quotient) as usize >= rotated;
    map.insert("partial_rotary_factor".into(), if is_exact { quotient } else { quotient.next_up() }.into());
    Ok(())
}

fn chatglm(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    has_square_output(metadata)?;
    rotated_fraction(metadata, map)
}

/// Refuses an output projection that is not square, which llama.cpp does not load in some architectures.
fn has_square_output(metadata: &Metadata) -> Result<()> {
    let (heads, width) = (metadata.required_size("attention.head_count")?, metadata.required_size("embedding_length")?);
    if heads.checked_mul(metadata.head_dim()?) == Some(width) {
        return Ok(());
    }
    let (head_count, embedding) = (metadata.key("attention.head_count"), metadata.key("embedding_length"));
    Err(metadata.unsupported(&format!("`{head_count}` times the width of a head other than `{embedding}`")))
}

/// llama.cpp has windows in the models of 64 layers only, whatever the file says; in these, the layers without a window have
/// no positions.
fn exaone4(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    const WINDOWED_LAYERS: usize = 64;
    has_square_output(metadata)?;
    let size = metadata.size("attention.sliding_window")?.filter(|&size| size > 0);
    let layers = metadata.required_size("block_count")?;
    if layers != WINDOWED_LAYERS {
        if size.is_some() {
            let key = metadata.key("attention.sliding_window");
            let what = format!("`{key}` in a model of another number of layers than {WINDOWED_LAYERS}");
            return Err(metadata.unsupported(&what));
        }
        map.insert("sliding_window".into(), Value::Null);
        // transformers requires the key beside a window of null
        map.insert("layer_types".into(), Value::Array(vec!["full_attention".into(); layers.min(MAX_LAYERS)]));
        return Ok(());
    }
    // without a pattern, three of four layers have a window, which is the default of the family, too
    windows(metadata, map)?;
    map.insert("sliding_window".into(), size.unwrap_or(4096).into());
    let theta = metadata.number("rope.freq_base")?.unwrap_or(10_000.0);
    if metadata.number("rope.freq_base_swa")?.is_some_and(|local| local.to_bits() != theta.to_bits()) {
        return Err(
            metadata.unsupported(&format!("`{}` other than that of all layers", metadata.key("rope.freq_base_swa")))
        );
    }
    Ok(())
}

/// Scaled positions without the factor on queries have one of 0, because the configuration class requires the key.
fn mistral3(metadata: &Metadata, map: &mut Map<String, Value>) -> Result<()> {
    let mut rope = map.remove("rope_scaling").unwrap_or_else(|| json!({"rope_type": "default"}));
    rope["rope_theta"] = map.remove("rope_theta").unwrap_or_else(|| 10_000.0.into());
    rope["llama_4_scaling_beta"] = shortest(metadata.number("attention.temperature_scale")?.unwrap_or(0.0));
    if rope.get("original_max_position_embeddings").is_none() {
        rope["original_max_position_embeddings"] = metadata.required_size("context_length")?.into();
    }
    if let Some(all) = metadata.number("rope.scaling.yarn_log_multiplier")?.filter(|all| *all != 0.0) {
        rope["mscale"] = 1.0.into();
        rope["mscale_all_dim"] = shortest(all);
    }
    map.insert("rope_parameters".into(), rope);
    map.insert("sliding_window".into(), Value::Null);
    Ok(())
}
