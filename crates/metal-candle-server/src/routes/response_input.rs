//! Reads the conversation of a request to `/v1/responses`.

use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::turn::{MAX_MESSAGES, message};
use metal_candle::data::Message;
use serde_json::{Value, json};

/// Fields of items that chat templates do not use.
const ITEM_FIELDS: [&str; 4] = ["type", "id", "status", "phase"];

/// The messages of `instructions` and `input`.
///
/// # Errors
/// An item is malformed or has an unsupported type.
pub(super) fn conversation(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let mut messages: Vec<Message> = fields.text("instructions")?.map(Message::system).into_iter().collect();
    match fields.get("input") {
        None => return Err(ApiError::field("input", "`input` is required")),
        Some(Value::String(text)) => messages.push(Message::user(text)),
        Some(Value::Array(list)) if list.is_empty() => {
            return Err(ApiError::field("input", "`input`: expected at least one item, found none"));
        }
        Some(Value::Array(list)) if list.len() <= MAX_MESSAGES => {
            let mut reader = Reader { messages, reasoning: None };
            for (index, value) in list.iter().enumerate() {
                reader.read(&Fields::of(value, format!("input[{index}]"))?)?;
            }
            messages = reader.messages;
        }
        Some(other) => {
            let expected = format!("a string or a list of at most {MAX_MESSAGES} items");
            return Err(ApiError::field("input", format!("`input`: expected {expected}, found {}", describe(other))));
        }
    }
    Ok(messages)
}

struct Reader {
    messages: Vec<Message>,
    /// The reasoning of the next assistant message.
    reasoning: Option<String>,
}

impl Reader {
    fn read(&mut self, item: &Fields) -> Result<(), ApiError> {
        match item.text("type")?.unwrap_or("message") {
            "message" => {
                let role = item.one_of("role", &["user", "assistant", "system", "developer"])?;
                let mut message = message(item)?;
                for name in ITEM_FIELDS {
                    message.remove(name);
                }
                if role == Some("assistant") {
                    message = self.with_reasoning(message);
                }
                self.messages.push(message);
            }
            "function_call" => {
                let (id, name) = (item.required_text("call_id")?, item.required_text("name")?);
                let function = json!({"name": name, "arguments": item.required_text("arguments")?});
                let call = json!({"id": id, "type": "function", "function": function});
                self.add_call(call);
            }
            "function_call_output" => {
                let id = item.required_text("call_id")?;
                let text = text_of(item, "output", &["input_text", "output_text", "text"])?;
                self.messages.push(Message::tool(text).with("tool_call_id", id));
            }
            "reasoning" => {
                item.refuse(&["encrypted_content"])?;
                let text = text_of(item, "content", &["reasoning_text"])?;
                self.reasoning = Some(text).filter(|text| !text.is_empty());
            }
            _ => {
                let path = item.path("type");
                let message = format!("`{path}`: only messages, function calls and their outputs are supported");
                return Err(ApiError::unsupported(path, message));
            }
        }
        Ok(())
    }

    fn with_reasoning(&mut self, message: Message) -> Message {
        match self.reasoning.take() {
            Some(reasoning) => message.with("reasoning_content", reasoning),
            None => message,
        }
    }

    /// Adds a call to the previous message.
    fn add_call(&mut self, call: Value) {
        let is_after_answer = self.messages.last().is_some_and(|last| last.role() == "assistant");
        let mut last = match self.messages.pop() {
            Some(last) if is_after_answer => last,
            other => {
                self.messages.extend(other);
                Message::assistant("")
            }
        };
        last = self.with_reasoning(last);
        // remove the list instead of copying it for each call, which would take quadratic time
        let mut calls = match last.remove("tool_calls") {
            Some(Value::Array(calls)) => calls,
            _ => Vec::new(),
        };
        calls.push(call);
        self.messages.push(last.with("tool_calls", calls));
    }
}

/// A text, or the texts of a list of parts with these types.
fn text_of(item: &Fields, name: &str, kinds: &[&str]) -> Result<String, ApiError> {
    if !item.get(name).is_some_and(Value::is_array) {
        return Ok(item.text(name)?.unwrap_or_default().to_owned());
    }
    let mut text = String::new();
    for part in item.objects(name, MAX_MESSAGES)? {
        if !kinds.contains(&part.required_text("type")?) {
            let path = part.path("type");
            return Err(ApiError::unsupported(path.clone(), format!("`{path}`: only text is supported")));
        }
        text.push_str(part.required_text("text")?);
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Vec<Value>, ApiError> {
        let messages = conversation(&Fields::of_body(body).unwrap())?;
        Ok(messages.iter().map(|message| json!(message)).collect())
    }

    #[test]
    fn items_become_messages() {
        let body = json!({"instructions": "Be short.", "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{\"a\":1}"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "done", "annotations": []}]},
        ]});
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let expected = [
            json!({"role": "system", "content": "Be short."}),
            json!({"role": "user", "content": "ab"}),
            json!({"role": "assistant", "content": "", "reasoning_content": "hm",
                   "tool_calls": [call("c1", "f", "{}"), call("c2", "g", "{\"a\":1}")]}),
            json!({"role": "tool", "content": "one", "tool_call_id": "c1"}),
            json!({"role": "assistant", "content": "done"}),
        ];
        assert_eq!(read(&body).unwrap(), expected);
    }

    #[test]
    fn parts_other_than_text_are_refused_by_name() {
        let param = |item: Value| read(&json!({"input": [item]})).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"type": "item_reference", "id": "x"})), "input[0].type");
        assert_eq!(param(json!({"role": "tool", "content": "x"})), "input[0].role");
        assert_eq!(param(json!({"type": "reasoning", "encrypted_content": "x"})), "input[0].encrypted_content");
        let image = json!({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]});
        assert_eq!(param(image), "input[0].content[0].type");
        let image = json!({"type": "function_call_output", "call_id": "x", "output": [{"type": "input_image"}]});
        assert_eq!(param(image), "input[0].output[0].type");
    }
}
