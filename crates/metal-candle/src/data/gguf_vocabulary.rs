//! Reads and checks the tokens of a GGUF file, with their types and scores.

use crate::error::{Error, Result};
use crate::files::{END_MARKS, GgufFile, GgufValue};
use std::borrow::Cow;
use std::collections::HashMap;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

/// Longest token that [`Vocabulary::derived_merges`] splits, in bytes. Trying all splits takes quadratic time.
pub(super) const MAX_DIVIDED_BYTES: usize = 4096;

/// The type of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    /// Text; also undefined and unused tokens.
    Normal,
    /// Replaces text without a token.
    Unknown,
    /// A mark such as `<|im_end|>`.
    Control,
    /// Text that is never split.
    UserDefined,
    /// One byte, written `<0xNN>`.
    Byte,
}

/// The tokens of a GGUF file.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    file: &'a GgufFile,
    tokens: Vec<Cow<'a, str>>,
    types: Vec<TokenType>,
    ids: HashMap<String, u32>,
}

impl<'a> Vocabulary<'a> {
    /// The tokens of `file`.
    ///
    /// # Errors
    /// There are no tokens, two are equal, or their types are damaged.
    pub(super) fn of(file: &'a GgufFile) -> Result<Self> {
        let texts = file.texts(TOKENS)?.unwrap_or_default();
        if texts.is_empty() {
            return Err(wrong(file, TOKENS, "expected a list of tokens, found none"));
        }
        let named = texts.into_iter().enumerate().map(|(id, text)| match text {
            // llama.cpp's name for an empty token
            "" => Cow::from(format!("[EMPTY_{id}]")),
            text => Cow::from(text),
        });
        let tokens: Vec<Cow<'a, str>> = named.collect();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0_u32..) {
            if let Some(first) = ids.insert(token.to_string(), id) {
                return Err(wrong(
                    file,
                    TOKENS,
                    format!("expected distinct tokens, found `{token}` as {first} and {id}"),
                ));
            }
        }
        let types = types(file, tokens.len())?;
        let mut vocabulary = Self { file, tokens, types: Vec::new(), ids };
        vocabulary.types = match types {
            Some(types) => types,
            None => vocabulary.types_of_named()?,
        };
        for end in END_MARKS {
            if let Some(id) = vocabulary.id(end) {
                // llama.cpp corrects the type as well
                vocabulary.types[id as usize] = TokenType::Control;
            }
        }
        Ok(vocabulary)
    }

    /// The types of tokens in a file without types: tokens with a named id are control tokens.
    fn types_of_named(&self) -> Result<Vec<TokenType>> {
        let mut types = vec![TokenType::Normal; self.tokens.len()];
        for name in ["bos", "eos", "eot", "eom", "padding"] {
            if let Some(id) = self.named_id(name)? {
                types[id as usize] = TokenType::Control;
            }
        }
        Ok(types)
    }

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens with their ids and types.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenType)> {
        (0..).zip(&self.tokens).zip(&self.types).map(|((id, token), kind)| (id, token.as_ref(), *kind))
    }

    /// The id of a token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token of an id.
    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(AsRef::as_ref)
    }

    /// The id that `tokenizer.ggml.NAME_token_id` holds.
    ///
    /// # Errors
    /// The value is not the id of a token.
    pub(super) fn named_id(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.file.size(&key)? else { return Ok(None) };
        let found = u32::try_from(id).ok().filter(|_| id < self.tokens.len());
        found.map(Some).ok_or_else(|| {
            wrong(
                self.file,
                &key,
                format!("expected an id below {}, the number of tokens, found {id}", self.tokens.len()),
            )
        })
    }

    /// The pairs of `tokenizer.ggml.merges`, if there are any.
    ///
    /// # Errors
    /// A pair is not two tokens that make a third one.
    pub(super) fn merges(&self) -> Result<Option<Vec<(&'a str, &'a str)>>> {
        let Some(lines) = self.file.texts(MERGES)? else { return Ok(None) };
        let mut merges = Vec::with_capacity(lines.len());
        for (index, line) in lines.into_iter().enumerate() {
            // the first token may be a space
            let space = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let Some((first, second)) = space.map(|at| (&line[..at], &line[at + 1..])) else {
                let message = format!("entry {index}: expected two tokens with a space between them, found `{line}`");
                return Err(wrong(self.file, MERGES, message));
            };
            let merged = format!("{first}{second}");
            if let Some(token) = [first, second, &merged].into_iter().find(|token| !self.ids.contains_key(*token)) {
                let message = format!("entry {index}: expected tokens of `{TOKENS}`, found `{token}` in `{line}`");
                return Err(wrong(self.file, MERGES, message));
            }
            merges.push((first, second));
        }
        Ok(Some(merges))
    }

    /// The scores of the tokens.
    ///
    /// # Errors
    /// The number of scores is not the number of tokens.
    pub(super) fn scores(&self) -> Result<Vec<f64>> {
        let expected = self.tokens.len();
        let values = self.file.list(SCORES)?.unwrap_or_default();
        if values.len() != expected {
            let message = format!("expected {expected} scores, one for each token, found {}", values.len());
            return Err(wrong(self.file, SCORES, message));
        }
        let score = |value: &GgufValue| match value {
            GgufValue::Float(score) if !score.is_nan() => Ok(*score),
            GgufValue::Integer(score) => Ok(*score as f64),
            other => Err(wrong(self.file, SCORES, format!("expected numbers, found {other:?}"))),
        };
        values.iter().map(score).collect()
    }

    /// All pairs of tokens that make a third token, by descending score of the third.
    ///
    /// Special, user-defined and byte tokens are excluded.
    ///
    /// # Errors
    /// A token is too long.
    pub(super) fn derived_merges(&self, scores: &[f64]) -> Result<Vec<(&str, &str)>> {
        let is_text = |token: &str| self.id(token).is_some_and(|id| self.types[id as usize] == TokenType::Normal);
        let mut merges = Vec::new();
        for ((_, token, kind), score) in self.iter().zip(scores) {
            if kind != TokenType::Normal {
                continue;
            }
            if token.len() > MAX_DIVIDED_BYTES {
                let message =
                    format!("expected tokens of at most {MAX_DIVIDED_BYTES} bytes, found one of {}", token.len());
                return Err(wrong(self.file, TOKENS, message));
            }
            for (first, second) in divisions(token) {
                if is_text(first) && is_text(second) {
                    merges.push((*score, first, second));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
        Ok(merges.into_iter().map(|(_, first, second)| (first, second)).collect())
    }
}

/// All ways to split a token in two, shortest first part first.
pub(super) fn divisions(token: &str) -> impl Iterator<Item = (&str, &str)> {
    token.char_indices().skip(1).map(|(at, _)| token.split_at(at))
}

/// The types that a file lists.
fn types(file: &GgufFile, num_tokens: usize) -> Result<Option<Vec<TokenType>>> {
    let Some(values) = file.list(TYPES)? else { return Ok(None) };
    if values.len() != num_tokens {
        let message = format!("expected {num_tokens} types, one for each token, found {}", values.len());
        return Err(wrong(file, TYPES, message));
    }
    let parsed = values.iter().map(|value| match value {
        GgufValue::Integer(0 | 1 | 5) => Ok(TokenType::Normal),
        GgufValue::Integer(2) => Ok(TokenType::Unknown),
        GgufValue::Integer(3) => Ok(TokenType::Control),
        GgufValue::Integer(4) => Ok(TokenType::UserDefined),
        GgufValue::Integer(6) => Ok(TokenType::Byte),
        other => Err(wrong(file, TYPES, format!("expected types from 0 to 6, found {other:?}"))),
    });
    parsed.collect::<Result<_>>().map(Some)
}

/// An error about a metadata key.
pub(super) fn wrong(file: &GgufFile, key: &str, message: impl AsRef<str>) -> Error {
    Error::format(file.path(), format!("`{key}`: {}", message.as_ref()))
}
