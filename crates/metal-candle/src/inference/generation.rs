//! The settings, pieces and result of a generation.

use super::sampler::Choice;
use super::sampling::SamplingConfig;
use crate::error::{Error, Result};

/// The prompt of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, which the generator's tokenizer encodes with the special tokens that it adds to every text.
    Text(String),
    /// Token ids, used unchanged.
    Ids(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&String> for Prompt {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl From<&[u32]> for Prompt {
    fn from(ids: &[u32]) -> Self {
        Self::Ids(ids.to_vec())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self::Ids(ids)
    }
}

impl From<&Vec<u32>> for Prompt {
    fn from(ids: &Vec<u32>) -> Self {
        Self::Ids(ids.clone())
    }
}

impl<const N: usize> From<[u32; N]> for Prompt {
    fn from(ids: [u32; N]) -> Self {
        Self::Ids(ids.to_vec())
    }
}

/// Sampling settings and stop conditions. The default is greedy and ends after 256 tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Maximum number of tokens to generate, at least 1; the context of the model is also a limit.
    pub max_tokens: usize,
    /// Minimum number of tokens before an end token may be sampled. Stop strings can end a generation earlier, as can a mask that allows
    /// only end tokens.
    pub min_tokens: usize,
    /// How tokens are sampled.
    pub sampling: SamplingConfig,
    /// Texts that end the generation; they are not part of its text. They need a tokenizer.
    pub stop_strings: Vec<String>,
    /// Tokens that end the generation, in addition to the end-of-text tokens of the model's configuration.
    pub stop_ids: Vec<u32>,
    /// Whether the generation continues after the end-of-text tokens of the model's configuration.
    pub ignore_eos: bool,
    /// Whether special tokens are omitted from the text.
    pub skip_special_tokens: bool,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            min_tokens: 0,
            sampling: SamplingConfig::greedy(),
            stop_strings: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
        }
    }
}

impl GenerationConfig {
    /// Sets the maximum number of tokens to generate.
    #[must_use]
    pub fn with_max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets the minimum number of tokens before an end token.
    #[must_use]
    pub fn with_min_tokens(mut self, min_tokens: usize) -> Self {
        self.min_tokens = min_tokens;
        self
    }

    /// Sets the sampling settings: a [`SamplingConfig`] or a [`SamplingStrategy`](super::SamplingStrategy).
    #[must_use]
    pub fn with_sampling(mut self, sampling: impl Into<SamplingConfig>) -> Self {
        self.sampling = sampling.into();
        self
    }

    /// Adds a text that ends the generation.
    #[must_use]
    pub fn with_stop_string(mut self, stop_string: impl Into<String>) -> Self {
        self.stop_strings.push(stop_string.into());
        self
    }

    /// Adds a token that ends the generation.
    #[must_use]
    pub fn with_stop_id(mut self, id: u32) -> Self {
        self.stop_ids.push(id);
        self
    }

    /// Sets whether the generation continues after end-of-text tokens.
    #[must_use]
    pub fn with_ignore_eos(mut self, ignore_eos: bool) -> Self {
        self.ignore_eos = ignore_eos;
        self
    }

    /// Sets whether special tokens are omitted from the text.
    #[must_use]
    pub fn with_skip_special_tokens(mut self, skip_special_tokens: bool) -> Self {
        self.skip_special_tokens = skip_special_tokens;
        self
    }

    /// Checks the range of every setting.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn validate(&self) -> Result<()> {
        if self.max_tokens == 0 {
            return Err(Error::argument("max_tokens", "expected at least 1, found 0"));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::argument("stop_strings", "expected text, found an empty string"));
        }
        self.sampling.validate()
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model sampled an end-of-text token or one of the `stop_ids`.
    EndOfText,
    /// The text reached one of the `stop_strings`.
    StopString,
    /// The generation reached `max_tokens`.
    MaxTokens,
    /// Prompt and text fill the model's context.
    Length,
    /// The caller cancelled it.
    Cancelled,
}

impl FinishReason {
    /// `end_of_text`, `stop_string`, `max_tokens`, `length` or `cancelled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndOfText => "end_of_text",
            Self::StopString => "stop_string",
            Self::MaxTokens => "max_tokens",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::fmt::Display for FinishReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a generation ended, and its counts and speeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why it ended.
    pub reason: FinishReason,
    /// The stop string that was reached; among several, the one that starts first.
    pub stop_string: Option<String>,
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// The number of first tokens of the prompt that were not computed for this sequence, because their keys and values were
    /// in the cache, or another sample of the prompt computed them.
    pub reused_tokens: usize,
    /// Number of sampled tokens, including the one that ended the text.
    pub generated_tokens: usize,
    /// The number of generated tokens that were drafted: see [`Speculation`](super::Speculation).
    pub accepted_draft_tokens: usize,
    /// Number of drafted tokens that were computed and discarded.
    pub rejected_draft_tokens: usize,
    /// Computed tokens of the prompt per second until the first token was sampled.
    pub prompt_tokens_per_second: f64,
    /// Tokens after the first, per second since it was sampled; 0 if there is only one.
    pub decode_tokens_per_second: f64,
    /// The peak memory of the process so far, in bytes: [`Device::process_peak_memory`](crate::Device::process_peak_memory).
    pub peak_memory_bytes: Option<u64>,
}

impl Finish {
    /// The end of a sequence after an error, with unknown counts.
    pub(super) fn unknown() -> Self {
        Self {
            reason: FinishReason::Cancelled,
            stop_string: None,
            prompt_tokens: 0,
            reused_tokens: 0,
            generated_tokens: 0,
            accepted_draft_tokens: 0,
            rejected_draft_tokens: 0,
            prompt_tokens_per_second: 0.0,
            decode_tokens_per_second: 0.0,
            peak_memory_bytes: None,
        }
    }
}

/// A sampled token and its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The text since the previous piece. It is empty while a character is incomplete, while the text may be the start of
    /// a stop string, and always without a tokenizer.
    pub text: String,
    /// The token.
    pub token: u32,
    /// The natural logarithm of the token's probability in the model, before penalties, bias, mask, temperature and
    /// filters.
    pub log_probability: f32,
    /// The most probable tokens at this position, in the requested number, with log-probabilities as above. They are sorted by
    /// descending probability, then by id.
    pub top_log_probabilities: Vec<Choice>,
    /// The end of the generation, in the last piece only.
    pub finish: Option<Finish>,
}

/// A finished generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text of all pieces.
    pub text: String,
    /// The sampled tokens, including the one that ended the text.
    pub tokens: Vec<u32>,
    /// The log-probability of each token, as in [`Piece`].
    pub log_probabilities: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Collects the pieces of a generation.
#[derive(Debug, Default)]
pub(super) struct Collected {
    text: String,
    tokens: Vec<u32>,
    log_probabilities: Vec<f32>,
}

impl Collected {
    pub(super) fn push(&mut self, piece: &Piece) {
        self.text.push_str(&piece.text);
        self.tokens.push(piece.token);
        self.log_probabilities.push(piece.log_probability);
    }

    pub(super) fn finish(self, finish: Finish) -> Generation {
        let Self { text, tokens, log_probabilities } = self;
        Generation { text, tokens, log_probabilities, finish }
    }
}
