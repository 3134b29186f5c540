//! `POST /v1/chat/completions`.

use crate::answer::{Answering, Progress};
use crate::app::App;
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::ids::{new_id, unix_time};
use crate::sampling::most_tokens;
use crate::sse::{self, Closed, Events};
use crate::tools::Delta;
use crate::turn::{Turn, finish_reason, messages};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};
use std::sync::Arc;

/// Settings of the wire format besides the turn.
#[derive(Debug, Clone)]
struct Form {
    id: String,
    created: u64,
    model: String,
    num_choices: usize,
    shows_logprobs: bool,
    includes_usage: bool,
}

impl Form {
    fn object(&self, kind: &str, choices: Value) -> Value {
        let Self { id, created, model, .. } = self;
        json!({"id": id, "object": kind, "created": created, "model": model, "choices": choices})
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
        let mut chunk = self.object("chat.completion.chunk", json!([choice]));
        if self.includes_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn logprobs(&self, app: &App, progress: &Progress) -> Value {
        if !self.shows_logprobs || progress.tokens.is_empty() {
            return Value::Null;
        }
        let content: Vec<Value> = progress.tokens.iter().map(|token| token.chat_form(&app.served)).collect();
        json!({"content": content, "refusal": null})
    }
}

/// Answers a conversation.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let (turn, form) = parse(&app, &client, &fields)?;
    let streams = fields.flag("stream")?.unwrap_or(false);
    drop(body);
    let answering = turn.start(&app, &client).await?;
    if streams {
        let keep_alive = app.config.keep_alive;
        return Ok(sse::respond(|events| async move { write(&events, &app, &form, answering, keep_alive).await }));
    }
    Ok(Json(collect(&app, &form, answering).await?).into_response())
}

fn parse(app: &App, client: &Client, fields: &Fields) -> Result<(Turn, Form), ApiError> {
    if fields.list("modalities", 8)?.is_some_and(|list| list.iter().any(|mode| mode != "text")) {
        return Err(ApiError::unsupported("modalities", "`modalities`: this server generates text only"));
    }
    let num_choices = fields.count("n", 1, app.max_choices(client))?.unwrap_or(1);
    let newer = most_tokens(fields, "max_completion_tokens", 1)?;
    let older = most_tokens(fields, "max_tokens", 1)?;
    // llama.cpp's name; editors send 0 to fill the cache with the prompt
    let native = most_tokens(fields, "n_predict", 0)?.map(|count| count.max(1));
    if newer.zip(older).is_some_and(|(newer, older)| newer != older) {
        let message = "`max_tokens` and `max_completion_tokens` differ; send one of them";
        return Err(ApiError::field("max_tokens", message));
    }
    let max_tokens = newer.or(older).or(native).unwrap_or(usize::MAX);
    let mut turn = Turn::new(app, fields, messages(fields)?, max_tokens, "messages")?;
    let shows_logprobs = fields.flag("logprobs")?.unwrap_or(false);
    let num_top = fields.count("top_logprobs", 0, 20)?.unwrap_or(0);
    if num_top > 0 && !shows_logprobs {
        return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
    }
    let options = fields.object("stream_options")?;
    let includes_usage = options.map(|options| options.flag("include_usage")).transpose()?.flatten().unwrap_or(false);
    turn.constrain(&app.served, fields)?;
    turn.prediction = prediction(fields)?;
    turn.num_choices = num_choices;
    turn.num_top = num_top;
    let form = Form {
        id: new_id("chatcmpl-"),
        created: unix_time(),
        model: turn.target.name.clone(),
        num_choices,
        shows_logprobs,
        includes_usage,
    };
    Ok((turn, form))
}

/// The expected text, from `prediction`.
fn prediction(fields: &Fields) -> Result<Option<String>, ApiError> {
    let Some(given) = fields.object("prediction")? else { return Ok(None) };
    given.one_of("type", &["content"])?;
    if given.get("content").is_some_and(Value::is_array) {
        let parts = given.objects("content", 64)?;
        let texts: Result<Vec<&str>, ApiError> = parts.iter().map(|part| part.required_text("text")).collect();
        return Ok(Some(texts?.concat()));
    }
    Ok(given.text("content")?.map(ToOwned::to_owned))
}

