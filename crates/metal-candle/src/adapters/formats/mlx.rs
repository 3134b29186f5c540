//! Reads and writes adapter folders of mlx-lm: `adapters.safetensors` and `adapter_config.json`.
//!
//! A and B are stored transposed, and `scale` is the factor itself, not divided by the rank.

use super::config_file::{CONFIG_FILE, as_texts, layout_of, read_as};
use super::refusal::low_rank_only;
use super::source::TensorSource;
use super::values::{self, Naming, Part};
use crate::adapters::layout::{LoRAModule, Planned, SavedParameter, Settings, TrainedBiases};
use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};
use crate::files::{JsonObject, create_folder, write_atomically, write_safetensors};
use crate::models::Model;
use serde_json::{Map, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const TENSOR_FILE: &str = "adapters.safetensors";

struct Names;

impl Naming for Names {
    fn name(&self, module: &LoRAModule, part: Part) -> String {
        let leaf = match part {
            Part::A => "lora_a",
            Part::B => "lora_b",
            Part::Magnitude => "m",
        };
        format!("{}.{leaf}", module.path)
    }

    fn saved(&self, saved: &SavedParameter, _has_terms: bool) -> String {
        saved.name.clone()
    }

    fn transposed(&self) -> bool {
        true
    }
}

/// The part of a module for which mlx-lm would compute another result, if there is one.
fn refusal(model: &Model, module: &str, use_dora: bool) -> Option<&'static str> {
    match module {
        "embed_tokens" if use_dora => Some("DoRA magnitudes of an embedding, which mlx-lm stores per token"),
        "embed_tokens" | "lm_head" if model.config().tie_word_embeddings => {
            Some("low-rank updates of a tied embedding or head, which mlx-lm applies to both")
        }
        _ => None,
    }
}

pub(super) fn load(model: &Model, folder: &Path, config: &JsonObject) -> Result<LoRAAdapter> {
    let path = config.path();
    let kind = config.text("fine_tune_type")?.unwrap_or("lora");
    let use_dora = kind == "dora";
    if kind != "lora" && !use_dora {
        return Err(Error::Unsupported(format!("`fine_tune_type` `{kind}` in `{}`", path.display())));
    }
    let parameters = config.object("lora_parameters")?.ok_or_else(|| config.missing("lora_parameters", "an object"))?;
    let rank = parameters.required_size("rank")?;
    let scale = parameters.number("scale")?.ok_or_else(|| parameters.missing("scale", "a number"))?;
    let keys = read_as(&parameters, "keys", "a list of module paths", as_texts)?;
    // the tensors name the layers, so only the type of this key is checked
    for key in ["num_layers", "lora_layers"] {
        read_as(config, key, "a whole number", serde_json::Value::as_i64)?;
    }
    let source = TensorSource::open(&folder.join(TENSOR_FILE))?;
    let has = |path: &str, leaf: &str| source.shape(&format!("{path}.{leaf}")).is_some();

    let alpha = scale * rank as f64;
    let mut planned = Vec::new();
    let mut unused: BTreeSet<&str> = keys.iter().flatten().copied().collect();
    for (number, linear) in model.linears().iter().enumerate() {
        let key = within_layer(linear.layer.is_some(), &linear.path);
        unused.remove(key);
        // mlx-lm accepts files with a subset of the modules: a missing update is zero
        if ["lora_a", "lora_b", "m"].iter().any(|leaf| has(&linear.path, leaf)) {
            if let Some(what) = refusal(model, linear.module, use_dora) {
                return Err(Error::Unsupported(format!("{what}, in `{}`", path.display())));
            }
            planned.push(Planned { number, rank, alpha, is_subtracted: false });
        }
    }
    if !unused.is_empty() {
        let names: Vec<&str> = unused.into_iter().collect();
        let message =
            format!("`lora_parameters.keys` of `{}`: no linear layer `{}`", path.display(), names.join("`, `"));
        return Err(Error::Unsupported(message));
    }
    let settings = Settings {
        rank,
        alpha,
        dropout: parameters.number("dropout")?.unwrap_or(0.0),
        use_rslora: false,
        use_dora,
        modules_to_save: Vec::new(),
        parameters_to_save: Vec::new(),
        bias: TrainedBiases::None,
        trainable_tokens: BTreeMap::new(),
        ensure_weight_tying: false,
        base_model: config.text("model")?.map(String::from),
    };
    let layout = layout_of(path, model, settings, &planned)?;
    let values = values::read(&source, &layout, &Names, &BTreeMap::new(), &BTreeSet::new())?;
    LoRAAdapter::from_values(model, layout, values, Vec::new())
}

