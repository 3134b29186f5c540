//! Computes the log-probabilities of the tokens of a text, and the mean of its hidden states.

use super::sample_token::with_logits;
use super::sampler::{Choice, Sampler};
use super::sampling::SamplingConfig;
use super::slots::new_cache;
use crate::error::{Error, Result};
use crate::models::{Batch, KVCacheType, Model, Rows};
use crate::ops::LowRankUpdates;
use candle_core::Tensor;

/// Maximum number of tokens in a pass.
const CHUNK: usize = 512;
/// Maximum number of rows of logits in memory.
const MAX_ROWS: usize = 256;

/// Computes the log-probability of each token of a text after the first, given the previous tokens, and the `num_top` most
/// probable tokens at its position, sorted by descending probability, then by id.
///
/// `kv_cache` is the type of the KV cache, as in [`SchedulerConfig::kv_cache`](super::SchedulerConfig::kv_cache). On the CPU
/// the results are identical to those in [`Piece`](super::Piece) for tokens generated with the same type. At most 256 rows
/// of logits are in memory at a time.
///
/// # Errors
/// The text does not fit in the model's context, an id is outside the vocabulary, `num_top` exceeds the vocabulary, the
/// adapter does not fit the model, the cache does not support the type, or logits are not finite.
pub fn prompt_log_probabilities(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    ids: &[u32],
    num_top: usize,
    kv_cache: Option<KVCacheType>,
) -> Result<Vec<(f32, Vec<Choice>)>> {
    let vocab = model.config().vocab_size;
    if num_top > vocab {
        let message = format!("expected at most {vocab}, the size of the vocabulary, found {num_top}");
        return Err(Error::argument("num_top_log_probabilities", message));
    }
    if ids.len() < 2 {
        return Ok(Vec::new());
    }
    let terms = terms.map(|terms| model.with_cached_factors(terms)).transpose()?;
    let terms = terms.as_ref();
    let mut sampler = Sampler::new(SamplingConfig::greedy())?;
    let mut scores = Vec::with_capacity(ids.len() - 1);
    for_each_pass(model, terms, ids, kv_cache, |first, hidden| {
        let num_rows = hidden.dim(0)?;
        for start in (0..num_rows).step_by(MAX_ROWS) {
            let count = MAX_ROWS.min(num_rows - start);
            let logits = model.logits_of(&hidden.narrow(0, start, count)?, terms)?;
            // the last token has no target
            let targets = ids.iter().skip(first + start + 1).take(count);
            for (row, &token) in targets.enumerate() {
                let (choice, top) = with_logits(&logits.get(row)?, |logits| sampler.score(logits, token, num_top))?;
                scores.push((choice.log_probability, top));
            }
        }
        Ok(())
    })?;
    Ok(scores)
}

/// Computes the mean of the final hidden states of a text, after the last norm: `hidden_size` values.
///
/// # Errors
/// The text is empty or does not fit in the model's context, an id is outside the vocabulary, the adapter does not fit the
/// model, or the cache does not support the type.
pub fn mean_hidden_state(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    ids: &[u32],
    kv_cache: Option<KVCacheType>,
) -> Result<Vec<f32>> {
    if ids.is_empty() {
        return Err(Error::argument("prompt", "expected at least one token, found none"));
    }
    let terms = terms.map(|terms| model.with_cached_factors(terms)).transpose()?;
    let mut mean = vec![0.0; model.config().hidden_size];
    for_each_pass(model, terms.as_ref(), ids, kv_cache, |_, hidden| {
        let sums: Vec<f32> = hidden.sum(0)?.to_vec1()?;
        mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean += sum / ids.len() as f32);
        Ok(())
    })?;
    Ok(mean)
}

/// Computes a text in passes, and calls `read` with the index of the first token and the hidden states of each pass.
fn for_each_pass(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    ids: &[u32],
    kv_cache: Option<KVCacheType>,
    mut read: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let (vocab, max_len) = (model.config().vocab_size, model.config().max_sequence_length());
    if ids.len() > max_len {
        let message = format!("expected at most {max_len} tokens, the model's context, found {}", ids.len());
        return Err(Error::argument("prompt", message));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("token `{id}` is outside the vocabulary of {vocab} tokens");
        return Err(Error::argument("prompt", message));
    }
    // if the rotation depends on the length of the text, it must be computed in one pass
    let is_whole = model.rotary_limit().is_some_and(|limit| ids.len() > limit);
    let chunk_len = if is_whole { ids.len() } else { CHUNK };
    let mut cache = new_cache(model, kv_cache, 1, ids.len())?;
    for (number, chunk) in ids.chunks(chunk_len).enumerate() {
        let mut batch = Batch::new();
        batch.push(chunk, number * chunk_len, 0);
        read(number * chunk_len, &model.hidden_states(&batch, terms, Some(&mut cache), Rows::All)?)?;
    }
    Ok(())
}
