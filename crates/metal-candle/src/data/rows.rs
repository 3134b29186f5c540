//! Schemas: what the keys of a row mean.

use super::Message;
use super::message::kind;
use serde_json::{Map, Value};
use std::fmt;

/// The schema of a row, found by its keys.
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
    /// `instruction` and `output`, perhaps `input`, `system` and `history`.
    Alpaca,
    /// `conversations` with `from` and `value`, perhaps `system` and `tools`.
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

/// A row in the words of no schema.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Row {
    Conversation(Conversation),
    Completion { prompt: String, completion: String, tools: Option<Vec<Value>> },
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Conversation {
    pub messages: Vec<Message>,
    /// For each message whether the row says that it is trained or not.
    pub train: Vec<Option<bool>>,
    pub tools: Option<Vec<Value>>,
}

impl Conversation {
    fn push(&mut self, message: Message) {
        self.messages.push(message);
        self.train.push(None);
    }
}

/// The schema and meaning of a parsed row.
pub(super) fn parse(row: Value) -> Result<(Schema, Row), String> {
    let Value::Object(mut row) = row else {
        return Err(format!("expected an object, found {}", kind(&row)));
    };
    row.retain(|_, value| !value.is_null());
    if row.contains_key("prompt") && row.contains_key("completion") {
        return Ok((Schema::Completions, completions(&mut row)?));
    }
    if row.contains_key("messages") {
        let tools = tools(&mut row)?;
        let mut conversation = conversation(&mut row, "messages")?;
        conversation.tools = tools;
        let schema = if conversation.tools.is_some() { Schema::Tools } else { Schema::Chat };
        return Ok((schema, Row::Conversation(conversation)));
    }
    if row.contains_key("conversations") {
        let tools = tools(&mut row)?;
        let mut conversation = conversation(&mut row, "conversations")?;
        conversation.tools = tools;
        if let Some(system) = string(&mut row, "system")?.filter(|system| !system.is_empty()) {
            conversation.messages.insert(0, Message::system(system));
            conversation.train.insert(0, None);
        }
        return Ok((Schema::ShareGpt, Row::Conversation(conversation)));
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

/// The list under `tools`, or the one in a string there; an empty one counts as none.
fn tools(row: &mut Map<String, Value>) -> Result<Option<Vec<Value>>, String> {
    let tools = match row.remove("tools") {
        None => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|e| format!("`tools` holds a string that is not valid JSON: {e}"))?
        }
        Some(tools) => tools,
    };
    match tools {
        Value::Array(tools) if tools.iter().all(Value::is_object) => Ok(Some(tools).filter(|tools| !tools.is_empty())),
        other => Err(format!("`tools` must be a list of objects, found {}", kind(&other))),
    }
}

fn completions(row: &mut Map<String, Value>) -> Result<Row, String> {
    let tools = tools(row)?;
    if !(row.get("prompt").is_some_and(Value::is_array) && row.get("completion").is_some_and(Value::is_array)) {
        let (prompt, completion) = (required(row, "prompt")?, required(row, "completion")?);
        return Ok(Row::Completion { prompt, completion, tools });
    }
    let mut whole = conversation(row, "prompt")?;
    whole.train.fill(Some(false));
    let answer = conversation(row, "completion")?;
    whole.messages.extend(answer.messages);
    whole.train.extend(answer.train);
    whole.tools = tools;
    Ok(Row::Conversation(whole))
}

fn alpaca(row: &mut Map<String, Value>) -> Result<Conversation, String> {
    let mut conversation = Conversation::default();
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

/// The messages under `key`, with `from` and `value` allowed for `role` and `content`.
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
                    "expected the role `system`, `developer`, `user`, `assistant` or `tool`, or a name sharegpt has for one, found `{other}`"
                ));
            }
        };
        if role == "function_call" {
            read_function_call(&mut fields)?;
        }
        fields.insert("role".into(), Value::String(known.to_string()));
    }
    let message = Message::try_from(fields)?.normalized()?;
    Ok((message, train))
}

/// `train` of a message, or the `weight` of 0 or 1 that stands for it elsewhere.
fn train(fields: &mut Map<String, Value>) -> Result<Option<bool>, String> {
    match (fields.shift_remove("train"), fields.shift_remove("weight")) {
        (Some(Value::Bool(train)), _) => Ok(Some(train)),
        (None | Some(Value::Null), None | Some(Value::Null)) => Ok(None),
        (None | Some(Value::Null), Some(Value::Number(weight))) if weight.as_f64() == Some(0.0) => Ok(Some(false)),
        (None | Some(Value::Null), Some(Value::Number(weight))) if weight.as_f64() == Some(1.0) => Ok(Some(true)),
        (None | Some(Value::Null), Some(_)) => Err("`weight` must be 0 or 1".into()),
        (Some(other), _) => Err(format!("`train` must be true or false, found {}", kind(&other))),
    }
}

/// sharegpt writes a tool call as the JSON text of one or several `{name, arguments}`.
fn read_function_call(fields: &mut Map<String, Value>) -> Result<(), String> {
    let text = fields.get("content").and_then(Value::as_str).ok_or("a function call must be a string")?;
    let call: Value = serde_json::from_str(text).map_err(|e| format!("a function call is not valid JSON: {e}"))?;
    let calls = match call {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    let calls: Vec<Value> =
        calls.into_iter().map(|call| serde_json::json!({"type": "function", "function": call})).collect();
    fields.insert("content".into(), Value::String(String::new()));
    fields.insert("tool_calls".into(), Value::Array(calls));
    Ok(())
}
