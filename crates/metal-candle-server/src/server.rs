//! [`Server`]: accepts connections, and drains them when the server shuts down.

use crate::adapters::{Adapters, Replaces};
use crate::app::App;
use crate::config::ServerConfig;
use crate::engine::{Engine, EngineLimits};
use crate::error::ApiError;
use crate::files::{FileLimits, Files};
use crate::ids::new_id;
use crate::jobs;
use crate::metrics::Metrics;
use crate::routes;
use crate::served::Served;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metal_candle::data::{DatasetOptions, Tokenizer};
use metal_candle::inference::SchedulerConfig;
use metal_candle::models::Model;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;

/// The default limit of sequences that run at the same time.
const MAX_SLOTS: usize = 32;
/// Longest row of a training file, in tokens, unless the model's context is shorter; the default of `train`.
const MAX_ROW_TOKENS: usize = 2048;
/// Maximum number of connections.
const MAX_CONNECTIONS: usize = 1024;
const MAX_HEADERS: usize = 100;
const MAX_HEADER_BYTES: usize = 64 << 10;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A model with its adapters, ready to answer requests.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    engine: JoinHandle<()>,
    jobs: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts the engine: allocates its cache and starts its thread.
    ///
    /// # Errors
    /// The cache does not fit in `cache_bytes` or on the device, the type `kv_cache` is not supported, a limit is out of
    /// range, or prefixes cannot be stored.
    pub fn new(model: &Model, tokenizer: Tokenizer, config: ServerConfig) -> metal_candle::Result<Self> {
        let limits = limits(model, &config)?;
        let metrics = Arc::new(Metrics::default());
        let scheduler = SchedulerConfig {
            max_sequences: limits.slots,
            prefill_chunk: config.prefill_chunk,
            step_tokens: config.prefill_chunk + limits.slots,
            kv_cache: config.kv_cache,
        };
        let scheduler = (scheduler, config.prefix_storage.as_ref());
        let (engine, thread) =
            Engine::start(model, &tokenizer, config.draft_model.as_ref(), scheduler, limits, Arc::clone(&metrics))?;
        let served = Served::new(config.name.clone(), model, tokenizer, limits.context);
        let adapters =
            Arc::new(Adapters::new(model.clone(), &config.name, config.adapter_root.clone(), config.max_adapters));
        let mut app = App::new(config, served, engine, adapters, metrics);
        let jobs = open_jobs(&mut app, model)?;
        Ok(Self { app: Arc::new(app), engine: thread, jobs })
    }

    /// Adds an adapter that clients select with `model: NAME`.
    ///
    /// # Errors
    /// The path contains no adapter of this model, or the name is taken.
    pub fn add_adapter(&self, name: &str, path: &Path) -> metal_candle::Result<()> {
        let source = path.file_name().map_or_else(|| name.to_owned(), |name| name.to_string_lossy().into_owned());
        let added = self.app.adapters.load(name, path, &source, Replaces::Nothing);
        added
            .map(|_| ())
            .map_err(|error| metal_candle::Error::Argument { name: "adapter".into(), message: error.message })
    }

    /// Maximum number of sequences that run at the same time.
    pub fn slots(&self) -> usize {
        self.app.engine.limits().slots
    }

    /// Maximum number of tokens in the prompt and the answer.
    pub fn context(&self) -> usize {
        self.app.served.context
    }

    /// The routes, for use in your own server. They check keys and origins.
    pub fn router(&self) -> Router {
        let app = Arc::clone(&self.app);
        routes::router()
            .fallback(unknown_path)
            .method_not_allowed_fallback(wrong_method)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .layer(axum::middleware::from_fn_with_state(Arc::clone(&app), check))
            .with_state(app)
    }

    /// Answers requests until `shutdown` completes, then waits up to `drain_timeout` for running requests and saves prefixes.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> std::io::Result<()> {
        let router = self.router();
        let drain_timeout = self.app.config.drain_timeout;
        let write_timeout = 2 * self.app.config.stall_timeout;
        let (closing, is_closing) = watch::channel(false);
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        tokio::pin!(shutdown);
        loop {
            let permit = Arc::clone(&connections).acquire_owned();
            let (stream, permit) = tokio::select! {
                () = &mut shutdown => break,
                (accepted, permit) = async { let permit = permit.await; (listener.accept().await, permit) } => {
                    match (accepted, permit) {
                        (Ok((stream, _)), Ok(permit)) => (stream, permit),
                        // too many open files, or the client disconnected: continue with other connections
                        (Err(error), _) => {
                            tracing::warn!("cannot accept a connection: {error}");
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            continue;
                        }
                        (_, Err(_)) => break,
                    }
                }
            };
            // send small chunks without delay
            let _ = stream.set_nodelay(true);
            // close connections of clients that do not read
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(write_timeout));
            let stream = Box::pin(stream);
            let service = TowerToHyperService::new(router.clone());
            let mut is_closing = is_closing.clone();
            tokio::spawn(async move {
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(MAX_HEADER_BYTES)
                    .max_headers(MAX_HEADERS)
                    .serve_connection(TokioIo::new(stream), service);
                let closing = async { is_closing.wait_for(|closing| *closing).await.map(drop) };
                tokio::pin!(connection);
                tokio::select! {
                    // a disconnected client is not an error
                    _ = &mut connection => {}
                    _ = closing => {
                        connection.as_mut().graceful_shutdown();
                        let _ = connection.await;
                    }
                }
                drop(permit);
            });
        }
        drop(listener);
        self.app.engine.drain();
        if let Some(jobs) = &self.app.jobs {
            jobs.stop();
        }
        let _ = closing.send(true);
        let ended = || connections.available_permits() == MAX_CONNECTIONS;
        let started = Instant::now();
        while !ended() && started.elapsed() < drain_timeout {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // running requests receive an error event, and their bodies end
        self.app.engine.stop();
        let started = Instant::now();
        while !ended() && started.elapsed() < Duration::from_secs(2) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let threads = [Some(self.engine), self.jobs];
        let join = move || threads.into_iter().flatten().for_each(|thread| drop(thread.join()));
        let _ = tokio::task::spawn_blocking(join).await;
        Ok(())
    }
}

