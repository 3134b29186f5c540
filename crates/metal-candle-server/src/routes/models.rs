//! `/v1/models`: lists the base model and its adapters.

use crate::adapters::Adapter;
use crate::app::App;
use crate::error::ApiError;
use crate::routes::query::Name;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/models`.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let adapters = app.adapters.list();
    let adapters = adapters.iter().map(|adapter| adapter_object(&app, adapter));
    let data: Vec<Value> = std::iter::once(base_object(&app)).chain(adapters).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/NAME`.
pub(crate) async fn one(State(app): State<Arc<App>>, Name(name): Name) -> Result<Json<Value>, ApiError> {
    if name == app.served.name || name == "default" {
        return Ok(Json(base_object(&app)));
    }
    let adapter = app.adapters.get(&name).ok_or_else(|| ApiError::no_such_model(&name))?;
    Ok(Json(adapter_object(&app, &adapter)))
}

fn base_object(app: &App) -> Value {
    json!({
        "id": app.served.name,
        "object": "model",
        "created": app.served.created,
        "owned_by": "metal-candle",
        "context_length": app.served.context,
        "max_model_len": app.served.context,
    })
}

fn adapter_object(app: &App, adapter: &Adapter) -> Value {
    json!({
        "id": adapter.name,
        "object": "model",
        "created": adapter.created,
        "owned_by": "metal-candle",
        "parent": app.served.name,
        "generation": adapter.generation,
        "context_length": app.served.context,
        "max_model_len": app.served.context,
        "adapter": {"rank": adapter.rank, "method": adapter.method},
    })
}
