//! Reads and writes PEFT's `adapter_config.json`: the adapted layers, their ranks and scales.

use super::config_file::{as_count, as_texts, brief, read_as};
use super::text_part::peft_path;
use crate::adapters::Start;
use crate::adapters::layout::{EMBEDDING, EMBEDDING_WEIGHT, LoRAModule, Planned, Settings, TrainedBiases};
use crate::adapters::lora::LoRAAdapter;
use crate::adapters::patterns::{Patterns, compile as compile_pattern, is_match};
use crate::error::{Error, Result};
use crate::files::JsonObject;
use crate::models::{LinearInfo, Model};
use fancy_regex::Regex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// PEFT's targets for these families if `target_modules` is null; other families have no default.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];
const FAMILIES_WITH_DEFAULTS: [&str; 7] = ["llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"];

/// Keys that change the result in a way that low-rank updates of linear layers cannot express.
const UNSUPPORTED: [&str; 11] = [
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
];

/// Initializations that do not change the weights of the model.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The settings of a configuration, the adapted layers, and the initialization that is subtracted, if there is one.
///
/// `is_in_file` returns whether the file has tensors of a layer; these layers are adapted regardless of the configuration.
pub(super) fn plan(
    model: &Model,
    config: &JsonObject,
    is_in_file: impl Fn(&LinearInfo) -> bool,
) -> Result<(Settings, Vec<Planned>, Option<Start>)> {
    refuse_unsupported(config)?;
    let start = start(config)?;
    let rank = config.size("r")?.unwrap_or(8);
    let alpha = config.number("lora_alpha")?.unwrap_or(8.0);
    let ranks = patterns(config, "rank_pattern", as_count, "whole numbers")?;
    let alphas = patterns(config, "alpha_pattern", Value::as_f64, "numbers")?;
    let modules_to_save = read_as(config, "modules_to_save", "a list of texts", as_texts)?.unwrap_or_default();
    let settings = Settings {
        rank,
        alpha,
        dropout: config.number("lora_dropout")?.unwrap_or(0.0),
        use_rslora: config.flag("use_rslora")?.unwrap_or(false),
        use_dora: config.flag("use_dora")?.unwrap_or(false),
        modules_to_save: modules_to_save.into_iter().map(String::from).collect(),
        bias: config.text("bias")?.map_or(Ok(TrainedBiases::None), str::parse)?,
        trainable_tokens: BTreeMap::new(),
        parameters_to_save: Vec::new(),
        ensure_weight_tying: config.flag("ensure_weight_tying")?.unwrap_or(false) && model.config().tie_word_embeddings,
        base_model: config.text("base_model_name_or_path")?.map(String::from),
    };
    let selection = Selection::read(config, &model.config().model_type)?;
    let mut planned = Vec::new();
    for (number, linear) in model.linears().iter().enumerate() {
        if (selection.takes(linear) && !settings.saves(&linear.path)) || is_in_file(linear) {
            planned.push(Planned {
                number,
                rank: ranks.get(&linear.path).unwrap_or(rank),
                alpha: alphas.get(&linear.path).unwrap_or(alpha),
                is_subtracted: start.is_some() && linear.module != EMBEDDING,
            });
        }
    }
    Ok((settings, planned, start))
}

/// The error for an adapter that fits no layer of the model.
pub(super) fn nothing_selected(config: &JsonObject) -> Error {
    let found = config.get("target_modules").map_or("null".into(), brief);
    Error::format(config.path(), format!("`target_modules` `{found}` matches no linear layer of the model"))
}

/// The initialization that PEFT recomputes from the weights and subtracts when it loads the adapter.
fn start(config: &JsonObject) -> Result<Option<Start>> {
    let refuse = |value: &Value| {
        let found = format!("`init_lora_weights`: `{}` in `{}`", brief(value), config.path().display());
        Err(Error::Unsupported(found))
    };
    match config.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(None),
        Some(Value::String(start)) if PLAIN_STARTS.contains(&start.as_str()) => Ok(None),
        Some(Value::String(start)) if start == "pissa" => Ok(Some(Start::Pissa { iterations: None })),
        Some(Value::String(start)) if start == "olora" => Ok(Some(Start::Olora)),
        Some(value) => refuse(value),
    }
}

fn refuse_unsupported(config: &JsonObject) -> Result<()> {
    let refuse = |key: &str, value: &Value| {
        Err(Error::Unsupported(format!("`{key}`: `{}` in `{}`", brief(value), config.path().display())))
    };
    let kind = config.text("peft_type")?.unwrap_or_default();
    if kind != "LORA" {
        return refuse("peft_type", &json!(kind));
    }
    for key in UNSUPPORTED {
        match config.get(key) {
            None | Some(Value::Bool(false)) => {}
            Some(Value::Array(items)) if items.is_empty() => {}
            Some(Value::Object(items)) if items.is_empty() => {}
            Some(value) => return refuse(key, value),
        }
    }
    // trained biases are in the file
    let is_known = |value: &&Value| matches!(value.as_str(), Some("none" | "all" | "lora_only"));
    if let Some(value) = config.get("bias").filter(|value| !is_known(value)) {
        return refuse("bias", value);
    }
    Ok(())
}

