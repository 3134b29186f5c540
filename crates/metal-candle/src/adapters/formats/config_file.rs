//! Reads typed values from `adapter_config.json`.

use crate::adapters::layout::{Layout, Planned, Settings};
use crate::error::{Error, Result};
use crate::files::JsonObject;
use crate::models::Model;
use serde_json::Value;
use std::path::Path;

/// The configuration file of PEFT and of mlx-lm.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// The layout that a configuration file describes. Errors name the file.
pub(super) fn layout_of(path: &Path, model: &Model, settings: Settings, planned: &[Planned]) -> Result<Layout> {
    Layout::new(model, settings, planned).map_err(|error| match error {
        Error::Argument { name, message } => Error::format(path, format!("`{name}`: {message}")),
        other => other,
    })
}

/// The value of `key` converted by `read`; `None` if it is absent or null, an error if `read` returns `None`.
pub(super) fn read_as<'a, T>(
    config: &'a JsonObject,
    key: &str,
    expected: &str,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>> {
    let Some(value) = config.get(key) else { return Ok(None) };
    read(value).map(Some).ok_or_else(|| config.wrong(key, expected, value))
}

pub(super) fn as_count(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

pub(super) fn as_texts(value: &Value) -> Option<Vec<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

/// A value for a message, shortened if it is long.
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
