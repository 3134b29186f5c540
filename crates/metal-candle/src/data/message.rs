//! [`Message`]: one message of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Length of the tool call ids that Mistral's templates require.
const CALL_ID_LENGTH: usize = 9;

/// One message of a conversation: the JSON object that chat templates read.
///
/// Keys keep their order, and unknown keys are preserved because templates may read them.
/// Known keys are `role`, `content` (text, `null`, or a list of parts), `tool_calls`, `tool_call_id`, `name` and
/// `reasoning_content`.
///
/// ```
/// use metal_candle::data::Message;
///
/// let message = Message::user("hello");
/// assert_eq!(message.role(), "user");
/// assert_eq!(message.text(), "hello");
/// assert_eq!(serde_json::to_string(&message).unwrap(), r#"{"role":"user","content":"hello"}"#);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message of `role` with text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self { fields }
    }

    /// A message of the role `system`.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A message of the role `user`.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the role `assistant`.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A message of the role `tool`: the result of a tool call.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new("tool", content)
    }

    /// The message with `key` set to `value`.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.fields.insert(key.into(), value.into());
        self
    }

    /// The role.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The value of `key`, if there is one.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key)
    }

    /// Removes `key` and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.fields.shift_remove(key)
    }

    /// The text of `content`, or its concatenated text parts; empty if there is no text.
    pub fn text(&self) -> String {
        match self.fields.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts.iter().filter_map(part_text).collect(),
            _ => String::new(),
        }
    }

    /// The tool calls; may be empty.
    pub fn tool_calls(&self) -> &[Value] {
        self.fields.get("tool_calls").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// Joins text parts into one text, and parses the `arguments` of tool calls that are JSON in a string.
    ///
    /// Templates write `arguments` with `tojson`, which would quote a string again, and most expect text as `content`.
    ///
    /// # Errors
    /// A part is not text, or says whether it is trained.
    pub fn normalized(mut self) -> Result<Self, String> {
        if let Some(Value::Array(parts)) = self.fields.get("content") {
            if let Some(part) = parts.iter().find(|part| part_text(part).is_none()) {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("unknown");
                return Err(format!("a content part of type `{kind}` is not supported, only `text` is"));
            }
            if let Some(key) =
                parts.iter().find_map(|part| PART_TRAIN_KEYS.into_iter().find(|key| part.get(*key).is_some()))
            {
                return Err(format!("`{key}` of a content part is not supported; use separate messages with `train`"));
            }
            let text = self.text();
            self.fields.insert("content".into(), Value::String(text));
        }
        if let Some(Value::Array(calls)) = self.fields.get_mut("tool_calls") {
            calls.iter_mut().for_each(parse_arguments);
        }
        Ok(self)
    }

    /// All keys and values.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }
}

/// Keys of a content part that say whether it is trained, which is not supported.
const PART_TRAIN_KEYS: [&str; 4] = ["train", "weight", "loss_mask", "loss"];

fn part_text(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        Value::Object(part) if part.get("type").is_none_or(|kind| kind == "text") => part.get("text")?.as_str(),
        _ => None,
    }
}

fn parse_arguments(call: &mut Value) {
    let Some(call) = call.as_object_mut() else { return };
    let arguments = match call.get_mut("function") {
        Some(Value::Object(function)) => function.get_mut("arguments"),
        _ => call.get_mut("arguments"),
    };
    if let Some(arguments) = arguments {
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(parsed) = parsed.filter(Value::is_object) {
            *arguments = parsed;
        }
    }
}

impl TryFrom<Map<String, Value>> for Message {
    type Error = String;

    fn try_from(fields: Map<String, Value>) -> Result<Self, String> {
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(format!("`role` must be a string, found {}", kind(other))),
            None => return Err("the message has no key `role`".into()),
        }
        match fields.get("content") {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) if parts.iter().all(|part| part.is_string() || part.is_object()) => {}
            Some(Value::Array(_)) => return Err("`content` must be a list of strings or objects".into()),
            Some(other) => {
                return Err(format!("`content` must be a string, null or a list of parts, found {}", kind(other)));
            }
        }
        match fields.get("tool_calls") {
            None | Some(Value::Null) => {}
            Some(Value::Array(calls)) if calls.iter().all(Value::is_object) => {}
            Some(other) => return Err(format!("`tool_calls` must be a list of objects, found {}", kind(other))),
        }
        Ok(Self { fields })
    }
}

impl From<Message> for Map<String, Value> {
    fn from(message: Message) -> Self {
        message.fields
    }
}

/// Describes the type of a JSON value.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
/// The conversation with tool call ids of nine characters, which some templates require, in calls and results. `None` if
/// there are no calls.
pub(super) fn with_call_ids(messages: &[Message]) -> Option<Vec<Message>> {
    let mut count = 0;
    let mut pending: Vec<(Option<Value>, String)> = Vec::new();
    let replaced = messages.iter().map(|message| {
        let mut message = message.clone();
        if let Some(Value::Array(mut calls)) = message.get("tool_calls").cloned() {
            pending.clear();
            for call in calls.iter_mut().filter_map(Value::as_object_mut) {
                let id = format!("call{count:0width$}", width = CALL_ID_LENGTH - 4);
                count += 1;
                pending.push((call.insert("id".into(), Value::String(id.clone())), id));
            }
            message = message.with("tool_calls", calls);
        } else if message.role() == "tool" && !pending.is_empty() {
            let asked = message.get("tool_call_id");
            let place = pending.iter().position(|(old, _)| asked.is_some() && old.as_ref() == asked).unwrap_or(0);
            let (_, id) = pending.remove(place);
            message = message.with("tool_call_id", id);
        }
        message
    });
    let replaced: Vec<Message> = replaced.collect();
    (count > 0).then_some(replaced)
}
