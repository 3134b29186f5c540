//! [`Speculation`]: how the next tokens are drafted.

use crate::error::{Error, Result};

/// How the next tokens of a sequence are drafted, so that one pass can compute several.
///
/// A draft never changes an answer: every token is sampled from the logits of the model, and drafts that differ from the
/// sampled tokens are discarded. On the CPU, tokens and log-probabilities are identical with and without drafts. On Metal and
/// CUDA, drafts are used only while steps with drafts are measured to be faster than steps without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Speculation {
    /// Each step computes one token.
    #[default]
    Off,
    /// Drafts the tokens that followed an earlier occurrence of the last tokens: in the predicted text, else in the prompt and
    /// the answer so far (prompt lookup). A sequence that rejects most of its drafts stops drafting for a while.
    Lookup {
        /// Maximum number of tokens in a draft, 1 to 64.
        max_tokens: usize,
        /// Minimum number of last tokens that must match, at least 1.
        min_ngram: usize,
        /// Maximum number of last tokens to compare, at least `min_ngram` and at most 64. The longest match is used.
        max_ngram: usize,
    },
    /// Drafts the rest of the predicted text, then the most probable tokens of the draft model of the
    /// [`Scheduler`](super::Scheduler). A sequence that rejects most of its drafts stops drafting for a while.
    DraftModel {
        /// Maximum number of tokens in a draft, 1 to 64.
        max_tokens: usize,
    },
}

impl Speculation {
    /// Prompt lookup with drafts of up to 4 tokens, matching the last 2 to 4 tokens.
    pub const LOOKUP: Self = Self::Lookup { max_tokens: 4, min_ngram: 2, max_ngram: 4 };

    /// Maximum number of tokens in a draft or a match.
    const MAX_TOKENS: usize = 64;

    /// Checks the range of every setting.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn validate(&self) -> Result<()> {
        let (max_tokens, min_ngram, max_ngram) = match *self {
            Self::Off => return Ok(()),
            Self::Lookup { max_tokens, min_ngram, max_ngram } => (max_tokens, min_ngram, max_ngram),
            Self::DraftModel { max_tokens } => (max_tokens, 1, 1),
        };
        let most = Self::MAX_TOKENS;
        for (name, found, least) in
            [("max_tokens", max_tokens, 1), ("min_ngram", min_ngram, 1), ("max_ngram", max_ngram, min_ngram)]
        {
            if !(least..=most).contains(&found) {
                let message = format!("`{name}`: expected {least} to {most}, found {found}");
                return Err(Error::argument("speculation", message));
            }
        }
        Ok(())
    }
}
