//! Reads `tools`, `tool_choice` and `parallel_tool_calls` of a request.

use crate::error::ApiError;
use crate::fields::Fields;
use serde_json::{Map, Value, json};

/// Maximum number of tools in a request.
pub(crate) const MAX_TOOLS: usize = 128;

type Result<T> = std::result::Result<T, ApiError>;

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    /// Letters, digits, `_` and `-`.
    pub(crate) name: String,
    /// The purpose of the function.
    pub(crate) description: Option<String>,
    /// The JSON schema of the arguments.
    pub(crate) parameters: Value,
    /// Whether calls must satisfy the schema.
    pub(crate) strict: bool,
}

impl Tool {
    /// The tool as chat templates expect it.
    pub(crate) fn to_value(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), json!(self.name));
        if let Some(description) = &self.description {
            function.insert("description".into(), json!(description));
        }
        function.insert("parameters".into(), self.parameters.clone());
        json!({"type": "function", "function": function})
    }

    /// The schema of a parameter.
    pub(super) fn property(&self, name: &str) -> Option<&Value> {
        self.parameters.get("properties")?.get(name)
    }
}

/// The string values of a parameter that are written without quotes.
pub(super) enum PlainText<'a> {
    /// Any.
    Any,
    /// One of these.
    OneOf(Vec<&'a str>),
}

impl<'a> PlainText<'a> {
    /// The string values allowed by a parameter's schema; none for values that are written as JSON.
    pub(super) fn of(schema: &'a Value) -> Option<Self> {
        match (schema.get("enum"), schema.get("const")) {
            (Some(Value::Array(values)), None) => {
                values.iter().map(Value::as_str).collect::<Option<_>>().map(Self::OneOf)
            }
            (None, Some(Value::String(text))) => Some(Self::OneOf(vec![text])),
            (None, None) if schema.get("type").is_some_and(|kind| kind == "string") => Some(Self::Any),
            _ => None,
        }
    }
}

/// Which tools a model may or must call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// No tool.
    None,
    /// A tool or text, at the model's choice.
    Auto,
    /// At least one tool.
    Required,
}

/// The tools of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ToolRequest {
    /// The tools that may be called, which the template shows. If one function is required, it is the only one.
    pub(crate) tools: Vec<Tool>,
    /// Whether tools may or must be called.
    pub(crate) choice: ToolChoice,
    /// Whether an answer may have several calls.
    pub(crate) parallel: bool,
}

impl ToolRequest {
    /// Reads the tools of a request body; `None` without tools.
    ///
    /// # Errors
    /// A field is invalid, or `tool_choice` names an unknown tool.
    pub(crate) fn from_request(fields: &Fields) -> Result<Option<Self>> {
        let mut tools = tools(fields)?;
        let mut parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        let choice = match fields.get("tool_choice") {
            Some(Value::Object(_)) => choose(&fields.required_object("tool_choice")?, &mut tools, &mut parallel)?,
            Some(_) => mode(fields, "tool_choice", &["none", "auto", "required"])?,
            None => ToolChoice::Auto,
        };
        if choice == ToolChoice::Required && tools.is_empty() {
            let message = "`tool_choice`: a call is required, but there are no tools";
            return Err(ApiError::field(fields.path("tool_choice"), message));
        }
        Ok((!tools.is_empty()).then_some(Self { tools, choice, parallel }))
    }

    /// The tools as chat templates expect them; `None` if the model must not call one.
    pub(crate) fn template_tools(&self) -> Option<Vec<Value>> {
        (self.choice != ToolChoice::None).then(|| self.tools.iter().map(Tool::to_value).collect())
    }
}

fn tools(fields: &Fields) -> Result<Vec<Tool>> {
    let mut tools: Vec<Tool> = Vec::new();
    for tool in fields.objects("tools", MAX_TOOLS)? {
        let function = function(&tool)?;
        let name = function.required_name("name")?;
        if tools.iter().any(|tool| tool.name == name) {
            let path = function.path("name");
            return Err(ApiError::field(path.clone(), format!("`{path}`: another tool is also named `{name}`")));
        }
        let parameters = function.object("parameters")?.map(|parameters| Value::Object(parameters.map().clone()));
        tools.push(Tool {
            name: name.to_owned(),
            description: function.text("description")?.map(ToOwned::to_owned),
            parameters: parameters.unwrap_or_else(|| json!({"type": "object", "properties": {}})),
            strict: function.flag("strict")?.unwrap_or(false),
        });
    }
    Ok(tools)
}

