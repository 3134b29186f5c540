//! `/v1/fine_tuning/jobs`: creates, lists and controls fine-tuning jobs, with OpenAI's API.

use crate::app::App;
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::jobs::{Event, JobSettings, Jobs, NewJob, Page, checkpoint_objects, job_object, no_such_job};
use crate::routes::query::{Name, Query};
use crate::routes::table::Routes;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Extension, Json};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Limits of a request.
const MAX_SUFFIX: usize = 64;
const MAX_SEED: i64 = i32::MAX as i64;
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;
/// How long the response to `cancel` waits for the job's last checkpoint.
const CANCEL_WAIT: Duration = Duration::from_secs(20);

pub(crate) fn routes() -> Routes {
    Routes::default()
        .route("/v1/fine_tuning/jobs", get(list).post(create))
        .route("/v1/fine_tuning/jobs/{id}", get(one))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(checkpoints))
}

/// The jobs, if the client may use them.
fn jobs<'a>(app: &'a App, client: &Client) -> Result<&'a Arc<Jobs>, ApiError> {
    client.check_admin()?;
    let message = "fine-tuning jobs are disabled: start the server with --jobs FOLDER";
    app.jobs.as_ref().ok_or_else(|| ApiError::not_found(message))
}

fn object(jobs: &Jobs, owner: &str, id: &str) -> Result<Value, ApiError> {
    let record = jobs.get(owner, id).ok_or_else(|| no_such_job(id))?;
    Ok(job_object(&record, jobs.live(id).as_ref()))
}

/// Runs work that reads or writes files of a job.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::server)?
}

/// `POST /v1/fine_tuning/jobs`. With `dry_run`, returns the memory and time estimate of the job.
async fn create(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let jobs = Arc::clone(jobs(&app, &client)?);
    let fields = Fields::of_body(&body)?;
    let model = fields.required_text("model")?;
    if model != app.served.name && model != "default" {
        return Err(ApiError::no_such_model(model));
    }
    let new = read(&fields)?;
    let owner = client.name.clone();
    if fields.flag("dry_run")?.unwrap_or(false) {
        let Ok(turn) = Arc::clone(&app.planning).try_acquire_owned() else {
            return Err(ApiError::unavailable("queue_full", "another plan is running"));
        };
        // the plan completes even if the client disconnects
        let plan = move || {
            let _turn = turn;
            jobs.plan(&owner, &new)
        };
        let plan = on_disk(plan).await?;
        return Ok(Json(json!({"plan": plan})));
    }
    let record = on_disk(move || jobs.create(&owner, new)).await?;
    Ok(Json(job_object(&record, None)))
}

fn read(fields: &Fields) -> Result<NewJob, ApiError> {
    if fields.list("integrations", 16)?.is_some_and(|list| !list.is_empty()) {
        return Err(ApiError::unsupported("integrations", "`integrations` is not supported by this server"));
    }
    let suffix = fields.text("suffix")?;
    if let Some(suffix) = suffix {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=MAX_SUFFIX).contains(&suffix.len()) || !suffix.bytes().all(is_plain) {
            let message = format!("`suffix`: expected 1 to {MAX_SUFFIX} letters, digits, `.`, `_` and `-`");
            return Err(ApiError::field("suffix", message));
        }
    }
    Ok(NewJob {
        training_file: fields.required_text("training_file")?.to_owned(),
        validation_file: fields.text("validation_file")?.map(str::to_owned),
        suffix: suffix.map(str::to_owned),
        seed: fields.integer("seed", 0..=MAX_SEED)?.unwrap_or(0) as u64,
        settings: JobSettings::read(fields)?,
        metadata: metadata(fields)?,
    })
}

fn metadata(fields: &Fields) -> Result<Option<Map<String, Value>>, ApiError> {
    let Some(metadata) = fields.object("metadata")? else { return Ok(None) };
    let map = metadata.map();
    let is_short = |(key, value): (&String, &Value)| {
        let value = value.as_str().is_some_and(|text| text.chars().count() <= MAX_METADATA_VALUE);
        value && key.chars().count() <= MAX_METADATA_KEY
    };
    if map.len() > MAX_METADATA || !map.iter().all(is_short) {
        let message = format!(
            "`metadata`: expected at most {MAX_METADATA} strings of at most {MAX_METADATA_VALUE} characters with names of at most \
            {MAX_METADATA_KEY}"
        );
        return Err(ApiError::field("metadata", message));
    }
    Ok(Some(map.clone()))
}

