//! Parses tool calls that a model generated as JSON.

use super::json_scan::{fields, items};

/// A function and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) name: String,
    /// A JSON object.
    pub(super) arguments: String,
}

/// The calls of a JSON object with a name and arguments, or of a list of them; `None` if one is not a call.
pub(super) fn calls_of_json(text: &str) -> Option<Vec<Call>> {
    if text.trim_start().starts_with('[') {
        let calls: Option<Vec<Call>> = items(text)?.into_iter().map(call_of_json).collect();
        calls.filter(|calls| !calls.is_empty())
    } else {
        Some(vec![call_of_json(text)?])
    }
}

fn call_of_json(text: &str) -> Option<Call> {
    let mut fields = fields(text)?;
    // some models wrap the call in `function`, as in a request
    if let Some(index) = fields.iter().position(|(key, value)| key == "function" && value.starts_with('{')) {
        fields = super::json_scan::fields(fields[index].1)?;
    }
    let text_of = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| *value);
    let name: String = serde_json::from_str(text_of("name")?).ok()?;
    let arguments = text_of("arguments").or_else(|| text_of("parameters")).unwrap_or("{}");
    if name.is_empty() {
        return None;
    }
    Some(Call { name, arguments: object(arguments)? })
}

/// The text of a JSON object, which may be inside a JSON string.
pub(super) fn object(text: &str) -> Option<String> {
    match text.trim_start().chars().next()? {
        '{' => fields(text).map(|_| text.trim().to_string()),
        '"' => {
            let inner: String = serde_json::from_str(text).ok()?;
            fields(&inner).is_some().then_some(inner)
        }
        _ => None,
    }
}