pub(super) fn save(adapter: &LoRAAdapter, folder: &Path) -> Result<()> {
    let adapter = &adapter.without_start()?;
    let modules = adapter.modules();
    let Some(first) = modules.first() else {
        return Err(Error::argument("adapter", "has no module"));
    };
    low_rank_only(adapter, "an adapter of mlx-lm")?;
    for module in modules {
        if let Some(what) = refusal(adapter.model(), module.module, adapter.use_dora()) {
            return Err(Error::Unsupported(format!("{what}, in an adapter of mlx-lm")));
        }
    }
    let keys: BTreeSet<&str> = modules.iter().map(key).collect();
    let total = adapter.model().config().num_hidden_layers;
    let num_layers = total - modules.iter().filter_map(|module| module.layer).min().unwrap_or(total).min(total);
    // mlx-lm has one rank and one scale: A and B are padded with zeros, and the difference in scale is multiplied into B
    let rank = modules.iter().map(|module| module.rank).max().unwrap_or(first.rank);
    let scale = modules.iter().map(|module| module.scale).find(|scale| *scale != 0.0).unwrap_or(first.scale);
    let mut tensors = Vec::with_capacity(2 * modules.len());
    for module in modules {
        let (mut a, mut b) = adapter.matrices(module)?;
        if module.rank < rank {
            a = a.pad_with_zeros(0, 0, rank - module.rank)?;
            b = b.pad_with_zeros(1, 0, rank - module.rank)?;
        }
        if module.scale.to_bits() != scale.to_bits() {
            b = (b * (module.scale / scale))?;
        }
        tensors.push((Names.name(module, Part::A), a.t()?.contiguous()?));
        tensors.push((Names.name(module, Part::B), b.t()?.contiguous()?));
        if let Some(magnitudes) = adapter.magnitudes(module)? {
            tensors.push((Names.name(module, Part::Magnitude), magnitudes));
        }
    }
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    create_folder(folder)?;
    write_safetensors(folder.join(TENSOR_FILE), &tensors, &[])?;
    let mut config = Map::new();
    config.insert("fine_tune_type".into(), json!(if adapter.use_dora() { "dora" } else { "lora" }));
    config.insert(
        "lora_parameters".into(),
        json!({"dropout": adapter.dropout(), "keys": keys, "rank": rank, "scale": scale}),
    );
    if let Some(model) = adapter.base_model() {
        config.insert("model".into(), json!(model));
    }
    // of the last layers, those without tensors stay as they are in mlx-lm; none stands for all, and what is in no layer is named by its whole path, so one layer without a match will do
    config.insert("num_layers".into(), json!(num_layers.max(1)));
    let path = folder.join(CONFIG_FILE);
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    serde::Serialize::serialize(&config, &mut serializer).map_err(|error| Error::format(&path, error))?;
    write_atomically(&path, |file| file.write_all(&text))
}

fn key(module: &LoRAModule) -> &str {
    within_layer(module.layer.is_some(), &module.path)
}

/// The part of a path after the layer index, `self_attn.q_proj`; the whole path of a module outside the layers.
fn within_layer(is_in_layer: bool, path: &str) -> &str {
    let mut rest = path;
    while let Some((part, tail)) = rest.split_once('.').filter(|_| is_in_layer) {
        rest = tail;
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            break;
        }
    }
    rest
}
