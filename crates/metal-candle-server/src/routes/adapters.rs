//! The adapter routes: `/v1/adapters`, and the equivalents of vLLM and llama.cpp.

use crate::adapters::{Adapter, Replaces};
use crate::app::App;
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::routes::query::Name;
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/adapters`.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.adapters.list().iter().map(|adapter| object(&app, adapter)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `POST /v1/adapters {name, path, replace, expected_generation}`.
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    client.check_admin()?;
    let fields = Fields::of_body(&body)?;
    let expected = fields.integer("expected_generation", 0..=i64::MAX)?;
    let replaces = match (expected, fields.flag("replace")?.unwrap_or(false)) {
        (Some(generation), _) => Replaces::Generation(generation as u64),
        (None, true) => Replaces::Any,
        (None, false) => Replaces::Nothing,
    };
    let adapter = load_from(&app, fields.required_text("name")?, fields.required_text("path")?, replaces).await?;
    Ok((StatusCode::CREATED, Json(object(&app, &adapter))))
}

/// `DELETE /v1/adapters/NAME`. Running requests keep the adapter.
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(name): Name,
) -> Result<Json<Value>, ApiError> {
    client.check_admin()?;
    let adapter = app.adapters.remove(&name).ok_or_else(|| ApiError::no_such_model(&name).with_param("name"))?;
    let in_flight = adapter.in_flight();
    Ok(Json(json!({"id": name, "object": "adapter", "deleted": true, "in_flight": in_flight})))
}

/// Field names of `/v1/adapters`, and their names in vLLM.
const RENAMED: [(&str, &str); 2] = [("`name`", "`lora_name`"), ("`path`", "`lora_path`")];

/// `POST /v1/load_lora_adapter`, as in vLLM.
pub(crate) async fn load_vllm(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<String, ApiError> {
    client.check_admin()?;
    let fields = Fields::of_body(&body)?;
    let (name, path) = (fields.required_text("lora_name")?, fields.required_text("lora_path")?);
    let replaces = if fields.flag("load_inplace")?.unwrap_or(false) { Replaces::Any } else { Replaces::Nothing };
    load_from(&app, name, path, replaces).await.map_err(|error| error.renamed(&RENAMED))?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

/// `POST /v1/unload_lora_adapter`, as in vLLM.
pub(crate) async fn unload_vllm(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<String, ApiError> {
    client.check_admin()?;
    let fields = Fields::of_body(&body)?;
    let name = fields.required_text("lora_name")?;
    app.adapters.remove(name).ok_or_else(|| ApiError::no_such_model(name).with_param("lora_name"))?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

/// `GET /lora-adapters`, as in llama.cpp.
pub(crate) async fn list_llama(State(app): State<Arc<App>>) -> Json<Value> {
    // generation ids are never reused
    let object = |adapter: &Arc<Adapter>| json!({"id": adapter.generation, "path": adapter.name, "scale": 0.0});
    Json(app.adapters.list().iter().map(object).collect())
}

async fn load_from(app: &Arc<App>, name: &str, path: &str, replaces: Replaces) -> Result<Arc<Adapter>, ApiError> {
    let (adapters, name, path) = (Arc::clone(&app.adapters), name.to_owned(), path.to_owned());
    let adapter = app.compute(move || adapters.load_below_root(&name, &path, replaces)).await?;
    app.metrics.adapter_swaps.add(1);
    Ok(adapter)
}

fn object(app: &App, adapter: &Arc<Adapter>) -> Value {
    let Adapter { name, generation, rank, method, bytes, source, created, .. } = adapter.as_ref();
    json!({
        "id": name,
        "object": "adapter",
        "base": app.served.name,
        "generation": generation,
        "method": method,
        "rank": rank,
        "bytes": bytes,
        "in_flight": adapter.in_flight(),
        "source": source,
        "created_at": created,
    })
}
