//! Reads values of a request; an error names the path of the field.

use serde_json::{Map, Value};

/// Most characters of a name.
const MAX_NAME: usize = 64;

/// A wrong field of a request, for an answer with status 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct RequestError {
    /// The path of the field, such as `tools[2].function.name`.
    pub(crate) param: String,
    /// The problem and the expected value.
    pub(crate) message: String,
}

impl RequestError {
    /// An error of the field at `param`.
    pub(crate) fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: param.into(), message: message.into() }
    }
}

type Result<T> = std::result::Result<T, RequestError>;

/// The fields of an object at `path`.
pub(crate) fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().map_or_else(|| wrong(path, "an object", value), Ok)
}

/// The values of a list at `path`.
pub(crate) fn list<'a>(value: &'a Value, path: &str) -> Result<&'a Vec<Value>> {
    value.as_array().map_or_else(|| wrong(path, "a list", value), Ok)
}

/// The string at `path`.
pub(crate) fn text<'a>(value: &'a Value, path: &str) -> Result<&'a str> {
    value.as_str().map_or_else(|| wrong(path, "a string", value), Ok)
}

/// The boolean at `path`; `None` if it is absent or null.
pub(crate) fn flag(value: Option<&Value>, path: &str) -> Result<Option<bool>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => wrong(path, "a boolean", other),
    }
}

/// The value of the field `name`, whose path is `path`.
pub(crate) fn required<'a>(fields: &'a Map<String, Value>, name: &str, path: &str) -> Result<&'a Value> {
    let present = fields.get(name).filter(|value| !value.is_null());
    present.ok_or_else(|| RequestError::new(path, format!("`{path}` is required")))
}

/// The name of a function or schema at `path`.
pub(crate) fn name<'a>(value: &'a Value, path: &str) -> Result<&'a str> {
    let name = text(value, path)?;
    let is_valid = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    if is_valid {
        return Ok(name);
    }
    let message = format!("`{path}`: expected 1 to {MAX_NAME} letters, digits, `_` or `-`");
    Err(RequestError::new(path, message))
}

/// An error of a value with another type.
pub(crate) fn wrong<T>(path: &str, expected: &str, found: &Value) -> Result<T> {
    Err(RequestError::new(path, format!("`{path}`: expected {expected}, found {}", kind(found))))
}

/// The type of a JSON value, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
