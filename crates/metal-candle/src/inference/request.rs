//! The requests of a scheduler and the events of its steps.

use super::generation::{GenerationConfig, Piece};
use super::mask::TokenMask;
use super::speculation::Speculation;
use crate::data::Random;
use crate::error::Result;

/// The id of a sequence of a [`Scheduler`](super::Scheduler). Ids are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(super) u64);

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The id of an adapter of a [`Scheduler`](super::Scheduler). Ids are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub(super) u64);

impl std::fmt::Display for AdapterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A prompt to continue, once or several times.
#[derive(Debug)]
pub struct Request {
    /// The token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Sampling settings and stop conditions.
    pub config: GenerationConfig,
    /// The number of sequences that continue the prompt, at least 1. The prompt is computed once. The seed of sample `i` is
    /// [`sample_seed`] of the seed and `i`.
    pub num_samples: usize,
    /// The adapter; none for the model alone.
    pub adapter: Option<AdapterId>,
    /// Restricts the tokens that may be sampled.
    pub mask: Option<Box<dyn TokenMask>>,
    /// The number of most probable tokens in each piece; 0 for none.
    pub num_top_log_probabilities: usize,
    /// How the next tokens are drafted, to compute several in one step.
    pub speculation: Speculation,
    /// The expected tokens of the answer, which are drafted first. They have no effect without speculation.
    pub prediction: Vec<u32>,
    /// Requests with the same key and adapter share the cache of a common prefix. Without a key, nothing is shared. The time
    /// to the first token reveals whether a prefix was cached, so callers that do not trust each other need different keys.
    /// With [`Scheduler::with_prefix_storage`](super::Scheduler::with_prefix_storage), a key means the same in all processes
    /// that use the folder.
    pub prefix_key: Option<u128>,
}

impl Request {
    /// Creates a request for one sequence, without an adapter and without shared prefixes.
    pub fn new(prompt: impl Into<Vec<u32>>, config: GenerationConfig) -> Self {
        Self {
            prompt: prompt.into(),
            config,
            num_samples: 1,
            adapter: None,
            mask: None,
            num_top_log_probabilities: 0,
            speculation: Speculation::Off,
            prediction: Vec::new(),
            prefix_key: None,
        }
    }

    /// Sets the number of sequences that continue the prompt.
    #[must_use]
    pub fn with_num_samples(mut self, num_samples: usize) -> Self {
        self.num_samples = num_samples;
        self
    }

    /// Sets the adapter.
    #[must_use]
    pub fn with_adapter(mut self, adapter: Option<AdapterId>) -> Self {
        self.adapter = adapter;
        self
    }

    /// Restricts the tokens that may be sampled.
    #[must_use]
    pub fn with_mask(mut self, mask: impl TokenMask + 'static) -> Self {
        self.mask = Some(Box::new(mask));
        self
    }

    /// Sets the number of most probable tokens in each piece.
    #[must_use]
    pub fn with_num_top_log_probabilities(mut self, count: usize) -> Self {
        self.num_top_log_probabilities = count;
        self
    }

    /// Sets how the next tokens are drafted.
    #[must_use]
    pub fn with_speculation(mut self, speculation: Speculation) -> Self {
        self.speculation = speculation;
        self
    }

    /// Sets the expected tokens of the answer.
    #[must_use]
    pub fn with_prediction(mut self, prediction: impl Into<Vec<u32>>) -> Self {
        self.prediction = prediction.into();
        self
    }

    /// Shares the cache of common prefixes with requests of the same key.
    #[must_use]
    pub fn with_prefix_key(mut self, key: u128) -> Self {
        self.prefix_key = Some(key);
        self
    }
}

/// The seed of sample `sample` of a request with `seed`; for sample 0, `seed` itself.
pub fn sample_seed(seed: u64, sample: usize) -> u64 {
    if sample == 0 {
        return seed;
    }
    Random::new(Random::new(seed).next_u64() ^ sample as u64).next_u64()
}

/// An event of one sequence in a step. With speculation a step may return several events of a sequence, in order.
#[derive(Debug)]
pub struct Event {
    /// The sequence.
    pub sequence: SequenceId,
    /// The next piece (the last piece has a `finish`), or the error that ended the sequence.
    pub result: Result<Piece>,
}
