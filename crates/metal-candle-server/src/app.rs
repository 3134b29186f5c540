//! The state that all routes share.

use crate::adapters::{Adapter, Adapters};
use crate::auth::{Client, Keys, Origins};
use crate::config::ServerConfig;
use crate::engine::Engine;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::ids;
use crate::metrics::Metrics;
use crate::served::Served;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Computations on the side (tokens, templates, grammars) that run at a time, and that may wait.
const MAX_SIDE_TASKS: usize = 2;
const MAX_SIDE_WAITING: usize = 256;

/// The state of a server.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) served: Served,
    pub(crate) engine: Engine,
    pub(crate) adapters: Arc<Adapters>,
    pub(crate) keys: Keys,
    pub(crate) origins: Origins,
    pub(crate) metrics: Arc<Metrics>,
    /// Of the salts, so that no client can guess one.
    hasher: RandomState,
    side_tasks: Semaphore,
    side_queue: Semaphore,
}

/// What a request's field `model` names.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The name to answer with.
    pub(crate) name: String,
    pub(crate) adapter: Option<Arc<Adapter>>,
}

impl App {
    pub(crate) fn new(
        config: ServerConfig,
        served: Served,
        engine: Engine,
        adapters: Arc<Adapters>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let keys = Keys::new(&config.keys);
        let origins = Origins::new(&config.allowed_hosts, &config.cors_origins);
        Self {
            config,
            served,
            engine,
            adapters,
            keys,
            origins,
            metrics,
            hasher: RandomState::new(),
            side_tasks: Semaphore::new(MAX_SIDE_TASKS),
            side_queue: Semaphore::new(MAX_SIDE_WAITING),
        }
    }

    /// The model or adapter of a request: by `model`, or by the extra field `adapter`.
    ///
    /// # Errors
    /// There is no such model or adapter, or its generation is another one.
    pub(crate) fn target(&self, fields: &Fields) -> Result<Target, ApiError> {
        let name = fields.text("model")?;
        if let Some(pinned) = fields.get("adapter") {
            return self.pinned(fields, pinned);
        }
        let Some(name) = name else { return Ok(self.base()) };
        if name == self.served.name || name == "default" {
            return Ok(self.base());
        }
        match self.adapters.get(name) {
            Some(adapter) => Ok(Target { name: name.to_owned(), adapter: Some(adapter) }),
            None => Err(ApiError::no_such_model(name)),
        }
    }

    fn base(&self) -> Target {
        Target { name: self.served.name.clone(), adapter: None }
    }

    fn pinned(&self, fields: &Fields, pinned: &serde_json::Value) -> Result<Target, ApiError> {
        let (name, generation) = if let Some(name) = pinned.as_str() {
            (name, None)
        } else {
            let inner = Fields::of(pinned, fields.path("adapter"))?;
            (inner.required_text("name")?, inner.integer("generation", 0..=i64::MAX)?)
        };
        let adapter = self.adapters.get(name).ok_or_else(|| ApiError::no_such_model(name).with_param("adapter"))?;
        if let Some(generation) = generation.filter(|generation| *generation as u64 != adapter.generation) {
            let message = format!("adapter `{name}`: expected generation {generation}, found {}", adapter.generation);
            return Err(ApiError::conflict(message).with_param("adapter.generation"));
        }
        Ok(Target { name: name.to_owned(), adapter: Some(adapter) })
    }

    /// The salt of the cache for a client's requests.
    pub(crate) fn salt(&self, client: &Client, cache_salt: Option<&str>) -> u64 {
        let owner = if self.config.share_prefixes { 0 } else { client.owner };
        self.hasher.hash_one((owner, cache_salt))
    }

    /// Computes on a thread that may take its time.
    ///
    /// # Errors
    /// Those of `compute`, or too many computations wait.
    pub(crate) async fn compute<T, F>(&self, compute: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let Ok(_place) = self.side_queue.try_acquire() else {
            self.metrics.reject("queue_full");
            return Err(ApiError::unavailable("queue_full", "too many requests are being prepared"));
        };
        let _turn = self.side_tasks.acquire().await.map_err(ApiError::server)?;
        match tokio::task::spawn_blocking(compute).await {
            Ok(result) => result,
            Err(error) => Err(ApiError::server(format!("request {}: {error}", ids::new_id("")))),
        }
    }
}
