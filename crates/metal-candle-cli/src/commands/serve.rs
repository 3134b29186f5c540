//! `serve`: runs the HTTP server.

mod jobs;

use crate::error::UserError;
use crate::input::read_text;
use crate::kv_cache::CacheArguments;
use crate::matmul_precision::PrecisionArguments;
use crate::model_source::{ModelArguments, ModelSource, check_adapter};
use crate::output::Output;
use crate::templates::TemplateArguments;
use crate::values::{ByteSize, parse_bytes};
use anyhow::{Context, Result};
use clap::Args;
use jobs::JobArguments;
use metal_candle::inference::PrefixStorage;
use metal_candle_server::{ApiKey, Server, ServerConfig};
use serde::Deserialize;
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;

/// Maximum size of the API key file, in bytes.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;
/// The KV cache uses at most one part in this many of the free memory, unless `--cache-memory` is given.
const SHARE_OF_FREE: usize = 4;

/// Flags of `serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArguments {
    /// The address to listen on. An address other than loopback needs --api-key-file or --no-auth.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,

    /// The port to listen on; 0 for any free one.
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,

    /// The name of the model for clients [default: the last part of --model].
    #[arg(long, value_name = "NAME")]
    pub(crate) served_name: Option<String>,

    /// An adapter that clients select by name: a run folder, a PEFT or mlx-lm folder, or a GGUF file. May be given more
    /// than once. Without NAME, the name of the folder or file is used.
    #[arg(long, value_name = "[NAME=]PATH")]
    pub(crate) adapter: Vec<String>,

    /// Let clients with an admin key load adapters from this folder.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) adapter_root: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) model: ModelArguments,

    #[command(flatten)]
    pub(crate) cache: CacheArguments,

    #[command(flatten)]
    pub(crate) precision: PrecisionArguments,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,

    #[command(flatten)]
    pub(crate) jobs: JobArguments,

    #[command(flatten)]
    pub(crate) limits: LimitArguments,

    #[command(flatten)]
    pub(crate) access: AccessArguments,
}

/// Limits of the server.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArguments {
    /// Maximum number of requests that are answered at the same time; others wait [default: as memory allows, at most 32].
    #[arg(long)]
    pub(crate) slots: Option<usize>,

    /// Maximum number of tokens in the prompt and the answer [default: the model's context].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,

    /// Memory of the KV cache, such as `4GB` [default: a quarter of the free memory].
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache_memory: Option<String>,

    /// Save long prompts' keys and values in this folder when they leave the KV cache, and read them instead of computing
    /// them again, also after a restart. CPU only. The files contain prompts and answers; the folder must be accessible to
    /// its owner only. Servers may share it.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) prefix_cache: Option<PathBuf>,

    /// Maximum size of the files in --prefix-cache; the least recently used ones are removed.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", requires = "prefix_cache")]
    pub(crate) prefix_cache_size: ByteSize,

    /// Size of prefill chunks in tokens; other requests wait for their next token during a chunk.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) prefill_chunk: usize,

    /// Maximum number of requests that wait for a slot; further requests are refused with status 503.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_waiting: usize,

    /// Draft tokens from the text so far and verify several at a time. Answers do not change; texts that repeat their
    /// prompt are faster.
    #[arg(long)]
    pub(crate) speculate: bool,

    /// A smaller model with the same vocabulary that drafts tokens; several are verified at a time. Answers do not
    /// change.
    #[arg(long, value_name = "MODEL", conflicts_with = "speculate")]
    pub(crate) draft_model: Option<String>,

    /// Maximum number of adapters that are loaded at the same time.
    #[arg(long, default_value_t = 64)]
    pub(crate) max_adapters: usize,
}

impl LimitArguments {
    fn storage(&self) -> Option<PrefixStorage> {
        let folder = self.prefix_cache.clone()?;
        Some(PrefixStorage { folder, max_bytes: self.prefix_cache_size.0 as u64 })
    }
}