/// Selects the adapted layers by the rules of PEFT.
struct Selection<'a> {
    targets: Targets<'a>,
    excluded: Option<Targets<'a>>,
    layers: Option<Vec<usize>>,
    layers_patterns: Vec<Regex>,
}

enum Targets<'a> {
    /// Paths or ends of paths.
    Named(Vec<&'a str>),
    /// The whole path must match.
    Matching(Regex),
    /// Every linear layer of the blocks.
    All,
}

impl<'a> Selection<'a> {
    fn read(config: &'a JsonObject, model_type: &str) -> Result<Self> {
        let targets = match targets_of(config, "target_modules")? {
            Some(Targets::Matching(regex)) if regex.as_str() == whole("all-linear") => Targets::All,
            Some(targets) => targets,
            None if FAMILIES_WITH_DEFAULTS.contains(&model_type) => Targets::Named(DEFAULT_TARGETS.to_vec()),
            None => Targets::Named(Vec::new()),
        };
        let layers = read_as(config, "layers_to_transform", "a whole number or a list of them", |value| match value {
            Value::Array(layers) => layers.iter().map(as_count).collect(),
            layer => Some(vec![as_count(layer)?]),
        })?;
        let names = read_as(config, "layers_pattern", "text or a list of texts", |value| match value {
            Value::String(name) => Some(vec![name.as_str()]),
            names => as_texts(names),
        })?;
        let layers_patterns = names
            .into_iter()
            .flatten()
            .filter(|name| !name.is_empty())
            .map(|name| compile(config, "layers_pattern", &format!(r"^.*\.(?:{name})\.(\d+)\."), name))
            .collect::<Result<_>>()?;
        let excluded = targets_of(config, "exclude_modules")?;
        Ok(Self { targets, excluded, layers: layers.filter(|layers| !layers.is_empty()), layers_patterns })
    }

    fn takes(&self, linear: &LinearInfo) -> bool {
        if self.excluded.as_ref().is_some_and(|excluded| excluded.matches(&linear.path)) {
            return false;
        }
        // PEFT's `all-linear` includes neither the embedding nor the head
        let is_meant = linear.layer.is_some() || !matches!(self.targets, Targets::All);
        if !is_meant || !self.targets.matches(&linear.path) {
            return false;
        }
        match (&self.layers, &self.targets) {
            (None, _) => true,
            // a full path is selected in any layer
            (Some(_), Targets::Named(names)) if names.contains(&linear.path.as_str()) => true,
            (Some(layers), _) => self.layer(linear).is_some_and(|layer| layers.contains(&layer)),
        }
    }

    fn layer(&self, linear: &LinearInfo) -> Option<usize> {
        if self.layers_patterns.is_empty() {
            return linear.layer;
        }
        let captures = self.layers_patterns.iter().find_map(|pattern| pattern.captures(&linear.path).ok().flatten())?;
        captures.get(1)?.as_str().parse().ok()
    }
}

impl Targets<'_> {
    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Named(names) => names
                .iter()
                .any(|name| path == *name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))),
            Self::Matching(regex) => is_match(regex, path),
            Self::All => true,
        }
    }
}

fn targets_of<'a>(config: &'a JsonObject, key: &str) -> Result<Option<Targets<'a>>> {
    match config.get(key) {
        None => Ok(None),
        Some(Value::String(pattern)) => Ok(Some(Targets::Matching(compile(config, key, &whole(pattern), pattern)?))),
        Some(value) => match as_texts(value) {
            Some(names) => Ok(Some(Targets::Named(names))),
            None => Err(config.wrong(key, "text or a list of texts", value)),
        },
    }
}

fn whole(pattern: &str) -> String {
    format!("^(?:{pattern})$")
}

fn compile(config: &JsonObject, key: &str, pattern: &str, shown: &str) -> Result<Regex> {
    compile_pattern(pattern).ok_or_else(|| {
        Error::Unsupported(format!("the regular expression `{shown}` of `{key}` in `{}`", config.path().display()))
    })
}

/// The entries of `rank_pattern` or `alpha_pattern` in the order of the file.
fn patterns<T: Copy>(
    config: &JsonObject,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
    kind: &str,
) -> Result<Patterns<T>> {
    let expected = format!("an object of {kind}");
    let mut entries = Vec::new();
    match config.get(key) {
        None => {}
        Some(Value::Object(object)) => {
            for (pattern, value) in object {
                let number = read(value).ok_or_else(|| config.wrong(key, &expected, value))?;
                entries.push((pattern.clone(), number));
            }
        }
        Some(value) => return Err(config.wrong(key, &expected, value)),
    }
    Patterns::new(key, entries).map_err(|error| Error::Unsupported(format!("{error} in `{}`", config.path().display())))
}

