//! Continuous batching: admits prompts at any time and advances all of them by one token or prompt chunk per step.

mod admission;
mod decoding;
mod prefixes;

use super::adapter_set::AdapterSet;
use super::device_decoding::DeviceDecoding;
use super::draft_gate::DraftGate;
use super::draft_model::DraftModel;
use super::generation::{Finish, FinishReason, Piece};
use super::mask::AllowedTokens;
use super::plan::{Fed, plan};
use super::request::{AdapterId, Event, Request, SequenceId};
use super::sample_token::with_logits;
use super::scheduler_config::SchedulerConfig;
use super::sequence::Sequence;
use super::slots::Slots;
use super::speculation::Speculation;
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::models::{Batch, KVCache, Model, Rows};
use crate::ops::LowRankUpdates;
use crate::ops::adapters::Adapters;
use candle_core::Tensor;
use std::collections::VecDeque;
use std::time::Instant;

/// Continues many prompts with one model: continuous batching without threads or waiting.
///
/// [`Scheduler::admit`] queues a prompt, [`Scheduler::step`] advances every running sequence, and [`Scheduler::cancel`] ends
/// one. A sequence that ends frees its slot for the next one in the queue.
///
/// On the CPU the result of a sequence does not depend on other sequences or on how its text is split into passes: each
/// sequence has its own seed, and each row of a product and each query of attention is summed in one order. On Metal and
/// CUDA, products of few and of many rows are summed in different orders, so the last digits of a log-probability depend on
/// the batch, and so may the choice between nearly equally probable tokens.
///
/// A sequence can reuse the keys and values of a prefix that another sequence with the same key and adapter has computed:
/// see [`Request::prefix_key`]. On the CPU this does not change its answer.
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
    draft_model: Option<DraftModel>,
    draft_gate: DraftGate,
    config: SchedulerConfig,
    adapters: AdapterSet,
    slots: Slots,
    /// The requests without slots, each represented by its first sample, in the order of admission.
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    device_decoding: DeviceDecoding,
    /// The buffer for masks.
    allowed: Option<AllowedTokens>,
    /// Events that no step has returned yet.
    events: Vec<Event>,
    num_steps: u64,
    num_admitted: u64,
}

impl Scheduler {
    /// Creates a scheduler with the limits of [`SchedulerConfig::of`].
    pub fn new(model: Model) -> Self {
        let config = SchedulerConfig::of(&model);
        Self::with_limits(model, config)
    }

    /// Creates a scheduler with valid limits.
    pub(super) fn with_limits(model: Model, config: SchedulerConfig) -> Self {
        Self {
            model,
            tokenizer: None,
            draft_model: None,
            draft_gate: DraftGate::default(),
            config,
            adapters: AdapterSet::default(),
            slots: Slots::new(config.kv_cache),
            waiting: VecDeque::new(),
            running: Vec::new(),
            device_decoding: DeviceDecoding::default(),
            allowed: None,
            events: Vec::new(),
            num_steps: 0,
            num_admitted: 0,
        }
    }

    /// Creates a scheduler with these limits.
    ///
    /// # Errors
    /// As [`SchedulerConfig::validate`].
    pub fn with_config(model: Model, config: SchedulerConfig) -> Result<Self> {
        config.validate(&model)?;
        Ok(Self::with_limits(model, config))
    }

    /// Sets the tokenizer, to decode tokens to text and for stop strings.
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Adds a model that drafts the tokens of requests with [`Speculation::DraftModel`].
    ///
    /// # Errors
    /// The vocabularies of the models differ in size, or the draft model's cache does not support the type of the configuration.
    pub fn with_draft_model(mut self, draft_model: Model) -> Result<Self> {
        self.draft_model = Some(DraftModel::new(draft_model, &self.model, self.config.kv_cache)?);
        Ok(self)
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

    /// The number of sequences with a slot of the cache.
    pub fn num_running(&self) -> usize {
        self.running.iter().map(Sequence::num_sequences).sum()
    }

    /// The number of sequences that wait for a slot, without paused sequences.
    pub fn num_waiting(&self) -> usize {
        self.waiting.iter().filter(|sequence| sequence.may_start()).map(Sequence::num_sequences).sum()
    }

    /// Whether there is nothing to compute and no event to return.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.events.is_empty()
    }

    /// The size of the KV cache in bytes, including the draft model's.
    pub fn cache_bytes(&self) -> usize {
        self.slots.num_bytes() + self.draft_model.as_ref().map_or(0, DraftModel::num_bytes)
    }

