//! Reads the grammar of a request from `response_format` and the fields of vLLM and llama.cpp.

use super::kind::Grammar;
use crate::error::ApiError;
use crate::fields::Fields;
use serde_json::Value;

/// Maximum number of texts in a choice.
const MAX_CHOICES: usize = 1024;

/// Fields of vLLM and llama.cpp, and the kind of grammar in each.
const EXTRAS: [(&str, &str); 6] = [
    ("guided_json", "json"),
    ("json_schema", "json"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("grammar", "grammar"),
];

type Result<T> = std::result::Result<T, ApiError>;

impl Grammar {
    /// The fields that all wire formats share: the fields of [`Grammar::from_request`] except `response_format`.
    pub(crate) fn extra_fields(fields: &Fields) -> impl Iterator<Item = (String, Value)> {
        let names = EXTRAS.iter().map(|(name, _)| *name).chain(["structured_outputs"]);
        names.filter_map(|name| Some((name.to_owned(), fields.get(name)?.clone())))
    }

    /// The grammar of a request and the path of its field; `None` without a grammar.
    ///
    /// It reads `response_format`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`, `json_schema`, `grammar`
    /// and `structured_outputs`.
    ///
    /// # Errors
    /// A field is invalid, or several fields specify a grammar.
    pub(crate) fn from_request(fields: &Fields) -> Result<Option<(String, Self)>> {
        let mut found = Vec::new();
        if let Some(format) = fields.object("response_format")? {
            found.extend(of_format(&format)?.map(|grammar| (fields.path("response_format"), grammar)));
        }
        for (name, kind) in EXTRAS {
            found.extend(of_extra(fields, name, kind)?.map(|grammar| (fields.path(name), grammar)));
        }
        if let Some(outputs) = fields.object("structured_outputs")? {
            for kind in ["json", "json_object", "regex", "choice", "grammar"] {
                found.extend(of_extra(&outputs, kind, kind)?.map(|grammar| (outputs.path(kind), grammar)));
            }
        }
        if let [(first, _), (second, _), ..] = found.as_slice() {
            let message = format!("`{second}` and `{first}` both specify a grammar; send one of them");
            return Err(ApiError::field(second, message));
        }
        Ok(found.pop())
    }
}

/// The grammar of a `response_format`; `None` for text.
fn of_format(format: &Fields) -> Result<Option<Grammar>> {
    format.required("type")?;
    match format.one_of("type", &["text", "json_object", "json_schema"])? {
        Some("json_object") if format.get("schema").is_some() => of_extra(format, "schema", "json"),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => {
            let inner = format.required_object("json_schema")?;
            if inner.get("name").is_some() {
                inner.required_name("name")?;
            }
            inner.flag("strict")?;
            inner.required("schema")?;
            of_extra(&inner, "schema", "json")
        }
        _ => Ok(None),
    }
}

/// The grammar of the field `name`, which has this kind.
fn of_extra(fields: &Fields, name: &str, kind: &str) -> Result<Option<Grammar>> {
    if fields.get(name).is_none() {
        return Ok(None);
    }
    Ok(match kind {
        "json" => Some(json_schema(fields, name)?),
        "json_object" => (fields.flag(name)? == Some(true)).then_some(Grammar::JsonObject),
        "regex" => fields.text(name)?.map(|text| Grammar::Regex(text.into())),
        "choice" => Some(choice(fields, name)?),
        // llama.cpp's clients send an empty text for no grammar
        _ => fields.text(name)?.filter(|text| !text.is_empty()).map(|text| notation(fields, name, text)).transpose()?,
    })
}

/// A grammar in GBNF or Lark notation.
fn notation(fields: &Fields, name: &str, text: &str) -> Result<Grammar> {
    if text.contains("::=") {
        return Ok(Grammar::Gbnf(text.into()));
    }
    // schemas inside a grammar would bypass the limits of schemas
    if text.contains("%json") {
        let path = fields.path(name);
        let message = format!("`{path}`: `%json` is not supported by this server; send the schema as `json_schema`");
        return Err(ApiError::unsupported(path, message));
    }
    Ok(Grammar::Lark(text.into()))
}

fn json_schema(fields: &Fields, name: &str) -> Result<Grammar> {
    let value = fields.required(name)?;
    let written = value.as_str().map(serde_json::from_str::<Value>);
    match written.as_ref().map_or(Ok(value), |parsed| parsed.as_ref().map_err(|_| ())) {
        // no value satisfies `false`
        Ok(schema @ (Value::Object(_) | Value::Bool(true))) => Ok(Grammar::JsonSchema(schema.clone())),
        _ => fields.wrong(name, "a JSON schema", value),
    }
}

/// A choice of several texts.
fn choice(fields: &Fields, name: &str) -> Result<Grammar> {
    let choices = fields.texts(name, MAX_CHOICES)?;
    if choices.is_empty() {
        return fields.wrong(name, "at least one string", fields.required(name)?);
    }
    let escaped = |choice: &&str| -> String {
        let escape = |c: char| r"\.+*?()|[]{}^$#&-~".contains(c).then_some('\\').into_iter().chain([c]);
        choice.chars().flat_map(escape).collect()
    };
    let alternatives: Vec<String> = choices.iter().map(escaped).collect();
    Ok(Grammar::Regex(format!("(?:{})", alternatives.join("|"))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Option<(String, Grammar)>> {
        Grammar::from_request(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn every_field_is_read() {
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
            (json!({"guided_json": false}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", 3]}), "guided_choice[1]"),
            (json!({"guided_regex": "a", "grammar": "b"}), "grammar"),
            (json!({"grammar": "start: %json {\"x-guidance\": {}}"}), "grammar"),
        ] {
            assert_eq!(read(&body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