/// The configuration of an adapter, with sorted keys, that PEFT, mistral.rs and llama.cpp can read.
pub(super) fn describe(adapter: &LoRAAdapter) -> BTreeMap<&'static str, Value> {
    let modules = adapter.modules();
    let (inside, outside): (Vec<&LoRAModule>, Vec<_>) = modules.iter().partition(|module| module.layer.is_some());
    let kinds: BTreeSet<&str> = inside.iter().map(|module| module.module).collect();
    let layers: BTreeSet<usize> = inside.iter().filter_map(|module| module.layer).collect();
    let path = |module: &LoRAModule| peft_path(adapter.model(), &module.path);
    // kinds of modules and layers if they describe the adapter, else a list of paths. The other parts of a multimodal model
    // have modules of the same kinds, so such a model always gets paths
    let regular = inside.len() == kinds.len() * layers.len() && !adapter.model().config().is_text_part;
    let all_layers = layers.len() == adapter.model().config().num_hidden_layers;
    let some_layers = regular && !all_layers && !inside.is_empty();
    let mut targets: BTreeSet<String> = if regular {
        kinds.into_iter().map(String::from).collect()
    } else {
        inside.iter().map(|module| path(module)).collect()
    };
    // with `layers_to_transform`, PEFT selects modules outside the layers by their full path only
    targets.extend(outside.iter().map(|module| if some_layers { path(module) } else { module.module.to_string() }));
    let modules_to_save = Some(adapter.modules_to_save()).filter(|names| !names.is_empty());
    let mut config = BTreeMap::from([
        (
            "alpha_pattern",
            pattern_of(modules, path, |module| whole_number(module.alpha), &whole_number(adapter.alpha())),
        ),
        ("base_model_name_or_path", json!(adapter.base_model())),
        ("bias", json!(bias_of(adapter).name())),
        ("exclude_modules", Value::Null),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("layers_pattern", if some_layers { json!("layers") } else { Value::Null }),
        ("layers_to_transform", if some_layers { json!(layers) } else { Value::Null }),
        ("lora_alpha", whole_number(adapter.alpha())),
        ("lora_dropout", json!(adapter.dropout())),
        ("modules_to_save", json!(modules_to_save)),
        ("peft_type", json!("LORA")),
        ("r", json!(adapter.rank())),
        ("rank_pattern", pattern_of(modules, path, |module| json!(module.rank), &json!(adapter.rank()))),
        ("revision", Value::Null),
        ("target_modules", json!(targets)),
        ("task_type", json!("CAUSAL_LM")),
        ("use_dora", json!(adapter.use_dora())),
        ("use_rslora", json!(adapter.use_rslora())),
    ]);
    if adapter.ensure_weight_tying() {
        config.insert("ensure_weight_tying", json!(true));
    }
    if let Some(indices) = token_indices(adapter) {
        config.insert("trainable_token_indices", indices);
    }
    config
}

/// The value of `bias`; biases from an adapter that does not name them are written as `all`.
fn bias_of(adapter: &LoRAAdapter) -> TrainedBiases {
    let is_bias = |name: &String| name.rsplit('.').next() == Some("bias");
    let has_others = adapter.parameters_to_save().iter().any(is_bias);
    if has_others { TrainedBiases::All } else { adapter.bias() }
}

/// `trainable_token_indices`: a list for the embedding, else lists by module.
fn token_indices(adapter: &LoRAAdapter) -> Option<Value> {
    let tokens = adapter.trainable_tokens();
    match tokens.get(EMBEDDING_WEIGHT) {
        Some(of_embedding) if tokens.len() == 1 => Some(json!(of_embedding)),
        _ if tokens.is_empty() => None,
        _ => {
            let module = |name: &str| name.trim_end_matches(".weight").rsplit('.').next().map(String::from);
            let by_module = tokens.iter().filter_map(|(name, ids)| Some((module(name)?, json!(ids))));
            Some(Value::Object(by_module.collect()))
        }
    }
}

/// The values that differ from the default: by the last part of the path if all of its modules agree, else by path.
fn pattern_of(
    modules: &[LoRAModule],
    path: impl Fn(&LoRAModule) -> String,
    value: impl Fn(&LoRAModule) -> Value,
    default: &Value,
) -> Value {
    let mut kinds: BTreeMap<&str, Vec<(String, Value)>> = BTreeMap::new();
    for module in modules {
        kinds.entry(module.module).or_default().push((path(module), value(module)));
    }
    let mut pattern = BTreeMap::new();
    for (kind, values) in kinds {
        let first = &values[0].1;
        if values.iter().all(|(_, value)| value == first) {
            if first != default {
                pattern.insert(kind.to_string(), first.clone());
            }
        } else {
            pattern.extend(values.into_iter().filter(|(_, value)| value != default));
        }
    }
    json!(pattern)
}

/// A number as JSON, as an integer if it is whole: PEFT writes alpha this way.
fn whole_number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
