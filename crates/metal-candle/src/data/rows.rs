//! Detects the schema of a row and parses it.

use super::Message;
use super::message::kind;
use serde_json::{Map, Value, json};
use std::fmt;

/// The schema of a row, determined by its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Schema {
    /// `messages`.
    Chat,
    /// `messages` and `tools`.
    Tools,
    /// `prompt` and `completion`.
    Completions,
    /// `text`.
    Text,
    /// `instruction` and `output`, optionally `input`, `system` and `history`.
    Alpaca,
    /// `conversations` with `from` and `value`, optionally `system` and `tools`.
    ShareGpt,
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chat => "chat",
            Self::Tools => "tools",
            Self::Completions => "completions",
            Self::Text => "text",
            Self::Alpaca => "alpaca",
            Self::ShareGpt => "sharegpt",
        })
    }
}

/// A parsed row, independent of its schema.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Row {
    Conversation(Conversation),
    Completion { prompt: String, completion: String, tools: Option<Vec<Value>>, variables: Map<String, Value> },
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Conversation {
    pub messages: Vec<Message>,
    /// For each message whether it is trained; `None` if the row does not say.
    pub train: Vec<Option<bool>>,
    pub tools: Option<Vec<Value>>,
    /// The row's variables of the chat template, `chat_template_kwargs`.
    pub variables: Map<String, Value>,
}

impl Conversation {
    fn push(&mut self, message: Message) {
        self.messages.push(message);
        self.train.push(None);
    }
}

/// Detects the schema of a JSON row and converts it.
pub(super) fn parse(row: Value) -> Result<(Schema, Row), String> {
    let Value::Object(mut row) = row else {
        return Err(format!("expected an object, found {}", kind(&row)));
    };
    row.retain(|_, value| !value.is_null());
    refuse_row_train_keys(&row)?;
    if row.contains_key("prompt") && row.contains_key("completion") {
        return Ok((Schema::Completions, completions(&mut row)?));
    }
    for (key, is_sharegpt) in [("messages", false), ("conversations", true)] {
        if !row.contains_key(key) {
            continue;
        }
        let (tools, variables) = (tools(&mut row)?, variables(&mut row)?);
        let mut conversation = Conversation { tools, variables, ..conversation(&mut row, key)? };
        let system = string(&mut row, "system")?.filter(|system| !system.is_empty());
        if let Some(system) = system.filter(|_| conversation.messages[0].role() != "system") {
            conversation.messages.insert(0, Message::system(system));
            conversation.train.insert(0, None);
        }
        let schema = match conversation.tools {
            _ if is_sharegpt => Schema::ShareGpt,
            Some(_) => Schema::Tools,
            None => Schema::Chat,
        };
        return Ok((schema, Row::Conversation(conversation)));
    }
    if row.contains_key("instruction") && row.contains_key("output") {
        return Ok((Schema::Alpaca, Row::Conversation(alpaca(&mut row)?)));
    }
    if let Some(text) = string(&mut row, "text")? {
        return Ok((Schema::Text, Row::Text(text)));
    }
    let found: Vec<String> = row.keys().take(10).map(|key| format!("`{key}`")).collect();
    let found = if found.is_empty() { "none".to_string() } else { found.join(", ") };
    Err(format!(
        "expected the keys `messages`, `prompt` and `completion`, `text`, `instruction` and `output`, or `conversations`; found {found}"
    ))
}

fn string(row: &mut Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match row.remove(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("`{key}` must be a string, found {}", kind(&other))),
    }
}

fn required(row: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    string(row, key)?.ok_or_else(|| format!("the key `{key}` is missing"))
}

/// The tools of a row: the list under `tools`, or under `functions` in `OpenAI`'s older form. An empty list counts as none.
fn tools(row: &mut Map<String, Value>) -> Result<Option<Vec<Value>>, String> {
    let functions = tool_list(row, "functions")?.map(|functions| functions.into_iter().map(as_tool).collect());
    match (tool_list(row, "tools")?, functions) {
        (Some(_), Some(_)) => Err("the row has both `tools` and `functions`; keep only `tools`".into()),
        (tools, functions) => Ok(tools.or(functions)),
    }
}

/// The list of objects at `key`, which may be in a JSON string.
fn tool_list(row: &mut Map<String, Value>, key: &str) -> Result<Option<Vec<Value>>, String> {
    let tools = match row.remove(key) {
        None => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|e| format!("`{key}` is a string that is not valid JSON: {e}"))?
        }
        Some(tools) => tools,
    };
    match tools {
        Value::Array(tools) if tools.iter().all(Value::is_object) => Ok(Some(tools).filter(|tools| !tools.is_empty())),
        other => Err(format!("`{key}` must be a list of objects, found {}", kind(&other))),
    }
}

