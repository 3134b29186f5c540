//! Reads typed fields of a JSON object and checks their ranges. Errors name the field, and what was expected and found.
//! `null` counts as absent.

use crate::error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Maximum number of characters in the name of a function or a schema.
const MAX_NAME: usize = 64;

type Result<T> = std::result::Result<T, ApiError>;

/// The fields of an object in a request.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// The path of the object, before a field's name.
    prefix: String,
}

impl<'a> Fields<'a> {
    /// The fields of a request body.
    pub(crate) fn of_body(body: &'a Value) -> Result<Self> {
        match body {
            Value::Object(map) => Ok(Self { map, prefix: String::new() }),
            other => Err(ApiError::invalid(format!("expected a JSON object as the body, found {}", describe(other)))),
        }
    }

    /// The fields of `value`, which is at `path`.
    pub(crate) fn of(value: &'a Value, path: String) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, prefix: format!("{path}.") }),
            other => {
                let message = format!("`{path}`: expected an object, found {}", describe(other));
                Err(ApiError::field(path, message))
            }
        }
    }

    /// The path of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The value of a field, unless it is absent or `null`.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        #[cfg(test)]
        asked::add(&self.path(name));
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// All fields.
    pub(crate) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The error about an unexpected value of a field.
    pub(crate) fn wrong<T>(&self, name: &str, expected: &str, found: &Value) -> Result<T> {
        let path = self.path(name);
        Err(ApiError::field(path.clone(), format!("`{path}`: expected {expected}, found {}", describe(found))))
    }

    /// The value of a required field.
    pub(crate) fn required(&self, name: &str) -> Result<&'a Value> {
        self.get(name).ok_or_else(|| self.absent(name))
    }

    fn absent(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::field(path.clone(), format!("`{path}` is required"))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => self.wrong(name, "a string", other),
        }
    }

    pub(crate) fn required_text(&self, name: &str) -> Result<&'a str> {
        self.text(name)?.ok_or_else(|| self.absent(name))
    }

    /// The name of a function or a schema.
    pub(crate) fn required_name(&self, name: &str) -> Result<&'a str> {
        let found = self.required_text(name)?;
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if (1..=MAX_NAME).contains(&found.len()) && found.bytes().all(is_good) {
            return Ok(found);
        }
        self.wrong(name, &format!("1 to {MAX_NAME} letters, digits, `_` or `-`"), &found.into())
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => self.wrong(name, "true or false", other),
        }
    }

    pub(crate) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_i64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => self.wrong(name, &format!("a whole number {}", span(range.start(), range.end())), value),
        }
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn count(&self, name: &str, least: usize, most: usize) -> Result<Option<usize>> {
        let limit = |number| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(self.integer(name, limit(least)..=limit(most))?.map(|number| number as usize))
    }

    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => self.wrong(name, &format!("a number {}", span(range.start(), range.end())), value),
        }
    }

    /// A list with at most `most` values.
    pub(crate) fn list(&self, name: &str, most: usize) -> Result<Option<&'a [Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() <= most => Ok(Some(list)),
            Some(Value::Array(list)) => {
                let path = self.path(name);
                let message = format!("`{path}`: expected at most {most} values, found {}", list.len());
                Err(ApiError::field(path, message))
            }
            Some(other) => self.wrong(name, "a list", other),
        }
    }

    pub(crate) fn required_list(&self, name: &str, most: usize) -> Result<&'a [Value]> {
        self.list(name, most)?.ok_or_else(|| self.absent(name))
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>> {
        self.get(name).map(|value| Self::of(value, self.path(name))).transpose()
    }

    pub(crate) fn required_object(&self, name: &str) -> Result<Self> {
        Self::of(self.required(name)?, self.path(name))
    }

    /// The objects of a list, each with its path.
    pub(crate) fn objects(&self, name: &str, most: usize) -> Result<Vec<Self>> {
        let list = self.list(name, most)?.unwrap_or_default();
        list.iter().enumerate().map(|(index, value)| Self::of(value, format!("{}[{index}]", self.path(name)))).collect()
    }

    /// A string, or a list of at most `most` strings.
    pub(crate) fn texts(&self, name: &str, most: usize) -> Result<Vec<&'a str>> {
        if let Some(Value::String(text)) = self.get(name) {
            return Ok(vec![text]);
        }
        if let Some(other) = self.get(name).filter(|value| !value.is_array()) {
            return self.wrong(name, "a string or a list of strings", other);
        }
        let list = self.list(name, most)?.unwrap_or_default();
        let text = |(index, value): (usize, &'a Value)| match value {
            Value::String(text) => Ok(text.as_str()),
            other => self.wrong(&format!("{name}[{index}]"), "a string", other),
        };
        list.iter().enumerate().map(text).collect()
    }

    /// Returns an error for the first of these fields with a value that is not null, false or empty.
    pub(crate) fn refuse(&self, names: &[&str]) -> Result<()> {
        let is_empty = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        match names.iter().find(|name| self.get(name).is_some_and(|value| !is_empty(value))) {
            Some(name) => {
                let path = self.path(name);
                Err(ApiError::unsupported(path.clone(), format!("`{path}` is not supported by this server")))
            }
            None => Ok(()),
        }
    }

    /// Reads a field that must be one of these texts.
    pub(crate) fn one_of(&self, name: &str, texts: &[&'static str]) -> Result<Option<&'static str>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        if let Some(text) = texts.iter().find(|text| value.as_str() == Some(text)) {
            return Ok(Some(text));
        }
        let list: Vec<String> = texts.iter().map(|text| format!("`{text}`")).collect();
        self.wrong(name, &list.join(" or "), value)
    }
}

