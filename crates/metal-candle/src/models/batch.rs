//! The input of a model: a ragged batch of sequences of any lengths, without padding.

use crate::error::{Error, Result};

/// Token sequences of any lengths, one after the other.
///
/// Only attention uses the boundaries. Packed training samples, prompts and single decode steps are all batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// The start of each sequence, followed by the total: `num_sequences + 1` entries.
    offsets: Vec<usize>,
    /// The cache slot of each sequence.
    slots: Vec<usize>,
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self { ids: Vec::new(), positions: Vec::new(), offsets: vec![0], slots: Vec::new() }
    }

    /// One sequence that starts at position 0, in cache slot 0.
    pub fn single(ids: &[u32]) -> Self {
        let mut batch = Self::new();
        batch.push(ids, 0, 0);
        batch
    }

    /// Sequences that each start at position 0; sequence `i` uses cache slot `i`.
    pub fn from_sequences<S: AsRef<[u32]>>(sequences: impl IntoIterator<Item = S>) -> Self {
        let mut batch = Self::new();
        for (slot, ids) in sequences.into_iter().enumerate() {
            batch.push(ids.as_ref(), 0, slot);
        }
        batch
    }

    /// The rows of a rectangular `[batch, seq]` tensor of ids.
    ///
    /// # Errors
    /// The tensor does not have two dimensions, or is not of dtype `u32`.
    pub fn from_tensor(ids: &candle_core::Tensor) -> Result<Self> {
        if ids.rank() != 2 {
            return Err(Error::shape("ids", "[batch, seq]", ids.dims()));
        }
        Ok(Self::from_sequences(ids.to_vec2::<u32>()?))
    }

    /// Adds a sequence whose first token has position `start`, with its keys and values in cache slot `slot`. An empty
    /// sequence is ignored.
    pub fn push(&mut self, ids: &[u32], start: usize, slot: usize) {
        if ids.is_empty() {
            return;
        }
        self.ids.extend_from_slice(ids);
        self.positions.extend((start..start + ids.len()).map(|p| p as u32));
        self.offsets.push(self.ids.len());
        self.slots.push(slot);
    }

    /// All token ids: `[tokens]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The position of each token in its sequence: `[tokens]`.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The start of each sequence, followed by the number of tokens: `[num_sequences + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The cache slot of each sequence: `[num_sequences]`.
    pub fn slots(&self) -> &[usize] {
        &self.slots
    }

    /// The number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// The number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.slots.len()
    }

    /// The index of the last token of each sequence: `[num_sequences]`.
    pub fn last_rows(&self) -> Vec<usize> {
        self.offsets[1..].iter().map(|end| end - 1).collect()
    }

    /// Whether the batch has no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}