/// Converts a function description or call to the form of `tools` and `tool_calls`.
fn as_tool(function: Value) -> Value {
    if function.get("function").is_some_and(Value::is_object) {
        return function;
    }
    json!({"type": "function", "function": function})
}

/// The chat template variables of a row: the object at `chat_template_kwargs`, which may be in a JSON string.
fn variables(row: &mut Map<String, Value>) -> Result<Map<String, Value>, String> {
    let key = "chat_template_kwargs";
    let value = match row.remove(key) {
        None => return Ok(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Map::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|e| format!("`{key}` is a string that is not valid JSON: {e}"))?
        }
        Some(value) => value,
    };
    let Value::Object(mut variables) = value else {
        return Err(format!("`{key}` must be an object, found {}", kind(&value)));
    };
    // dataset libraries add the keys of all rows to every row, with `null` for missing values
    variables.retain(|_, value| !value.is_null());
    match variables.keys().find(|name| RESERVED_VARIABLES.contains(&name.as_str())) {
        Some(name) => Err(format!("`{key}` cannot set `{name}`, which comes from the row")),
        None => Ok(variables),
    }
}

/// Chat template variables that are set from a row's messages and tools.
const RESERVED_VARIABLES: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

fn completions(row: &mut Map<String, Value>) -> Result<Row, String> {
    let (tools, variables) = (tools(row)?, variables(row)?);
    if !(row.get("prompt").is_some_and(Value::is_array) && row.get("completion").is_some_and(Value::is_array)) {
        let (prompt, completion) = (required(row, "prompt")?, required(row, "completion")?);
        return Ok(Row::Completion { prompt, completion, tools, variables });
    }
    let mut whole = conversation(row, "prompt")?;
    whole.train.fill(Some(false));
    let answer = conversation(row, "completion")?;
    whole.messages.extend(answer.messages);
    whole.train.extend(answer.train);
    (whole.tools, whole.variables) = (tools, variables);
    Ok(Row::Conversation(whole))
}

fn alpaca(row: &mut Map<String, Value>) -> Result<Conversation, String> {
    let mut conversation = Conversation { variables: variables(row)?, ..Conversation::default() };
    if let Some(system) = string(row, "system")?.filter(|system| !system.is_empty()) {
        conversation.push(Message::system(system));
    }
    match row.remove("history") {
        None => {}
        Some(Value::Array(history)) => {
            for pair in &history {
                let texts: Option<Vec<&str>> =
                    pair.as_array().and_then(|pair| pair.iter().map(Value::as_str).collect());
                let Some(&[question, answer]) = texts.as_deref() else {
                    return Err("`history` must be a list of pairs of strings".into());
                };
                conversation.push(Message::user(question));
                conversation.push(Message::assistant(answer));
            }
        }
        Some(other) => return Err(format!("`history` must be a list of pairs of strings, found {}", kind(&other))),
    }
    let mut question = required(row, "instruction")?;
    if let Some(input) = string(row, "input")?.filter(|input| !input.is_empty()) {
        question.push('\n');
        question.push_str(&input);
    }
    conversation.push(Message::user(question));
    conversation.push(Message::assistant(required(row, "output")?));
    Ok(conversation)
}

/// The messages at `key`; `from` and `value` are accepted for `role` and `content`.
fn conversation(row: &mut Map<String, Value>, key: &str) -> Result<Conversation, String> {
    let messages = match row.remove(key) {
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(format!("`{key}` must be a list of messages, found {}", kind(&other))),
        None => return Err(format!("the key `{key}` is missing")),
    };
    if messages.is_empty() {
        return Err(format!("`{key}` is an empty list"));
    }
    let mut conversation = Conversation::default();
    for (index, message) in messages.into_iter().enumerate() {
        let (message, train) = self::message(message).map_err(|e| format!("`{key}` entry {}: {e}", index + 1))?;
        conversation.messages.push(message);
        conversation.train.push(train);
    }
    Ok(conversation)
}

fn message(value: Value) -> Result<(Message, Option<bool>), String> {
    let Value::Object(mut fields) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    let train = train(&mut fields)?;
    for (alias, key) in [("from", "role"), ("value", "content")] {
        if !fields.contains_key(key)
            && let Some(value) = fields.shift_remove(alias)
        {
            fields.insert(key.into(), value);
        }
    }
    let role = fields.get("role").and_then(Value::as_str).map(str::to_string);
    if let Some(role) = role {
        let known = match role.as_str() {
            "system" | "developer" | "user" | "assistant" | "tool" => role.as_str(),
            "human" => "user",
            "gpt" | "model" | "chatgpt" | "function_call" => "assistant",
            "observation" | "function" | "function_response" => "tool",
            other => {
                return Err(format!(
                    "expected the role `system`, `developer`, `user`, `assistant` or `tool`, or its name in sharegpt, found `{other}`"
                ));
            }
        };
        if role == "function_call" {
            read_function_call(&mut fields)?;
        }
        if known == "assistant" {
            take_function_call(&mut fields)?;
            refuse_text_elsewhere(&fields)?;
        }
        fields.insert("role".into(), Value::String(known.to_string()));
    }
    let message = Message::try_from(fields)?.normalized()?;
    Ok((message, train))
}

