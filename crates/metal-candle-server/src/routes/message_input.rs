//! Reads the conversation of a request to `/v1/messages`.

use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::turn::MAX_MESSAGES;
use metal_candle::data::Message;
use serde_json::{Value, json};

/// Maximum number of blocks in a message.
const MAX_BLOCKS: usize = 4096;

/// The messages of `system` and `messages`.
///
/// # Errors
/// A message is malformed or has a block of an unsupported type.
pub(super) fn conversation(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let mut messages = Vec::new();
    if fields.get("system").is_some() {
        let blocks = blocks(fields, "system")?;
        messages.push(Message::system(join(&texts(&blocks, "`text`")?)));
    }
    fields.required_list("messages", MAX_MESSAGES)?;
    let list = fields.objects("messages", MAX_MESSAGES)?;
    if list.is_empty() {
        return Err(ApiError::field("messages", "`messages`: expected at least one message, found none"));
    }
    for message in &list {
        let role = message.one_of("role", &["user", "assistant"])?;
        let role = role
            .ok_or_else(|| ApiError::field(message.path("role"), format!("`{}` is required", message.path("role"))))?;
        let blocks = blocks(message, "content")?;
        if role == "user" {
            read_user(&blocks, &mut messages)?;
        } else {
            messages.push(read_assistant(&blocks)?);
        }
    }
    Ok(messages)
}

/// A part of a message: text, or an object with a type.
enum Block<'a> {
    Text(&'a str),
    Object(Fields<'a>, &'a str),
}

/// The blocks of a field: a text or a list of blocks.
fn blocks<'a>(fields: &Fields<'a>, name: &str) -> Result<Vec<Block<'a>>, ApiError> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(vec![Block::Text(text)]),
        Some(Value::Array(_)) => {
            let read = |block: Fields<'a>| {
                let kind = block.required_text("type")?;
                match kind {
                    "text" => Ok(Block::Text(block.required_text("text")?)),
                    _ => Ok(Block::Object(block, kind)),
                }
            };
            fields.objects(name, MAX_BLOCKS)?.into_iter().map(read).collect()
        }
        found => {
            let (path, found) = (fields.path(name), found.map_or_else(|| "nothing".to_owned(), describe));
            let message = format!("`{path}`: expected a string or a list of blocks, found {found}");
            Err(ApiError::field(path, message))
        }
    }
}

/// The texts of blocks that must be text. `supported` names the supported types for errors.
fn texts<'a>(blocks: &[Block<'a>], supported: &str) -> Result<Vec<&'a str>, ApiError> {
    let text = |block: &Block<'a>| match block {
        Block::Text(text) => Ok(*text),
        Block::Object(block, _) => Err(refused(block, supported)),
    };
    blocks.iter().map(text).collect()
}

fn refused(block: &Fields, supported: &str) -> ApiError {
    let path = block.path("type");
    ApiError::unsupported(path.clone(), format!("`{path}`: only blocks of type {supported} are supported"))
}

/// Joins blocks as paragraphs.
fn join(texts: &[&str]) -> String {
    texts.join("\n")
}

/// Reads a user message; tool results become messages before its text.
fn read_user(blocks: &[Block], messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let mut said = Vec::new();
    let mut has_results = false;
    for block in blocks {
        match block {
            Block::Text(text) => said.push(*text),
            Block::Object(block, "tool_result") => {
                has_results = true;
                let id = block.required_text("tool_use_id")?;
                let content = match block.get("content") {
                    None => String::new(),
                    Some(_) => join(&texts(&self::blocks(block, "content")?, "`text`")?),
                };
                messages.push(Message::tool(content).with("tool_call_id", id));
            }
            Block::Object(block, _) => return Err(refused(block, "`text` and `tool_result`")),
        }
    }
    if !said.is_empty() || !has_results {
        messages.push(Message::user(join(&said)));
    }
    Ok(())
}

fn read_assistant(blocks: &[Block]) -> Result<Message, ApiError> {
    let (mut said, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for block in blocks {
        match block {
            Block::Text(text) => said.push(*text),
            Block::Object(block, "thinking") => thoughts.push(block.required_text("thinking")?),
            Block::Object(block, "tool_use") => {
                let (id, name) = (block.required_text("id")?, block.required_text("name")?);
                let input = block.object("input")?.map(|input| input.map().clone()).unwrap_or_default();
                let function = json!({"name": name, "arguments": Value::from(input).to_string()});
                calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            Block::Object(block, _) => return Err(refused(block, "`text`, `thinking` and `tool_use`")),
        }
    }
    let mut message = Message::assistant(join(&said));
    if !thoughts.is_empty() {
        message = message.with("reasoning_content", join(&thoughts));
    }
    if !calls.is_empty() {
        message = message.with("tool_calls", calls);
    }
    Ok(message)
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
    fn blocks_become_messages() {
        let body = json!({
            "system": [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "text", "text": "c"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "text", "text": "d"},
                ]},
            ],
        });
        let function = json!({"name": "f", "arguments": "{\"a\":1}"});
        let expected = [
            json!({"role": "system", "content": "Be short."}),
            json!({"role": "user", "content": "a"}),
            json!({"role": "assistant", "content": "b", "reasoning_content": "hm",
                   "tool_calls": [{"id": "t1", "type": "function", "function": function}]}),
            json!({"role": "tool", "content": "3", "tool_call_id": "t1"}),
            json!({"role": "user", "content": "c\nd"}),
        ];
        assert_eq!(read(&body).unwrap(), expected);
    }

    #[test]
    fn blocks_other_than_text_are_refused_by_name() {
        let param = |role: &str, content: Value| {
            read(&json!({"messages": [{"role": role, "content": content}]})).unwrap_err().param.unwrap()
        };
        assert_eq!(param("system", json!("x")), "messages[0].role");
        assert_eq!(param("user", Value::Null), "messages[0].content");
        assert_eq!(param("user", json!([{"type": "image", "source": {}}])), "messages[0].content[0].type");
        assert_eq!(param("assistant", json!([{"type": "tool_result"}])), "messages[0].content[0].type");
        let nested = json!([{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}]);
        assert_eq!(param("user", nested), "messages[0].content[0].content[0].type");
    }
}
