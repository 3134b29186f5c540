//! Loads the data of a run according to its settings.

use super::TrainSettings;
use crate::error::UserError;
use anyhow::Result;
use metal_candle::data::{DatasetOptions, Datasets, SplitOptions, Tokenizer, TrainedTurns};
use std::path::PathBuf;

impl TrainSettings {
    /// The file or folder of the data.
    pub(crate) fn data_path(&self) -> Result<PathBuf> {
        match &self.data {
            Some(path) => Ok(path.clone()),
            None if self.is_nano() => crate::nano::data(),
            None => Err(UserError::new("`--data` is missing")
                .with_hint(
                    "--data accepts a JSONL file or a folder with train.jsonl; `metal-candle train --help` has examples",
                )
                .into()),
        }
    }

    /// Reads the rows of all splits. The settings must be complete.
    pub(crate) fn datasets(&self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Datasets> {
        let options = DatasetOptions {
            max_tokens: self.max_tokens_per_sample,
            truncate: self.truncate == Some(true),
            trained_turns: match self.train_last_turn_only {
                Some(true) => TrainedTurns::Last,
                _ => TrainedTurns::All,
            },
            mask_prompt: self.mask_prompt != Some(false),
            vocab_size: Some(vocab_size),
        };
        let split = SplitOptions { valid_fraction: self.valid_fraction.unwrap_or(0.0), seed: self.seed.unwrap_or(0) };
        Ok(Datasets::load(&self.data_path()?, tokenizer, &options, &split)?)
    }
}
