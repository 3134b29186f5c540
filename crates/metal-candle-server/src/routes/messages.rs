//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API.

use super::message_input::conversation;
use crate::answer::{Answering, Progress, Usage};
use crate::app::App;
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::ids::new_id;
use crate::parts::{Change, Part, Parts};
use crate::sampling::stop_strings;
use crate::sse::{self, Closed, Events};
use crate::tools::MAX_TOOLS;
use crate::turn::Turn;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use metal_candle::inference::{Finish, FinishReason};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// An error in Anthropic's format.
pub(crate) struct MessageError(ApiError);

impl From<ApiError> for MessageError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl MessageError {
    fn object(&self) -> Value {
        let kind = match self.0.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.0.message}})
    }
}

impl IntoResponse for MessageError {
    fn into_response(self) -> Response {
        self.0.respond(self.object())
    }
}

/// Settings of the wire format besides the turn.
#[derive(Debug)]
struct Form {
    id: String,
    model: String,
    max_tokens: usize,
}

/// Answers a conversation.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    body: Result<JsonBody, ApiError>,
) -> Result<Response, MessageError> {
    let JsonBody(body) = body?;
    let fields = Fields::of_body(&body)?;
    let Some(max_tokens) = fields.count("max_tokens", 1, usize::MAX)? else {
        return Err(ApiError::field("max_tokens", "`max_tokens` is required").into());
    };
    let turn = parse(&app, &fields, max_tokens)?;
    let form = Form { id: new_id("msg_"), model: turn.target.name.clone(), max_tokens };
    let streams = fields.flag("stream")?.unwrap_or(false);
    drop(body);
    let answering = turn.start(&app, &client).await?;
    if streams {
        let keep_alive = app.config.keep_alive;
        return Ok(sse::respond(|events| async move { write(&events, &form, answering, keep_alive).await }));
    }
    Ok(Json(collect(&form, answering).await?).into_response())
}

/// Counts the tokens of a conversation.
pub(crate) async fn count(
    State(app): State<Arc<App>>,
    body: Result<JsonBody, ApiError>,
) -> Result<Json<Value>, MessageError> {
    let JsonBody(body) = body?;
    let turn = parse(&app, &Fields::of_body(&body)?, usize::MAX)?;
    Ok(Json(json!({"input_tokens": turn.count_tokens(&app).await?})))
}

fn parse(app: &App, fields: &Fields, max_tokens: usize) -> Result<Turn, ApiError> {
    let messages = conversation(fields)?;
    // if the conversation ends with the assistant's text, the answer continues that text
    let continues = messages.last().is_some_and(|last| last.role() == "assistant" && last.tool_calls().is_empty());
    let mut turn = Turn::new(app, fields, messages, max_tokens, "messages")?;
    turn.continues = continues;
    let chat = chat_fields(fields)?;
    turn.constrain(&app.served, &Fields::of_body(&chat)?).map_err(|error| error.renamed(&RENAMED))?;
    turn.config.stop_strings.extend(stop_strings(fields, "stop_sequences")?);
    if let Some(thinking) = fields.object("thinking")? {
        let is_on = thinking.one_of("type", &["enabled", "adaptive", "disabled"])? != Some("disabled");
        turn.variables.entry("enable_thinking").or_insert(is_on.into());
    }
    Ok(turn)
}

/// Field names of the chat route, and their names in this API.
const RENAMED: [(&str, &str); 4] = [
    (".function.parameters", ".input_schema"),
    (".function", ""),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
];

/// Converts tools and formats to fields of the chat route.
fn chat_fields(fields: &Fields) -> Result<Value, ApiError> {
    let mut chat: Map<String, Value> = Grammar::extra_fields(fields).collect();
    let mut tools = Vec::new();
    for tool in fields.objects("tools", MAX_TOOLS)? {
        // other types run on Anthropic's servers
        tool.one_of("type", &["custom"])?;
        let mut function = Map::new();
        for (name, of_chats) in
            [("name", "name"), ("description", "description"), ("input_schema", "parameters"), ("strict", "strict")]
        {
            if let Some(value) = tool.get(name) {
                function.insert(of_chats.into(), value.clone());
            }
        }
        tools.push(json!({"type": "function", "function": function}));
    }
    if !tools.is_empty() {
        chat.insert("tools".into(), tools.into());
    }
    if let Some(choice) = fields.object("tool_choice")? {
        let mode = match choice.one_of("type", &["auto", "any", "tool", "none"])? {
            Some("any") => json!("required"),
            Some("tool") => json!({"type": "function", "function": {"name": choice.required_text("name")?}}),
            Some(other) => json!(other),
            None => Value::Null,
        };
        chat.insert("tool_choice".into(), mode);
        if choice.flag("disable_parallel_tool_use")? == Some(true) {
            chat.insert("parallel_tool_calls".into(), false.into());
        }
    }
    if let Some(format) = fields.object("output_config")?.map(|config| config.object("format")).transpose()?.flatten() {
        format.one_of("type", &["json_schema"])?;
        let schema = json!({"schema": format.get("schema")});
        chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
    }
    Ok(chat.into())
}

