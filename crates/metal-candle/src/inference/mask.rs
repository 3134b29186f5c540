//! [`TokenMask`]: a hook that restricts the next token of a sequence.

use crate::error::{Error, Result};

const BITS: usize = u32::BITS as usize;

/// Restricts the next token of a sequence, for example to the tokens that a grammar allows.
///
/// A sequence with a mask samples on the CPU; other sequences of the batch still use the device's faster path.
pub trait TokenMask: std::fmt::Debug + Send {
    /// Adds the tokens that may follow `generated` (the sampled tokens, without the prompt) to `allowed`, which is empty. Called
    /// once per token, before sampling.
    ///
    /// # Errors
    /// Any error ends this sequence only.
    fn allow(&mut self, generated: &[u32], allowed: &mut AllowedTokens) -> Result<()>;

    /// Returns a copy in the current state, for another sample of the same prompt.
    fn fork(&self) -> Box<dyn TokenMask>;
}

/// A set of token ids: one bit per token of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedTokens {
    words: Vec<u32>,
    vocab_size: usize,
}

impl AllowedTokens {
    /// Creates an empty set for a vocabulary of `vocab_size` tokens.
    pub fn new(vocab_size: usize) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(BITS)], vocab_size }
    }

    /// Number of tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Adds a token.
    ///
    /// # Errors
    /// The id is outside the vocabulary.
    pub fn insert(&mut self, id: u32) -> Result<()> {
        if id as usize >= self.vocab_size {
            let message = format!("token `{id}` is outside the vocabulary of {} tokens", self.vocab_size);
            return Err(Error::argument("mask", message));
        }
        self.words[id as usize / BITS] |= 1 << (id as usize % BITS);
        Ok(())
    }

    /// Removes tokens, unless the set has no others.
    pub(super) fn remove_unless_all(&mut self, ids: &[u32]) {
        let removed: Vec<u32> = ids.iter().copied().filter(|&id| self.contains(id)).collect();
        let bit = |id: u32| 1 << (id as usize % BITS);
        for &id in &removed {
            self.words[id as usize / BITS] &= !bit(id);
        }
        if self.is_empty() {
            for id in removed {
                self.words[id as usize / BITS] |= bit(id);
            }
        }
    }

    /// Adds every token.
    pub fn insert_all(&mut self) {
        self.words.fill(u32::MAX);
    }

    /// Removes every token.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether the token is in the set.
    pub fn contains(&self, id: u32) -> bool {
        let bit = |word: &u32| word >> (id as usize % BITS) & 1 == 1;
        (id as usize) < self.vocab_size && self.words.get(id as usize / BITS).is_some_and(bit)
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        let (rest, whole) = (self.vocab_size % BITS, self.vocab_size / BITS);
        let last = self.words.get(whole).map_or(0, |word| word & ((1 << rest) - 1));
        last == 0 && self.words[..whole].iter().all(|&word| word == 0)
    }

    /// The bits: token `id` is bit `id % 32` of word `id / 32`. Bits past the vocabulary are ignored.
    pub fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }

    /// Sets the logits of all other tokens to negative infinity.
    pub(super) fn apply(&self, logits: &mut [f32]) -> Result<()> {
        if logits.len() != self.vocab_size {
            let message = format!("expected a mask over {} tokens, found one over {}", logits.len(), self.vocab_size);
            return Err(Error::argument("mask", message));
        }
        for (&word, logits) in self.words.iter().zip(logits.chunks_mut(BITS)) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn bits_past_the_vocabulary_are_ignored() {
        let mut allowed = AllowedTokens::new(35);
        allowed.words_mut()[1] = !0b111;
        assert!(allowed.is_empty());
        assert!(!allowed.contains(35));
        assert!(allowed.insert(35).is_err());
        allowed.insert(34).unwrap();
        assert!(!allowed.is_empty() && allowed.contains(34) && !allowed.contains(2));
        let mut logits = vec![1.0; 35];
        allowed.apply(&mut logits).unwrap();
        let left: Vec<usize> = (0..35).filter(|&id| logits[id] > f32::NEG_INFINITY).collect();
        assert_eq!(left, [34]);
        assert!(allowed.apply(&mut [0.0; 34]).is_err());
        let mut whole = AllowedTokens::new(64);
        assert!(whole.is_empty());
        whole.insert_all();
        assert!(!whole.is_empty() && whole.contains(63));
        whole.remove_unless_all(&[63, 64, 2, 63]);
        assert!(!whole.contains(63) && !whole.contains(2) && whole.contains(62));
        whole.clear();
        whole.insert(9).unwrap();
        whole.remove_unless_all(&[9, 10, 9]);
        assert!(whole.contains(9) && !whole.contains(10));
        whole.clear();
        assert!(whole.is_empty());
    }
}
