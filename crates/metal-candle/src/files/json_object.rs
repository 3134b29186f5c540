//! Reads typed values of a JSON object, with errors that name the file, the key, and what was expected and found.

use super::read::{MAX_SIDE_FILE_BYTES, read_text};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The keys of a JSON file.
#[derive(Debug, Clone)]
pub(crate) struct JsonObject {
    path: PathBuf,
    map: Map<String, Value>,
}

impl JsonObject {
    /// Reads the object in the file `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(&read_text(path, MAX_SIDE_FILE_BYTES)?, path)
    }

    /// Parses the object in `text`; errors name `path`.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        if text.trim().is_empty() {
            return Err(Error::format(path, "expected a JSON object, found an empty file"));
        }
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::format(path, format!("expected JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self { path: path.to_path_buf(), map }),
            other => Err(Error::format(path, format!("expected a JSON object, found {}", describe(&other)))),
        }
    }

    /// Wraps a map; errors name `path`.
    pub(crate) fn from_map(path: &Path, map: Map<String, Value>) -> Self {
        Self { path: path.to_path_buf(), map }
    }

    /// Adds `keys` of `other` that are missing here.
    pub(crate) fn with_defaults(mut self, other: &Self, keys: &[&str]) -> Self {
        for key in keys {
            if let Some(value) = other.get(key) {
                self.map.entry(*key).or_insert_with(|| value.clone());
            }
        }
        self
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The keys.
    pub(crate) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of `key`, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The object at `key`, whose own keys are named `key.name` in errors.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { path: self.path.clone(), map: map.clone() })),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }

    /// The whole number at `key`.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|value| self.to_size(key, value)).transpose()
    }

    /// The whole number at `key`; an error if it is missing.
    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        match self.map.get(key) {
            None => Err(self.missing(key, "a whole number")),
            Some(value) => self.to_size(key, value),
        }
    }

    /// The finite number at `key`.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|value| {
                let number = value.as_f64().filter(|number| number.is_finite());
                number.ok_or_else(|| self.wrong(key, "a number", value))
            })
            .transpose()
    }

    /// The truth value at `key`.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|value| value.as_bool().ok_or_else(|| self.wrong(key, "`true` or `false`", value)))
            .transpose()
    }

    /// The string at `key`.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, "a string", value))).transpose()
    }

    /// The token ids at `key`: one or a list.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let to_id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(key, "a token id or a list of them", value))
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(to_id).collect::<Result<_>>().map(Some),
            Some(value) => Ok(Some(vec![to_id(value)?])),
        }
    }

    /// The error about a key with a wrong value.
    pub(crate) fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::format(&self.path, format!("`{key}`: expected {expected}, found {}", describe(found)))
    }

    /// The error about a missing key.
    pub(crate) fn missing(&self, key: &str, expected: &str) -> Error {
        Error::format(&self.path, format!("`{key}`: expected {expected}, found no such key"))
    }

    fn to_size(&self, key: &str, value: &Value) -> Result<usize> {
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| self.wrong(key, "a whole number", value))
    }
}

/// A short description of a value, for errors.
pub(crate) fn describe(value: &Value) -> String {
    const MAX_SHOWN: usize = 60;
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_string(),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(MAX_SHOWN) {
                Some((end, _)) => format!("`{}...`", &text[..end]),
                None => format!("`{text}`"),
            }
        }
    }
}
