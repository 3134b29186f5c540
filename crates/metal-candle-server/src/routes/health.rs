//! `/health` and `/metrics`.

use crate::app::App;
use crate::error::ApiError;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /health`: 200, or 503 while the server shuts down.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    if app.engine.is_draining() {
        return Err(ApiError::unavailable("draining", "the server is shutting down"));
    }
    Ok(Json(json!({"status": "ok"})))
}

/// `GET /metrics`, if it is enabled.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if !app.config.metrics {
        return Err(ApiError::not_found("metrics are disabled: start the server with --metrics"));
    }
    let slots = app.engine.limits().slots;
    let running = app.engine.num_running();
    let gauges = [
        ("requests_running", running as f64),
        ("requests_waiting", app.engine.num_waiting() as f64),
        ("kv_slots{state=\"used\"}", running as f64),
        ("kv_slots{state=\"free\"}", slots.saturating_sub(running) as f64),
        ("kv_bytes", app.engine.limits().cache_bytes as f64),
        ("adapters_loaded", app.adapters.list().len() as f64),
    ];
    let text = app.metrics.text(&gauges);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
