//! Reads the grammar of a request: `response_format`, and the fields of vLLM and llama.cpp.

use super::kind::Grammar;
use crate::request_error::{RequestError, flag, name, object, required, text, wrong};
use serde_json::{Map, Value};

const MAX_CHOICES: usize = 1024;

type Result<T> = std::result::Result<T, RequestError>;

impl Grammar {
    /// The grammar that a `response_format` asks for; `None` for text.
    ///
    /// # Errors
    /// A field is wrong or not supported.
    pub(crate) fn from_response_format(format: &Value) -> Result<Option<Self>> {
        const PARAM: &str = "response_format";
        let fields = object(format, PARAM)?;
        let path = format!("{PARAM}.type");
        match required(fields, "type", &path)?.as_str() {
            Some("text") => Ok(None),
            Some("json_object") => match fields.get("schema").filter(|schema| !schema.is_null()) {
                None => Ok(Some(Self::JsonObject)),
                Some(schema) => json_schema(schema, &format!("{PARAM}.schema")).map(Some),
            },
            Some("json_schema") => {
                let path = format!("{PARAM}.json_schema");
                let fields = object(required(fields, "json_schema", &path)?, &path)?;
                if let Some(value) = fields.get("name").filter(|value| !value.is_null()) {
                    name(value, &format!("{path}.name"))?;
                }
                flag(fields.get("strict"), &format!("{path}.strict"))?;
                let path = format!("{path}.schema");
                json_schema(required(fields, "schema", &path)?, &path).map(Some)
            }
            _ => {
                let message = format!("`{path}`: expected `text`, `json_object` or `json_schema`");
                Err(RequestError::new(path, message))
            }
        }
    }

    /// The grammar of a request's body with the path of its field; `None` if the body asks for none.
    ///
    /// It reads `response_format`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`, `json_schema`, `grammar` and
    /// `structured_outputs`.
    ///
    /// # Errors
    /// A field is wrong, or several fields ask for a grammar.
    pub(crate) fn from_request(body: &Map<String, Value>) -> Result<Option<(String, Self)>> {
        let mut found: Option<(String, Self)> = None;
        let mut add = |param: String, grammar: Option<Self>| -> Result<()> {
            let Some(grammar) = grammar else { return Ok(()) };
            if let Some((first, _)) = &found {
                let message = format!("`{param}` and `{first}` both ask for a grammar; send one of them");
                return Err(RequestError::new(param, message));
            }
            found = Some((param, grammar));
            Ok(())
        };
        for (field, value) in body.iter().filter(|(_, value)| !value.is_null()) {
            if field == "response_format" {
                add(field.clone(), Self::from_response_format(value)?)?;
            } else if field == "structured_outputs" {
                for (key, value) in object(value, field)?.iter().filter(|(_, value)| !value.is_null()) {
                    let path = format!("{field}.{key}");
                    add(path.clone(), Self::from_extra(key, value, &path)?)?;
                }
            } else {
                let key = field.strip_prefix("guided_").or(match field.as_str() {
                    "json_schema" => Some("json"),
                    "grammar" => Some("grammar"),
                    _ => None,
                });
                if let Some(key) = key {
                    add(field.clone(), Self::from_extra(key, value, field)?)?;
                }
            }
        }
        Ok(found)
    }

    fn from_extra(key: &str, value: &Value, path: &str) -> Result<Option<Self>> {
        Ok(match key {
            "json" => Some(json_schema(value, path)?),
            "json_object" => (flag(Some(value), path)? == Some(true)).then_some(Self::JsonObject),
            "regex" => Some(Self::Regex(text(value, path)?.into())),
            "choice" => Some(choice(value, path)?),
            "grammar" => {
                let text = text(value, path)?.to_string();
                Some(if text.contains("::=") { Self::Gbnf(text) } else { Self::Lark(text) })
            }
            _ => None,
        })
    }
}

fn json_schema(value: &Value, path: &str) -> Result<Grammar> {
    match value {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::JsonSchema(value.clone())),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Grammar::JsonSchema(schema)),
            _ => Err(RequestError::new(path, format!("`{path}`: the text is not a JSON schema"))),
        },
        other => wrong(path, "a JSON schema", other),
    }
}

/// One of several texts.
fn choice(value: &Value, path: &str) -> Result<Grammar> {
    let Some(choices) = value.as_array() else { return wrong(path, "a list of strings", value) };
    if choices.is_empty() || choices.len() > MAX_CHOICES {
        let message = format!("`{path}`: expected 1 to {MAX_CHOICES} strings, found {}", choices.len());
        return Err(RequestError::new(path, message));
    }
    let mut alternatives = Vec::with_capacity(choices.len());
    for (index, choice) in choices.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut escaped = String::new();
        for c in text(choice, &path)?.chars() {
            if r"\.+*?()|[]{}^$#&-~".contains(c) {
                escaped.push('\\');
            }
            escaped.push(c);
        }
        alternatives.push(escaped);
    }
    Ok(Grammar::Regex(format!("(?:{})", alternatives.join("|"))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Option<(String, Grammar)>> {
        Grammar::from_request(body.as_object().unwrap())
    }

    #[test]
    fn every_field_gives_its_grammar() {
        let schema = json!({"type": "object"});
        for (body, expected) in [
            (json!({}), None),
            (json!({"response_format": null, "guided_json": null}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::JsonObject)),
            (
                json!({"response_format": {"type": "json_object", "schema": schema}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": true}}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (json!({"guided_json": schema.to_string()}), Some(Grammar::JsonSchema(schema.clone()))),
            (json!({"json_schema": schema}), Some(Grammar::JsonSchema(schema.clone()))),
            (json!({"guided_regex": "a+"}), Some(Grammar::Regex("a+".into()))),
            (json!({"guided_choice": ["a.b", "c"]}), Some(Grammar::Regex(r"(?:a\.b|c)".into()))),
            (json!({"grammar": "start: \"a\""}), Some(Grammar::Lark("start: \"a\"".into()))),
            (json!({"grammar": "root ::= \"a\""}), Some(Grammar::Gbnf("root ::= \"a\"".into()))),
            (json!({"structured_outputs": {"regex": "a", "json": null}}), Some(Grammar::Regex("a".into()))),
            (json!({"structured_outputs": {"json_object": true}}), Some(Grammar::JsonObject)),
        ] {
            assert_eq!(read(&body).unwrap().map(|(_, grammar)| grammar), expected, "{body}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}),
                "response_format.json_schema.name",
            ),
            (json!({"guided_json": 3}), "guided_json"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", 3]}), "guided_choice[1]"),
            (json!({"guided_regex": "a", "grammar": "b"}), "grammar"),
        ] {
            assert_eq!(read(&body).unwrap_err().param, param, "{body}");
        }
    }
}
