//! [`Served`]: the name, tokenizer, chat template and defaults of the served model.

use crate::error::ApiError;
use crate::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarMask};
use crate::ids::unix_time;
use crate::tools::{Reasoning, ToolSyntax};
use crate::untrusted::ControlTokens;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::inference::SamplingConfig;
use metal_candle::models::Model;
use std::sync::{Arc, OnceLock};

/// The fill-in-the-middle tokens of published models: before the prefix, the suffix and the middle.
const FIM_MARKERS: [[&str; 3]; 5] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
];

/// The fill-in-the-middle tokens of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FimTokens {
    pub(crate) prefix: u32,
    pub(crate) suffix: u32,
    pub(crate) middle: u32,
    /// The tokens before the name of a repository, and before the name of each of its files.
    pub(crate) repository: Option<(u32, u32)>,
}

/// The properties of the model that routes need.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) created: u64,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) control: ControlTokens,
    pub(crate) fim: Option<FimTokens>,
    pub(crate) end_of_turn: Option<u32>,
    /// The syntax of tool calls in the chat template.
    pub(crate) tool_syntax: Option<Arc<ToolSyntax>>,
    pub(crate) reasoning: Option<Reasoning>,
    grammars: Arc<OnceLock<Result<GrammarCompiler, GrammarError>>>,
    /// The sampling defaults of `generation_config.json`, completed by OpenAI's defaults.
    pub(crate) sampling: SamplingConfig,
    pub(crate) vocab_size: usize,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) context: usize,
    /// Whether answers are identical alone and in any batch.
    pub(crate) is_deterministic: bool,
}

impl Served {
    pub(crate) fn new(name: String, model: &Model, tokenizer: Tokenizer, context: usize) -> Self {
        let config = model.config();
        let fim = FIM_MARKERS.iter().find_map(|markers| {
            let [prefix, suffix, middle] = markers.map(|marker| tokenizer.token_to_id(marker));
            let repository = tokenizer.token_to_id("<|repo_name|>").zip(tokenizer.token_to_id("<|file_sep|>"));
            Some(FimTokens { prefix: prefix?, suffix: suffix?, middle: middle?, repository })
        });
        let defaults = &config.generation;
        let says_nothing = defaults.do_sample.is_none() && defaults.temperature.is_none();
        let sampling = if says_nothing && defaults.top_k.is_none() && defaults.top_p.is_none() {
            SamplingConfig {
                repetition_penalty: defaults.repetition_penalty.unwrap_or(1.0),
                ..SamplingConfig::default()
            }
        } else {
            SamplingConfig::from(defaults)
        };
        let template: String =
            tokenizer.chat_template().iter().flat_map(|all| all.sources()).map(|(_, source)| source.as_str()).collect();
        Self {
            tool_syntax: ToolSyntax::of(&template, &tokenizer).map(Arc::new),
            reasoning: Reasoning::of(&template, &tokenizer),
            grammars: Arc::default(),
            name,
            created: unix_time(),
            control: ControlTokens::of(&tokenizer),
            fim,
            end_of_turn: tokenizer.end_of_turn_id(),
            sampling,
            vocab_size: config.vocab_size,
            eos_token_ids: config.eos_token_ids.clone(),
            context,
            is_deterministic: model.device().is_cpu(),
            tokenizer,
        }
    }

    /// The chat template.
    ///
    /// # Errors
    /// The model has no chat template.
    pub(crate) fn template(&self) -> Result<&ChatTemplate, ApiError> {
        self.tokenizer.chat_template().ok_or_else(|| {
            let message =
                "the model has no chat template; use /v1/completions, or start the server with --chat-template";
            ApiError::unsupported("messages", message)
        })
    }

    /// Compiles the grammar of the field `param` to a mask.
    ///
    /// # Errors
    /// The grammar is invalid or too large, or the tokens of the model have no fixed text.
    pub(crate) fn mask(&self, grammar: &Grammar, param: &str) -> Result<GrammarMask, ApiError> {
        let end_ids: Vec<u32> = self.eos_token_ids.iter().copied().chain(self.end_of_turn).collect();
        // created at the first request with a grammar
        let compiler = self.grammars.get_or_init(|| GrammarCompiler::new(&self.tokenizer, self.vocab_size, &end_ids));
        compiler.as_ref().map_err(Clone::clone).and_then(|compiler| compiler.compile(grammar)).map_err(|error| {
            match error {
                GrammarError::Busy => ApiError::unavailable("queue_full", error.to_string()),
                GrammarError::Invalid(message) => ApiError::field(param, format!("`{param}`: {message}")),
            }
        })
    }

    /// Tokenizes text with active control tokens: the client's own prompt, or a rendered template.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        ControlTokens::encode(&self.tokenizer, text, add_special).map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// Tokenizes text in which control tokens are plain text.
    pub(crate) fn encode_text(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        self.encode(&self.control.disarm(text, false), false)
    }

    /// The text and bytes of a token, which may be part of a character.
    pub(crate) fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}