    /// Allocates the KV cache, including a draft model's, for `num_sequences` of `num_tokens` each. Otherwise the cache grows
    /// on demand, which copies it during a step.
    ///
    /// # Errors
    /// `num_sequences` exceeds `max_sequences`, `num_tokens` exceeds the model's context, or the cache does not fit on the
    /// device. In the last case running sequences are recomputed from their first token.
    pub fn reserve(&mut self, num_sequences: usize, num_tokens: usize) -> Result<()> {
        let limits = [
            ("num_sequences", num_sequences, self.config.max_sequences),
            ("num_tokens", num_tokens, self.model.config().max_sequence_length()),
        ];
        if let Some((name, found, limit)) = limits.into_iter().find(|(_, found, limit)| found > limit) {
            return Err(Error::argument(name, format!("expected at most {limit}, found {found}")));
        }
        self.grow(num_sequences, num_tokens)?;
        if let Some(draft_model) = &mut self.draft_model {
            draft_model.reserve(num_sequences, num_tokens)?;
        }
        // most sequences are shorter than the reserved length
        let of_drafts = self.draft_model.as_ref().and_then(DraftModel::cache);
        let mut caches = self.slots.cache().map(|cache| &*cache).into_iter().chain(of_drafts);
        caches.try_for_each(KVCache::prefer_small_pages)
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
        self.device_decoding.clear();
        self.draft_model.iter_mut().for_each(DraftModel::clear);
        Ok(())
    }

    /// Adds an adapter for requests. Its tensors must not change while it is in use.
    ///
    /// # Errors
    /// The adapter does not fit the model.
    pub fn add_adapter(&mut self, terms: &LowRankUpdates) -> Result<AdapterId> {
        let adapter = self.adapters.add(self.model.with_cached_factors(terms)?);
        self.slots.add_adapter(adapter, terms)?;
        Ok(adapter)
    }

    /// Removes an adapter.
    ///
    /// # Errors
    /// There is no such adapter, or a sequence uses it.
    pub fn remove_adapter(&mut self, adapter: AdapterId) -> Result<()> {
        self.adapters.index(adapter)?;
        let used = self.waiting.iter().chain(&self.running).find(|sequence| sequence.adapter() == Some(adapter));
        if let Some(sequence) = used {
            let message = format!("adapter {adapter} is in use by sequence {}", sequence.id());
            return Err(Error::argument("adapter", message));
        }
        self.slots.forget_adapter(adapter);
        self.device_decoding.forget(adapter);
        self.adapters.remove(adapter)
    }

    /// Queues a request and returns the ids of its sequences, one per sample.
    ///
    /// # Errors
    /// The prompt is empty, does not fit in the model's context or has an id outside the vocabulary; a setting is out of its
    /// range; there is no such adapter or no draft model; stop strings need a tokenizer; there are more samples than
    /// `max_sequences`. Then nothing is queued.
    pub fn admit(&mut self, request: Request) -> Result<Vec<SequenceId>> {
        if let Some(adapter) = request.adapter {
            self.adapters.index(adapter)?;
        }
        if matches!(request.speculation, Speculation::DraftModel { .. }) && self.draft_model.is_none() {
            return Err(Error::argument("speculation", "the scheduler has no draft model"));
        }
        let (count, limit) = (request.num_samples, self.config.max_sequences);
        if count > limit {
            let message = format!("expected at most {limit}, the limit of running sequences, found {count}");
            return Err(Error::argument("num_samples", message));
        }
        let sequence = Sequence::new(request, self.num_admitted, &self.model, self.tokenizer.as_ref())?;
        let first = self.num_admitted;
        self.num_admitted += count as u64;
        self.waiting.push_back(sequence);
        Ok((first..self.num_admitted).map(SequenceId).collect())
    }

