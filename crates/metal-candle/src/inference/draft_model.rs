//! Drafts the next tokens of sequences with a small model that has its own KV cache.

use super::prefix_folder::num_common;
use super::request::SequenceId;
use super::sample_token::with_logits;
use super::sampler::Sampler;
use super::sampling::SamplingConfig;
use super::sequence::Sequence;
use super::slots::{check_kind, new_cache};
use crate::error::{Error, Result};
use crate::models::{Batch, KVCache, KVCacheType, Model, Rows};

/// Drafts the most probable tokens. Each slot of its cache belongs to the sequence in the scheduler's slot with the same
/// index.
#[derive(Debug)]
pub(super) struct DraftModel {
    model: Model,
    /// A greedy sampler.
    sampler: Sampler,
    cache: Option<KVCache>,
    /// The type of the cache; `None` for the default of the model.
    kind: Option<KVCacheType>,
    /// The tokens in each slot.
    held: Vec<Held>,
}

#[derive(Debug, Default)]
struct Held {
    sequence: Option<SequenceId>,
    ids: Vec<u32>,
}

/// A sequence that requests drafts.
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
    /// The vocabulary differs from that of the model that verifies the drafts, or the cache does not support the type.
    pub(super) fn new(model: Model, checking: &Model, kind: Option<KVCacheType>) -> Result<Self> {
        let (expected, found) = (checking.config().vocab_size, model.config().vocab_size);
        if expected != found {
            let message = format!("expected the model's vocabulary of {expected} tokens, found {found}");
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

    /// Drafts tokens of the sequences that request them. At most `max_tokens` tokens that the cache lacks are computed;
    /// sequences whose text is still incomplete get no draft.
    pub(super) fn draft(&mut self, running: &mut [Sequence], max_tokens: usize) -> Result<()> {
        let mut jobs = self.jobs(running, max_tokens)?;
        // the first pass computes the tokens that the cache lacks, each later pass the previous draft
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

    /// Allocates the cache for at least this number of slots and tokens per slot, limited to the model's context.
    pub(super) fn reserve(&mut self, num_slots: usize, num_tokens: usize) -> Result<()> {
        let num_tokens = num_tokens.min(self.model.config().max_sequence_length());
        self.held.resize_with(self.held.len().max(num_slots), Held::default);
        let Some(cache) = &mut self.cache else {
            self.cache = Some(new_cache(&self.model, self.kind, num_slots, num_tokens)?);
            return Ok(());
        };
        let max_len = self.model.config().max_sequence_length();
        let held = *cache.config();
        // doubling limits the number of copies of a growing cache
        let grown = if num_tokens > held.max_seq_len { num_tokens.max(2 * held.max_seq_len).min(max_len) } else { 0 };
        let reserved = cache.reserve_slots(num_slots).and_then(|()| cache.reserve(grown));
        if reserved.is_err() {
            // some layers may have grown, others not
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
            // a draft may be any token, so non-finite logits of the draft model are not an error
            let token = token.unwrap_or(0);
            job.draft.push(token);
            job.next.push(token);
        }
        Ok(())
    }
}