/// Records the names of the fields that were read on this thread, for tests.
#[cfg(test)]
pub(crate) mod asked {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    thread_local! {
        static NAMES: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
    }

    pub(super) fn add(path: &str) {
        if !path.contains(['.', '[']) {
            NAMES.with_borrow_mut(|names| names.insert(path.to_owned()));
        }
    }

    /// Clears the names.
    pub(crate) fn start() {
        NAMES.with_borrow_mut(BTreeSet::clear);
    }

    /// The names since the last [`start`].
    pub(crate) fn names() -> BTreeSet<String> {
        NAMES.with_borrow(Clone::clone)
    }
}

fn span<T: std::fmt::Display>(least: &T, most: &T) -> String {
    format!("from {least} to {most}")
}

/// A short description of a value.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.chars().count() <= 40 => format!("`{text}`"),
        Value::String(text) => format!("a string of {} characters", text.chars().count()),
        Value::Array(list) => format!("a list of {} values", list.len()),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_checked_and_errors_name_the_field() {
        let body = json!({
            "n": 1.0, "m": 3, "t": null, "x": 1e308, "list": [{"a": 1}, 2], "stop": ["a", 5], "off": [], "kind": "b"
        });
        let fields = Fields::of_body(&body).unwrap();
        let param = |error: ApiError| error.param.unwrap();
        assert_eq!(param(fields.integer("n", 0..=5).unwrap_err()), "n");
        assert_eq!(fields.integer("m", 0..=5).unwrap(), Some(3));
        let error = fields.integer("m", 4..=5).unwrap_err();
        assert_eq!(error.message, "`m`: expected a whole number from 4 to 5, found 3");
        assert_eq!(fields.text("t").unwrap(), None);
        assert!(fields.number("x", -2.0..=2.0).is_err());
        assert_eq!(param(fields.objects("list", 9).unwrap_err()), "list[1]");
        assert_eq!(param(fields.list("list", 1).unwrap_err()), "list");
        assert_eq!(param(fields.texts("stop", 9).unwrap_err()), "stop[1]");
        assert!(fields.refuse(&["off", "t", "absent"]).is_ok());
        assert_eq!(param(fields.refuse(&["m"]).unwrap_err()), "m");
        assert_eq!(fields.one_of("kind", &["a", "b"]).unwrap(), Some("b"));
        assert!(fields.one_of("kind", &["a"]).is_err());
        assert!(Fields::of_body(&json!([])).is_err());
    }
}
