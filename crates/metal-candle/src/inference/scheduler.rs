//! Continuous batching: admits prompts at any time and advances all of them by one token or prompt chunk per step.

use super::generation::{Finish, FinishReason, Piece};
use super::mask::AllowedTokens;
use super::request::{AdapterId, Event, Request, SequenceId};
use super::sample_token::with_logits;
use super::scheduler_config::SchedulerConfig;
use super::sequence::Sequence;
use super::slots::{Slots, num_common};
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::models::{Batch, Decoding, Model, Rows};
use crate::ops::{Adapters, LowRankTerms};
use candle_core::Tensor;
use std::collections::VecDeque;

/// Continues many prompts with one model: continuous batching without threads or waiting.
///
/// [`Scheduler::admit`] queues a prompt, [`Scheduler::step`] advances every running sequence, and [`Scheduler::cancel`] ends
/// one. A sequence that ends frees its slot for the next one in the queue.
///
/// On the CPU a sequence has the same bits alone and beside any others: its draws come from its own seed, and each row of a
/// product and each query of attention is summed as if it were alone, however a text is cut into passes. On Metal and CUDA
/// products of few and of many rows are summed in different orders, so the last digits of a log-probability depend on the
/// batch, and so may the choice between tokens that are nearly equally probable.
///
/// A sequence can start with the keys and values of a prefix that another one with its key and adapter has computed: see
/// [`Request::prefix_key`]. On the CPU this changes no bit of its answer.
///
/// ```no_run
/// use metal_candle::ModelLoader;
/// use metal_candle::data::Tokenizer;
/// use metal_candle::inference::{GenerationConfig, Request, Scheduler};
///
/// # fn main() -> metal_candle::Result<()> {
/// let tokenizer = Tokenizer::from_folder("model")?;
/// let mut scheduler = Scheduler::new(ModelLoader::new().load("model")?).with_tokenizer(tokenizer.clone());
/// for text in ["fn main() {", "struct Point"] {
///     scheduler.admit(Request::new(tokenizer.encode(text, true)?, GenerationConfig::default()))?;
/// }
/// while !scheduler.is_idle() {
///     for event in scheduler.step()? {
///         println!("{}: {:?}", event.sequence, event.result?.text);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Scheduler {
    model: Model,
    tokenizer: Option<Tokenizer>,
    config: SchedulerConfig,
    adapter_ids: Vec<AdapterId>,
    /// The adapters in the order of `adapter_ids`.
    adapters: Vec<LowRankTerms>,
    slots: Slots,
    /// The requests without slots, each as its first sample, in the order of their admission.
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Buffers of the device's path for single-token steps, by adapter.
    decodings: Vec<(Option<AdapterId>, Option<Decoding>)>,
    /// Buffer for masks.
    allowed: Option<AllowedTokens>,
    /// Events that no step has returned yet.
    events: Vec<Event>,
    num_steps: u64,
    num_admitted: u64,
    num_adapters: u64,
}

impl Scheduler {
    /// A scheduler with the limits of [`SchedulerConfig::of`].
    pub fn new(model: Model) -> Self {
        let config = SchedulerConfig::of(&model);
        Self::with_limits(model, config)
    }

    /// A scheduler with limits none of which is 0.
    pub(super) fn with_limits(model: Model, config: SchedulerConfig) -> Self {
        Self {
            model,
            tokenizer: None,
            config,
            adapter_ids: Vec::new(),
            adapters: Vec::new(),
            slots: Slots::default(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            decodings: Vec::new(),
            allowed: None,
            events: Vec::new(),
            num_steps: 0,
            num_admitted: 0,
            num_adapters: 0,
        }
    }

    /// A scheduler with other limits.
    ///
    /// # Errors
    /// A limit is 0.
    pub fn with_config(model: Model, config: SchedulerConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self::with_limits(model, config))
    }

