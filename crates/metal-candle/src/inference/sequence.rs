//! Sequences that are generated, alone or side by side in one ragged batch.

use super::generation::{Finish, FinishReason, GenerationConfig, Piece};
use super::sampler::{Choice, Sampler};
use super::sampling::with_logits;
use super::stop::StopMatcher;
use crate::data::{StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::models::{Batch, Decoding, DecodingRow, KVCache, Model, Rows};
use crate::ops::LowRankTerms;
use std::time::Instant;

/// Most tokens after the prompt that the cache has room for at the start.
const MAX_FIRST_ROOM: usize = 256;

/// A prompt that is being continued.
#[derive(Debug)]
pub(super) struct Sequence {
    /// The prompt and the tokens after it.
    ids: Vec<u32>,
    prompt_tokens: usize,
    /// Number of first tokens whose keys and values are in the cache.
    num_cached: usize,
    reused_tokens: usize,
    generated_tokens: usize,
    slot: usize,
    sampler: Sampler,
    decoder: Option<StreamDecoder>,
    stop: StopMatcher,
    end_ids: Vec<u32>,
    max_tokens: usize,
    /// Most tokens of prompt and text together.
    max_len: usize,
    started: Instant,
    first_token: Option<Instant>,
    is_finished: bool,
}

impl Sequence {
    /// A prompt in `slot` of the cache, nothing of which is computed.
    ///
    /// # Errors
    /// The prompt is empty or does not fit the model, a setting is out of its range, or stop strings lack a tokenizer.
    pub(super) fn new(
        ids: Vec<u32>,
        slot: usize,
        config: &GenerationConfig,
        model: &Model,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        config.validate()?;
        let max_len = model.config().max_position_embeddings;
        let vocab = model.config().vocab_size;
        if ids.is_empty() {
            return Err(Error::argument("prompt", "expected at least one token, found none"));
        }
        if ids.len() >= max_len {
            let message = format!(
                "expected at most {} tokens, for the model's context of {max_len} to hold one more, found {}",
                max_len.saturating_sub(1),
                ids.len()
            );
            return Err(Error::argument("prompt", message));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            let message = format!("token `{id}` is outside the vocabulary of {vocab} tokens");
            return Err(Error::argument("prompt", message));
        }
        if tokenizer.is_none() && !config.stop_strings.is_empty() {
            return Err(Error::argument("stop_strings", "the generator has no tokenizer to find them with"));
        }
        let mut sampler = Sampler::new(config.sampling.clone())?;
        sampler.observe(&ids);
        let mut end_ids = config.stop_ids.clone();
        if !config.ignore_eos {
            end_ids.extend(&model.config().eos_token_ids);
        }
        Ok(Self {
            prompt_tokens: ids.len(),
            ids,
            num_cached: 0,
            reused_tokens: 0,
            generated_tokens: 0,
            slot,
            sampler,
            decoder: tokenizer.map(|tokenizer| tokenizer.stream_decoder(config.skip_special_tokens)),
            stop: StopMatcher::new(config.stop_strings.clone()),
            end_ids,
            max_tokens: config.max_tokens,
            max_len,
            started: Instant::now(),
            first_token: None,
            is_finished: false,
        })
    }

    /// The prompt and the tokens after it.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The tokens whose keys and values are in the cache.
    pub(super) fn cached_ids(&self) -> &[u32] {
        &self.ids[..self.num_cached]
    }

    /// The slot of the cache it is in.
    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    /// Number of tokens that the cache should have room for at the start: more may never come.
    pub(super) fn first_room(&self) -> usize {
        self.prompt_tokens.saturating_add(self.max_tokens.min(MAX_FIRST_ROOM)).min(self.max_len)
    }

    /// Whether there will be no more piece.
    pub(super) fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// Begins with the first `reused` tokens of the prompt in the cache, from now on the clock.
    pub(super) fn start(&mut self, slot: usize, reused: usize) {
        self.slot = slot;
        self.num_cached = reused;
        self.reused_tokens = reused;
        self.started = Instant::now();
    }

    /// The end, for this reason.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Finish {
        self.is_finished = true;
        let first_token = self.first_token.unwrap_or_else(Instant::now);
        let per_second = |count: usize, seconds: f64| {
            if count > 0 && seconds > 0.0 { count as f64 / seconds } else { 0.0 }
        };
        let computed = self.prompt_tokens - self.reused_tokens;
        Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused_tokens,
            generated_tokens: self.generated_tokens,
            prompt_tokens_per_second: per_second(computed, (first_token - self.started).as_secs_f64()),
            decode_tokens_per_second: per_second(
                self.generated_tokens.saturating_sub(1),
                first_token.elapsed().as_secs_f64(),
            ),
            peak_memory_bytes: crate::Device::process_peak_memory(),
        }
    }

    /// Adds the token chosen from this row of logits.
    fn advance(&mut self, logits: &[f32]) -> Result<Piece> {
        let choice = self.sampler.sample(logits)?;
        self.add(choice)
    }

    /// Its next step, if that is the step after its last token and the device can choose.
    fn decoding_row(&self) -> Option<DecodingRow> {
        let choice = self.sampler.choice_on_device()?;
        let position = self.num_cached;
        (position + 1 == self.ids.len()).then(|| DecodingRow {
            id: self.ids[position],
            position,
            slot: self.slot,
            choice,
        })
    }

    fn add(&mut self, Choice { token, log_probability }: Choice) -> Result<Piece> {
        self.generated_tokens += 1;
        self.first_token.get_or_insert_with(Instant::now);
        let mut reason = None;
        let mut text = String::new();
        if self.end_ids.contains(&token) {
            reason = Some(FinishReason::EndOfText);
        } else {
            self.ids.push(token);
            if let Some(decoded) = self.decoder.as_mut().map(|decoder| decoder.push(token)).transpose()?.flatten() {
                let matched = self.stop.push(&decoded);
                text = matched.text;
                reason = matched.stopped.then_some(FinishReason::StopString);
            }
            if reason.is_none() && self.generated_tokens == self.max_tokens {
                reason = Some(FinishReason::MaxTokens);
            } else if reason.is_none() && self.ids.len() >= self.max_len {
                reason = Some(FinishReason::Length);
            }
        }
        if let Some(other) = reason.filter(|&reason| reason != FinishReason::StopString) {
            let held = self.decoder.as_mut().map(StreamDecoder::flush).transpose()?.flatten();
            let matched = self.stop.finish(&held.unwrap_or_default());
            text.push_str(&matched.text);
            reason = Some(if matched.stopped { FinishReason::StopString } else { other });
        }
        let finish = reason.map(|reason| self.finish(reason));
        Ok(Piece { text, token, log_probability, finish })
    }
}