/// Opens the files and jobs if they are configured, and starts the thread that runs jobs.
fn open_jobs(app: &mut App, model: &Model) -> metal_candle::Result<Option<JoinHandle<()>>> {
    let Some(config) = app.config.jobs.clone() else { return Ok(None) };
    let options = DatasetOptions {
        max_tokens: Some(model.config().max_sequence_length().min(MAX_ROW_TOKENS)),
        vocab_size: Some(model.config().vocab_size),
        ..DatasetOptions::default()
    };
    let lock = jobs::lock_folder(&config.folder)?;
    let limits = FileLimits { file_bytes: config.max_file_bytes, total_bytes: config.max_total_bytes };
    let tokenizer = app.served.tokenizer.clone();
    let files = Files::open(&config.folder.join("files"), limits, tokenizer, options)?;
    let (jobs, thread) =
        jobs::start(config, app.config.name.clone(), lock, Arc::clone(&files), Arc::clone(&app.adapters))?;
    (app.files, app.jobs) = (Some(files), Some(jobs));
    Ok(Some(thread))
}

/// The limits of the engine, from the settings and the model.
fn limits(model: &Model, config: &ServerConfig) -> metal_candle::Result<EngineLimits> {
    let argument = |name: &str, message: String| metal_candle::Error::Argument { name: name.into(), message };
    let longest = model.config().max_sequence_length();
    let context = if config.context == 0 { longest } else { config.context };
    if context > longest || context < 2 {
        return Err(argument(
            "context",
            format!("expected 2 to {longest} tokens, the model's context, found {context}"),
        ));
    }
    let models = || std::iter::once(model).chain(&config.draft_model);
    let scheduler = SchedulerConfig { kv_cache: config.kv_cache, ..SchedulerConfig::of(model) };
    models().try_for_each(|model| scheduler.validate(model))?;
    let bytes_of = |slots: usize| -> usize { models().map(|model| scheduler.cache_bytes(model, slots, context)).sum() };
    let fitting = config.cache_bytes / bytes_of(1).max(1);
    if fitting == 0 {
        let message = format!(
            "a sequence of {context} tokens needs {} bytes of KV cache, but the limit is {}; reduce the context",
            bytes_of(1),
            config.cache_bytes
        );
        return Err(argument("cache_bytes", message));
    }
    let slots = if config.slots == 0 { fitting.min(MAX_SLOTS) } else { config.slots };
    if slots > fitting {
        let message =
            format!("expected at most {fitting}, the number that fits in {} bytes, found {slots}", config.cache_bytes);
        return Err(argument("slots", message));
    }
    Ok(EngineLimits {
        slots,
        context,
        cache_bytes: bytes_of(slots),
        max_waiting: config.max_waiting,
        queue_timeout: config.queue_timeout,
        request_timeout: config.request_timeout,
        stall_timeout: config.stall_timeout,
    })
}

async fn unknown_path(request: Request) -> Response {
    let path: String = request.uri().path().chars().take(100).collect();
    let error = ApiError::not_found(format!("there is no `{} {path}`", request.method()));
    routes::refuse(request.uri().path(), error)
}

async fn wrong_method(request: Request) -> Response {
    let message = format!("`{}` is not allowed here", request.method());
    routes::refuse(request.uri().path(), ApiError::malformed(StatusCode::METHOD_NOT_ALLOWED, message))
}

/// Checks the origin and key of a request, and adds the common response headers.
async fn check(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|value| value.len() <= 128 && value.as_bytes().iter().all(u8::is_ascii_graphic));
    let id = given.cloned().or_else(|| HeaderValue::from_str(&new_id("req_")).ok());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let started = Instant::now();
    let mut name = String::new();
    let checked = app.origins.check(&method, request.headers()).and_then(|()| {
        if method == Method::OPTIONS || routes::is_public(&path) {
            return Ok(None);
        }
        app.keys.client(request.headers()).map(Some)
    });
    let mut response = match checked {
        Err(error) => {
            app.metrics.reject("unauthorized");
            routes::refuse(&path, error)
        }
        Ok(_) if method == Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        Ok(client) => {
            if let Some(client) = client {
                name.clone_from(&client.name);
                request.extensions_mut().insert(client);
            }
            next.run(request).await
        }
    };
    let status = response.status();
    let headers = response.headers_mut();
    if let Some(id) = &id {
        headers.insert(REQUEST_ID, id.clone());
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = origin.filter(|origin| origin.to_str().is_ok_and(|origin| app.origins.is_allowed(origin))) {
        let lines = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE"),
            (
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                "authorization, content-type, x-api-key, x-request-id, anthropic-version, x-stainless-arch, x-stainless-lang, \
                 x-stainless-os, x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, \
                 x-stainless-runtime-version, x-stainless-timeout",
            ),
            (header::ACCESS_CONTROL_EXPOSE_HEADERS, "x-request-id, retry-after"),
            (header::VARY, "origin"),
        ];
        for (name, value) in lines {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    let milliseconds = started.elapsed().as_millis();
    tracing::info!(id = ?id, client = name, %method, path, status = status.as_u16(), milliseconds, "request");
    response
}
