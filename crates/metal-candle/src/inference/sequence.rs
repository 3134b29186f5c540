//! One sequence of a scheduler: its tokens, sampler and stop conditions.

use super::drafter::{Draft, Drafter};
use super::generation::{Finish, FinishReason, Piece};
use super::mask::{AllowedTokens, TokenMask};
use super::request::{AdapterId, Request, SequenceId, sample_seed};
use super::sampler::{Choice, Sampler};
use super::slots::{Prefix, Sharing};
use super::stop::StopMatcher;
use crate::data::{StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::models::{Decoded, DecodingRow, Model};
use std::time::Instant;

/// Maximum number of tokens after the prompt in the first allocation of the cache.
const MAX_FIRST_CAPACITY: usize = 256;

/// A prompt and the tokens that continue it.
#[derive(Debug)]
pub(super) struct Sequence {
    id: SequenceId,
    /// The prompt and the tokens after it.
    ids: Vec<u32>,
    prompt_tokens: usize,
    /// The number of first tokens whose keys and values are in the cache.
    num_cached: usize,
    reused_tokens: usize,
    generated_tokens: usize,
    slot: usize,
    adapter: Option<AdapterId>,
    sharing: Option<Sharing>,
    mask: Option<Box<dyn TokenMask>>,
    num_top: usize,
    drafter: Option<Drafter>,
    /// Drafts of the tokens after `ids`.
    draft: Vec<u32>,
    /// The number of tokens requested from the draft model.
    num_to_draft: usize,
    sampler: Sampler,
    decoder: Option<StreamDecoder>,
    stop: StopMatcher,
    end_ids: Vec<u32>,
    min_tokens: usize,
    max_tokens: usize,
    /// Maximum number of tokens in the prompt and the generated text.
    max_len: usize,
    /// The step in which it was last computed or started.
    last_step: u64,
    started: Instant,
    first_token: Option<Instant>,
    state: State,
    is_paused: bool,
    /// The other samples of its prompt, until the prompt has been computed.
    samples: Vec<Sequence>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Finished,
    Failed,
}

impl Sequence {
    /// Creates the sequences of a request: the first contains the others. The id of sample `i` is `first_id + i`.
    ///
    /// # Errors
    /// The prompt is empty or does not fit the model, a setting is out of its range, or stop strings need a tokenizer.
    pub(super) fn new(request: Request, first_id: u64, model: &Model, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        check(&request, model, tokenizer)?;
        let mut first = Self::sample(&request, 0, first_id, model, tokenizer)?;
        for index in 1..request.num_samples {
            let mut sample = Self::sample(&request, index, first_id, model, tokenizer)?;
            sample.mask = request.mask.as_ref().map(|mask| mask.fork());
            first.samples.push(sample);
        }
        first.mask = request.mask;
        Ok(first)
    }

    fn sample(
        request: &Request,
        index: usize,
        first_id: u64,
        model: &Model,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        let (ids, config) = (request.prompt.clone(), &request.config);
        let mut sampling = config.sampling.clone();
        sampling.seed = sampling.seed.map(|seed| sample_seed(seed, index));
        let mut sampler = Sampler::new(sampling)?;
        sampler.observe(&ids);
        let mut end_ids = config.stop_ids.clone();
        if !config.ignore_eos {
            end_ids.extend(&model.config().eos_token_ids);
        }
        Ok(Self {
            id: SequenceId(first_id + index as u64),
            prompt_tokens: ids.len(),
            ids,
            num_cached: 0,
            reused_tokens: 0,
            generated_tokens: 0,
            slot: 0,
            adapter: request.adapter,
            sharing: request.prefix_key.map(|key| Sharing { key, adapter: request.adapter }),
            mask: None,
            num_top: request.num_top_log_probabilities,
            drafter: Drafter::new(request.speculation, &request.prediction),
            draft: Vec::new(),
            num_to_draft: 0,
            sampler,
            decoder: tokenizer.map(|tokenizer| tokenizer.stream_decoder(config.skip_special_tokens)),
            stop: StopMatcher::new(config.stop_strings.clone()),
            end_ids,
            min_tokens: config.min_tokens,
            max_tokens: config.max_tokens,
            max_len: model.config().max_sequence_length(),
            last_step: 0,
            started: Instant::now(),
            first_token: None,
            state: State::Open,
            is_paused: false,
            samples: Vec::new(),
        })
    }

    pub(super) fn id(&self) -> SequenceId {
        self.id
    }

    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    pub(super) fn adapter(&self) -> Option<AdapterId> {
        self.adapter
    }

    /// Identifies the sequences that it shares prefixes with.
    pub(super) fn sharing(&self) -> Option<Sharing> {
        self.sharing
    }

    pub(super) fn last_step(&self) -> u64 {
        self.last_step
    }

    pub(super) fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// The prompt and the tokens after it.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The number of tokens that are not in the cache yet.
    pub(super) fn num_waiting(&self) -> usize {
        self.ids.len() - self.num_cached
    }

    /// Drafts the next tokens if the sequence is decoding. `len_limit` is the maximum length of the text including drafts.
    pub(super) fn propose(&mut self, len_limit: Option<usize>) {
        self.clear_draft();
        let is_decoding = self.num_waiting() == 1 && self.samples.is_empty() && !self.is_paused;
        let Some(drafter) = self.drafter.as_mut().filter(|_| is_decoding) else { return };
        // one more token is sampled after the drafts
        let left = (self.max_tokens - self.generated_tokens).min(self.max_len - self.ids.len()).saturating_sub(1);
        let left = len_limit.map_or(left, |limit| left.min(limit.saturating_sub(self.ids.len())));
        match drafter.draft(&self.ids, self.generated_tokens, left) {
            Draft::Tokens(tokens) => self.draft = tokens,
            Draft::ByModel(count) => self.num_to_draft = count,
        }
    }

    /// Removes the drafts for the next step.
    pub(super) fn clear_draft(&mut self) {
        (self.draft, self.num_to_draft) = (Vec::new(), 0);
    }

    /// The number of tokens requested from the draft model.
    pub(super) fn num_to_draft(&self) -> usize {
        self.num_to_draft
    }

    /// Sets the drafts of the draft model.
    pub(super) fn set_draft(&mut self, tokens: Vec<u32>) {
        self.draft = tokens;
    }

    /// The drafts after the last token.
    pub(super) fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// Removes and returns the first drafts, which a pass has computed.
    pub(super) fn take_draft(&mut self, count: usize) -> Vec<u32> {
        let mut draft = std::mem::take(&mut self.draft);
        draft.truncate(count);
        if let Some(drafter) = &mut self.drafter {
            drafter.count_drafted(draft.len());
        }
        draft
    }

    /// Records the number of accepted drafts of a pass.
    pub(super) fn finish_pass(&mut self, drafted: usize, accepted: usize) {
        if let Some(drafter) = &mut self.drafter {
            drafter.finish_pass(drafted, accepted, self.generated_tokens);
        }
    }

    /// The number of tokens in the first allocation of the cache: a sequence may end long before its limit.
    pub(super) fn first_capacity(&self) -> usize {
        self.prompt_tokens.saturating_add(self.max_tokens.min(MAX_FIRST_CAPACITY)).min(self.max_len)
    }

    /// The number of sequences: itself and the samples that wait for its prompt.
    pub(super) fn num_sequences(&self) -> usize {
        1 + self.samples.len()
    }

    /// Whether the last piece has been returned.
    pub(super) fn is_finished(&self) -> bool {
        self.state != State::Open
    }

    /// Whether it is paused. A sequence whose samples wait for its prompt is not paused until the prompt has been computed.
    pub(super) fn is_paused(&self) -> bool {
        self.is_paused && self.samples.is_empty()
    }

    pub(super) fn set_paused(&mut self, is_paused: bool) {
        self.is_paused = is_paused;
    }

    /// The sequence `id`: this one or one of its samples.
    pub(super) fn find_mut(&mut self, id: SequenceId) -> Option<&mut Self> {
        if self.id == id { Some(self) } else { self.samples.iter_mut().find(|sample| sample.id == id) }
    }

    /// The samples that wait for the prompt.
    pub(super) fn samples_mut(&mut self) -> &mut Vec<Self> {
        &mut self.samples
    }

    /// Starts in a slot of the cache that contains the first `reused` tokens.
    pub(super) fn start(&mut self, slot: usize, reused: usize, step: u64) {
        self.slot = slot;
        self.num_cached = reused;
        self.last_step = step;
        // a preempted sequence starts again
        if self.first_token.is_none() {
            self.reused_tokens = reused.min(self.prompt_tokens);
            self.started = Instant::now();
        }
    }

    /// Whether it can take a free slot.
    pub(super) fn may_start(&self) -> bool {
        !self.is_paused
    }

    /// Records that the cache contains the first `len` tokens.
    pub(super) fn set_cached(&mut self, len: usize, step: u64) {
        self.num_cached = len;
        self.last_step = step;
    }

    /// Records that its slot has a copy of the cache of the whole prompt.
    pub(super) fn set_prompt_copied(&mut self, step: u64) {
        self.set_cached(self.prompt_tokens, step);
        self.reused_tokens = self.prompt_tokens;
    }

    /// Removes sequence `id` from this one and its samples. If it is this one, the first sample replaces it, with its cache of
    /// the prompt.
    pub(super) fn take_sample(&mut self, id: SequenceId) -> Option<Self> {
        if self.id != id {
            let index = self.samples.iter().position(|sample| sample.id == id)?;
            return Some(self.samples.remove(index));
        }
        if self.samples.is_empty() {
            return None;
        }
        let mut next = self.samples.remove(0);
        std::mem::swap(&mut next.slot, &mut self.slot);
        std::mem::swap(&mut next.num_cached, &mut self.num_cached);
        std::mem::swap(&mut next.samples, &mut self.samples);
        (next.reused_tokens, next.last_step) = (self.reused_tokens, self.last_step);
        (next.started, self.reused_tokens) = (self.started, 0);
        Some(std::mem::replace(self, next))
    }

    /// The tokens in its slot when it is released, if later sequences may reuse them.
    pub(super) fn prefix(&self) -> Option<Prefix> {
        let sharing = self.sharing.filter(|_| self.state != State::Failed)?;
        Some(Prefix { ids: self.ids[..self.num_cached].to_vec(), sharing })
    }

    /// Ends it after an error.
    pub(super) fn fail(&mut self) {
        self.state = State::Failed;
    }

    /// Ends it for this reason.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Finish {
        self.state = State::Finished;
        let first_token = self.first_token.unwrap_or_else(Instant::now);
        let per_second = |count: usize, seconds: f64| {
            if count > 0 && seconds > 0.0 { count as f64 / seconds } else { 0.0 }
        };
        let computed = self.prompt_tokens - self.reused_tokens;
        let (accepted, rejected) = self.drafter.as_ref().map_or((0, 0), Drafter::counts);
        Finish {
            reason,
            stop_string: self.stop.found().map(ToOwned::to_owned),
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused_tokens,
            generated_tokens: self.generated_tokens,
            accepted_draft_tokens: accepted,
            rejected_draft_tokens: rejected,
            prompt_tokens_per_second: per_second(computed, (first_token - self.started).as_secs_f64()),
            decode_tokens_per_second: per_second(
                self.generated_tokens.saturating_sub(1),
                first_token.elapsed().as_secs_f64(),
            ),
            peak_memory_bytes: crate::Device::process_peak_memory(),
        }
    }

    /// Samples a token from this row of logits and adds it. `allowed` is a buffer for the mask; `draft` is the draft of the
    /// token.
    pub(super) fn advance(
        &mut self,
        logits: &[f32],
        allowed: &mut Option<AllowedTokens>,
        draft: Option<u32>,
    ) -> Result<Piece> {
        let is_early = self.is_early();
        let mut found = None;
        if self.mask.is_some() || is_early {
            let allowed = allowed.get_or_insert_with(|| AllowedTokens::new(logits.len()));
            allowed.clear();
            match &mut self.mask {
                Some(mask) => mask.allow(&self.ids[self.prompt_tokens..], allowed)?,
                None => allowed.insert_all(),
            }
            if allowed.is_empty() {
                let count = self.ids.len() - self.prompt_tokens;
                let message = format!("expected at least one allowed token, found none; generated so far: {count}");
                return Err(Error::argument("mask", message));
            }
            if is_early {
                allowed.remove_unless_all(&self.end_ids);
            }
            found = Some(&*allowed);
        }
        let allowed = found;
        let (choice, top) = self.sampler.sample_allowed(logits, allowed, self.num_top)?;
        if let Some(drafter) = self.drafter.as_mut().filter(|_| draft == Some(choice.token)) {
            drafter.count_accepted();
        }
        self.add(choice, top)
    }

    /// Whether it has fewer than `min_tokens` tokens.
    fn is_early(&self) -> bool {
        self.generated_tokens < self.min_tokens && !self.end_ids.is_empty()
    }

    /// Adds a token that the device sampled.
    pub(super) fn accept(&mut self, decoded: Decoded) -> Result<Piece> {
        let choice = self.sampler.accept(decoded);
        self.add(choice, Vec::new())
    }

    /// The row of its next step, if it is decoding and the device can sample its next token.
    pub(super) fn decoding_row(&self) -> Option<DecodingRow> {
        if self.num_waiting() != 1 || self.mask.is_some() || self.num_top > 0 || !self.samples.is_empty() {
            return None;
        }
        if !self.draft.is_empty() || self.is_early() {
            return None;
        }
        let choice = self.sampler.choice_on_device()?;
        let position = self.num_cached;
        Some(DecodingRow { id: self.ids[position], position, slot: self.slot, sampling: choice })
    }

    fn add(&mut self, Choice { token, log_probability }: Choice, top: Vec<Choice>) -> Result<Piece> {
        self.generated_tokens += 1;
        if let Some(drafter) = &mut self.drafter {
            drafter.observe(token);
        }
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
        Ok(Piece { text, token, log_probability, top_log_probabilities: top, finish })
    }
}