    /// Ends a sequence and frees its slot. Later steps return no events of it.
    ///
    /// # Errors
    /// The sequence is neither waiting nor running.
    pub fn cancel(&mut self, sequence: SequenceId) -> Result<Finish> {
        let finish = self.remove(sequence)?;
        // events of a failed step
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
                self.slots.release(taken.slot(), taken.prefix());
                return Ok(finish);
            }
        }
        Err(not_found(sequence))
    }

    /// Pauses or resumes a sequence. A paused sequence keeps its slot and cache; a waiting sequence gets no slot while it is
    /// paused.
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

    /// Whether a step would compute something: a sequence is waiting or running, and not paused.
    pub fn has_work(&self) -> bool {
        self.waiting.iter().any(Sequence::may_start) || self.running.iter().any(|sequence| !sequence.is_paused())
    }

    /// Ends all sequences and drops pending events.
    pub fn cancel_all(&mut self) {
        self.waiting.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            for sample in std::mem::take(sequence.samples_mut()) {
                self.slots.release(sample.slot(), None);
            }
            self.slots.release(sequence.slot(), sequence.prefix());
        }
        self.events.clear();
    }

    /// Advances the running sequences, each decoding sequence by one token and its accepted drafts, and prompts by chunks.
    /// Returns their events. A sequence that fails, for example because of non-finite logits, ends with its error and does not
    /// affect others.
    ///
    /// # Errors
    /// The device fails or is out of memory for the cache. The sequences are unchanged by the failed pass, and the next step
    /// tries again. The next step also returns the events of the passes that succeeded.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        self.num_steps += 1;
        self.start_waiting()?;
        let (started, num_events, num_sequences) = (Instant::now(), self.events.len(), self.num_decoding());
        let stepped = self.draft(num_sequences).and_then(|()| self.decode_and_forward());
        self.retire();
        let had_drafts = stepped?;
        if let (Some(count), false) = (num_sequences, self.model.device().is_cpu()) {
            let tokens = self.events.len() - num_events;
            self.draft_gate.record(had_drafts, count, tokens, started.elapsed(), Instant::now());
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// The number of sequences of the next step, if all of them are decoding.
    fn num_decoding(&self) -> Option<usize> {
        let mut computed = self.running.iter().filter(|sequence| !sequence.is_paused());
        let count = computed.clone().count();
        computed.all(|sequence| sequence.num_waiting() == 1).then_some(count)
    }

    /// Runs one step of all sequences; returns whether drafts were verified.
    fn decode_and_forward(&mut self) -> Result<bool> {
        let had_drafts = self.running.iter().any(|sequence| !sequence.draft().is_empty());
        let rest = self.decode()?;
        self.forward(&rest)?;
        Ok(had_drafts)
    }

    /// Drafts the next tokens of sequences with speculation. `num_sequences` is the number of sequences of a step without
    /// prompts.
    fn draft(&mut self, num_sequences: Option<usize>) -> Result<()> {
        let is_slow = !self.model.device().is_cpu();
        if is_slow && !num_sequences.is_some_and(|count| self.draft_gate.is_open(count, Instant::now())) {
            self.running.iter_mut().for_each(Sequence::clear_draft);
            return Ok(());
        }
        // a draft beyond the limit would change the rotation of the previous tokens
        let len_limit = self.model.rotary_limit();
        self.running.iter_mut().for_each(|sequence| sequence.propose(len_limit));
        let Some(draft_model) = &mut self.draft_model else { return Ok(()) };
        draft_model.draft(&mut self.running, self.config.step_tokens)
    }

    fn grow(&mut self, num_slots: usize, num_tokens: usize) -> Result<()> {
        let grown = self.slots.reserve(&self.model, num_slots, num_tokens);
        if !matches!(grown, Ok(false)) {
            self.device_decoding.clear();
        }
        if grown.is_err() && self.slots.num_bytes() == 0 {
            for sequence in &mut self.running {
                sequence.set_cached(0, self.num_steps);
            }
        }
        grown.map(|_| ())
    }

    /// The index in the adapter set of each of these sequences' adapters.
    fn adapter_indices(&self, sequences: impl Iterator<Item = usize>) -> Result<Vec<Option<u32>>> {
        let index_of = |index: usize| -> Result<Option<u32>> {
            let index = self.running[index].adapter().map(|adapter| self.adapters.index(adapter)).transpose()?;
            Ok(index.map(|index| index as u32))
        };
        sequences.map(index_of).collect()
    }

    /// Computes the next tokens of decoding sequences and the next chunks of prompts in one pass.
    fn forward(&mut self, indices: &[usize]) -> Result<()> {
        self.restart_at_other_positions(indices);
        let mut fed = plan(&self.running, indices, &self.config, self.model.rotary_limit());
        let longest = fed.iter().map(|fed| fed.end + fed.num_drafts).max().unwrap_or(0);
        let capacity = self.slots.cache().map_or(0, |cache| cache.config().max_seq_len);
        if longest > capacity {
            // doubling limits the number of copies of a growing cache
            self.grow(0, longest.max(2 * capacity).min(self.model.config().max_sequence_length()))?;
        }
        // sort by adapter, so that the rows of an adapter are multiplied together
        fed.sort_by_key(|fed| self.running[fed.index].adapter());
        if fed.is_empty() { Ok(()) } else { self.forward_tokens(&fed) }
    }

    /// Clears the slots of sequences whose cached keys were rotated for shorter texts, so that they are recomputed.
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

    fn forward_tokens(&mut self, all: &[Fed]) -> Result<()> {
        let mut batch = Batch::new();
        let mut rows = Vec::new();
        for fed in all {
            let sequence = &self.running[fed.index];
            let mut ids = sequence.ids()[sequence.num_cached()..fed.end].to_vec();
            ids.extend(&sequence.draft()[..fed.num_drafts]);
            batch.push(&ids, sequence.num_cached(), sequence.slot());
            if fed.end == sequence.ids().len() {
                rows.extend(batch.num_tokens() - 1 - fed.num_drafts..batch.num_tokens());
            }
        }
        let of_sequence = self.adapter_indices(all.iter().map(|fed| fed.index))?;
        let cache = self.slots.cache().ok_or(Error::Stopped)?;
        let is_mixed = of_sequence.windows(2).any(|pair| pair[0] != pair[1]);
        let logits = if is_mixed {
            let adapters = Adapters { sets: self.adapters.terms(), of_sequence: &of_sequence };
            self.model.forward_adapted(&batch, adapters, Some(cache), Rows::Of(&rows))
        } else {
            let terms = self.adapters.of(all.first().and_then(|fed| self.running[fed.index].adapter()))?;
            self.model.forward(&batch, terms, Some(cache), Rows::Of(&rows))
        };
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => {
                // tokens that it wrote after the end of a slot will be overwritten
                for fed in all {
                    let sequence = &self.running[fed.index];
                    self.slots.truncate(sequence.slot(), sequence.num_cached());
                }
                return Err(error);
            }
        };
        let mut row = 0;
        for &Fed { index, end, num_drafts } in all {
            let sequence = &mut self.running[index];
            sequence.set_cached(end, self.num_steps);
            if num_drafts > 0 {
                let kept = self.check_drafts(index, num_drafts, |draft| logits.get(row + draft).map_err(Error::from));
                let sequence = &mut self.running[index];
                sequence.set_cached(end + kept, self.num_steps);
                self.slots.truncate(sequence.slot(), end + kept);
            } else if end == sequence.ids().len() {
                self.sample(index, logits.get(row).map_err(Error::from));
            } else {
                continue;
            }
            row += 1 + num_drafts;
        }
        Ok(())
    }

    /// Samples tokens after the last token and each draft, until one differs from its draft or ends the sequence. Returns the
    /// number of drafts that remain in the cache.
    fn check_drafts(&mut self, index: usize, count: usize, logits: impl Fn(usize) -> Result<Tensor>) -> usize {
        let sequence = &mut self.running[index];
        let draft = sequence.take_draft(count);
        let mut kept = 0;
        loop {
            let expected = draft.get(kept).copied();
            let advance = |logits: &[f32]| sequence.advance(logits, &mut self.allowed, expected);
            let result = logits(kept).and_then(|logits| with_logits(&logits, advance));
            let token = result.as_ref().ok().map(|piece| piece.token);
            report(&mut self.events, sequence, result);
            if expected.is_none() || token != expected || sequence.is_finished() {
                break;
            }
            kept += 1;
        }
        sequence.finish_pass(draft.len(), kept);
        kept
    }

    /// Samples the next token of a sequence, and the first token of each sample that waits for its prompt.
    fn sample(&mut self, index: usize, logits: Result<Tensor>) {
        let Self { running, slots, allowed, events, num_steps, .. } = self;
        let first = &mut running[index];
        let mut samples = std::mem::take(first.samples_mut());
        let read = logits.and_then(|logits| {
            with_logits(&logits, |logits| {
                let result = first.advance(logits, allowed, None);
                report(events, first, result);
                for sample in &mut samples {
                    let copied = slots.cache().ok_or(Error::Stopped).and_then(|cache| {
                        cache.copy_slot(first.slot(), sample.slot())?;
                        sample.set_prompt_copied(*num_steps);
                        sample.advance(logits, allowed, None)
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

    /// Frees the slots of ended sequences.
    fn retire(&mut self) {
        let slots = &mut self.slots;
        for sequence in self.running.extract_if(.., |sequence| sequence.is_finished()) {
            slots.release(sequence.slot(), sequence.prefix());
        }
    }
}

fn not_found(sequence: SequenceId) -> Error {
    let message = format!("sequence {sequence} is neither waiting nor running: it has ended or was never admitted");
    Error::argument("sequence", message)
}

/// Adds an event; an error ends the sequence.
fn report(events: &mut Vec<Event>, sequence: &mut Sequence, result: Result<Piece>) {
    if result.is_err() {
        sequence.fail();
    }
    events.push(Event { sequence: sequence.id(), result });
}
