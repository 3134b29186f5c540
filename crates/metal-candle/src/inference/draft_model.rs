//! A small model that drafts the next tokens of sequences, with a KV cache of its own.

use super::request::SequenceId;
use super::sample_token::with_logits;
use super::sampler::Sampler;
use super::sampling::SamplingConfig;
use super::sequence::Sequence;
use super::slots::{check_kind, new_cache, num_common};
use crate::error::{Error, Result};
use crate::models::{Batch, KVCache, KVCacheType, Model, Rows};

/// Drafts the most probable tokens. A slot of its cache belongs to the sequence in the scheduler's slot of that index.
#[derive(Debug)]
pub(super) struct DraftModel {
    model: Model,
    /// Chooses the most probable token.
    sampler: Sampler,
    cache: Option<KVCache>,
    /// The type of the cache; `None` for the model's.
    kind: Option<KVCacheType>,
    /// What each slot holds.
    held: Vec<Held>,
}

#[derive(Debug, Default)]
struct Held {
    sequence: Option<SequenceId>,
    ids: Vec<u32>,
}

/// A sequence that wants drafts.
struct Job {
    /// The index of the sequence.
    index: usize,
    slot: usize,
    /// The tokens to compute next.
    next: Vec<u32>,
    draft: Vec<u32>,
}

impl DraftModel {
    /// # Errors
    /// The vocabulary is not that of the model that checks the drafts, or the cache of the model cannot have the type.
    pub(super) fn new(model: Model, checking: &Model, kind: Option<KVCacheType>) -> Result<Self> {
        let (expected, found) = (checking.config().vocab_size, model.config().vocab_size);
        if expected != found {
            let message = format!("expected a vocabulary of {expected} tokens, that of the model, found {found}");
            return Err(Error::argument("draft_model", message));
        }
        check_kind(&model, kind).map_err(|error| match error {
            Error::Argument { name, message } => Error::argument(name, format!("the draft model: {message}")),
            other => other,
        })?;
        let sampler = Sampler::new(SamplingConfig::greedy())?;
        Ok(Self { model, sampler, cache: None, kind, held: Vec::new() })
    }

    /// Frees the cache.
    pub(super) fn clear(&mut self) {
        self.cache = None;
        self.held.clear();
    }

    /// The cache, once it is allocated.
    pub(super) fn cache(&self) -> Option<&KVCache> {
        self.cache.as_ref()
    }

    /// Memory of the cache in bytes.
    pub(super) fn num_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, KVCache::num_bytes)
    }

    /// Drafts tokens of the sequences that ask for them. Of texts that the cache lacks at most `max_tokens` are computed;
    /// sequences whose text is not complete then get no draft.
    pub(super) fn draft(&mut self, running: &mut [Sequence], max_tokens: usize) -> Result<()> {
        let mut jobs = self.jobs(running, max_tokens)?;
        // the first pass computes what the cache lacks of the texts, each later one the draft before
        while !jobs.is_empty() {
            self.advance(&mut jobs)?;
            jobs.retain_mut(|job| {
                let sequence = &mut running[job.index];
                if self.held[job.slot].ids.len() < sequence.ids().len() {
                    return false;
                }
                let is_complete = job.draft.len() == sequence.num_to_draft();
                if is_complete {
                    sequence.set_draft(std::mem::take(&mut job.draft));
                }
                !is_complete
            });
        }
        Ok(())
    }

    fn jobs(&mut self, running: &[Sequence], max_tokens: usize) -> Result<Vec<Job>> {
        let max_len = self.model.config().max_sequence_length();
        let len = |sequence: &Sequence| sequence.ids().len() + sequence.num_to_draft();
        let is_drafted = |sequence: &Sequence| sequence.num_to_draft() > 0 && len(sequence) <= max_len;
        let drafted = || running.iter().enumerate().filter(|(_, sequence)| is_drafted(sequence));
        let num_slots = drafted().map(|(_, sequence)| sequence.slot() + 1).max().unwrap_or(0);
        if num_slots == 0 {
            return Ok(Vec::new());
        }
        self.reserve(num_slots, drafted().map(|(_, sequence)| len(sequence)).max().unwrap_or(0))?;
        let cache = self.cache.as_mut().ok_or(Error::Stopped)?;
        let mut left = max_tokens;
        let mut jobs: Vec<Job> = Vec::new();
        for (index, sequence) in drafted() {
            let (slot, ids) = (sequence.slot(), sequence.ids());
            let held = &mut self.held[slot];
            if held.sequence != Some(sequence.id()) {
                *held = Held { sequence: Some(sequence.id()), ids: Vec::new() };
            }
            // the logits of the last token are needed
            let count = num_common(&held.ids, &ids[..ids.len() - 1]);
            held.ids.truncate(count);
            cache.truncate(slot, count);
            let next: Vec<u32> = ids[count..].iter().copied().take(left).collect();
            if !next.is_empty() {
                left -= next.len();
                jobs.push(Job { index, slot, next, draft: Vec::new() });
            }
        }
        Ok(jobs)
    }

    /// Allocates the cache for at least this number of slots and tokens per slot, or as many tokens as the model can have.
    pub(super) fn reserve(&mut self, num_slots: usize, num_tokens: usize) -> Result<()> {
        let num_tokens = num_tokens.min(self.model.config().max_sequence_length());
        self.held.resize_with(self.held.len().max(num_slots), Held::default);
        let Some(cache) = &mut self.cache else {
            self.cache = Some(new_cache(&self.model, self.kind, num_slots, num_tokens)?);
            return Ok(());
        };
        let max_len = self.model.config().max_sequence_length();
        let held = *cache.config();
        // doubling keeps the copies of a growing cache few
        let grown = if num_tokens > held.max_seq_len { num_tokens.max(2 * held.max_seq_len).min(max_len) } else { 0 };
        let reserved = cache.reserve_slots(num_slots).and_then(|()| cache.reserve(grown));
        if reserved.is_err() {
            // some layers may have grown and others not
            self.clear();
        }
        reserved
    }

    /// Computes the next tokens of all jobs, and the most probable token after each.
    fn advance(&mut self, jobs: &mut [Job]) -> Result<()> {
        let mut batch = Batch::new();
        for job in &*jobs {
            batch.push(&job.next, self.held[job.slot].ids.len(), job.slot);
        }
        let logits = self.model.forward(&batch, None, self.cache.as_mut(), Rows::Last)?;
        for (row, job) in jobs.iter_mut().enumerate() {
            let token = with_logits(&logits.get(row)?, |logits| self.sampler.choose(logits));
            self.held[job.slot].ids.append(&mut job.next);
            // a draft may be any token: logits that are not finite are no error of the sequence
            let token = token.unwrap_or(0);
            job.draft.push(token);
            job.next.push(token);
        }
        Ok(())
    }
}
