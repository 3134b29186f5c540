//! Builds grammars of answers with tool calls.

use super::reasoning::Reasoning;
use super::request::{PlainText, Tool, ToolChoice, ToolRequest};
use super::syntax::{Form, ToolSyntax};
use crate::error::ApiError;
use crate::grammar::{Grammar, prepared_schema};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Maximum size of the schemas of all tools, in bytes.
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// The supported keywords of strings in a grammar of XML parameters.
const STRING_KEYWORDS: [&str; 7] = ["type", "enum", "const", "description", "title", "default", "examples"];

/// The grammar of answers to a request: only calls if a call is required; calls or an `answer` if its format is given; text
/// and valid calls if a tool is strict; otherwise `None`. `reasoning` has the reasoning markers and whether the prompt ends
/// inside reasoning; `answer` is the format.
///
/// # Errors
/// The schemas cannot be enforced: they are too large, or the markers of calls are not tokens.
pub(crate) fn tools_grammar(
    syntax: &ToolSyntax,
    request: &ToolRequest,
    reasoning: Option<(&Reasoning, bool)>,
    answer: Option<&Grammar>,
) -> Result<Option<Grammar>, ApiError> {
    let is_strict = answer.is_some() || request.tools.iter().any(|tool| tool.strict);
    let is_required = match request.choice {
        ToolChoice::Required => true,
        ToolChoice::Auto if is_strict => false,
        ToolChoice::Auto | ToolChoice::None => return Ok(None),
    };
    let mut lark = String::new();
    let thinking = thinking(reasoning, &mut lark);
    let bytes: usize = request.tools.iter().map(|tool| tool.parameters.to_string().len()).sum();
    if bytes > MAX_SCHEMA_BYTES {
        let message = format!(
            "`tools`: expected schemas of at most {MAX_SCHEMA_BYTES} bytes for constrained calls, found {bytes}"
        );
        return Err(ApiError::field("tools", message));
    }
    let writer = Writer { syntax, request };
    let (call, calls) = writer.calls(&mut lark)?;
    let start = if is_required {
        format!("{thinking} {calls}")
    } else if answer.is_some() {
        format!("{thinking} ({calls} | @answer)")
    } else if syntax.form == Form::Bare {
        // an answer that starts with a character other than `{` is text
        lark.push_str("text: /[^{\\s](?s:.)*/\n");
        format!("{thinking} ({call} | text)?")
    } else if syntax.open().1.is_none() {
        let message = "`tools`: `strict` is not supported by this model unless a call is required";
        return Err(ApiError::field("tools", message));
    } else {
        lark.push_str("text: /(?s:.)*/\n");
        match (request.parallel, syntax.form.is_list()) {
            (false, _) => format!("{thinking} text {call}?"),
            (true, true) => format!("{thinking} text ({call} text)?"),
            (true, false) => format!("{thinking} text ({call} text)*"),
        }
    };
    let lark = format!("start: {start}\n{lark}");
    Ok(Some(match answer.filter(|_| !is_required) {
        Some(grammar) => Grammar::Around(lark, Box::new(grammar.clone())),
        None => Grammar::Lark(lark),
    }))
}

/// A rule for reasoning before the answer.
fn thinking(reasoning: Option<(&Reasoning, bool)>, lark: &mut String) -> &'static str {
    let Some((markers, is_open)) = reasoning else { return "" };
    let [(open, open_id), (close, close_id)] = markers.markers();
    match close_id {
        Some(id) => {
            let _ = writeln!(lark, "thoughts: /(?s:.)*/ <[{id}]> /[ \\n]{{0,4}}/");
        }
        None => {
            let _ = writeln!(lark, "thoughts: thought /[ \\n]{{0,4}}/\nthought[suffix={}]: /(?s:.)*/", quoted(close));
        }
    }
    if is_open {
        return "thoughts";
    }
    let _ = writeln!(lark, "thinking: {} thoughts", marker((open, open_id)));
    "thinking?"
}

struct Writer<'a> {
    syntax: &'a ToolSyntax,
    request: &'a ToolRequest,
}

