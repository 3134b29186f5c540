//! `POST /v1/completions`.

use crate::answer::{Answering, Merged, MergedUpdate, Progress, Scored, Usage, finite};
use crate::app::{App, Target, remaining_context};
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::ids::{new_id, unix_time};
use crate::prompt::{TextPrompt, prompts};
use crate::sampling::{generation_config, most_tokens};
use crate::sse::{self, Closed, Events};
use crate::turn::finish_reason;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use metal_candle::inference::{Choice, TokenMask, prompt_log_probabilities};
use metal_candle::models::Model;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Maximum number of prompt tokens with scores in a request.
const MAX_SCORED: usize = 4096;

/// Settings of the wire format besides the jobs.
#[derive(Debug)]
struct Form {
    id: String,
    created: u64,
    model: String,
    num_choices: usize,
    num_top: Option<usize>,
    includes_usage: bool,
    /// The text before each prompt's answers.
    echoes: Vec<String>,
    /// The offset of each prompt's first scored token, in characters.
    offsets: Vec<usize>,
    /// The scores of each prompt's tokens, if requested.
    scores: Vec<Vec<PromptToken>>,
}

impl Form {
    fn object(&self, choices: Value) -> Value {
        let Self { id, created, model, .. } = self;
        json!({"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices})
    }

    fn choice(&self, prompt: usize, choice: usize, text: &str, logprobs: Value, finish: Option<&str>) -> Value {
        let index = prompt * self.num_choices + choice;
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
    }
}

/// OpenAI's lists of log-probabilities.
#[derive(Debug, Default, Clone)]
struct Logprobs {
    tokens: Vec<Value>,
    of_tokens: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<Value>,
    offset: usize,
}

/// The number of characters that start in a token.
fn num_characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}

impl Logprobs {
    fn add(&mut self, app: &App, tokens: &[Scored], num_top: usize) {
        for Scored { id, logprob, top } in tokens {
            let (text, bytes) = app.served.token_text(*id);
            let name = |choice: &Choice| app.served.token_text(choice.token).0;
            let mut map: Map<String, Value> = Map::new();
            for choice in top.iter().take(num_top) {
                map.entry(name(choice)).or_insert_with(|| json!(finite(choice.log_probability)));
            }
            map.entry(text.clone()).or_insert_with(|| json!(finite(*logprob)));
            self.offsets.push(self.offset.into());
            self.offset += num_characters(&bytes);
            self.tokens.push(text.into());
            self.of_tokens.push(json!(finite(*logprob)));
            self.top.push(map.into());
        }
    }

    fn add_prompt_token(&mut self, app: &App, token: &PromptToken, num_top: usize) {
        if let Some((logprob, top)) = &token.score {
            return self.add(app, &[Scored { id: token.id, logprob: *logprob, top: top.clone() }], num_top);
        }
        let (text, bytes) = app.served.token_text(token.id);
        self.offsets.push(self.offset.into());
        // the beginning-of-text token is not part of the text
        self.offset += if app.served.tokenizer.is_special(token.id) { 0 } else { num_characters(&bytes) };
        self.tokens.push(text.into());
        self.of_tokens.push(Value::Null);
        self.top.push(Value::Null);
    }

