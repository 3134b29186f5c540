//! Reads the JSON files of a tokenizer folder and their special tokens.

use crate::error::{Error, Result};
use crate::files::read_if_exists;
use serde_json::Value;
use std::path::Path;

/// Largest accepted `tokenizer.json`, in bytes; Gemma 3's has 33 MB.
pub(super) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest accepted `tokenizer_config.json` and `special_tokens_map.json`.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The text of a special token: a string, or an object with `content`.
pub(super) fn token_text(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_string)
}

/// The text of the special token `name`.
pub(super) fn special_token(config: &Value, name: &str) -> Option<String> {
    config.get(name).and_then(token_text)
}

/// The value of a JSON file, or `None` if there is no file.
pub(super) fn read_json_if_exists(path: &Path) -> Result<Option<Value>> {
    let bytes = read_if_exists(path, MAX_CONFIG_BYTES)?;
    bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(|e| Error::format(path, e))).transpose()
}
