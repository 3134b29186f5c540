//! [`SchedulerConfig`]: the limits of a scheduler.

use super::slots::{cache_bytes, check_kind};
use crate::error::{Error, Result};
use crate::models::{KVCacheType, Model};

/// The limits of a [`Scheduler`](super::Scheduler).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Maximum number of sequences that run at the same time, each in its own slot of the KV cache. Others wait.
    pub max_sequences: usize,
    /// Prompts are computed in chunks that end at multiples of this number of tokens.
    pub prefill_chunk: usize,
    /// Maximum number of tokens in a step: one per decoding sequence, the rest for prompt chunks. Chunks are not split to fit,
    /// and each step computes at least one.
    pub step_tokens: usize,
    /// The type of the KV caches of the model and the draft model. `None` for the default: f32 for f32 and quantized weights;
    /// for other weights f16 on the CPU, and the type of the weights on other devices, which support no other type.
    pub kv_cache: Option<KVCacheType>,
}

impl SchedulerConfig {
    /// The default of `max_sequences`.
    pub(super) const MAX_SEQUENCES: usize = 32;

    /// The default limits for a model's device: 32 sequences, and chunks of 512 tokens on the CPU or 4,096 on other devices.
    pub fn of(model: &Model) -> Self {
        let prefill_chunk = if model.device().is_cpu() { 512 } else { 4096 };
        Self { max_sequences: Self::MAX_SEQUENCES, prefill_chunk, step_tokens: prefill_chunk, kv_cache: None }
    }

    /// The size in bytes of the KV cache that a scheduler of `model` allocates for `num_sequences` of `num_tokens` each.
    pub fn cache_bytes(&self, model: &Model, num_sequences: usize, num_tokens: usize) -> usize {
        cache_bytes(model, self.kv_cache, num_sequences, num_tokens)
    }

    /// Checks that no limit is 0 and that the cache of `model` supports the type.
    ///
    /// # Errors
    /// A limit is 0; the width of a head is not a multiple of 32, which `Q8_0` and `Q4_0` require; or the device does not
    /// support the type.
    pub fn validate(&self, model: &Model) -> Result<()> {
        check_kind(model, self.kv_cache)?;
        let Self { max_sequences, prefill_chunk, step_tokens, .. } = *self;
        let all = [("max_sequences", max_sequences), ("prefill_chunk", prefill_chunk), ("step_tokens", step_tokens)];
        match all.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(Error::argument(name, "expected at least 1, found 0")),
            None => Ok(()),
        }
    }
}
