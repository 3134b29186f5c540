//! Rows of token ids, and the options by which rows of a file become samples.

use std::path::PathBuf;
use std::sync::Arc;

/// The file and line of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: Arc<PathBuf>,
    /// The line, counted from 1.
    pub line: usize,
}

/// One row of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token whether its prediction is trained; the entry of the first token has no effect.
    pub trained: Vec<bool>,
    /// The file and line it was read from, if any.
    pub source: Option<Source>,
}

impl Sample {
    /// The number of tokens whose prediction is trained.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }
}

/// Which assistant turns of a conversation are trained where its messages do not say so by `train`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TrainedTurns {
    /// Every one.
    #[default]
    All,
    /// The last one.
    Last,
}

/// How rows become samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetOptions {
    /// Most tokens of a row.
    pub max_tokens: Option<usize>,
    /// Whether a row that is too long is cut at its end instead of being refused.
    pub truncate: bool,
    /// The assistant turns that are trained.
    pub trained_turns: TrainedTurns,
    /// Whether only answers are trained; else every token is.
    pub mask_prompt: bool,
    /// The number of tokens that the model has embeddings for; a row with a token id at or above it cannot be used.
    pub vocab_size: Option<usize>,
}

impl Default for DatasetOptions {
    fn default() -> Self {
        Self {
            max_tokens: None,
            truncate: false,
            trained_turns: TrainedTurns::All,
            mask_prompt: true,
            vocab_size: None,
        }
    }
}
