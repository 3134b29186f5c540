//! Packs samples of different lengths into ragged batches.

use super::{Random, Sample};
use crate::error::{Error, Result};
use crate::models::{Batch, Targets};

/// The limits of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackingLimits {
    /// Maximum number of tokens in a batch; a sample that is longer gets a batch of its own.
    pub max_tokens: usize,
    /// Maximum number of samples in a batch.
    pub max_samples: usize,
}

impl PackingLimits {
    /// A limit on tokens only.
    pub fn tokens(max_tokens: usize) -> Self {
        Self { max_tokens, max_samples: usize::MAX }
    }
}

/// Distributes samples of these lengths (in tokens) over batches, and returns indices into `lengths`.
///
/// The samples are shuffled with `random`; each is then added to the first batch with enough capacity (first fit). Every
/// non-empty sample is in exactly one batch.
///
/// # Errors
/// A limit is 0.
pub fn pack(lengths: &[usize], limits: PackingLimits, random: &mut Random) -> Result<Vec<Vec<usize>>> {
    for (name, limit) in [("max_tokens", limits.max_tokens), ("max_samples", limits.max_samples)] {
        if limit == 0 {
            return Err(Error::argument(name, "expected at least 1, found 0"));
        }
    }
    let mut order: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
    random.shuffle(&mut order);
    let mut free = FreeTokens::new(order.len());
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let needed = lengths[index].min(limits.max_tokens);
        let found = free.first_with(needed).filter(|&batch| batch < batches.len());
        let batch = found.unwrap_or_else(|| {
            batches.push(Vec::new());
            free.set(batches.len() - 1, limits.max_tokens);
            batches.len() - 1
        });
        batches[batch].push(index);
        let is_full = batches[batch].len() >= limits.max_samples;
        let left = free.get(batch) - needed;
        free.set(batch, if is_full { 0 } else { left });
    }
    Ok(batches)
}

/// The free tokens of each batch in a tree of maxima, which finds the first batch with enough capacity in O(log n).
struct FreeTokens {
    leaves: usize,
    maxima: Vec<usize>,
}

impl FreeTokens {
    fn new(num_batches: usize) -> Self {
        let leaves = num_batches.max(1).next_power_of_two();
        Self { leaves, maxima: vec![0; 2 * leaves] }
    }

    fn get(&self, batch: usize) -> usize {
        self.maxima[self.leaves + batch]
    }

    fn set(&mut self, batch: usize, tokens: usize) {
        let mut node = self.leaves + batch;
        self.maxima[node] = tokens;
        while node > 1 {
            node /= 2;
            self.maxima[node] = self.maxima[2 * node].max(self.maxima[2 * node + 1]);
        }
    }

    /// The first batch with at least `tokens` (1 or more) free.
    fn first_with(&self, tokens: usize) -> Option<usize> {
        if self.maxima[1] < tokens {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            node = if self.maxima[2 * node] >= tokens { 2 * node } else { 2 * node + 1 };
        }
        Some(node - self.leaves)
    }
}

/// Creates the ragged batch of these samples, and the target of each token.
///
/// A token's target is the next token of its sample, with weight 1 if the next token is trained, otherwise 0. The last
/// token of a sample has weight 0.
///
/// # Shapes
/// Batch and targets have one entry per token of the samples: `[tokens]`.
pub fn batch_of(samples: &[&Sample]) -> (Batch, Targets) {
    let batch = Batch::from_sequences(samples.iter().map(|sample| &sample.ids));
    let mut targets =
        Targets { ids: Vec::with_capacity(batch.num_tokens()), weights: Vec::with_capacity(batch.num_tokens()) };
    for sample in samples {
        for index in 0..sample.ids.len() {
            let is_trained = sample.trained.get(index + 1).copied().unwrap_or(false);
            targets.ids.push(sample.ids.get(index + 1).copied().unwrap_or(0));
            targets.weights.push(if is_trained && index + 1 < sample.ids.len() { 1.0 } else { 0.0 });
        }
    }
    (batch, targets)
}