async fn write(
    events: &Events,
    app: &App,
    form: &Form,
    mut answering: Answering,
    keep_alive: std::time::Duration,
) -> Result<(), Closed> {
    let mut has_started = false;
    loop {
        let Some(next) = answering.next_within(keep_alive).await else {
            events.data(&form.chunk(0, json!({}), Value::Null, None)).await?;
            continue;
        };
        let progress = match next {
            Ok(Some(progress)) => progress,
            Ok(None) => break,
            Err(error) => return events.error(&error).await,
        };
        if !has_started {
            has_started = true;
            for index in 0..form.num_choices {
                let delta = json!({"role": "assistant", "content": "", "refusal": null});
                events.data(&form.chunk(index, delta, Value::Null, None)).await?;
            }
        }
        let mut logprobs = form.logprobs(app, &progress);
        for delta in &progress.deltas {
            let logprobs = std::mem::take(&mut logprobs);
            events.data(&form.chunk(progress.choice, delta_form(delta), logprobs, None)).await?;
        }
        if !logprobs.is_null() {
            events.data(&form.chunk(progress.choice, json!({"content": ""}), logprobs, None)).await?;
        }
        if let Some(finish) = progress.finish {
            let reason = finish_reason(finish.reason, progress.has_calls);
            events.data(&form.chunk(progress.choice, json!({}), Value::Null, Some(reason))).await?;
        }
    }
    if form.includes_usage {
        let mut chunk = form.object("chat.completion.chunk", json!([]));
        chunk["usage"] = answering.usage.openai_form();
        events.data(&chunk).await?;
    }
    events.done().await
}

fn delta_form(delta: &Delta) -> Value {
    match delta {
        Delta::Content(text) => json!({"content": text}),
        Delta::Reasoning(text) => json!({"reasoning_content": text}),
        Delta::CallStart { index, id, name } => json!({"tool_calls": [
            {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        ]}),
        Delta::Arguments { index, text } => {
            json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        }
    }
}

/// The collected answer of a choice.
#[derive(Debug, Default, Clone)]
struct Collected {
    content: String,
    reasoning: String,
    calls: Vec<(String, String, String)>,
    logprobs: Vec<Value>,
    reason: &'static str,
}

impl Collected {
    fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::CallStart { id, name, .. } => self.calls.push((id, name, String::new())),
            Delta::Arguments { index, text } => {
                if let Some((_, _, arguments)) = self.calls.get_mut(index) {
                    arguments.push_str(&text);
                }
            }
        }
    }

    fn message(&self) -> Value {
        let has_text = !self.content.is_empty() || self.calls.is_empty();
        let content = if has_text { Value::from(self.content.as_str()) } else { Value::Null };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null, "annotations": []});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.as_str().into();
        }
        if !self.calls.is_empty() {
            let call = |(id, name, arguments): &(String, String, String)| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            message["tool_calls"] = self.calls.iter().map(call).collect();
        }
        message
    }
}

async fn collect(app: &App, form: &Form, mut answering: Answering) -> Result<Value, ApiError> {
    let mut all = vec![Collected::default(); form.num_choices];
    while let Some(progress) = answering.next().await? {
        let collected = &mut all[progress.choice];
        if form.shows_logprobs {
            collected.logprobs.extend(progress.tokens.iter().map(|token| token.chat_form(&app.served)));
        }
        if let Some(finish) = &progress.finish {
            collected.reason = finish_reason(finish.reason, progress.has_calls);
        }
        progress.deltas.into_iter().for_each(|delta| collected.add(delta));
    }
    let choices: Value = all
        .iter()
        .enumerate()
        .map(|(index, collected)| {
            let Collected { logprobs, reason, .. } = collected;
            let logprobs =
                if form.shows_logprobs { json!({"content": logprobs, "refusal": null}) } else { Value::Null };
            json!({"index": index, "message": collected.message(), "logprobs": logprobs, "finish_reason": reason})
        })
        .collect();
    let mut object = form.object("chat.completion", choices);
    object["usage"] = answering.usage.openai_form();
    Ok(object)
}
