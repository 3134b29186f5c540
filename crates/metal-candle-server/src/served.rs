//! The model that a server offers: its name, tokenizer, chat template and defaults.

use crate::error::ApiError;
use crate::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarMask};
use crate::ids::unix_time;
use crate::tools::{Reasoning, ToolSyntax};
use crate::untrusted::ControlTokens;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::inference::SamplingConfig;
use metal_candle::models::Model;
use std::sync::{Arc, OnceLock};

/// Spellings of the markers of fill-in-the-middle: before the prefix, the suffix and the middle.
const FIM_MARKERS: [[&str; 3]; 5] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
];

/// The tokens around the parts of a text with a gap.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FimTokens {
    pub(crate) prefix: u32,
    pub(crate) suffix: u32,
    pub(crate) middle: u32,
    /// Before the name of a repository, and before the name of each of its files.
    pub(crate) repository: Option<(u32, u32)>,
}

/// What routes need to know of the model.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) created: u64,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) control: ControlTokens,
    pub(crate) fim: Option<FimTokens>,
    pub(crate) end_of_turn: Option<u32>,
    /// How the chat template writes calls of tools, and reasoning.
    pub(crate) tool_syntax: Option<Arc<ToolSyntax>>,
    pub(crate) reasoning: Option<Reasoning>,
    grammars: Arc<OnceLock<Result<GrammarCompiler, GrammarError>>>,
    /// What `generation_config.json` advises; OpenAI's defaults where it says nothing.
    pub(crate) sampling: SamplingConfig,
    pub(crate) vocab_size: usize,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) context: usize,
    /// Whether answers have the same bits alone and in any batch.
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
    /// The model has none.
    pub(crate) fn template(&self) -> Result<&ChatTemplate, ApiError> {
        self.tokenizer.chat_template().ok_or_else(|| {
            let message =
                "the model has no chat template; use /v1/completions, or start the server with --chat-template";
            ApiError::unsupported("messages", message)
        })
    }

    /// A mask for answers in a grammar, which the field `param` asks for.
    ///
    /// # Errors
    /// The grammar is wrong or too large, or the tokens of the model have no fixed text.
    pub(crate) fn mask(&self, grammar: &Grammar, param: &str) -> Result<GrammarMask, ApiError> {
        let end_ids: Vec<u32> = self.eos_token_ids.iter().copied().chain(self.end_of_turn).collect();
        // the first request pays for the vocabulary
        let compiler = self.grammars.get_or_init(|| GrammarCompiler::new(&self.tokenizer, self.vocab_size, &end_ids));
        compiler.as_ref().map_err(Clone::clone).and_then(|compiler| compiler.compile(grammar)).map_err(|error| {
            match error {
                GrammarError::Busy => ApiError::unavailable("queue_full", error.to_string()),
                GrammarError::Invalid(message) => ApiError::field(param, format!("`{param}`: {message}")),
            }
        })
    }

    /// The tokens of text with control tokens: those of the client's own prompt, or of a template.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        ControlTokens::encode(&self.tokenizer, text, add_special).map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// The tokens of text in which control tokens are plain text.
    pub(crate) fn encode_text(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        self.encode(&self.control.disarm(text, false), false)
    }

    /// The bytes of a token, those of half a character included.
    pub(crate) fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}