impl Writer<'_> {
    /// Writes the rules of calls, and returns the names of two rules: one call, and all calls of an answer. A list counts as one
    /// call.
    fn calls(&self, lark: &mut String) -> Result<(&'static str, &'static str), ApiError> {
        let (syntax, tools) = (self.syntax, &self.request.tools);
        let names: Vec<String> = (0..tools.len()).map(|index| format!("tool{index}")).collect();
        let _ = writeln!(lark, "tool: {}", names.join(" | "));
        for (index, tool) in tools.iter().enumerate() {
            let path = format!("tools[{index}].function.parameters");
            self.tool(index, tool, &path, lark)?;
        }
        let open = if syntax.form == Form::Bare { String::new() } else { marker(syntax.open()) };
        let close = syntax.close().map(marker).unwrap_or_default();
        let more = if self.request.parallel { "(\", \" tool)*" } else { "" };
        let call = match syntax.form {
            Form::Hermes | Form::Xml => format!("{open} \"\\n\" tool \"\\n\" {close}"),
            Form::Phi => format!("{open} tool {close}"),
            Form::MistralArgs => format!("{open} tool"),
            Form::Bare => "tool".into(),
            Form::MistralList | Form::GraniteList | Form::Nemotron => format!("{open} \"[\" tool {more} \"]\" {close}"),
        };
        let _ = writeln!(lark, "call: {call}");
        // the template of Llama 3 supports one call
        let is_single = syntax.form.is_list() || syntax.form == Form::Bare || !self.request.parallel;
        if is_single {
            return Ok(("call", "call"));
        }
        let gap = if syntax.close().is_some() && syntax.form != Form::Phi { "\"\\n\"?" } else { "" };
        let _ = writeln!(lark, "calls: call ({gap} call)*");
        Ok(("call", "calls"))
    }

    fn tool(&self, index: usize, tool: &Tool, path: &str, lark: &mut String) -> Result<(), ApiError> {
        let name = &tool.name;
        if self.syntax.form == Form::Xml {
            return xml_tool(index, tool, path, lark);
        }
        let schema = embedded(&object_schema(&tool.parameters), path)?;
        let _ = if self.syntax.form == Form::MistralArgs {
            let id =
                self.syntax.call_id().map(|id| format!("({} /[a-zA-Z0-9]{{9}}/)?", marker(id))).unwrap_or_default();
            let args = marker(self.syntax.args());
            writeln!(lark, "tool{index}: {} {id} {args} {schema}", quoted(name))
        } else {
            let start = format!("{{\"name\": \"{name}\", \"{}\": ", self.syntax.form.arguments_key());
            writeln!(lark, "tool{index}: {} {schema} \"}}\"", quoted(&start))
        };
        Ok(())
    }
}

/// The rules of a call with a tag for each parameter.
fn xml_tool(index: usize, tool: &Tool, path: &str, lark: &mut String) -> Result<(), ApiError> {
    let properties = tool.parameters.get("properties").and_then(Value::as_object);
    let required: Vec<&str> = tool
        .parameters
        .get("required")
        .and_then(Value::as_array)
        .map_or_else(Vec::new, |names| names.iter().filter_map(Value::as_str).collect());
    let unknown = required.iter().find(|name| properties.is_none_or(|properties| !properties.contains_key(**name)));
    if let Some(name) = unknown {
        let path = format!("{path}.required");
        return Err(ApiError::field(path.clone(), format!("`{path}`: `{name}` is not in `properties`")));
    }
    let mut body = quoted(&format!("<function={}>\n", tool.name));
    for (number, (name, schema)) in properties.into_iter().flatten().enumerate() {
        let path = format!("{path}.properties.{name}");
        if name.is_empty() || name.contains(['<', '>', '\n']) {
            return Err(ApiError::field(path.clone(), format!("`{path}`: this name is not supported by this model")));
        }
        let start = quoted(&format!("<parameter={name}>\n"));
        let end = "\n</parameter>\n";
        let rule = format!("tool{index}p{number}");
        let plain = PlainText::of(schema);
        let _ = if let Some(PlainText::OneOf(texts)) = plain {
            let texts: Vec<String> = texts.into_iter().map(quoted).collect();
            writeln!(lark, "{rule}: {start} ({}) {}", texts.join(" | "), quoted(end))
        } else if plain.is_some() {
            let unsupported =
                schema.as_object().and_then(|map| map.keys().find(|key| !STRING_KEYWORDS.contains(&key.as_str())));
            if let Some(key) = unsupported.filter(|_| tool.strict) {
                let message = format!("`{path}`: `strict` does not support `{key}` of strings with this model");
                return Err(ApiError::field(path, message));
            }
            writeln!(lark, "{rule}: {start} {rule}t\n{rule}t[suffix={}]: /(?s:.)*/", quoted(end))
        } else {
            let schema = with_definitions(schema, &tool.parameters);
            writeln!(lark, "{rule}: {start} {} {}", embedded(&schema, &path)?, quoted(end))
        };
        let optional = if required.contains(&name.as_str()) { "" } else { "?" };
        let _ = write!(body, " {rule}{optional}");
    }
    let _ = writeln!(lark, "tool{index}: {body} \"</function>\"");
    Ok(())
}

/// The schema of arguments, which must be an object.
fn object_schema(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(map) = &mut schema {
        let has_shape = ["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| map.contains_key(*key));
        if !has_shape {
            map.insert("type".into(), json!("object"));
        }
    }
    schema
}

/// Adds the definitions of the outer schema to an inner schema, for its references.
fn with_definitions(schema: &Value, outer: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(map) = &mut schema {
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = outer.get(key).filter(|_| !map.contains_key(key)) {
                map.insert(key.into(), definitions.clone());
            }
        }
    }
    schema
}

fn embedded(schema: &Value, path: &str) -> Result<String, ApiError> {
    let schema = prepared_schema(schema, MAX_SCHEMA_BYTES);
    let schema = schema.map_err(|error| ApiError::field(path, format!("`{path}`: {error}")))?;
    Ok(format!("%json {schema}"))
}

fn marker((text, id): (&str, Option<u32>)) -> String {
    id.map_or_else(|| quoted(text), |id| format!("<[{id}]>"))
}

/// A Lark string, which has the same escapes as JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
