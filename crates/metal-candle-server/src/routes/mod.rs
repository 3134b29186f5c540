//! The routes of the server, by path.

mod chat;
mod completions;
mod health;
mod models;

use crate::app::App;
use axum::Router;
use axum::routing::{get, post};
use std::sync::Arc;

/// All routes.
pub(crate) fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(health::health))
        .route("/v1/health", get(health::health))
        .route("/metrics", get(health::metrics))
        .route("/v1/models", get(models::list))
        .route("/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/chat/completions", post(chat::answer))
        .route("/chat/completions", post(chat::answer))
        .route("/v1/completions", post(completions::answer))
        .route("/completions", post(completions::answer))
}

/// Whether a path may be read without a key.
pub(crate) fn is_public(path: &str) -> bool {
    matches!(path, "/health" | "/v1/health")
}
