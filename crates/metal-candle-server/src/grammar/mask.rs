//! [`GrammarMask`]: computes the tokens that a grammar allows next in a sequence.

use super::vocabulary::Vocabulary;
use llguidance::Matcher;
use llguidance::api::StopReason;
use metal_candle::Error;
use metal_candle::inference::{AllowedTokens, TokenMask};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time budget for the masks of a sequence: an initial amount, plus an amount per token. A mask takes about 0.1 ms; only
/// hostile grammars take longer.
const TIME: Duration = Duration::from_secs(2);
const TIME_PER_TOKEN: Duration = Duration::from_millis(10);

/// The state of a grammar in one sequence.
///
/// End-of-text ids are allowed only after a complete text. After a text that cannot be continued, only they are allowed.
pub(crate) struct GrammarMask {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
    /// The number of generated tokens that the grammar has consumed.
    consumed: usize,
    /// The total time of all masks.
    spent: Duration,
}

impl GrammarMask {
    pub(super) fn new(matcher: Matcher, vocabulary: Arc<Vocabulary>) -> Self {
        Self { matcher, vocabulary, consumed: 0, spent: Duration::ZERO }
    }

    fn next(&mut self, generated: &[u32], allowed: &mut AllowedTokens) -> metal_candle::Result<()> {
        let Some(new) = generated.get(self.consumed..) else {
            return Err(self.failed("tokens that the grammar has consumed were removed"));
        };
        if allowed.vocab_size() != self.vocabulary.size {
            return Err(self.failed("the grammar was compiled for another vocabulary"));
        }
        if !self.matcher.is_stopped() && self.matcher.consume_tokens(new).is_err() {
            return Err(self.failed("the text is outside the grammar, or the grammar is too complex for it"));
        }
        let is_start = generated.is_empty();
        self.consumed = generated.len();
        if self.matcher.is_stopped() {
            if !self.matcher.stop_reason().is_ok() {
                return Err(self.failed("no token can follow"));
            }
            return self.vocabulary.end_ids.iter().try_for_each(|&id| allowed.insert(id));
        }
        let Ok(mask) = self.matcher.compute_mask() else { return Err(self.failed("no token can follow")) };
        self.vocabulary.copy(mask.as_slice(), is_start, allowed);
        let is_complete = self.matcher.is_accepting().map_err(|_| self.failed("no token can follow"))?;
        for &id in &self.vocabulary.end_ids {
            let (word, bit) = (id as usize / 32, 1 << (id % 32));
            if is_complete {
                allowed.insert(id)?;
            } else if let Some(word) = allowed.words_mut().get_mut(word) {
                *word &= !bit;
            }
        }
        if allowed.is_empty() { Err(self.failed("no token can follow")) } else { Ok(()) }
    }

    fn failed(&self, otherwise: &str) -> Error {
        let message = match self.matcher.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => "the grammar is too complex for this text",
            _ if self
                .matcher
                .get_error()
                .is_some_and(|error| error.contains("TooComplex") || error.contains("fuel")) =>
            {
                "the grammar is too complex for this text"
            }
            _ => otherwise,
        };
        Error::Argument { name: "grammar".into(), message: message.into() }
    }
}

impl std::fmt::Debug for GrammarMask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarMask").field("consumed", &self.consumed).finish_non_exhaustive()
    }
}

impl TokenMask for GrammarMask {
    fn allow(&mut self, generated: &[u32], allowed: &mut AllowedTokens) -> metal_candle::Result<()> {
        let start = Instant::now();
        self.next(generated, allowed)?;
        self.spent += start.elapsed();
        let tokens = u32::try_from(generated.len()).unwrap_or(u32::MAX);
        if self.spent > TIME + TIME_PER_TOKEN.saturating_mul(tokens) {
            return Err(self.failed("the grammar takes too long for this text"));
        }
        Ok(())
    }

    fn fork(&self) -> Box<dyn TokenMask> {
        let (matcher, vocabulary) = (self.matcher.deep_clone(), Arc::clone(&self.vocabulary));
        Box::new(Self { matcher, vocabulary, consumed: self.consumed, spent: self.spent })
    }
}
