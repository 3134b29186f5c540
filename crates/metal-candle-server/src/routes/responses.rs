//! `POST /v1/responses`, without state: nothing is stored, so every request contains its whole conversation.

use super::response_input::conversation;
use super::response_output::{Output, usage};
use crate::answer::Answering;
use crate::app::App;
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::ids::{new_id, unix_time};
use crate::sse::{self, Closed, Events};
use crate::tools::MAX_TOOLS;
use crate::turn::Turn;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The smallest token limit that OpenAI accepts.
const MIN_TOKENS: usize = 16;

/// Settings of the wire format besides the turn.
#[derive(Debug)]
struct Form {
    /// The response object without the fields that change during generation.
    object: Value,
    shows_logprobs: bool,
}

/// Answers a conversation.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let (turn, form) = parse(&app, &fields)?;
    let streams = fields.flag("stream")?.unwrap_or(false);
    drop(body);
    let answering = turn.start(&app, &client).await?;
    if streams {
        return Ok(sse::respond(|events| async move { write(&events, &app, form, answering).await }));
    }
    Ok(Json(collect(&app, form, answering).await?).into_response())
}

/// Counts the tokens of a conversation.
pub(crate) async fn count(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::of_body(&body)?;
    let (turn, _) = parse(&app, &fields)?;
    let tokens = turn.count_tokens(&app).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens})))
}

fn parse(app: &App, fields: &Fields) -> Result<(Turn, Form), ApiError> {
    fields.one_of("truncation", &["auto", "disabled"])?;
    let format = fields.object("text")?.map(|text| text.object("format")).transpose()?.flatten();
    let format = format.map(|format| Value::Object(format.map().clone()));
    let given = fields.count("max_output_tokens", MIN_TOKENS, usize::MAX)?;
    let num_top = fields.count("top_logprobs", 0, 20)?.unwrap_or(0);
    let include = fields.texts("include", 16)?;
    let metadata = fields.object("metadata")?.map(|metadata| metadata.map().clone()).unwrap_or_default();
    let mut turn = Turn::new(app, fields, conversation(fields)?, given.unwrap_or(usize::MAX), "input")?;
    turn.num_top = num_top;
    let chat = chat_fields(fields, format.as_ref())?;
    turn.constrain(&app.served, &Fields::of_body(&chat)?).map_err(|error| error.renamed(&RENAMED))?;
    let effort = fields.object("reasoning")?.map(|reasoning| reasoning.text("effort")).transpose()?.flatten();
    if let Some(effort) = effort {
        turn.variables.entry("enable_thinking").or_insert((effort != "none").into());
        turn.variables.entry("reasoning_effort").or_insert(effort.into());
    }
    let object = json!({
        "id": new_id("resp_"),
        "object": "response",
        "created_at": unix_time(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": fields.text("instructions")?,
        "max_output_tokens": given,
        "metadata": metadata,
        "model": turn.target.name,
        "output": [],
        "parallel_tool_calls": fields.flag("parallel_tool_calls")?.unwrap_or(true),
        "previous_response_id": null,
        "reasoning": {"effort": effort, "summary": null},
        "store": false,
        "temperature": turn.config.sampling.temperature,
        "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": fields.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()),
        "tools": fields.get("tools").cloned().unwrap_or_else(|| json!([])),
        "top_logprobs": num_top,
        "top_p": turn.config.sampling.top_p,
        "truncation": "disabled",
        "usage": null,
        "user": fields.text("user")?,
    });
    let shows_logprobs = num_top > 0 || include.contains(&"message.output_text.logprobs");
    Ok((turn, Form { object, shows_logprobs }))
}

/// Converts tools and formats to fields of the chat route, which are nested instead of flat.
fn chat_fields(fields: &Fields, format: Option<&Value>) -> Result<Value, ApiError> {
    // the chat route refuses values other than objects
    let nested = |tool: &Value| {
        let Value::Object(map) = tool else { return tool.clone() };
        let mut function = map.clone();
        let kind = function.remove("type");
        json!({"type": kind, "function": function})
    };
    let mut chat: Map<String, Value> = Grammar::extra_fields(fields).collect();
    let mut tools = Vec::new();
    for tool in fields.objects("tools", MAX_TOOLS)? {
        // other types run on OpenAI's servers
        tool.one_of("type", &["function"])?;
        let mut tool = tool.map().clone();
        tool.insert("type".into(), "function".into());
        tools.push(nested(&tool.into()));
    }
    if !tools.is_empty() {
        chat.insert("tools".into(), tools.into());
    }
    if let Some(parallel) = fields.get("parallel_tool_calls") {
        chat.insert("parallel_tool_calls".into(), parallel.clone());
    }
    if let Some(choice) = fields.get("tool_choice") {
        let choice = match choice.get("type").and_then(Value::as_str) {
            Some("function") => nested(choice),
            Some("allowed_tools") => {
                let tools = choice.get("tools").map(|tools| match tools {
                    Value::Array(tools) => tools.iter().map(nested).collect(),
                    other => other.clone(),
                });
                json!({"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}})
            }
            _ => choice.clone(),
        };
        chat.insert("tool_choice".into(), choice);
    }
    if let Some(format) = format {
        let is_schema = format.get("type").is_some_and(|kind| kind == "json_schema");
        let nested = || json!({"type": "json_schema", "json_schema": format});
        chat.insert("response_format".into(), if is_schema { nested() } else { format.clone() });
    }
    Ok(chat.into())
}

/// Field names of the chat route, and their names in this API.
const RENAMED: [(&str, &str); 4] = [
    (".function", ""),
    (".allowed_tools", ""),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
];

/// The complete response.
fn ended(mut object: Value, output: &Output, answering: &Answering) -> Value {
    object["status"] = output.status().into();
    if output.status() == "incomplete" {
        object["incomplete_details"] = json!({"reason": "max_output_tokens"});
    }
    object["output"] = output.items();
    object["usage"] = usage(answering.usage);
    object
}

async fn collect(app: &App, form: Form, mut answering: Answering) -> Result<Value, ApiError> {
    let mut output = Output::new(form.shows_logprobs);
    while let Some(progress) = answering.next().await? {
        output.push(&app.served, &progress);
    }
    Ok(ended(form.object, &output, &answering))
}

/// Numbers events and sends them.
struct Numbered<'a> {
    events: &'a Events,
    next: u64,
}

impl Numbered<'_> {
    async fn send(&mut self, mut event: Value) -> Result<(), Closed> {
        event["sequence_number"] = self.next.into();
        self.next += 1;
        let name = event["type"].as_str().unwrap_or_default().to_owned();
        self.events.named(&name, &event).await
    }
}

async fn write(events: &Events, app: &App, form: Form, mut answering: Answering) -> Result<(), Closed> {
    let mut events = Numbered { events, next: 0 };
    let mut output = Output::new(form.shows_logprobs);
    for name in ["response.created", "response.in_progress"] {
        events.send(json!({"type": name, "response": form.object})).await?;
    }
    loop {
        let progress = match answering.next().await {
            Ok(Some(progress)) => progress,
            Ok(None) => break,
            Err(error) => {
                let mut object = form.object;
                object["status"] = "failed".into();
                object["error"] = json!({"code": "server_error", "message": error.message});
                return events.send(json!({"type": "response.failed", "response": object})).await;
            }
        };
        for event in output.push(&app.served, &progress) {
            events.send(event).await?;
        }
    }
    let object = ended(form.object, &output, &answering);
    let name = format!("response.{}", output.status());
    events.send(json!({"type": name, "response": object})).await
}
