//! The routes of llama.cpp's server that editors use: `/completion`, `/infill`, `/tokenize`, `/detokenize`,
//! `/apply-template` and `/props`.

use crate::answer::Answering;
use crate::app::{App, Target};
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::ids::unix_time;
use crate::prompt::{TextPrompt, gap, prompts};
use crate::sampling::{generation_config, token_id};
use crate::served::Served;
use crate::sse::{self, Closed, Events};
use crate::turn::{Turn, messages};
use crate::untrusted::ControlTokens;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use metal_candle::inference::{Finish, FinishReason, GenerationConfig, TokenMask};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of tokens in a call of `/detokenize`.
const MAX_TOKENS: usize = 1 << 20;
/// Maximum number of extra files in an infill request.
const MAX_EXTRAS: usize = 256;
/// Maximum number of entries of `lora`.
const MAX_ADAPTERS: usize = 64;

/// `POST /completion`.
pub(crate) async fn completion(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let served = app.served.clone();
    let mut all = prompts(&fields, &served)?;
    if all.len() > 1 {
        return Err(ApiError::unsupported("prompt", "`prompt`: expected one prompt; /v1/completions accepts several"));
    }
    let prompt = all.pop().unwrap_or(TextPrompt::Text(String::new()));
    let prompt = app.compute(move || prompt.encode(&served)).await?;
    run(&app, &client, &fields, prompt).await
}

/// `POST /infill`: generates the text between `input_prefix` and `input_suffix`, with other files as context.
pub(crate) async fn infill(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    if app.served.fim.is_none() {
        return Err(ApiError::unsupported("input_prefix", "the model has no fill-in-the-middle tokens"));
    }
    let prefix =
        fields.text("input_prefix")?.unwrap_or_default().to_owned() + fields.text("prompt")?.unwrap_or_default();
    let suffix = fields.text("input_suffix")?.unwrap_or_default().to_owned();
    let mut extras = Vec::new();
    for extra in fields.objects("input_extra", MAX_EXTRAS)? {
        let name = extra.text("filename")?.unwrap_or("tmp").to_owned();
        extras.push((name, extra.required_text("text")?.to_owned()));
    }
    let (served, context) = (app.served.clone(), app.served.context);
    let max_tokens = num_predict(&fields)?.unwrap_or(128).min(context / 2);
    let prompt = app.compute(move || infill_prompt(&served, &prefix, &suffix, &extras, context - max_tokens)).await?;
    run(&app, &client, &fields, prompt).await
}

/// The prompt of a gap: the newest extra files that fit, then the text around the gap that fits, three quarters of it before the
/// gap.
fn infill_prompt(
    served: &Served,
    prefix: &str,
    suffix: &str,
    extras: &[(String, String)],
    limit: usize,
) -> Result<Vec<u32>, ApiError> {
    let mut ids = gap(served, &[], prefix, suffix)?;
    if ids.len() >= limit {
        // three quarters of the tokens are for the text before the gap
        let share = |text: &str, tokens: usize, from_end: bool| -> Result<String, ApiError> {
            let all = served.encode_text(text)?;
            let kept = tokens.min(all.len());
            let kept = if from_end { &all[all.len() - kept..] } else { &all[..kept] };
            served.tokenizer.decode(kept, false).map_err(ApiError::server)
        };
        let available = limit.saturating_sub(8);
        let after = share(suffix, available / 4, false)?;
        let left = available.saturating_sub(served.encode_text(&after)?.len());
        return gap(served, &[], &share(prefix, left, true)?, &after);
    }
    let Some((repository, file)) = served.fim.and_then(|fim| fim.repository).filter(|_| !extras.is_empty()) else {
        return Ok(ids);
    };
    let mut before = Vec::new();
    // the last files are the most relevant
    for (name, text) in extras.iter().rev() {
        let mut part = vec![file];
        part.extend(served.encode_text(&format!("{name}\n{text}\n"))?);
        if ids.len() + before.len() + part.len() + 16 > limit {
            break;
        }
        part.append(&mut before);
        before = part;
    }
    if !before.is_empty() {
        let mut head = vec![repository];
        head.extend(served.encode_text("repository\n")?);
        head.append(&mut before);
        head.push(file);
        ids = gap(served, &head, prefix, suffix)?;
    }
    Ok(ids)
}

