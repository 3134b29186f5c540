//! Parses calls with one tag per parameter, as in Qwen3-Coder.

use super::call::Call;
use super::request::{PlainText, Tool};
use serde_json::{Map, Value};

const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// Parses the call between the markers; `None` if it is not a call. The tools' schemas determine which values are strings.
pub(super) fn call_of_xml(text: &str, tools: &[Tool]) -> Option<Call> {
    let text = text.trim().strip_prefix("<function=")?.strip_suffix(FUNCTION_END)?;
    let (name, mut rest) = text.split_once('>')?;
    let tool = tools.iter().find(|tool| tool.name == name);
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            break;
        }
        let (key, after) = rest.strip_prefix(PARAMETER)?.split_once('>')?;
        let end = parameter_end(after)?;
        let value = &after[..end];
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        arguments.insert(key.to_string(), typed(value, tool.and_then(|tool| tool.property(key))));
        rest = &after[end + PARAMETER_END.len()..];
    }
    let is_name = !name.is_empty() && !name.contains(['<', '\n', '"']);
    is_name.then(|| Call { name: name.to_string(), arguments: Value::Object(arguments).to_string() })
}

/// The end of a value: the first closing tag before another parameter or the end. Values may contain closing tags as text.
fn parameter_end(text: &str) -> Option<usize> {
    let mut ends = text.match_indices(PARAMETER_END).map(|(end, _)| end);
    ends.find(|end| {
        let after = text[end + PARAMETER_END.len()..].trim_start();
        after.is_empty() || after.starts_with(PARAMETER)
    })
}

/// Converts a text to a JSON value according to the schema of its parameter.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let string = || Value::String(text.to_string());
    let kinds: Vec<&str> = match schema.and_then(|schema| schema.get("type")) {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    match schema.and_then(PlainText::of) {
        Some(PlainText::Any) => return string(),
        Some(PlainText::OneOf(texts)) if texts.contains(&text) => return string(),
        _ => {}
    }
    let trimmed = text.trim();
    // templates print values like Python
    let parsed = match trimmed {
        "True" => Some(Value::Bool(true)),
        "False" => Some(Value::Bool(false)),
        "None" => Some(Value::Null),
        _ => serde_json::from_str(trimmed).ok(),
    };
    match parsed {
        // values with these schemas are JSON; without a schema, a quoted string is unchanged
        Some(Value::String(inner)) if schema.is_some() => Value::String(inner),
        Some(Value::String(_)) | None => string(),
        Some(value) => {
            let kind = match &value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(number) if number.is_f64() => "number",
                Value::Number(_) => "integer",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            };
            let is_allowed = kinds.contains(&kind) || (kind == "integer" && kinds.contains(&"number"));
            if kinds.contains(&"string") && !is_allowed { string() } else { value }
        }
    }
}
