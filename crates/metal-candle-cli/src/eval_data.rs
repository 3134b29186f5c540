//! Reads evaluation text: rows of a dataset, or windows of a text file.

use anyhow::Result;
use metal_candle::Error;
use metal_candle::data::{Dataset, DatasetOptions, Encoding, Sample, Tokenizer};
use serde_json::Value;
use std::path::Path;

/// Maximum size of a text file in bytes; it is tokenized as a whole.
const MAX_TEXT_BYTES: u64 = 1024 << 20;

/// Rows to evaluate on.
pub(crate) struct EvalData {
    /// The rows.
    pub(crate) dataset: Dataset,
    /// The number of bytes of text of the trained tokens.
    pub(crate) num_bytes: usize,
}

impl EvalData {
    /// Reads a JSONL file, or a text file in windows of `max_tokens`.
    pub(crate) fn read(file: &Path, tokenizer: &Tokenizer, max_tokens: usize, vocab_size: usize) -> Result<Self> {
        let (dataset, num_bytes) = if is_rows(file) {
            let vocab_size = Some(vocab_size);
            let options = DatasetOptions { max_tokens: Some(max_tokens), vocab_size, ..DatasetOptions::default() };
            let dataset = Dataset::from_file(file, tokenizer, &options)?;
            let num_bytes = trained_bytes(&dataset, tokenizer)?;
            (dataset, num_bytes)
        } else {
            let text = metal_candle::files::read_text(file, MAX_TEXT_BYTES)?;
            let (samples, num_bytes) = windows(&text, tokenizer, max_tokens)?;
            (Dataset::from_samples(samples), num_bytes)
        };
        if dataset.is_empty() {
            return Err(Error::Format { path: file.into(), message: "expected text or rows, found none".into() }.into());
        }
        Ok(Self { dataset, num_bytes })
    }
}

fn is_rows(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["jsonl", "json"].iter().any(|name| extension.eq_ignore_ascii_case(name)))
}

/// The concatenated strings of the rows of a JSONL file.
pub(crate) fn texts(file: &Path) -> Result<String> {
    fn add(value: &Value, text: &mut String) {
        match value {
            Value::String(string) => {
                text.push_str(string);
                text.push('\n');
            }
            Value::Array(values) => values.iter().for_each(|value| add(value, text)),
            Value::Object(map) => map.iter().filter(|(key, _)| *key != "role").for_each(|(_, value)| add(value, text)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    let mut text = String::new();
    for line in metal_candle::files::read_text(file, MAX_TEXT_BYTES)?.lines() {
        add(&serde_json::from_str(line)?, &mut text);
    }
    Ok(text)
}

/// Splits a text into overlapping windows, and returns them with the number of measured bytes. Each token except the first is
/// measured once, with at least half a window of context except in the first window. Windows start with a BOS token only if
/// the tokenizer adds one.
pub(crate) fn windows(
    text: &str,
    tokenizer: &Tokenizer,
    max_tokens: usize,
) -> metal_candle::Result<(Vec<Sample>, usize)> {
    let Encoding { ids, offsets } = tokenizer.encode_with_offsets(text, true)?;
    let num_bytes = text.len() - offsets.first().map_or(0, |&(_, end)| end);
    let mut samples = Vec::new();
    let mut measured = 1;
    while measured < ids.len() {
        let start = if measured == 1 { 0 } else { measured - max_tokens / 2 };
        let end = (start + max_tokens).min(ids.len());
        let trained = (start..end).map(|index| index >= measured).collect();
        samples.push(Sample { ids: ids[start..end].to_vec(), trained, source: None });
        measured = end;
    }
    Ok((samples, num_bytes))
}

/// The number of bytes of text of the trained tokens.
fn trained_bytes(dataset: &Dataset, tokenizer: &Tokenizer) -> metal_candle::Result<usize> {
    let mut num_bytes = 0;
    for sample in &dataset.samples {
        let trained = |index: usize| index > 0 && sample.trained[index];
        let mut start = 0;
        while let Some(begin) = (start..sample.ids.len()).find(|&index| trained(index)) {
            let end = (begin..sample.ids.len()).find(|&index| !trained(index)).unwrap_or(sample.ids.len());
            num_bytes += tokenizer.decode(&sample.ids[begin..end], true)?.len();
            start = end;
        }
    }
    Ok(num_bytes)
}
