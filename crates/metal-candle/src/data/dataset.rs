//! Datasets: rows of token ids with the tokens that are trained.

use std::path::PathBuf;
use std::sync::Arc;

/// Where a sample comes from.
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
    /// For each token whether predicting it is trained; the first one's entry has no effect.
    pub trained: Vec<bool>,
    /// Where it comes from, if from a file.
    pub source: Option<Source>,
}

/// Tokenized samples.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The samples in the order of the file.
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// A dataset of these samples.
    pub fn from_samples(samples: Vec<Sample>) -> Self {
        Self { samples }
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}
