//! Checks samples before training and names rows in errors.

use crate::data::Dataset;
use crate::error::{DataProblem, Error, Result};
use std::path::PathBuf;

/// The largest number of rows that an error names.
const MAX_ROWS: usize = 16;

/// The number of tokens of the samples with these indices, and the number of those whose prediction is trained.
pub(super) fn count_tokens<'a>(dataset: &Dataset, indices: impl IntoIterator<Item = &'a usize>) -> (usize, usize) {
    indices.into_iter().fold((0, 0), |(tokens, trained), &index| {
        let sample = &dataset.samples[index];
        (tokens + sample.ids.len(), trained + sample.num_trained())
    })
}

/// The name of a sample: `file:line`, or its position from 1.
pub(super) fn source_of(dataset: &Dataset, index: usize) -> String {
    match dataset.samples.get(index).and_then(|sample| sample.source.as_ref()) {
        Some(source) => format!("{}:{}", source.path.display(), source.line),
        None => format!("sample {}", index + 1),
    }
}

/// Shortens a list of names to the first ones and the number of the others.
pub(super) fn shorten(mut names: Vec<String>) -> Vec<String> {
    let left = names.len().saturating_sub(MAX_ROWS);
    if left > 0 {
        names.truncate(MAX_ROWS);
        names.push(format!("and {left} more"));
    }
    names
}

/// Returns an error if a sample has no trained token or an id outside the vocabulary.
pub(super) fn check_dataset(dataset: &Dataset, vocab_size: usize) -> Result<()> {
    if dataset.is_empty() {
        return Err(Error::argument("dataset", "has no sample"));
    }
    let mut problems = Vec::new();
    for (index, sample) in dataset.samples.iter().enumerate() {
        let message = if sample.trained.len() != sample.ids.len() {
            format!(
                "expected one `trained` flag per token, found {} tokens and {} flags",
                sample.ids.len(),
                sample.trained.len()
            )
        } else if !sample.trained.iter().skip(1).any(|&trained| trained) {
            "no token is trained".to_string()
        } else if let Some(id) = sample.ids.iter().find(|&&id| id as usize >= vocab_size) {
            format!("token id {id} is outside the vocabulary of {vocab_size}")
        } else {
            continue;
        };
        let (path, line) = match &sample.source {
            Some(source) => (source.path.as_ref().clone(), source.line),
            None => (PathBuf::from("sample"), index + 1),
        };
        problems.push(DataProblem { path, line, message });
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Data { problems }) }
}