    /// Decodes the tokens of later requests to text, which stop strings need.
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The limits.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Number of sequences that have a slot of the cache.
    pub fn num_running(&self) -> usize {
        self.running.iter().map(Sequence::num_sequences).sum()
    }

    /// Number of sequences that wait for a slot.
    pub fn num_waiting(&self) -> usize {
        self.waiting.iter().map(Sequence::num_sequences).sum()
    }

    /// Whether there is nothing to compute and no event to return.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.events.is_empty()
    }

    /// Memory of the KV cache in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.slots.num_bytes()
    }

    /// Allocates the KV cache for `num_sequences` of `num_tokens` each. Without this the cache grows on demand, which
    /// copies it within a step.
    ///
    /// # Errors
    /// More sequences than `max_sequences` or more tokens than the model's context, or the device cannot hold the cache.
    /// In the last case running sequences are computed again from their first token.
    pub fn reserve(&mut self, num_sequences: usize, num_tokens: usize) -> Result<()> {
        let limits = [
            ("num_sequences", num_sequences, self.config.max_sequences),
            ("num_tokens", num_tokens, self.model.config().max_sequence_length()),
        ];
        if let Some((name, found, limit)) = limits.into_iter().find(|(_, found, limit)| found > limit) {
            return Err(Error::argument(name, format!("expected at most {limit}, found {found}")));
        }
        self.grow(num_sequences, num_tokens)
    }

    /// Frees the KV cache.
    ///
    /// # Errors
    /// A sequence is running.
    pub fn clear_cache(&mut self) -> Result<()> {
        if !self.running.is_empty() {
            let message = format!("expected no running sequence, found {}", self.num_running());
            return Err(Error::argument("cache", message));
        }
        self.slots.clear();
        self.decodings.clear();
        Ok(())
    }

    /// Adds an adapter that requests can name. Its tensors must not change as long as it is used.
    ///
    /// # Errors
    /// The adapter does not fit the model.
    pub fn add_adapter(&mut self, terms: &LowRankTerms) -> Result<AdapterId> {
        let terms = self.model.with_fixed_norms(terms)?;
        let id = AdapterId(self.num_adapters);
        self.num_adapters += 1;
        self.adapter_ids.push(id);
        self.adapters.push(terms);
        Ok(id)
    }

    /// Removes an adapter.
    ///
    /// # Errors
    /// There is no such adapter, or a sequence uses it.
    pub fn remove_adapter(&mut self, adapter: AdapterId) -> Result<()> {
        let index = self.adapter_index(adapter)?;
        let used = self.waiting.iter().chain(&self.running).find(|sequence| sequence.adapter() == Some(adapter));
        if let Some(sequence) = used {
            let message = format!("adapter {adapter} is in use by sequence {}", sequence.id());
            return Err(Error::argument("adapter", message));
        }
        self.adapter_ids.remove(index);
        self.adapters.remove(index);
        self.slots.forget_adapter(adapter);
        self.decodings.retain(|(held, _)| *held != Some(adapter));
        Ok(())
    }

    fn adapter_index(&self, adapter: AdapterId) -> Result<usize> {
        let index = self.adapter_ids.iter().position(|id| *id == adapter);
        index
            .ok_or_else(|| Error::argument("adapter", format!("adapter {adapter} was never added or has been removed")))
    }

    /// Queues a request; returns the ids of its sequences, one per sample.
    ///
    /// # Errors
    /// The prompt is empty, does not fit the context of the model or has an id outside the vocabulary; a setting is out of
    /// its range; there is no such adapter; stop strings lack a tokenizer; more samples than `max_sequences`. Nothing is
    /// queued then.
    pub fn admit(&mut self, request: Request) -> Result<Vec<SequenceId>> {
        if let Some(adapter) = request.adapter {
            self.adapter_index(adapter)?;
        }
        let (count, limit) = (request.num_samples, self.config.max_sequences);
        if count > limit {
            let message = format!("expected at most {limit}, the most sequences that run at a time, found {count}");
            return Err(Error::argument("num_samples", message));
        }
        let sequence = Sequence::new(request, self.num_admitted, &self.model, self.tokenizer.as_ref())?;
        let first = self.num_admitted;
        self.num_admitted += count as u64;
        self.waiting.push_back(sequence);
        Ok((first..self.num_admitted).map(SequenceId).collect())
    }

    /// Ends a sequence and frees its slot. No later step returns an event of it.
    ///
    /// # Errors
    /// The sequence is neither waiting nor running.
    pub fn cancel(&mut self, sequence: SequenceId) -> Result<Finish> {
        let finish = self.remove(sequence)?;
        // of a step that failed
        self.events.retain(|event| event.sequence != sequence);
        Ok(finish)
    }

    fn remove(&mut self, sequence: SequenceId) -> Result<Finish> {
        for index in 0..self.waiting.len() {
            let found = &mut self.waiting[index];
            let taken = found.take_sample(sequence);
            let taken = if taken.is_none() && found.id() == sequence { self.waiting.remove(index) } else { taken };
            if let Some(mut taken) = taken {
                return Ok(taken.finish(FinishReason::Cancelled));
            }
        }
        for index in 0..self.running.len() {
            let found = &mut self.running[index];
            let taken = found.take_sample(sequence);
            let is_found = taken.is_none() && found.id() == sequence;
            let taken = if is_found { Some(self.running.remove(index)) } else { taken };
            if let Some(mut taken) = taken {
                let finish = taken.finish(FinishReason::Cancelled);
                self.slots.release(taken.slot(), taken.into_prefix());
                return Ok(finish);
            }
        }
        Err(not_found(sequence))
    }

    /// Stops computing a sequence, or resumes it. A paused sequence keeps its slot and what the cache holds of it.
    ///
    /// # Errors
    /// The sequence is neither waiting nor running.
    pub fn set_paused(&mut self, sequence: SequenceId, is_paused: bool) -> Result<()> {
        let all = self.waiting.iter_mut().chain(&mut self.running);
        match all.into_iter().find_map(|found| found.find_mut(sequence)) {
            Some(found) => found.set_paused(is_paused),
            None => return Err(not_found(sequence)),
        }
        Ok(())
    }

    /// Whether a step would compute something: a sequence waits, or runs and is not paused.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.running.iter().any(|sequence| !sequence.is_paused())
    }

    /// Ends all sequences and drops the events that no step has returned.
    pub fn cancel_all(&mut self) {
        self.waiting.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            for sample in std::mem::take(sequence.samples_mut()) {
                self.slots.release(sample.slot(), None);
            }
            self.slots.release(sequence.slot(), sequence.into_prefix());
        }
        self.events.clear();
    }

    /// Advances the running sequences: each decoding sequence by one token, and prompts by chunks. Returns what became of
    /// them; a sequence that fails, for example by logits that are not finite, ends with its error and leaves the others
    /// alone.
    ///
    /// # Errors
    /// The device fails or has no memory for the cache. The sequences stay as they were before the pass that failed, and the
    /// next step tries again. It also returns the events of the passes that succeeded.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        self.num_steps += 1;
        let stepped = self.start_waiting().and_then(|()| self.decode()).and_then(|rest| self.forward(&rest));
        self.retire();
        stepped?;
        Ok(std::mem::take(&mut self.events))
    }

    /// Gives slots to waiting sequences.
    fn start_waiting(&mut self) -> Result<()> {
        let max = self.config.max_sequences;
        let fits = |slots: &Slots, next: &Sequence| slots.num_taken() + next.num_sequences() <= max;
        if !self.waiting.front().is_some_and(|next| fits(&self.slots, next)) {
            return Ok(());
        }
        let needed = (self.slots.num_taken() + self.num_waiting()).min(max);
        let is_empty = self.slots.num_bytes() == 0;
        // doubling keeps the copies of a growing cache few
        let grown = if needed > self.slots.len() { needed.max(2 * self.slots.len()).min(max) } else { needed };
        let room = self.waiting.iter().map(Sequence::first_room).max().unwrap_or(0);
        self.grow(grown, if is_empty { room } else { 0 })?;
        // a prompt that has been fed in this step comes after those that have not
        let step = self.num_steps.saturating_sub(1);
        while let Some(mut sequence) = self.waiting.pop_front_if(|next| fits(&self.slots, next)) {
            let (slot, reused) = self.take_slot(&sequence).ok_or(Error::Stopped)?;
            sequence.start(slot, reused, step);
            for sample in sequence.samples_mut() {
                sample.start(self.slots.take().ok_or(Error::Stopped)?, 0, step);
            }
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Takes a slot for a sequence; returns it and the number of first tokens that it holds, at most all but the last, whose
    /// logits are needed.
    fn take_slot(&mut self, sequence: &Sequence) -> Option<(usize, usize)> {
        // keys that depend on the length of their text are of no use to other texts
        let sharing = sequence.sharing().filter(|_| self.model.rotary_limit().is_none());
        let Some(sharing) = sharing else { return Some((self.slots.take()?, 0)) };
        let ids = &sequence.ids()[..sequence.ids().len() - 1];
        let holders = self.running.iter().filter(|other| other.sharing() == Some(sharing));
        let busy = holders.map(|other| (other.slot(), num_common(&other.ids()[..other.num_cached()], ids)));
        self.slots.take_with_prefix(ids, sharing, busy.max_by_key(|&(_, count)| count))
    }

    fn grow(&mut self, num_slots: usize, num_tokens: usize) -> Result<()> {
        let grown = self.slots.reserve(&self.model, num_slots, num_tokens);
        if !matches!(grown, Ok(false)) {
            self.decodings.clear();
        }
        if grown.is_err() && self.slots.num_bytes() == 0 {
            for sequence in &mut self.running {
                sequence.set_cached(0, self.num_steps);
            }
        }
        grown.map(|_| ())
    }

    /// Decodes on the device the sequences for which it has kernels, if no prompt is left to compute; returns the indices
    /// of the others.
    fn decode(&mut self) -> Result<Vec<usize>> {
        let is_active = |&index: &usize| !self.running[index].is_paused();
        let all: Vec<usize> = (0..self.running.len()).filter(is_active).collect();
        // with a prompt in the step, one pass over the weights serves both
        if self.model.device().is_cpu() || all.iter().any(|&index| self.running[index].num_waiting() > 1) {
            return Ok(all);
        }
        let has_row = |&index: &usize| self.running[index].decoding_row().is_some();
        let (mut left, mut rest): (Vec<usize>, Vec<usize>) = all.into_iter().partition(has_row);
        left.sort_by_key(|&index| self.running[index].adapter());
        let running = &self.running;
        self.decodings.retain(|(held, _)| running.iter().any(|sequence| sequence.adapter() == *held));
        while let Some(&first) = left.first() {
            let adapter = self.running[first].adapter();
            let count = left.iter().take_while(|&&index| self.running[index].adapter() == adapter).count();
            let later = left.split_off(count);
            if !self.decode_with(adapter, &left)? {
                rest.append(&mut left);
            }
            left = later;
        }
        rest.sort_unstable();
        Ok(rest)
    }

    /// Decodes sequences with one adapter on the device; returns whether it can.
    fn decode_with(&mut self, adapter: Option<AdapterId>, indices: &[usize]) -> Result<bool> {
        let rows: Vec<_> = indices.iter().filter_map(|&index| self.running[index].decoding_row()).collect();
        let longest = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        let index = adapter.map(|adapter| self.adapter_index(adapter)).transpose()?;
        let terms = index.and_then(|index| self.adapters.get(index));
        let Some(cache) = self.slots.cache().filter(|cache| longest <= cache.config().max_seq_len) else {
            return Ok(false);
        };
        if !self.model.can_decode(rows.len(), terms, cache) {
            return Ok(false);
        }
        let entry = self.decodings.iter().position(|(held, _)| *held == adapter).unwrap_or(self.decodings.len());
        if entry == self.decodings.len() {
            self.decodings.push((adapter, None));
        }
        let decoding = &mut self.decodings[entry].1;
        let decoded = match self.model.decode(decoding, &rows, terms, cache) {
            Ok(decoded) => decoded,
            Err(error) => {
                *decoding = None;
                return Err(error);
            }
        };
        for (row, (&index, decoded)) in indices.iter().zip(decoded).enumerate() {
            let sequence = &mut self.running[index];
            sequence.set_cached(sequence.num_cached() + 1, self.num_steps);
            cache.set_len(sequence.slot(), sequence.num_cached());
            let result = if decoded.log_probability.is_finite() {
                sequence.accept(decoded)
            } else {
                // sampling from the logits says what is wrong with them
                let logits = decoding.as_ref().map(|decoding| decoding.logits().get(row)).transpose();
                logits.map_err(Error::from).and_then(|logits| {
                    with_logits(&logits.ok_or(Error::Stopped)?, |logits| sequence.advance(logits, &mut self.allowed))
                })
            };
            report(&mut self.events, sequence, result);
        }
        Ok(true)
    }

    /// Computes the next token of sequences at their last token and the next chunks of prompts, in one pass.
    fn forward(&mut self, indices: &[usize]) -> Result<()> {
        self.restart_at_other_positions(indices);
        let mut fed = self.tokens_of_step(indices);
        let longest = fed.iter().map(|&(_, end)| end).max().unwrap_or(0);
        let room = self.slots.cache().map_or(0, |cache| cache.config().max_seq_len);
        if longest > room {
            // doubling keeps the copies of a growing cache few
            self.grow(0, longest.max(2 * room).min(self.model.config().max_sequence_length()))?;
        }
        // the rows of an adapter are multiplied together
        fed.sort_by_key(|&(index, _)| self.running[index].adapter());
        if fed.is_empty() { Ok(()) } else { self.forward_tokens(&fed) }
    }

    /// Empties the slots of sequences whose cached keys were rotated for shorter texts: they are computed again.
    fn restart_at_other_positions(&mut self, indices: &[usize]) {
        let Some(limit) = self.model.rotary_limit() else { return };
        for &index in indices {
            let sequence = &mut self.running[index];
            if (1..=limit).contains(&sequence.num_cached()) && sequence.ids().len() > limit {
                self.slots.truncate(sequence.slot(), 0);
                sequence.set_cached(0, self.num_steps);
            }
        }
    }

    /// The sequences to feed, each with the position after its last token to feed: decode steps first, then the chunks of
    /// prompts, of which those that waited longest go first.
    fn tokens_of_step(&self, indices: &[usize]) -> Vec<(usize, usize)> {
        let end_of = |&index: &usize| {
            let (cached, chunk) = (self.running[index].num_cached(), self.config.prefill_chunk);
            // the same positions whatever else is in the step, so that the numbers are the same
            let is_long = self.model.rotary_limit().is_some_and(|limit| self.running[index].ids().len() > limit);
            // the rotation of a text follows from its length, so that it is computed as a whole
            let chunk = if is_long { self.running[index].ids().len() } else { chunk };
            let end = (cached / chunk + 1).saturating_mul(chunk);
            (index, end.min(self.running[index].ids().len()))
        };
        let (mut fed, mut prompts): (Vec<_>, Vec<_>) =
            indices.iter().map(end_of).partition(|&(index, _)| self.running[index].num_waiting() == 1);
        prompts.sort_by_key(|&(index, _)| self.running[index].last_step());
        let mut left = self.config.step_tokens.saturating_sub(fed.len());
        for (number, (index, end)) in prompts.into_iter().enumerate() {
            let count = end - self.running[index].num_cached();
            if count <= left || number == 0 {
                left = left.saturating_sub(count);
                fed.push((index, end));
            }
        }
        fed
    }

    fn forward_tokens(&mut self, fed: &[(usize, usize)]) -> Result<()> {
        let mut of_sequence = Vec::with_capacity(fed.len());
        let mut batch = Batch::new();
        for &(index, end) in fed {
            let sequence = &self.running[index];
            batch.push(&sequence.ids()[sequence.num_cached()..end], sequence.num_cached(), sequence.slot());
            let index = sequence.adapter().map(|adapter| self.adapter_index(adapter)).transpose()?;
            of_sequence.push(index.map(|index| index as u32));
        }
        let cache = self.slots.cache().ok_or(Error::Stopped)?;
        let is_complete = |&(index, end): &(usize, usize)| end == self.running[index].ids().len();
        let complete: Vec<bool> = fed.iter().map(is_complete).collect();
        let rows = batch.last_rows().into_iter().zip(&complete);
        let rows: Vec<usize> = rows.filter_map(|(row, &is_complete)| is_complete.then_some(row)).collect();
        let is_mixed = of_sequence.windows(2).any(|pair| pair[0] != pair[1]);
        let logits = if is_mixed {
            let adapters = Adapters { sets: &self.adapters, of_sequence: &of_sequence };
            self.model.forward_adapted(&batch, adapters, Some(cache), Rows::Of(&rows))
        } else {
            let terms = of_sequence.first().copied().flatten().and_then(|index| self.adapters.get(index as usize));
            self.model.forward(&batch, terms, Some(cache), Rows::Of(&rows))
        };
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => {
                // what it wrote behind the tokens of a slot is overwritten later
                for &(index, _) in fed {
                    let sequence = &self.running[index];
                    self.slots.truncate(sequence.slot(), sequence.num_cached());
                }
                return Err(error);
            }
        };
        let mut row = 0;
        for (&(index, end), is_complete) in fed.iter().zip(complete) {
            self.running[index].set_cached(end, self.num_steps);
            if is_complete {
                self.sample(index, logits.get(row).map_err(Error::from));
                row += 1;
            }
        }
        Ok(())
    }

    /// Samples the next token of a sequence, and the first one of each sample that waits for its prompt.
    fn sample(&mut self, index: usize, logits: Result<Tensor>) {
        let Self { running, slots, allowed, events, num_steps, .. } = self;
        let first = &mut running[index];
        let mut samples = std::mem::take(first.samples_mut());
        let read = logits.and_then(|logits| {
            with_logits(&logits, |logits| {
                let result = first.advance(logits, allowed);
                report(events, first, result);
                for sample in &mut samples {
                    let copied = slots.cache().ok_or(Error::Stopped).and_then(|cache| {
                        cache.copy_slot(first.slot(), sample.slot())?;
                        sample.set_prompt_copied(*num_steps);
                        sample.advance(logits, allowed)
                    });
                    report(events, sample, copied);
                }
                Ok(())
            })
        });
        if let Err(error) = read {
            for sample in &mut samples {
                report(events, sample, Err(Error::Device(error.to_string())));
            }
            report(events, first, Err(error));
        }
        running.append(&mut samples);
    }

    /// Frees the slots of sequences that have ended.
    fn retire(&mut self) {
        let slots = &mut self.slots;
        for sequence in self.running.extract_if(.., |sequence| sequence.is_finished()) {
            slots.release(sequence.slot(), sequence.into_prefix());
        }
    }
}

fn not_found(sequence: SequenceId) -> Error {
    let message = format!("sequence {sequence} is neither waiting nor running: it has ended or was never admitted");
    Error::argument("sequence", message)
}

/// Adds the event of a sequence, which ends if it failed.
fn report(events: &mut Vec<Event>, sequence: &mut Sequence, result: Result<Piece>) {
    if result.is_err() {
        sequence.fail();
    }
    events.push(Event { sequence: sequence.id(), result });
}
