//! Limits of a scheduler.

use super::slots::cache_bytes;
use crate::error::{Error, Result};
use crate::models::Model;

/// Limits of a [`Scheduler`](super::Scheduler).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most sequences that run at the same time, each in its own slot of the KV cache. Others wait.
    pub max_sequences: usize,
    /// Prompts are computed in chunks that end at multiples of this number of tokens.
    pub prefill_chunk: usize,
    /// Most tokens of a step: one per decoding sequence, the rest for prompt chunks. A chunk is never cut to fit, and one
    /// chunk is computed in any case.
    pub step_tokens: usize,
}

impl SchedulerConfig {
    /// The default of `max_sequences`.
    pub(super) const MAX_SEQUENCES: usize = 32;

    /// The limits that suit a model's device: 32 sequences, and chunks of 512 tokens on the CPU or 4,096 elsewhere.
    pub fn of(model: &Model) -> Self {
        let prefill_chunk = if model.device().is_cpu() { 512 } else { 4096 };
        Self { max_sequences: Self::MAX_SEQUENCES, prefill_chunk, step_tokens: prefill_chunk }
    }

    /// Bytes of the KV cache that a scheduler of `model` reserves for `num_sequences` of `num_tokens` each.
    pub fn cache_bytes(model: &Model, num_sequences: usize, num_tokens: usize) -> usize {
        cache_bytes(model, num_sequences, num_tokens)
    }

    /// Checks that no limit is 0.
    pub(super) fn validate(&self) -> Result<()> {
        let Self { max_sequences, prefill_chunk, step_tokens } = *self;
        let all = [("max_sequences", max_sequences), ("prefill_chunk", prefill_chunk), ("step_tokens", step_tokens)];
        match all.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(Error::argument(name, "expected at least 1, found 0")),
            None => Ok(()),
        }
    }
}
