//! Reads `tools`, `tool_choice` and `parallel_tool_calls` of a request.

use crate::request_error::{RequestError, flag, list, name, object, required, text, wrong};
use serde_json::{Map, Value, json};

/// Most tools of a request.
const MAX_TOOLS: usize = 128;

type Result<T> = std::result::Result<T, RequestError>;

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

/// Which tools a model may or must call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// No tool.
    None,
    /// A tool or text, as the model decides.
    Auto,
    /// At least one tool.
    Required,
}

/// The tools of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ToolRequest {
    /// The tools that may be called, which the template shows. A choice of one function leaves only this one.
    pub(crate) tools: Vec<Tool>,
    /// Whether tools may or must be called.
    pub(crate) choice: ToolChoice,
    /// Whether an answer may hold several calls.
    pub(crate) parallel: bool,
}

impl ToolRequest {
    /// The tools of a request's body; `None` without tools.
    ///
    /// # Errors
    /// A field is wrong, or a choice names an unknown tool.
    pub(crate) fn from_request(body: &Map<String, Value>) -> Result<Option<Self>> {
        let present = |name: &str| body.get(name).filter(|value| !value.is_null());
        let mut tools = present("tools").map_or(Ok(Vec::new()), tools)?;
        let parallel = flag(present("parallel_tool_calls"), "parallel_tool_calls")?.unwrap_or(true);
        // a choice of one function is one call of it
        let is_named =
            present("tool_choice").and_then(|choice| choice.get("type")).is_some_and(|kind| kind == "function");
        let parallel = parallel && !is_named;
        let choice = match present("tool_choice") {
            None => ToolChoice::Auto,
            Some(choice) => choose(choice, &mut tools)?,
        };
        Ok((!tools.is_empty()).then_some(Self { tools, choice, parallel }))
    }

    /// The tools as chat templates expect them; `None` if the model must not call one.
    pub(crate) fn template_tools(&self) -> Option<Vec<Value>> {
        (self.choice != ToolChoice::None).then(|| self.tools.iter().map(Tool::to_value).collect())
    }
}

fn tools(value: &Value) -> Result<Vec<Tool>> {
    let list = list(value, "tools")?;
    if list.len() > MAX_TOOLS {
        return Err(RequestError::new("tools", format!("`tools`: expected at most {MAX_TOOLS}, found {}", list.len())));
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let path = format!("tools[{index}]");
        let fields = object(value, &path)?;
        check_type(fields, &path)?;
        let path = format!("{path}.function");
        let fields = object(required(fields, "function", &path)?, &path)?;
        let name = name_of(fields, &path)?;
        if tools.iter().any(|tool| tool.name == name) {
            let path = format!("{path}.name");
            return Err(RequestError::new(path.clone(), format!("`{path}`: `{name}` is the name of another tool too")));
        }
        let at = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let description = at("description").map(|value| text(value, &format!("{path}.description"))).transpose()?;
        let parameters = match at("parameters") {
            None => json!({"type": "object", "properties": {}}),
            Some(value) => object(value, &format!("{path}.parameters")).map(|map| Value::Object(map.clone()))?,
        };
        let strict = flag(at("strict"), &format!("{path}.strict"))?.unwrap_or(false);
        tools.push(Tool { name, description: description.map(str::to_string), parameters, strict });
    }
    Ok(tools)
}

/// The choice; tools that it excludes are removed.
fn choose(value: &Value, tools: &mut Vec<Tool>) -> Result<ToolChoice> {
    const PARAM: &str = "tool_choice";
    let choice = match value {
        Value::String(mode) => mode_of(mode, PARAM)?,
        Value::Object(fields) if fields.get("type").is_some_and(|kind| kind == "allowed_tools") => {
            let path = format!("{PARAM}.allowed_tools");
            let fields = object(required(fields, "allowed_tools", &path)?, &path)?;
            let mode = format!("{path}.mode");
            let choice = match text(required(fields, "mode", &mode)?, &mode)? {
                text @ ("auto" | "required") => mode_of(text, &mode)?,
                _ => return Err(RequestError::new(mode.clone(), format!("`{mode}`: expected `auto` or `required`"))),
            };
            let path = format!("{path}.tools");
            let mut names = Vec::new();
            for (index, value) in list(required(fields, "tools", &path)?, &path)?.iter().enumerate() {
                let path = format!("{path}[{index}]");
                names.push(chosen(object(value, &path)?, &path, tools)?);
            }
            tools.retain(|tool| names.contains(&tool.name));
            choice
        }
        Value::Object(fields) => {
            let name = chosen(fields, PARAM, tools)?;
            tools.retain(|tool| tool.name == name);
            ToolChoice::Required
        }
        other => return wrong(PARAM, "a string or an object", other),
    };
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(RequestError::new(PARAM, "`tool_choice`: a call is required, but there are no tools"));
    }
    Ok(choice)
}

fn mode_of(mode: &str, path: &str) -> Result<ToolChoice> {
    match mode {
        "none" => Ok(ToolChoice::None),
        "auto" => Ok(ToolChoice::Auto),
        "required" => Ok(ToolChoice::Required),
        _ => Err(RequestError::new(path, format!("`{path}`: expected `none`, `auto`, `required` or an object"))),
    }
}

/// The name of a known tool in `{"type": "function", "function": {"name"}}`.
fn chosen(fields: &Map<String, Value>, path: &str, tools: &[Tool]) -> Result<String> {
    check_type(fields, path)?;
    let path = format!("{path}.function");
    let name = name_of(object(required(fields, "function", &path)?, &path)?, &path)?;
    if tools.iter().any(|tool| tool.name == name) {
        return Ok(name);
    }
    let path = format!("{path}.name");
    Err(RequestError::new(path.clone(), format!("`{path}`: there is no tool `{name}`")))
}

fn check_type(fields: &Map<String, Value>, path: &str) -> Result<()> {
    let path = format!("{path}.type");
    match text(required(fields, "type", &path)?, &path)? {
        "function" => Ok(()),
        other => {
            let found: String = other.chars().take(64).collect();
            Err(RequestError::new(path.clone(), format!("`{path}`: expected `function`, found `{found}`")))
        }
    }
}

fn name_of(fields: &Map<String, Value>, path: &str) -> Result<String> {
    let path = format!("{path}.name");
    name(required(fields, "name", &path)?, &path).map(str::to_string)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    fn read(body: &Value) -> Result<Option<ToolRequest>> {
        ToolRequest::from_request(body.as_object().unwrap())
    }

    #[test]
    fn a_choice_leaves_the_tools_that_it_allows() {
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
            assert_eq!(read(&body).unwrap_err().param, param, "{body}");
        }
    }
}