/// Makes a step of all unfinished sequences on the device, if each of them is at its last token.
fn decode(
    model: &Model,
    terms: Option<&LowRankTerms>,
    cache: &mut KVCache,
    sequences: &mut [Sequence],
    decoding: &mut Option<Decoding>,
) -> Result<Option<Vec<(usize, Piece)>>> {
    let open = || (0..sequences.len()).filter(|&index| !sequences[index].is_finished);
    if !model.can_decode(open().count(), terms, cache) {
        return Ok(None);
    }
    let Some(rows) = open().map(|index| sequences[index].decoding_row()).collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    let longest = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
    if rows.is_empty() || longest > cache.config().max_seq_len {
        return Ok(None);
    }
    let indices: Vec<usize> = open().collect();
    let decoded = model.decode(decoding, &rows, terms, cache)?;
    let mut pieces = Vec::with_capacity(rows.len());
    for (row, (&index, decoded)) in indices.iter().zip(decoded).enumerate() {
        let sequence = &mut sequences[index];
        sequence.num_cached += 1;
        cache.set_len(sequence.slot, sequence.num_cached);
        let piece = if decoded.log_probability.is_finite() {
            let choice = sequence.sampler.accept(decoded);
            sequence.add(choice)?
        } else {
            // the sampler says what is wrong with them
            let logits = decoding.as_ref().map(|decoding| decoding.logits().get(row)).transpose()?;
            let logits = logits.ok_or(Error::Stopped)?;
            with_logits(&logits, |logits| sequence.advance(logits))?
        };
        pieces.push((index, piece));
    }
    Ok(Some(pieces))
}

/// Feeds up to `max_batch_tokens` tokens of the unfinished sequences (decode steps first, at least one token) to the
/// model in one batch; the pieces that come of it, by the index of their sequence.
///
/// The cache grows as it must.
///
/// # Errors
/// The model or the choice of a token fails; the cache is then of no use any more.
pub(super) fn step(
    model: &Model,
    terms: Option<&LowRankTerms>,
    cache: &mut KVCache,
    sequences: &mut [Sequence],
    max_batch_tokens: usize,
    decoding: &mut Option<Decoding>,
) -> Result<Vec<(usize, Piece)>> {
    if let Some(pieces) = decode(model, terms, cache, sequences, decoding)? {
        return Ok(pieces);
    }
    let waiting = |sequence: &Sequence| sequence.ids.len() - sequence.num_cached;
    let (decoding, prompts): (Vec<usize>, Vec<usize>) = (0..sequences.len())
        .filter(|&index| !sequences[index].is_finished)
        .partition(|&index| waiting(&sequences[index]) == 1);
    let mut batch = Batch::new();
    let mut fed = Vec::new();
    for index in decoding.into_iter().chain(prompts) {
        let sequence = &sequences[index];
        let room = max_batch_tokens.saturating_sub(batch.num_tokens()).max(usize::from(batch.is_empty()));
        let count = waiting(sequence).min(room);
        if count == 0 {
            break;
        }
        let end = sequence.num_cached + count;
        batch.push(&sequence.ids[sequence.num_cached..end], sequence.num_cached, sequence.slot);
        fed.push((index, end));
    }
    if batch.is_empty() {
        return Ok(Vec::new());
    }
    let complete: Vec<bool> = fed.iter().map(|&(index, end)| end == sequences[index].ids.len()).collect();
    let last_rows = batch.last_rows();
    let rows: Vec<usize> =
        last_rows.into_iter().zip(&complete).filter_map(|(row, &wanted)| wanted.then_some(row)).collect();
    let longest = fed.iter().map(|&(_, end)| end).max().unwrap_or(0);
    let room = cache.config().max_seq_len;
    if longest > room {
        // doubling keeps the copies of a growing cache few
        cache.reserve(longest.max(2 * room).min(model.config().max_position_embeddings))?;
    }
    let logits = model.forward(&batch, terms, Some(cache), Rows::Of(&rows))?;
    let mut pieces = Vec::with_capacity(rows.len());
    for (&(index, end), complete) in fed.iter().zip(complete) {
        let sequence = &mut sequences[index];
        sequence.num_cached = end;
        if complete {
            let row = logits.get(pieces.len())?;
            pieces.push((index, with_logits(&row, |logits| sequence.advance(logits))?));
        }
    }
    Ok(pieces)
}