/// Access control of the server.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Access")]
#[allow(clippy::struct_excessive_bools)] // flags
pub(crate) struct AccessArguments {
    /// A TOML file with a table `[[keys]]` for each client: `name`, `key`, and optionally `admin`, `max_running` and
    /// `tokens_per_minute`.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,

    /// Listen on an address that other machines can reach without requiring keys.
    #[arg(long, conflicts_with = "api_key_file")]
    pub(crate) no_auth: bool,

    /// A host name of the server, in addition to its address. May be given more than once.
    #[arg(long, value_name = "NAME")]
    pub(crate) allowed_hosts: Vec<String>,

    /// An origin whose web pages may use the server, such as `https://chat.example`. May be given more than once.
    #[arg(long, value_name = "URL")]
    pub(crate) cors_origin: Vec<String>,

    /// Let all keys share the prefix cache. The time to the first token then reveals prompts of other keys.
    #[arg(long)]
    pub(crate) share_prefixes: bool,

    /// Serve `GET /metrics` in the format of Prometheus.
    #[arg(long)]
    pub(crate) metrics: bool,

    /// Log each request: id, key name, path, status and time, but no texts.
    #[arg(long)]
    pub(crate) log_requests: bool,
}

pub(crate) fn run(flags: &ServeArguments, output: Output) -> Result<()> {
    let keys = keys(&flags.access)?;
    if !flags.host.is_loopback() && keys.is_empty() && !flags.access.no_auth {
        let message = format!("anyone who can reach {} could use the server", flags.host);
        return Err(UserError::new(message).with_hint("--api-key-file FILE, or --no-auth").into());
    }
    let adapters: Vec<(String, PathBuf)> = flags.adapter.iter().map(|text| named_adapter(text)).collect();
    for (_, path) in &adapters {
        check_adapter(path)?;
    }
    start_log(&flags.access);
    let source = ModelSource::find(&flags.model.model, output)?;
    let model = flags.precision.apply(source.load_as(flags.model.types(), flags.model.device, output)?)?;
    let tokenizer = flags.template.tokenizer(&source, None)?;
    let name = flags.served_name.clone().unwrap_or_else(|| short_name(&source.name));
    let draft_model = match &flags.limits.draft_model {
        Some(name) => Some(ModelSource::find(name, output)?.load(flags.model.dtype, flags.model.device, output)?),
        None => None,
    };
    let cache_bytes = match &flags.limits.cache_memory {
        Some(text) => parse_bytes(text).map_err(|message| UserError::new(format!("`--cache-memory`: {message}")))?,
        None => model.device().memory().map_or(4 << 30, |memory| memory.free / SHARE_OF_FREE),
    };
    let limits = &flags.limits;
    let config = ServerConfig {
        name: name.clone(),
        slots: limits.slots.unwrap_or(0),
        context: limits.context.unwrap_or(0),
        cache_bytes,
        kv_cache: flags.cache.kv_cache,
        prefill_chunk: limits.prefill_chunk,
        max_waiting: limits.max_waiting,
        max_adapters: limits.max_adapters,
        allowed_hosts: flags.access.allowed_hosts.iter().cloned().chain([flags.host.to_string()]).collect(),
        cors_origins: flags.access.cors_origin.clone(),
        adapter_root: flags.adapter_root.clone(),
        share_prefixes: flags.access.share_prefixes,
        prefix_storage: limits.storage(),
        speculation: limits.speculate,
        draft_model,
        metrics: flags.access.metrics,
        keys,
        jobs: flags.jobs.config(&flags.model, &flags.template)?,
        ..ServerConfig::default()
    };
    let needs_key = !config.keys.is_empty();
    let server = Server::new(&model, tokenizer, config)?;
    for (name, path) in &adapters {
        server.add_adapter(name, path).with_context(|| format!("`{}`", path.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let address = SocketAddr::new(flags.host, flags.port);
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        announce(&server, listener.local_addr()?, &name, &adapters, needs_key, output)?;
        server.serve(listener, shutdown()).await?;
        output.note("the server stopped");
        Ok(())
    })
}

/// Prints the address of the server and an example request.
fn announce(
    server: &Server,
    address: SocketAddr,
    name: &str,
    adapters: &[(String, PathBuf)],
    needs_key: bool,
    output: Output,
) -> Result<()> {
    let host = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    let url = format!("http://{host}:{}", address.port());
    let adapters: Vec<&str> = adapters.iter().map(|(name, _)| name.as_str()).collect();
    if output.json {
        let (slots, context) = (server.slots(), server.context());
        let object = json!({"url": url, "model": name, "adapters": adapters, "slots": slots, "context": context});
        return Ok(Output::print_json(&object)?);
    }
    let key = if needs_key { " -H 'Authorization: Bearer KEY'" } else { "" };
    let api_key = if needs_key { "KEY" } else { "none" };
    output.note(format!(
        "serving `{name}` at {url}: {} answers at a time, {} tokens each{}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'
  OpenAI(base_url=\"{url}/v1\", api_key=\"{api_key}\")   in Python
  {url}/v1   as the base URL of any program that speaks to OpenAI; {url} for llama.vscode

Ctrl-C stops the server after the running answers.",
        server.slots(),
        server.context(),
        if adapters.is_empty() { String::new() } else { format!("; adapters {}", adapters.join(", ")) },
    ));
    Ok(())
}

/// Completes at the first Ctrl-C or SIGTERM; a second one exits at once.
async fn shutdown() {
    signal().await;
    tokio::spawn(async {
        signal().await;
        std::process::exit(130);
    });
}

async fn signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = interrupt.await;
}

/// Parses `NAME=PATH` or `PATH`.
fn named_adapter(text: &str) -> (String, PathBuf) {
    match text.split_once('=').filter(|(name, _)| !name.contains('/') && !Path::new(text).exists()) {
        Some((name, path)) => (name.to_owned(), path.into()),
        None => (short_name(text), text.into()),
    }
}

/// The last part of a path or Hub name, without file extension.
fn short_name(text: &str) -> String {
    let last = text.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or(text);
    let name = last.strip_suffix(".gguf").or(last.strip_suffix(".safetensors")).unwrap_or(last);
    name.split('@').next().unwrap_or(name).to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    keys: Vec<KeyEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: String,
    key: String,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    max_running: usize,
    #[serde(default)]
    tokens_per_minute: u64,
}

fn keys(flags: &AccessArguments) -> Result<Vec<ApiKey>> {
    let Some(path) = &flags.api_key_file else { return Ok(Vec::new()) };
    let wrong = |message: String| UserError::new(format!("`{}`: {message}", path.display()));
    let text = read_text(path, MAX_KEY_FILE_BYTES)?;
    // only the message: the whole error would show the line, and with it a key
    let file: KeyFile = toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
    if file.keys.is_empty() {
        return Err(wrong("expected at least one table `[[keys]]`, found none".into()).into());
    }
    for (index, entry) in file.keys.iter().enumerate() {
        if entry.key.len() < 16 {
            let message = format!("the key of `{}` has {} bytes; expected at least 16", entry.name, entry.key.len());
            return Err(wrong(message).into());
        }
        if file.keys[..index].iter().any(|other| other.key == entry.key || other.name == entry.name) {
            return Err(wrong(format!("the name or the key of `{}` is given twice", entry.name)).into());
        }
    }
    let key = |entry: KeyEntry| ApiKey {
        name: entry.name,
        secret: entry.key,
        is_admin: entry.admin,
        max_running: entry.max_running,
        tokens_per_minute: entry.tokens_per_minute,
    };
    Ok(file.keys.into_iter().map(key).collect())
}

fn start_log(flags: &AccessArguments) {
    let level = if flags.log_requests { tracing::Level::INFO } else { tracing::Level::WARN };
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    // a program that embeds this one may have set a logger
    let _ = log.with_ansi(false).try_init();
}
