//! [`Sample`], a row of token ids, and [`DatasetOptions`], which determine how rows become samples.

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
    /// For each token whether its prediction is trained; the flag of the first token has no effect.
    pub trained: Vec<bool>,
    /// The file and line, if the sample was read from a file.
    pub source: Option<Source>,
}

impl Sample {
    /// The number of tokens whose prediction is trained.
    pub fn num_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }
}

/// Which assistant turns of a conversation are trained if its messages have no `train` key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TrainedTurns {
    /// All turns.
    #[default]
    All,
    /// The last turn.
    Last,
}

/// How rows become samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetOptions {
    /// Maximum number of tokens in a row.
    pub max_tokens: Option<usize>,
    /// Whether rows that are too long are truncated instead of refused.
    pub truncate: bool,
    /// The assistant turns that are trained.
    pub trained_turns: TrainedTurns,
    /// Whether only answers are trained; otherwise every token is.
    pub mask_prompt: bool,
    /// The number of rows of the model's embedding; a data row with a token id at or above it is refused.
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
