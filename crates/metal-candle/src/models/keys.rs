//! The keys of a `config.json` as a family reads them.

use crate::error::{Error, Result};
use crate::files::JsonObject;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Keys that change what some family computes. One that a family does not read, and whose value is not neutral, is named.
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
    "use_qk_norm",
    "use_qkv_bias",
];

/// The keys of a file, and which of them were read.
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

    /// Whether there is such a key, even with a null value.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.mark(key);
        self.object.map().contains_key(key)
    }

    /// Whether the value of `key` is null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.mark(key);
        self.object.map().get(key).is_some_and(Value::is_null)
    }

    /// The value of `key`, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.mark(key);
        self.object.get(key)
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.mark(key);
        self.object.size(key)
    }

    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.mark(key);
        self.object.required_size(key)
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

    pub(crate) fn missing(&self, key: &str, expected: &str) -> Error {
        self.object.missing(key, expected)
    }

    /// Counts `key` as unread, so that a value that changes what other families compute is named.
    pub(crate) fn forget(&self, key: &str) {
        self.used.borrow_mut().remove(key);
    }

    /// The error of a value that is not supported.
    pub(crate) fn unsupported(&self, key: &str, what: &str) -> Error {
        Error::Unsupported(format!("`{}`: `{key}`: {what}", self.path().display()))
    }

    /// The keys that change what other families compute and that this one did not read, with values that are not neutral.
    pub(crate) fn unread(&self) -> Vec<&'static str> {
        let used = self.used.borrow();
        let is_neutral = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => {
                number.as_f64().is_some_and(|number| number == 0.0 || (number - 1.0).abs() < 1e-12)
            }
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        let is_unread = |key: &&str| !used.contains(*key) && self.object.get(key).is_some_and(|v| !is_neutral(v));
        FORWARD_KEYS.iter().copied().filter(is_unread).collect()
    }
}