/// `GET /v1/fine_tuning/jobs`: newest first.
async fn list(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let jobs = jobs(&app, &client)?;
    let mut records = jobs.list(&client.name);
    for (name, value) in query.pairs() {
        if name == "metadata" && value == "null" {
            records.retain(|record| record.metadata.as_ref().is_none_or(Map::is_empty));
        } else if let Some(key) = name.strip_prefix("metadata[").and_then(|name| name.strip_suffix(']')) {
            let has = |metadata: &Map<String, Value>| metadata.get(key).is_some_and(|found| found == value);
            records.retain(|record| record.metadata.as_ref().is_some_and(has));
        }
    }
    let limit = query.count("limit", 1, 100)?.unwrap_or(20);
    let start = match query.get("after") {
        None => 0,
        Some(after) => 1 + records.iter().position(|record| record.id == after).ok_or_else(|| no_such_job(after))?,
    };
    let page = records[start..].iter().take(limit);
    let data: Vec<Value> = page.map(|record| job_object(record, jobs.live(&record.id).as_ref())).collect();
    let has_more = records.len() > start + data.len();
    Ok(Json(json!({"object": "list", "data": data, "has_more": has_more})))
}

/// `GET /v1/fine_tuning/jobs/ID`.
async fn one(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    object(jobs(&app, &client)?, &client.name, &id).map(Json)
}

/// `POST /v1/fine_tuning/jobs/ID/cancel`. The response waits for the job to end.
async fn cancel(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    let jobs = change(&app, &client, &id, Jobs::cancel).await?;
    let started = Instant::now();
    let has_ended = || jobs.get(&client.name, &id).is_none_or(|record| record.state.has_ended());
    while !has_ended() && started.elapsed() < CANCEL_WAIT {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    object(&jobs, &client.name, &id).map(Json)
}

/// `POST /v1/fine_tuning/jobs/ID/pause`.
async fn pause(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    let jobs = change(&app, &client, &id, Jobs::pause).await?;
    object(&jobs, &client.name, &id).map(Json)
}

/// `POST /v1/fine_tuning/jobs/ID/resume`.
async fn resume(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    let jobs = change(&app, &client, &id, Jobs::resume).await?;
    object(&jobs, &client.name, &id).map(Json)
}

/// Changes the state of a job with a method of the store.
async fn change<T, F>(app: &App, client: &Client, id: &str, change: F) -> Result<Arc<Jobs>, ApiError>
where
    T: Send + 'static,
    F: FnOnce(&Jobs, &str, &str) -> Result<T, ApiError> + Send + 'static,
{
    let jobs = Arc::clone(jobs(app, client)?);
    let (store, owner, job) = (Arc::clone(&jobs), client.name.clone(), id.to_owned());
    on_disk(move || change(&store, &owner, &job)).await?;
    Ok(jobs)
}

/// `GET /v1/fine_tuning/jobs/ID/events`: newest first, or oldest first with `order=asc`.
async fn events(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let jobs = Arc::clone(jobs(&app, &client)?);
    let record = jobs.get(&client.name, &id).ok_or_else(|| no_such_job(&id))?;
    let limit = query.count("limit", 1, 1000)?.unwrap_or(20);
    let after = query.get("after").map(str::to_owned);
    let is_ascending = query.one_of("order", &["asc", "desc"])? == Some("asc");
    let page = on_disk(move || {
        let page = jobs.events(&record.id).page(after.as_deref(), limit, is_ascending).map_err(ApiError::server)?;
        page.ok_or_else(|| ApiError::field("after", "`after`: the job has no such event"))
    });
    let Page { events, has_more } = page.await?;
    let data: Vec<Value> = events.iter().map(Event::object).collect();
    Ok(Json(json!({"object": "list", "data": data, "has_more": has_more})))
}

/// `GET /v1/fine_tuning/jobs/ID/checkpoints`: the existing checkpoints, newest first.
async fn checkpoints(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let jobs = Arc::clone(jobs(&app, &client)?);
    let record = jobs.get(&client.name, &id).ok_or_else(|| no_such_job(&id))?;
    let limit = query.count("limit", 1, 100)?.unwrap_or(10);
    let all = on_disk(move || Ok(checkpoint_objects(&record, &jobs.run(&record.id)))).await?;
    let start = match query.get("after") {
        None => 0,
        Some(after) => {
            let found = all.iter().position(|checkpoint| checkpoint["id"] == after);
            1 + found.ok_or_else(|| ApiError::field("after", "`after`: the job has no such checkpoint"))?
        }
    };
    let page: Vec<&Value> = all[start..].iter().take(limit).collect();
    let id = |checkpoint: Option<&&Value>| checkpoint.map(|checkpoint| checkpoint["id"].clone());
    let (first, last, has_more) = (id(page.first()), id(page.last()), all.len() > start + page.len());
    Ok(Json(json!({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more})))
}