/// The collected answer.
#[derive(Debug, Default)]
struct Output {
    parts: Parts,
    /// The id of each part; only calls have one.
    ids: Vec<String>,
    finish: Option<Finish>,
}

impl Output {
    /// Adds new text and returns its events: names and data.
    fn push(&mut self, progress: Progress) -> Vec<(&'static str, Value)> {
        let mut changes = Vec::new();
        for delta in progress.deltas {
            changes.extend(self.parts.push(delta));
        }
        if progress.finish.is_some() {
            changes.extend(self.parts.close());
            self.finish = progress.finish;
        }
        changes.into_iter().map(|change| self.describe(change)).collect()
    }

    fn describe(&mut self, change: Change) -> (&'static str, Value) {
        match change {
            Change::Opened(index) => {
                self.ids.push(new_id("toolu_"));
                let block = match &self.parts.list()[index] {
                    Part::Text(_) => json!({"type": "text", "text": ""}),
                    Part::Reasoning(_) => json!({"type": "thinking", "thinking": "", "signature": ""}),
                    Part::Call { name, .. } => {
                        json!({"type": "tool_use", "id": self.ids[index], "name": name, "input": {}})
                    }
                };
                let data = json!({"type": "content_block_start", "index": index, "content_block": block});
                ("content_block_start", data)
            }
            Change::Grew(index, text) => {
                let delta = match &self.parts.list()[index] {
                    Part::Text(_) => json!({"type": "text_delta", "text": text}),
                    Part::Reasoning(_) => json!({"type": "thinking_delta", "thinking": text}),
                    Part::Call { .. } => json!({"type": "input_json_delta", "partial_json": text}),
                };
                ("content_block_delta", json!({"type": "content_block_delta", "index": index, "delta": delta}))
            }
            Change::Closed(index) => ("content_block_stop", json!({"type": "content_block_stop", "index": index})),
        }
    }

    fn blocks(&self) -> Value {
        let block = |(part, id): (&Part, &String)| match part {
            Part::Text(text) => json!({"type": "text", "text": text}),
            Part::Reasoning(text) => json!({"type": "thinking", "thinking": text, "signature": ""}),
            Part::Call { name, arguments } => {
                // a truncated call may have no complete object
                let input = serde_json::from_str::<Value>(arguments).ok().filter(Value::is_object);
                json!({"type": "tool_use", "id": id, "name": name, "input": input.unwrap_or_else(|| json!({}))})
            }
        };
        self.parts.list().iter().zip(&self.ids).map(block).collect()
    }

    /// `stop_reason` and `stop_sequence`.
    fn stop(&self, form: &Form) -> Value {
        let Some(finish) = &self.finish else { return json!({"stop_reason": null, "stop_sequence": null}) };
        let reason = match finish.reason {
            FinishReason::MaxTokens | FinishReason::Length if finish.generated_tokens < form.max_tokens => {
                "model_context_window_exceeded"
            }
            FinishReason::MaxTokens | FinishReason::Length => "max_tokens",
            _ if self.parts.has_calls() => "tool_use",
            FinishReason::StopString => "stop_sequence",
            FinishReason::EndOfText | FinishReason::Cancelled => "end_turn",
        };
        json!({"stop_reason": reason, "stop_sequence": finish.stop_string})
    }
}

impl Form {
    fn message(&self, output: &Output, usage: Usage) -> Value {
        let mut message = json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": output.blocks(),
            "usage": usage_form(usage),
        });
        if let (Value::Object(message), Value::Object(stop)) = (&mut message, output.stop(self)) {
            message.extend(stop);
        }
        message
    }
}

/// Anthropic counts cached tokens separately.
fn usage_form(usage: Usage) -> Value {
    let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = usage;
    json!({
        "input_tokens": prompt_tokens.saturating_sub(cached_tokens),
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion_tokens,
    })
}

async fn collect(form: &Form, mut answering: Answering) -> Result<Value, ApiError> {
    let mut output = Output::default();
    while let Some(progress) = answering.next().await? {
        output.push(progress);
    }
    Ok(form.message(&output, answering.usage))
}

async fn write(events: &Events, form: &Form, mut answering: Answering, keep_alive: Duration) -> Result<(), Closed> {
    let mut output = Output::default();
    let message = form.message(&output, answering.usage);
    events.named("message_start", &json!({"type": "message_start", "message": message})).await?;
    loop {
        let Some(next) = answering.next_within(keep_alive).await else {
            events.named("ping", &json!({"type": "ping"})).await?;
            continue;
        };
        match next {
            Ok(Some(progress)) => {
                for (name, data) in output.push(progress) {
                    events.named(name, &data).await?;
                }
            }
            Ok(None) => break,
            Err(error) => return events.named("error", &MessageError(error).object()).await,
        }
    }
    let data = json!({"type": "message_delta", "delta": output.stop(form), "usage": usage_form(answering.usage)});
    events.named("message_delta", &data).await?;
    events.named("message_stop", &json!({"type": "message_stop"})).await
}