/// Keys that say whether a message is trained, with the value that means trained.
const TRAIN_KEYS: [(&str, bool); 8] = [
    ("train", true),
    ("trainable", true),
    ("training", true),
    ("train_on_turn", true),
    ("weight", true),
    ("loss", true),
    ("loss_mask", true),
    ("masked", false),
];
/// Keys of other programs that select trained text in an unsupported way.
const UNSUPPORTED_TRAIN_KEYS: [&str; 4] = ["train_detail", "training_detail", "mask", "loss_weight"];

/// Whether a message says that it is trained: `train`, or the key of another program such as `weight` or `loss_mask`.
fn train(fields: &mut Map<String, Value>) -> Result<Option<bool>, String> {
    let mut found: Option<(&str, bool)> = None;
    for (key, stands_for_trained) in TRAIN_KEYS {
        let says = match fields.shift_remove(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(value)) => value,
            Some(Value::Number(number)) if key != "train" && number.as_f64() == Some(0.0) => false,
            Some(Value::Number(number)) if key != "train" && number.as_f64() == Some(1.0) => true,
            Some(_) if key == "weight" => return Err("`weight` must be 0 or 1".into()),
            Some(other) => return Err(format!("`{key}` must be true or false, found {}", kind(&other))),
        };
        let is_trained = says == stands_for_trained;
        match found {
            Some((first, other)) if other != is_trained => {
                return Err(format!("`{first}` and `{key}` disagree on whether the message is trained"));
            }
            _ => found = Some((key, is_trained)),
        }
    }
    match UNSUPPORTED_TRAIN_KEYS.into_iter().find(|key| fields.get(*key).is_some_and(|value| !value.is_null())) {
        Some(key) => Err(format!("`{key}` of a message is not supported; set `train` to true or false instead")),
        None => Ok(found.map(|(_, is_trained)| is_trained)),
    }
}

/// Returns an error for a training flag of a whole row: ignoring it would train the row.
fn refuse_row_train_keys(row: &Map<String, Value>) -> Result<(), String> {
    for (key, stands_for_trained) in TRAIN_KEYS {
        let is_refused = match row.get(key) {
            Some(Value::Bool(value)) => *value != stands_for_trained,
            Some(Value::Number(number)) => (number.as_f64() != Some(0.0)) != stands_for_trained,
            Some(Value::Array(_)) => true,
            _ => false,
        };
        if is_refused {
            return Err(format!(
                "`{key}` of a whole row is not supported; set `train` of its messages or remove the row"
            ));
        }
    }
    Ok(())
}

/// Converts `OpenAI`'s older `function_call` of a message to an entry of `tool_calls`.
fn take_function_call(fields: &mut Map<String, Value>) -> Result<(), String> {
    let call = match fields.shift_remove("function_call") {
        None | Some(Value::Null) => return Ok(()),
        Some(call) => call,
    };
    if fields.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty()) {
        return Err("the message has both `tool_calls` and `function_call`; keep only `tool_calls`".into());
    }
    let call = match call {
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|e| format!("`function_call` is not valid JSON: {e}"))?
        }
        call => call,
    };
    if !call.get("name").is_some_and(Value::is_string) {
        return Err("`function_call` must be an object with `name` and `arguments`".into());
    }
    fields.insert("tool_calls".into(), Value::Array(vec![as_tool(call)]));
    Ok(())
}

/// Keys of other programs for the text of an answer.
const TEXT_KEYS: [&str; 5] = ["text", "value", "refusal", "response", "output"];

/// Returns an error for an answer with its text at another key than `content`: it would be trained as an empty answer.
fn refuse_text_elsewhere(fields: &Map<String, Value>) -> Result<(), String> {
    let is_text = |key: &str| fields.get(key).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
    let has_content = match fields.get("content") {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    match TEXT_KEYS.into_iter().find(|key| !has_content && is_text(key)) {
        Some(key) => Err(format!("the message has no `content`, but text at `{key}`; rename the key to `content`")),
        None => Ok(()),
    }
}

/// Reads a tool call of sharegpt: JSON text of one or several `{name, arguments}`.
fn read_function_call(fields: &mut Map<String, Value>) -> Result<(), String> {
    let text = fields.get("content").and_then(Value::as_str).ok_or("a function call must be a string")?;
    let call: Value = serde_json::from_str(text).map_err(|e| format!("a function call is not valid JSON: {e}"))?;
    let calls = match call {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    let calls: Vec<Value> = calls.into_iter().map(as_tool).collect();
    fields.insert("content".into(), Value::String(String::new()));
    fields.insert("tool_calls".into(), Value::Array(calls));
    Ok(())
}