/// Reads `tool_choice`. Excluded tools are removed; the choice of one function allows one call.
fn choose(choice: &Fields, tools: &mut Vec<Tool>, parallel: &mut bool) -> Result<ToolChoice> {
    if choice.get("type").is_some_and(|kind| kind == "allowed_tools") {
        let allowed = choice.required_object("allowed_tools")?;
        allowed.required("mode")?;
        let mode = mode(&allowed, "mode", &["auto", "required"])?;
        allowed.required("tools")?;
        let names: Result<Vec<&str>> =
            allowed.objects("tools", MAX_TOOLS)?.iter().map(|tool| chosen(tool, tools)).collect();
        let names = names?;
        tools.retain(|tool| names.contains(&tool.name.as_str()));
        return Ok(mode);
    }
    let name = chosen(choice, tools)?;
    tools.retain(|tool| tool.name == name);
    *parallel = false;
    Ok(ToolChoice::Required)
}

fn mode(fields: &Fields, name: &str, modes: &[&'static str]) -> Result<ToolChoice> {
    Ok(match fields.one_of(name, modes)? {
        Some("none") => ToolChoice::None,
        Some("required") => ToolChoice::Required,
        _ => ToolChoice::Auto,
    })
}

/// The name of a known tool in `{"type": "function", "function": {"name"}}`.
fn chosen<'a>(fields: &Fields<'a>, tools: &[Tool]) -> Result<&'a str> {
    let function = function(fields)?;
    let name = function.required_name("name")?;
    if tools.iter().any(|tool| tool.name == name) {
        return Ok(name);
    }
    let path = function.path("name");
    Err(ApiError::field(path.clone(), format!("`{path}`: there is no tool `{name}`")))
}

/// The function of a tool; other types are refused.
fn function<'a>(tool: &Fields<'a>) -> Result<Fields<'a>> {
    tool.required("type")?;
    tool.one_of("type", &["function"])?;
    tool.required_object("function")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    fn read(body: &Value) -> Result<Option<ToolRequest>> {
        ToolRequest::from_request(&Fields::of_body(body).unwrap())
    }

    #[test]
    fn a_choice_removes_excluded_tools() {
        let named = json!({"type": "function", "function": {"name": "b"}});
        let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}});
        for (choice, expected, names) in [
            (json!(null), ToolChoice::Auto, vec!["a", "b"]),
            (json!("none"), ToolChoice::None, vec!["a", "b"]),
            (json!("required"), ToolChoice::Required, vec!["a", "b"]),
            (named.clone(), ToolChoice::Required, vec!["b"]),
            (allowed, ToolChoice::Auto, vec!["b"]),
        ] {
            let request = read(&json!({"tools": [tool("a"), tool("b")], "tool_choice": choice})).unwrap().unwrap();
            let found: Vec<&str> = request.tools.iter().map(|tool| tool.name.as_str()).collect();
            let parallel = choice != named;
            assert_eq!((request.choice, found, request.parallel), (expected, names, parallel), "{choice}");
        }
        assert_eq!(read(&json!({"tools": [], "tool_choice": "auto", "parallel_tool_calls": false})).unwrap(), None);
    }

    #[test]
    fn errors_name_the_field() {
        for (body, param) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": vec![tool("a"); 129]}), "tools"),
            (json!({"tools": [3]}), "tools[0]"),
            (json!({"tools": [tool("a"), {"type": "custom"}]}), "tools[1].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [tool("a"), tool("b"), tool("a b")]}), "tools[2].function.name"),
            (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}),
                "tools[0].function.strict",
            ),
            (json!({"tools": [tool("a")], "tool_choice": "any"}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice.function.name",
            ),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}}),
                "tool_choice.allowed_tools.mode",
            ),
            (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
        ] {
            assert_eq!(read(&body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
