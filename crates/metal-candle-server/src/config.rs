//! The settings of a server.

use metal_candle::inference::{KVCacheType, PrefixStorage};
use metal_candle::models::Model;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The settings of a server. [`ServerConfig::default`] is for a single-user machine.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The name of the model for clients.
    pub name: String,
    /// Maximum number of sequences that run at the same time; 0 for the number that fits in `cache_bytes`, at most 32.
    pub slots: usize,
    /// Maximum number of tokens in the prompt and the answer; 0 for the model's own limit.
    pub context: usize,
    /// Maximum size of the KV cache, in bytes.
    pub cache_bytes: usize,
    /// The type of the KV caches of the model and the draft model; `None` for the default of the model.
    pub kv_cache: Option<KVCacheType>,
    /// Maximum number of tokens in a prompt per step, so that other answers do not wait long.
    pub prefill_chunk: usize,
    /// Maximum number of sequences that wait for a slot.
    pub max_waiting: usize,
    /// Maximum number of choices in a request.
    pub max_choices: usize,
    /// Maximum size of a JSON body, in bytes.
    pub max_body_bytes: usize,
    /// Longest wait for a slot.
    pub queue_timeout: Duration,
    /// Longest duration of a request.
    pub request_timeout: Duration,
    /// Longest time for which a client may not read its stream.
    pub stall_timeout: Duration,
    /// Time between two keep-alive events of an idle stream.
    pub keep_alive: Duration,
    /// How long running requests may continue when the server shuts down.
    pub drain_timeout: Duration,
    /// The keys of clients; without keys, everyone who can reach the server may use it.
    pub keys: Vec<ApiKey>,
    /// Host names of the server, in addition to loopback names and its address.
    pub allowed_hosts: Vec<String>,
    /// Origins whose web pages may use the server, such as `https://chat.example`.
    pub cors_origins: Vec<String>,
    /// The folder from which requests may load adapters.
    pub adapter_root: Option<PathBuf>,
    /// Maximum number of loaded adapters.
    pub max_adapters: usize,
    /// Whether keys share the prefix cache. The time to the first token then reveals prompts of other keys.
    pub share_prefixes: bool,
    /// Where prefixes are saved that the KV cache gives up, on the CPU; `None` to drop them.
    pub prefix_storage: Option<PrefixStorage>,
    /// Whether tokens are drafted from the text so far and verified several at a time. Answers do not change.
    pub speculation: bool,
    /// A smaller model with the same vocabulary that drafts the tokens of all answers. Answers do not change.
    pub draft_model: Option<Model>,
    /// Whether to serve `GET /metrics`.
    pub metrics: bool,
    /// The settings of files and fine-tuning jobs; `None` disables them.
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
            prefix_storage: None,
            speculation: false,
            draft_model: None,
            metrics: false,
            jobs: None,
        }
    }
}

/// The folder of files and fine-tuning jobs, and how to run a job.
#[derive(Debug, Clone)]
pub struct JobsConfig {
    /// The folder of uploaded files and run folders.
    pub folder: PathBuf,
    /// The program for training, with the commands `train` and `plan` of `metal-candle`.
    pub program: PathBuf,
    /// The flags of these commands for the served model, its types and its device: `--model PATH ...`.
    pub model_flags: Vec<OsString>,
    /// The base of `learning_rate_multiplier`: the default learning rate of `program` for this model.
    pub learning_rate: f64,
    /// Maximum size of a file, in bytes.
    pub max_file_bytes: u64,
    /// Maximum size of all files, in bytes.
    pub max_total_bytes: u64,
}

/// An API key of a client.
#[derive(Clone)]
pub struct ApiKey {
    /// The name of the key, for logs and as owner of files and jobs.
    pub name: String,
    /// The key itself.
    pub secret: String,
    /// Whether it may load adapters, upload files and run jobs.
    pub is_admin: bool,
    /// Maximum number of sequences of this key that run at the same time; 0 for no limit.
    pub max_running: usize,
    /// Maximum number of prompt and answer tokens per minute; 0 for no limit.
    pub tokens_per_minute: u64,
}

impl std::fmt::Debug for ApiKey {
    /// Omits the key itself.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, is_admin, max_running, tokens_per_minute, .. } = self;
        let mut fields = f.debug_struct("ApiKey");
        fields.field("name", name).field("is_admin", is_admin).field("max_running", max_running);
        fields.field("tokens_per_minute", tokens_per_minute).finish_non_exhaustive()
    }
}
