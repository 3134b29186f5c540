//! The settings of a server.

use metal_candle::inference::KVCacheType;
use metal_candle::models::Model;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The settings of a server. [`ServerConfig::default`] suits a machine of one user.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The name that clients know the model by.
    pub name: String,
    /// Most sequences that run at a time; 0 for as many as `cache_bytes` holds, at most 32.
    pub slots: usize,
    /// Most tokens of prompt and answer; 0 for the model's own limit.
    pub context: usize,
    /// Most bytes of the cache of keys and values.
    pub cache_bytes: usize,
    /// The type in which keys and values are stored, also of the draft model; `None` for the one that suits the model.
    pub kv_cache: Option<KVCacheType>,
    /// Tokens of a prompt that a step computes at most, so that other answers do not wait for long.
    pub prefill_chunk: usize,
    /// Most sequences that wait for a slot.
    pub max_waiting: usize,
    /// Most choices of a request.
    pub max_choices: usize,
    /// Most bytes of a JSON body.
    pub max_body_bytes: usize,
    /// Longest wait for a slot.
    pub queue_timeout: Duration,
    /// Longest time of a request from its start.
    pub request_timeout: Duration,
    /// Longest time for which a client may take nothing of its stream.
    pub stall_timeout: Duration,
    /// Time between two events of a stream that has nothing to say.
    pub keep_alive: Duration,
    /// Time that running requests get to end when the server shuts down.
    pub drain_timeout: Duration,
    /// The keys of clients; none for a server that anyone may use who can reach it.
    pub keys: Vec<ApiKey>,
    /// Names by which the server is reached, besides loopback names and its address.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may use the server, such as `https://chat.example`.
    pub cors_origins: Vec<String>,
    /// The folder below which adapters may be loaded by request.
    pub adapter_root: Option<PathBuf>,
    /// Most adapters at a time.
    pub max_adapters: usize,
    /// Whether keys share the cache of common prefixes, so that the time to the first token shows what others asked.
    pub share_prefixes: bool,
    /// Whether tokens are drafted from the prompt and checked several at a time. Answers do not change.
    pub speculation: bool,
    /// A smaller model with the same vocabulary that drafts the tokens of all answers. Answers do not change.
    pub draft_model: Option<Model>,
    /// Whether `GET /metrics` is answered.
    pub metrics: bool,
    /// The folder of files and fine-tuning jobs; without it there are none.
    pub jobs: Option<JobsConfig>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            name: "default".into(),
            slots: 0,
            context: 0,
            cache_bytes: 4 << 30,
            kv_cache: None,
            prefill_chunk: 128,
            max_waiting: 256,
            max_choices: 8,
            max_body_bytes: 4 << 20,
            queue_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_mins(10),
            stall_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
            keys: Vec::new(),
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            adapter_root: None,
            max_adapters: 64,
            share_prefixes: false,
            speculation: false,
            draft_model: None,
            metrics: false,
            jobs: None,
        }
    }
}

/// Where files and fine-tuning jobs live, and how a job is run.
#[derive(Debug, Clone)]
pub struct JobsConfig {
    /// The folder of uploaded files and run folders.
    pub folder: PathBuf,
    /// The program that trains, with the commands `train` and `plan` of `metal-candle`.
    pub program: PathBuf,
    /// The flags of these commands that name the served model, its types and its device: `--model PATH ...`.
    pub model_flags: Vec<OsString>,
    /// The learning rate that `learning_rate_multiplier` multiplies: the default of `program` for this model.
    pub learning_rate: f64,
    /// Most bytes of a file.
    pub max_file_bytes: u64,
    /// Most bytes of all files.
    pub max_total_bytes: u64,
}

/// A key of a client.
#[derive(Clone)]
pub struct ApiKey {
    /// A name for the log and for limits.
    pub name: String,
    /// The key itself.
    pub secret: String,
    /// Whether it may load adapters, upload files and run jobs.
    pub is_admin: bool,
    /// Most sequences of this key that run at a time; 0 for no limit.
    pub max_running: usize,
    /// Most tokens of prompts and answers a minute; 0 for no limit.
    pub tokens_per_minute: u64,
}

impl std::fmt::Debug for ApiKey {
    /// Without the key itself.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, is_admin, max_running, tokens_per_minute, .. } = self;
        let mut fields = f.debug_struct("ApiKey");
        fields.field("name", name).field("is_admin", is_admin).field("max_running", max_running);
        fields.field("tokens_per_minute", tokens_per_minute).finish_non_exhaustive()
    }
}