/// Checks a request against the model.
fn check(request: &Request, model: &Model, tokenizer: Option<&Tokenizer>) -> Result<()> {
    let Request { prompt, config, .. } = request;
    config.validate()?;
    request.speculation.validate()?;
    let max_len = model.config().max_sequence_length();
    let vocab = model.config().vocab_size;
    if prompt.is_empty() {
        return Err(Error::argument("prompt", "expected at least one token, found none"));
    }
    if prompt.len() >= max_len {
        let message = format!(
            "expected at most {} tokens, one less than the model's context of {max_len}, found {}",
            max_len.saturating_sub(1),
            prompt.len()
        );
        return Err(Error::argument("prompt", message));
    }
    let outside = |id: u32| format!("token `{id}` is outside the vocabulary of {vocab} tokens");
    if let Some(&id) = prompt.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("prompt", outside(id)));
    }
    if let Some(&id) = request.prediction.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("prediction", outside(id)));
    }
    if let Some(&id) = config.sampling.logit_bias.keys().find(|&&id| id as usize >= vocab) {
        return Err(Error::argument("logit_bias", outside(id)));
    }
    if tokenizer.is_none() && !config.stop_strings.is_empty() {
        return Err(Error::argument("stop_strings", "stop strings need a tokenizer"));
    }
    if request.num_top_log_probabilities > vocab {
        let message = format!("expected at most {vocab}, the size of the vocabulary");
        let message = format!("{message}, found {}", request.num_top_log_probabilities);
        return Err(Error::argument("num_top_log_probabilities", message));
    }
    if request.num_samples == 0 {
        return Err(Error::argument("num_samples", "expected at least 1, found 0"));
    }
    Ok(())
}
