//! The routes of the server.

mod adapters;
mod chat;
mod completions;
mod embeddings;
mod files;
mod health;
mod jobs;
mod message_input;
mod messages;
mod models;
mod native;
mod openapi;
mod query;
mod response_input;
mod response_output;
mod responses;
mod table;

use crate::app::App;
use crate::error::ApiError;
use crate::page;
use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use std::sync::Arc;
use table::Routes;

/// All routes.
pub(crate) fn router() -> Router<Arc<App>> {
    api().into_router().merge(page::router())
}

/// The routes of the API, which `openapi.json` describes.
pub(crate) fn api() -> Routes {
    Routes::default()
        .route("/health", get(health::health))
        .route("/v1/health", get(health::health))
        .route("/openapi.json", get(openapi::document))
        .route("/metrics", get(health::metrics))
        .route("/v1/models", get(models::list))
        .route("/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/chat/completions", post(chat::answer))
        .route("/chat/completions", post(chat::answer))
        .route("/v1/completions", post(completions::answer))
        .route("/completions", post(completions::answer))
        .route("/v1/responses", post(responses::answer))
        .route("/responses", post(responses::answer))
        .route("/v1/responses/input_tokens", post(responses::count))
        .route("/v1/messages", post(messages::answer))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/v1/embeddings", post(embeddings::answer))
        .route("/embeddings", post(embeddings::answer))
        .route("/v1/adapters", get(adapters::list).post(adapters::load))
        .route("/v1/adapters/{name}", delete(adapters::unload))
        .route("/v1/load_lora_adapter", post(adapters::load_vllm))
        .route("/v1/unload_lora_adapter", post(adapters::unload_vllm))
        .route("/lora-adapters", get(adapters::list_llama))
        .route("/completion", post(native::completion))
        .route("/infill", post(native::infill))
        .route("/v1/infill", post(native::infill))
        .route("/tokenize", post(native::tokenize))
        .route("/v1/tokenize", post(native::tokenize))
        .route("/detokenize", post(native::detokenize))
        .route("/v1/detokenize", post(native::detokenize))
        .route("/apply-template", post(native::apply_template))
        .route("/v1/apply-template", post(native::apply_template))
        .route("/props", get(native::props))
        .merge(files::routes())
        .merge(jobs::routes())
}

/// The error response to a request that reached no route, in the format for its path.
pub(crate) fn refuse(path: &str, error: ApiError) -> Response {
    if path.starts_with("/v1/messages") {
        messages::MessageError::from(error).into_response()
    } else {
        error.into_response()
    }
}

/// Whether a path needs no key.
pub(crate) fn is_public(path: &str) -> bool {
    matches!(path, "/health" | "/v1/health" | "/openapi.json") || page::is_page(path)
}
