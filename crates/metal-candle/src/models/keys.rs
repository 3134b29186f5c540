//! Reads the keys of a `config.json`, and reports those that no family reads.

use crate::error::{Error, Result};
use crate::files::JsonObject;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Keys that change what some families compute. If a family does not read one and its value is not neutral, a note
/// lists it.
const FORWARD_KEYS: &[&str] = &[
    "attention_bias",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "kv_lora_rank",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "moe_intermediate_size",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_kv_shared_layers",
    "num_local_experts",
    "partial_rotary_factor",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "use_bias",
    "use_parallel_residual",
    "use_qk_norm",
    "use_qkv_bias",
];

/// Keys that have no effect on the results of any supported family in transformers: settings of dropout, of mixtures of
/// experts and recurrent layers (which a family refuses before it reads their sizes), of loading and generation, and
/// unused keys of released files.
const HARMLESS_KEYS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_name_or_path",
    "_sliding_window_pattern",
    "activation_function",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "embedding_dropout",
    "eod_token_id",
    "hidden_dropout",
    "id2label",
    "image_token_index",
    "init_method",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_window_layers",
    "mlp_type",
    "model_type",
    "norm_type",
    "normalization_function",
    "num_experts_per_tok",
    "order_of_interleaved_layers",
    "original_max_position_embeddings",
    "output_router_logits",
    "pad_token_id",
    "position_embedding_type",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "rope_interleaved",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "time_step_limit",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_embedding_sharing",
    "use_gated_activation",
    "use_parallel_block",
    "use_parallel_embedding",
    "use_sliding_window",
];

/// The keys of a file, with a record of those that were read.
pub(crate) struct Keys<'a> {
    object: &'a JsonObject,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(object: &'a JsonObject) -> Self {
        Self { object, used: RefCell::default() }
    }

    fn mark(&self, key: &str) {
        self.used.borrow_mut().insert(key.to_string());
    }

    pub(crate) fn path(&self) -> &Path {
        self.object.path()
    }

    pub(crate) fn map(&self) -> &Map<String, Value> {
        self.object.map()
    }

    /// Whether the key is present, even with a null value.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.mark(key);
        self.object.map().contains_key(key)
    }

    /// Whether the value of `key` is null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.mark(key);
        self.object.map().get(key).is_some_and(Value::is_null)
    }

    /// The value of `key`; `None` if it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.mark(key);
        self.object.get(key)
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.mark(key);
        self.object.size(key)
    }

    /// The integer at `key`, or `default` if the key is absent; null is an error.
    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.contains(key) { self.object.required_size(key) } else { Ok(default) }
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.mark(key);
        self.object.number(key)
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.mark(key);
        self.object.flag(key)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.mark(key);
        self.object.text(key)
    }

    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.mark(key);
        self.object.token_ids(key)
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<JsonObject>> {
        self.mark(key);
        self.object.object(key)
    }

    pub(crate) fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.object.wrong(key, expected, found)
    }

    /// Marks `key` as unread, so that it is reported if it changes what other families compute.
    pub(crate) fn forget(&self, key: &str) {
        self.used.borrow_mut().remove(key);
    }

    /// The error for a value that is not supported.
    pub(crate) fn unsupported(&self, key: &str, what: &str) -> Error {
        Error::Unsupported(format!("`{}`: `{key}`: {what}", self.path().display()))
    }

    /// The unread keys that change what other families compute, with values that are not neutral.
    pub(crate) fn unread(&self) -> Vec<&'static str> {
        let used = self.used.borrow();
        let is_unread = |key: &&str| !used.contains(*key) && self.object.get(key).is_some_and(|v| !is_neutral(v));
        FORWARD_KEYS.iter().copied().filter(is_unread).collect()
    }

    /// Unknown keys, such as misspelled ones, with values that are not neutral.
    pub(crate) fn unknown(&self) -> Vec<&'a str> {
        let used = self.used.borrow();
        let is_known = |key: &str| {
            used.contains(key)
                || FORWARD_KEYS.contains(&key)
                || HARMLESS_KEYS.contains(&key)
                || key.starts_with("mamba_")
        };
        let entries = self.object.map().iter();
        entries.filter(|(key, value)| !is_known(key) && !is_neutral(value)).map(|(key, _)| key.as_str()).collect()
    }
}

/// Whether a value means that a feature is disabled.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|number| number == 0.0 || (number - 1.0).abs() < 1e-12),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}