/// `n_predict` or `max_tokens`; none for no limit other than the context.
fn num_predict(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let most = i64::from(u32::MAX);
    let given = fields.integer("n_predict", -1..=most)?.or(fields.integer("max_tokens", -1..=most)?);
    Ok(given.and_then(|count| usize::try_from(count).ok()))
}

/// The adapter whose id in `GET /lora-adapters` is in `lora`; `None` if `lora` selects none.
fn adapter_by_number(app: &App, fields: &Fields) -> Result<Option<Target>, ApiError> {
    let mut found = None;
    for entry in fields.objects("lora", MAX_ADAPTERS)? {
        entry.required("id")?;
        let number = entry.integer("id", 0..=i64::MAX)?;
        let scale = entry.number("scale", -1e6..=1e6)?.unwrap_or(0.0);
        if scale == 0.0 {
            continue;
        }
        let path = entry.path("scale");
        if (scale - 1.0).abs() > f64::EPSILON {
            let message = format!("`{path}`: expected 0 or 1, found {scale}: this server does not scale adapters");
            return Err(ApiError::unsupported(path, message));
        }
        if found.is_some() {
            let message = format!("`{path}`: this server applies one adapter per request; set the other scales to 0");
            return Err(ApiError::unsupported(path, message));
        }
        let number = number.and_then(|number| u64::try_from(number).ok());
        let adapter = app.adapters.list().into_iter().find(|adapter| Some(adapter.generation) == number);
        let Some(adapter) = adapter else {
            let path = entry.path("id");
            let message = format!("`{path}`: there is no such adapter; `GET /lora-adapters` lists the ids");
            return Err(ApiError::field(path, message));
        };
        found = Some(Target { name: adapter.name.clone(), adapter: Some(adapter) });
    }
    Ok(found)
}

async fn run(app: &Arc<App>, client: &Client, fields: &Fields<'_>, prompt: Vec<u32>) -> Result<Response, ApiError> {
    let named = app.target(fields)?;
    let target = match adapter_by_number(app, fields)? {
        Some(target) if named.adapter.is_some() && named.name != target.name => {
            let message = "`lora` names another adapter than `model` or `adapter`";
            return Err(ApiError::field("lora", message));
        }
        Some(target) => target,
        None => named,
    };
    let most = app.max_choices(client);
    let num_choices = fields.count("n_cmpl", 1, most)?.or(fields.count("n", 1, most)?).unwrap_or(1);
    let max_tokens = num_predict(fields)?;
    // editors request no tokens to fill the cache with the prompt
    let config = generation_config(fields, &app.served, max_tokens.unwrap_or(usize::MAX).max(1))?;
    let streams = fields.flag("stream")?.unwrap_or(false);
    let limit = fields.integer("t_max_predict_ms", -1..=i64::from(u32::MAX))?.filter(|limit| *limit > 0);
    let shown = settings(&config, max_tokens);
    let mask = match Grammar::from_request(fields)? {
        None => None,
        Some((param, grammar)) => {
            let served = app.served.clone();
            let mask = app.compute(move || served.mask(&grammar, &param)).await?;
            Some(Box::new(mask) as Box<dyn TokenMask>)
        }
    };
    let form = Form {
        model: target.name.clone(),
        settings: shown,
        is_warm_up: max_tokens == Some(0),
        deadline: limit.map(|limit| Duration::from_millis(limit as u64)),
        num_choices,
    };
    let mut job = app.job(client, &target, ("prompt", prompt), config, fields.text("cache_salt")?)?;
    (job.num_samples, job.mask) = (num_choices, mask);
    let answering = Answering::start(app, job, client)?;
    if streams {
        return Ok(sse::respond(|events| async move { write(&events, &form, answering).await }));
    }
    let mut objects = collect(&form, answering).await?;
    let answer = if num_choices == 1 { objects.pop().unwrap_or_default() } else { Value::Array(objects) };
    Ok(Json(answer).into_response())
}