    /// Returns and clears the lists.
    fn take(&mut self) -> Value {
        let [tokens, logprobs, top, offsets] =
            [&mut self.tokens, &mut self.of_tokens, &mut self.top, &mut self.offsets].map(std::mem::take);
        json!({"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets})
    }
}

/// A token of a prompt; the first has no score.
#[derive(Debug, Clone)]
struct PromptToken {
    id: u32,
    score: Option<(f32, Vec<Choice>)>,
}

/// The scores of the tokens of prompts.
async fn scores(
    app: &App,
    target: &Target,
    prompts: &[Vec<u32>],
    num_top: usize,
) -> Result<Vec<Vec<PromptToken>>, ApiError> {
    let total: usize = prompts.iter().map(Vec::len).sum();
    if total > MAX_SCORED {
        let message = format!("`echo` with `logprobs`: expected at most {MAX_SCORED} tokens, found {total}");
        return Err(ApiError::field("prompt", message));
    }
    let mut all = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        remaining_context("prompt", prompt.len(), app.served.context)?;
        let (ids, adapter) = (prompt.clone(), target.adapter.clone());
        let kv_cache = app.config.kv_cache;
        let terms = move |model: &Model| {
            let terms = adapter.as_ref().map(|adapter| &adapter.terms);
            prompt_log_probabilities(model, terms, &ids, num_top, kv_cache)
        };
        let found = app.engine.run(terms).await?.map_err(ApiError::server)?;
        let scores = std::iter::once(None).chain(found.into_iter().map(Some));
        all.push(prompt.iter().zip(scores).map(|(&id, score)| PromptToken { id, score }).collect());
    }
    Ok(all)
}

/// The response for a request that only scores its prompts.
fn scored(app: &App, form: &Form, num_tokens: usize) -> Value {
    let mut lists = new_lists(app, form);
    let choices: Value = (0..lists.len())
        .map(|index| {
            let logprobs = if form.num_top.is_some() { lists[index].take() } else { Value::Null };
            let (prompt, choice) = (index / form.num_choices, index % form.num_choices);
            form.choice(prompt, choice, &form.echoes[prompt], logprobs, Some("length"))
        })
        .collect();
    let mut object = form.object(choices);
    object["usage"] = Usage { prompt_tokens: num_tokens, ..Usage::default() }.openai_form();
    object
}

/// Continues prompts.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let target = app.target(&fields)?;
    let num_choices = fields.count("n", 1, app.max_choices(&client))?.unwrap_or(1);
    let native = most_tokens(&fields, "n_predict", 0)?.map(|count| count.max(1));
    let max_tokens = most_tokens(&fields, "max_tokens", 0)?.or(native).unwrap_or(16);
    let num_top = fields.count("logprobs", 0, 5)?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    let streams = fields.flag("stream")?.unwrap_or(false);
    if max_tokens == 0 && !echo {
        return Err(ApiError::field("max_tokens", "`max_tokens`: expected at least 1, or 0 with `echo`, found 0"));
    }
    if max_tokens == 0 && streams {
        return Err(ApiError::unsupported("max_tokens", "`max_tokens`: 0 with `stream` is not supported"));
    }
    let config = generation_config(&fields, &app.served, max_tokens.max(1))?;
    let options = fields.object("stream_options")?;
    let includes_usage = options.map(|options| options.flag("include_usage")).transpose()?.flatten().unwrap_or(false);
    let texts = prompts(&fields, &app.served)?;
    let grammar = Grammar::from_request(&fields)?;
    let cache_salt = fields.text("cache_salt")?;
    let (num_sequences, limit) = (texts.len() * num_choices, app.engine.limits().max_waiting);
    if num_sequences > limit {
        let message = format!("`prompt` and `n`: expected at most {limit} answers, found {num_sequences}");
        return Err(ApiError::field("prompt", message));
    }
    let (encoded, texts, mask) = {
        let served = app.served.clone();
        app.compute(move || {
            let mask = grammar.map(|(param, grammar)| served.mask(&grammar, &param)).transpose()?;
            let encoded: Result<Vec<Vec<u32>>, ApiError> = texts.iter().map(|text| text.encode(&served)).collect();
            let shown: Vec<String> = texts.iter().map(|text: &TextPrompt| text.text(&served)).collect();
            Ok((encoded?, shown, mask))
        })
        .await?
    };
    let scores = match num_top.filter(|_| echo) {
        Some(num_top) => {
            // charge before computing; a job charges its own prompt
            let num_tokens = encoded.iter().map(Vec::len).sum();
            app.keys.charge(&client, num_tokens).inspect_err(|_| app.metrics.reject("rate_limit"))?;
            let scores = scores(&app, &target, &encoded, num_top).await?;
            if max_tokens > 0 {
                app.keys.refund(client.owner, num_tokens);
            }
            scores
        }
        None => vec![Vec::new(); encoded.len()],
    };
    let form = Form {
        id: new_id("cmpl-"),
        created: unix_time(),
        model: target.name.clone(),
        num_choices,
        num_top,
        includes_usage,
        scores,
        offsets: texts.iter().map(|text| if echo { 0 } else { text.chars().count() }).collect(),
        echoes: if echo { texts } else { vec![String::new(); texts.len()] },
    };
    if max_tokens == 0 {
        let num_tokens = encoded.iter().map(Vec::len).sum();
        return Ok(Json(scored(&app, &form, num_tokens)).into_response());
    }
    let mut answering = Vec::with_capacity(encoded.len());
    for prompt in encoded {
        let mut job = app.job(&client, &target, ("prompt", prompt), config.clone(), cache_salt)?;
        (job.num_samples, job.num_top) = (num_choices, num_top.unwrap_or(0));
        job.mask = mask.as_ref().map(TokenMask::fork);
        answering.push(Answering::start(&app, job, &client)?);
    }
    drop(body);
    let merged = Merged::new(answering);
    if streams {
        let keep_alive = app.config.keep_alive;
        return Ok(sse::respond(|events| async move { write(&events, &app, &form, merged, keep_alive).await }));
    }
    Ok(Json(collect(&app, &form, merged).await?).into_response())
}

fn logprobs_of(app: &App, form: &Form, lists: &mut Logprobs, progress: &Progress) -> Value {
    let Some(num_top) = form.num_top else { return Value::Null };
    lists.add(app, &progress.tokens, num_top);
    if lists.tokens.is_empty() { Value::Null } else { lists.take() }
}

/// The lists of each choice, starting with the prompt's tokens if they are requested.
fn new_lists(app: &App, form: &Form) -> Vec<Logprobs> {
    let of_prompt = |(&offset, scores): (&usize, &Vec<PromptToken>)| {
        let mut lists = Logprobs { offset, ..Logprobs::default() };
        for token in scores {
            lists.add_prompt_token(app, token, form.num_top.unwrap_or(0));
        }
        std::iter::repeat_n(lists, form.num_choices)
    };
    form.offsets.iter().zip(&form.scores).flat_map(of_prompt).collect()
}

async fn write(
    events: &Events,
    app: &App,
    form: &Form,
    mut merged: Merged,
    keep_alive: std::time::Duration,
) -> Result<(), Closed> {
    let mut lists = new_lists(app, form);
    let mut echoes: Vec<Option<&str>> =
        form.echoes.iter().flat_map(|echo| std::iter::repeat_n(Some(echo.as_str()), form.num_choices)).collect();
    let mut usage = Usage::default();
    loop {
        let Ok(next) = tokio::time::timeout(keep_alive, merged.next()).await else {
            let choice = form.choice(0, 0, "", Value::Null, None);
            events.data(&form.object(json!([choice]))).await?;
            continue;
        };
        match next {
            None => break,
            Some(MergedUpdate::Failed(error)) => return events.error(&error).await,
            Some(MergedUpdate::Ended(found)) => usage.add(found),
            Some(MergedUpdate::Progress(prompt, progress)) => {
                let index = prompt * form.num_choices + progress.choice;
                let logprobs = logprobs_of(app, form, &mut lists[index], &progress);
                let text = format!("{}{}", echoes[index].take().unwrap_or_default(), progress.text);
                let reason = progress.finish.as_ref().map(|finish| finish_reason(finish.reason, false));
                if !text.is_empty() || !logprobs.is_null() || reason.is_some() {
                    let choice = form.choice(prompt, progress.choice, &text, logprobs, reason);
                    let mut chunk = form.object(json!([choice]));
                    if form.includes_usage {
                        chunk["usage"] = Value::Null;
                    }
                    events.data(&chunk).await?;
                }
            }
        }
    }
    if form.includes_usage {
        let mut chunk = form.object(json!([]));
        chunk["usage"] = usage.openai_form();
        events.data(&chunk).await?;
    }
    events.done().await
}

async fn collect(app: &App, form: &Form, mut merged: Merged) -> Result<Value, ApiError> {
    let mut texts: Vec<String> =
        form.echoes.iter().flat_map(|echo| std::iter::repeat_n(echo.clone(), form.num_choices)).collect();
    let mut lists = new_lists(app, form);
    let mut reasons = vec!["stop"; texts.len()];
    let mut usage = Usage::default();
    while let Some(update) = merged.next().await {
        match update {
            MergedUpdate::Failed(error) => return Err(error),
            MergedUpdate::Ended(found) => usage.add(found),
            MergedUpdate::Progress(prompt, progress) => {
                let index = prompt * form.num_choices + progress.choice;
                texts[index].push_str(&progress.text);
                if let Some(num_top) = form.num_top {
                    lists[index].add(app, &progress.tokens, num_top);
                }
                if let Some(finish) = progress.finish {
                    reasons[index] = finish_reason(finish.reason, false);
                }
            }
        }
    }
    let choices: Value = texts
        .iter()
        .zip(&mut lists)
        .zip(reasons)
        .enumerate()
        .map(|(index, ((text, lists), reason))| {
            let logprobs = if form.num_top.is_some() { lists.take() } else { Value::Null };
            form.choice(index / form.num_choices, index % form.num_choices, text, logprobs, Some(reason))
        })
        .collect();
    let mut object = form.object(choices);
    object["usage"] = usage.openai_form();
    Ok(object)
}
