//! [`App`]: the state that all routes share.

use crate::adapters::{Adapter, Adapters};
use crate::auth::{Client, Keys, Origins};
use crate::config::ServerConfig;
use crate::engine::{Engine, Job};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::files::Files;
use crate::jobs::Jobs;
use crate::metrics::Metrics;
use crate::served::Served;
use metal_candle::inference::{GenerationConfig, Speculation};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Maximum number of CPU tasks (tokenizing, templates, grammars) that run at the same time, and of tasks that wait.
const MAX_SIDE_TASKS: usize = 2;
const MAX_SIDE_WAITING: usize = 256;

/// Maximum number of tokens that a draft model drafts at a time.
const MAX_DRAFT: usize = 4;

/// The number of tokens that fit in the context after a prompt.
///
/// # Errors
/// No token fits.
pub(crate) fn remaining_context(param: &str, prompt_tokens: usize, context: usize) -> Result<usize, ApiError> {
    if prompt_tokens >= context {
        return Err(ApiError::context(param, prompt_tokens, context));
    }
    Ok(context - prompt_tokens)
}

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
    /// The uploaded files, if the server has a folder for them.
    pub(crate) files: Option<Arc<Files>>,
    /// Fine-tuning jobs, if the server has a folder for them.
    pub(crate) jobs: Option<Arc<Jobs>>,
    /// Limits the number of job plans that run at the same time.
    pub(crate) planning: Arc<Semaphore>,
    side_tasks: Arc<Semaphore>,
    side_queue: Arc<Semaphore>,
}

/// The model or adapter of a request.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The name in the response.
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
            files: None,
            jobs: None,
            planning: Arc::new(Semaphore::new(1)),
            side_tasks: Arc::new(Semaphore::new(MAX_SIDE_TASKS)),
            side_queue: Arc::new(Semaphore::new(MAX_SIDE_WAITING)),
        }
    }

    /// The model or adapter of a request, from `model` or the extra field `adapter`.
    ///
    /// # Errors
    /// There is no such model or adapter, or its generation differs.
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

    /// Loads the adapter of a request if it belongs to a fine-tuning job or to a checkpoint of a job.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub(crate) async fn load_named(&self, body: &serde_json::Value) -> Result<(), ApiError> {
        let Some(jobs) = &self.jobs else { return Ok(()) };
        let pinned = body.get("adapter").and_then(|value| value.get("name").unwrap_or(value).as_str());
        let named = body.get("model").and_then(serde_json::Value::as_str);
        for name in [named, pinned].into_iter().flatten().filter(|name| jobs.can_load(name)) {
            let (jobs, name) = (Arc::clone(jobs), name.to_owned());
            self.compute(move || jobs.load(&name)).await?;
        }
        Ok(())
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

    /// Maximum number of choices that a client may request; they run at the same time.
    pub(crate) fn max_choices(&self, client: &Client) -> usize {
        self.config.max_choices.min(self.engine.limits().slots).min(client.max_running)
    }

    /// Creates a job with one answer to a prompt, within the client's limits.
    ///
    /// # Errors
    /// The prompt (in the field `param`) fills the context.
    pub(crate) fn job(
        &self,
        client: &Client,
        target: &Target,
        (param, prompt): (&str, Vec<u32>),
        mut config: GenerationConfig,
        cache_salt: Option<&str>,
    ) -> Result<Job, ApiError> {
        config.max_tokens = config.max_tokens.min(remaining_context(param, prompt.len(), self.served.context)?);
        Ok(Job {
            prompt,
            config,
            num_samples: 1,
            adapter: target.adapter.clone(),
            mask: None,
            num_top: 0,
            speculation: self.speculation(false),
            prediction: Vec::new(),
            salt: self.salt(client, cache_salt),
            owner: client.owner,
            max_running: client.max_running,
        })
    }

    /// The speculation mode: for all requests if configured, else for requests with a `prediction`.
    pub(crate) fn speculation(&self, has_prediction: bool) -> Speculation {
        if self.config.draft_model.is_some() {
            return Speculation::DraftModel { max_tokens: MAX_DRAFT };
        }
        if self.config.speculation || has_prediction { Speculation::LOOKUP } else { Speculation::Off }
    }

    /// The prefix cache salt of a client's requests: the same after a restart, because prefixes may be stored. It depends on the
    /// client's key, which other clients do not know, so they cannot choose a `cache_salt` with an equal salt.
    pub(crate) fn salt(&self, client: &Client, cache_salt: Option<&str>) -> u128 {
        let mut digest = Sha256::new();
        match self.keys.digest(client) {
            _ if self.config.share_prefixes => digest.update(b"all keys"),
            None => digest.update(b"no keys"),
            Some(key) => digest.update([b"key ", &key[..]].concat()),
        }
        if let Some(salt) = cache_salt {
            digest.update([b"/", salt.as_bytes()].concat());
        }
        let mut half = [0; 16];
        half.copy_from_slice(&digest.finalize()[..16]);
        u128::from_le_bytes(half)
    }

    /// Runs a CPU task on a blocking thread.
    ///
    /// # Errors
    /// `compute` failed, or too many tasks wait.
    pub(crate) async fn compute<T, F>(&self, compute: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let Ok(queue_permit) = Arc::clone(&self.side_queue).try_acquire_owned() else {
            self.metrics.reject("queue_full");
            return Err(ApiError::unavailable("queue_full", "too many requests are being processed; try again later"));
        };
        let task_permit = Arc::clone(&self.side_tasks).acquire_owned().await.map_err(ApiError::server)?;
        // the task continues if the client disconnects, and still counts towards the limits
        let compute = move || {
            let _permits = (queue_permit, task_permit);
            compute()
        };
        tokio::task::spawn_blocking(compute).await.map_err(ApiError::server)?
    }
}