#[derive(Debug)]
struct Form {
    model: String,
    settings: Value,
    is_warm_up: bool,
    deadline: Option<Duration>,
    num_choices: usize,
}

fn settings(config: &GenerationConfig, max_tokens: Option<usize>) -> Value {
    let sampling = &config.sampling;
    json!({
        "n_predict": max_tokens.map_or(-1, |max_tokens| max_tokens as i64),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "ignore_eos": config.ignore_eos,
        "stop": config.stop_strings,
    })
}

/// The collected answer.
#[derive(Debug, Default, Clone)]
struct Collected {
    text: String,
    tokens: Vec<u32>,
    finish: Option<Finish>,
    first_token: Option<Instant>,
}

impl Form {
    fn object(&self, index: usize, collected: &Collected) -> Value {
        let mut object = json!({
            "index": index,
            "content": if self.is_warm_up { "" } else { &collected.text },
            "tokens": if self.is_warm_up { &[] } else { collected.tokens.as_slice() },
            "id_slot": 0,
            "stop": true,
            "model": self.model,
            "truncated": false,
            // the text took too long
            "stop_type": "limit",
            "generation_settings": self.settings,
        });
        if let Some(finish) = &collected.finish {
            let stop_type = match finish.reason {
                FinishReason::EndOfText => "eos",
                FinishReason::StopString => "word",
                FinishReason::MaxTokens | FinishReason::Length | FinishReason::Cancelled => "limit",
            };
            let per_second = |rate: f64, count: usize| if rate > 0.0 { 1000.0 * count as f64 / rate } else { 0.0 };
            let computed = finish.prompt_tokens - finish.reused_tokens;
            object["stop_type"] = stop_type.into();
            object["stopping_word"] = finish.stop_string.as_deref().unwrap_or_default().into();
            object["tokens_predicted"] = finish.generated_tokens.into();
            object["tokens_evaluated"] = finish.prompt_tokens.into();
            object["tokens_cached"] = (finish.prompt_tokens + finish.generated_tokens).into();
            object["timings"] = json!({
                "cache_n": finish.reused_tokens,
                "prompt_n": computed,
                "prompt_ms": per_second(finish.prompt_tokens_per_second, computed),
                "prompt_per_second": finish.prompt_tokens_per_second,
                "predicted_n": finish.generated_tokens,
                "predicted_ms": per_second(finish.decode_tokens_per_second, finish.generated_tokens.saturating_sub(1)),
                "predicted_per_second": finish.decode_tokens_per_second,
            });
        }
        object
    }

    /// Whether the text has taken too long and ends after the current line.
    fn is_late(&self, collected: &Collected) -> bool {
        let since = collected.first_token.map(|first| first.elapsed());
        let is_over = self.deadline.zip(since).is_some_and(|(deadline, since)| since > deadline);
        is_over && collected.text.contains('\n')
    }
}

async fn collect(form: &Form, mut answering: Answering) -> Result<Vec<Value>, ApiError> {
    let mut all = vec![Collected::default(); form.num_choices];
    while let Some(progress) = answering.next().await? {
        let collected = &mut all[progress.choice];
        collected.first_token.get_or_insert_with(Instant::now);
        collected.text.push_str(&progress.text);
        collected.tokens.extend(progress.tokens.iter().map(|token| token.id));
        collected.finish = progress.finish.or(collected.finish.take());
        if form.deadline.is_some() && all.iter().all(|one| one.finish.is_some() || form.is_late(one)) {
            break;
        }
    }
    Ok(all.iter().enumerate().map(|(index, collected)| form.object(index, collected)).collect())
}

async fn write(events: &Events, form: &Form, mut answering: Answering) -> Result<(), Closed> {
    let mut all = vec![Collected::default(); form.num_choices];
    loop {
        let progress = match answering.next().await {
            Ok(Some(progress)) => progress,
            Ok(None) => return Ok(()),
            Err(error) => return events.error(&error).await,
        };
        let collected = &mut all[progress.choice];
        collected.first_token.get_or_insert_with(Instant::now);
        let tokens: Vec<u32> = progress.tokens.iter().map(|token| token.id).collect();
        collected.text.push_str(&progress.text);
        if !form.is_warm_up && (!progress.text.is_empty() || !tokens.is_empty()) {
            let (index, text) = (progress.choice, &progress.text);
            events.data(&json!({"index": index, "content": text, "tokens": tokens, "stop": false})).await?;
        }
        if progress.finish.is_some() {
            collected.finish = progress.finish;
            let last = Collected { text: String::new(), ..collected.clone() };
            events.data(&form.object(progress.choice, &last)).await?;
            continue;
        }
        if form.deadline.is_some() && form.is_late(&all[progress.choice]) && form.num_choices == 1 {
            let object = json!({"index": 0, "content": "", "tokens": [], "stop": true, "stop_type": "limit"});
            return events.data(&object).await;
        }
    }
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::of_body(&body)?;
    let content = fields.required_text("content")?.to_owned();
    let add_special = fields.flag("add_special")?.unwrap_or(false);
    let parse_special = fields.flag("parse_special")?.unwrap_or(true);
    let with_pieces = fields.flag("with_pieces")?.unwrap_or(false);
    let served = app.served.clone();
    let tokens = app
        .compute(move || {
            let text = if parse_special { content } else { served.control.disarm(&content, false) };
            let ids = served.encode(&text, add_special)?;
            let piece = |id: &u32| {
                let (text, bytes) = served.token_text(*id);
                let is_text = std::str::from_utf8(&bytes).is_ok();
                json!({"id": id, "piece": if is_text { Value::from(text) } else { Value::from(bytes) }})
            };
            let list: Value = if with_pieces {
                ids.iter().map(piece).collect()
            } else {
                ids.iter().copied().map(Value::from).collect()
            };
            Ok(list)
        })
        .await?;
    Ok(Json(json!({"tokens": tokens})))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::of_body(&body)?;
    let list = fields.required_list("tokens", MAX_TOKENS)?;
    let id = |(index, value)| token_id(value, || format!("tokens[{index}]"), &app.served);
    let ids: Vec<u32> = list.iter().enumerate().map(id).collect::<Result<_, _>>()?;
    let served = app.served.clone();
    let content = app.compute(move || served.tokenizer.decode(&ids, false).map_err(ApiError::server)).await?;
    Ok(Json(json!({"content": content})))
}

/// `POST /apply-template`: renders a conversation.
pub(crate) async fn apply_template(
    State(app): State<Arc<App>>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let fields = Fields::of_body(&body)?;
    let mut turn = Turn::new(&app, &fields, messages(&fields)?, usize::MAX, "messages")?;
    turn.constrain(&app.served, &fields)?;
    let served = app.served.clone();
    let prompt = app.compute(move || turn.render(&served)).await?;
    Ok(Json(json!({"prompt": ControlTokens::without_marks(&prompt)})))
}

/// `GET /props`: the capabilities of the server.
pub(crate) async fn props(State(app): State<Arc<App>>) -> Json<Value> {
    let (served, limits) = (&app.served, app.engine.limits());
    let template = served.tokenizer.chat_template().and_then(|template| template.sources().first());
    let config = GenerationConfig::default().with_sampling(served.sampling.clone());
    Json(json!({
        "default_generation_settings": {"n_ctx": served.context, "params": settings(&config, None)},
        "total_slots": limits.slots,
        "model_path": served.name,
        "model_alias": served.name,
        "chat_template": template.map(|(_, source)| source),
        "modalities": {"vision": false, "audio": false},
        "build_info": concat!("metal-candle ", env!("CARGO_PKG_VERSION")),
        "n_ctx": served.context,
        "vocab_size": served.vocab_size,
        "eos_token_ids": served.eos_token_ids,
        "fill_in_the_middle": served.fim.is_some(),
        "deterministic": served.is_deterministic,
        "max_choices": app.config.max_choices.min(limits.slots),
        "max_waiting": limits.max_waiting,
        "running": app.engine.num_running(),
        "waiting": app.engine.num_waiting(),
        "now": unix_time(),
    }))
}
