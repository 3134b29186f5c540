//! Converts the vocabulary of a model to a trie of token bytes, for grammars.

use super::error::GrammarError;
use metal_candle::data::Tokenizer;
use metal_candle::inference::AllowedTokens;
use std::sync::Arc;
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

const BITS: usize = u32::BITS as usize;
/// Longest token in bytes; the trie does not support longer ones.
const MAX_TOKEN_BYTES: usize = 1000;
/// Maximum number of tokens: ids have 24 bits in the trie.
const MAX_TOKENS: usize = 1 << 22;
/// Added tokens that mark parts of an answer although they are not special.
const MARKERS: [&str; 12] = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[THINK]",
    "[/THINK]",
];

/// The tokens of a model.
pub(super) struct Vocabulary {
    /// The trie of the tokens' bytes.
    pub(super) env: TokEnv,
    pub(super) end_ids: Vec<u32>,
    pub(super) size: usize,
    /// The ids with a token.
    known: Vec<u32>,
    /// The ids of tokens that start with a space, if decoding drops a space at the start of a text.
    blank: Option<Vec<u32>>,
}

impl Vocabulary {
    pub(super) fn new(tokenizer: &Tokenizer, size: usize, end_ids: &[u32]) -> Result<Self, GrammarError> {
        let refuse =
            |message: &str| Err(GrammarError::Invalid(format!("this model does not support grammars: {message}")));
        if size == 0 || size > MAX_TOKENS {
            return refuse("its vocabulary is empty or too large");
        }
        let end_ids: Vec<u32> = end_ids.iter().copied().filter(|&id| (id as usize) < size).collect();
        let Some(&end) = end_ids.first() else { return refuse("it has no end-of-text token") };
        let mut known = vec![0u32; size.div_ceil(BITS)];
        let mut blank = known.clone();
        let insert = |words: &mut [u32], id: usize| words[id / BITS] |= 1 << (id % BITS);
        let words: Vec<Vec<u8>> = (0..size)
            .map(|index| {
                let id = index as u32;
                let Some(bytes) = word(tokenizer, id, end_ids.contains(&id)) else { return Vec::new() };
                insert(&mut known, index);
                if bytes.first() == Some(&b' ') {
                    insert(&mut blank, index);
                }
                bytes
            })
            .collect();
        if words.iter().filter(|word| !word.is_empty()).count() < 2 {
            return refuse("the bytes of its tokens are unknown");
        }
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, end), &words).with_eos_tokens(&end_ids);
        let blank = tokenizer.drops_first_blank().then_some(blank);
        Ok(Self { env: Arc::new(Env { trie }), end_ids, size, known, blank })
    }

    /// Allows the existing tokens of `mask`. At the start of a text, a space that decoding would drop is not allowed.
    pub(super) fn copy(&self, mask: &[u32], is_start: bool, allowed: &mut AllowedTokens) {
        for (index, word) in allowed.words_mut().iter_mut().enumerate() {
            let at = |words: &[u32]| words.get(index).copied().unwrap_or(0);
            let blank = self.blank.as_deref().filter(|_| is_start).map_or(0, at);
            *word = at(mask) & at(&self.known) & !blank;
        }
    }
}

/// The bytes of a token in the trie. Control tokens start with a byte that does not occur in text.
fn word(tokenizer: &Tokenizer, id: u32, is_end: bool) -> Option<Vec<u8>> {
    let added = tokenizer.raw().get_added_vocabulary().simple_id_to_token(id);
    let is_control = |name: &str| {
        tokenizer.is_special(id) || (name.starts_with("<|") && name.ends_with("|>")) || MARKERS.contains(&name)
    };
    let control = match added {
        Some(name) if is_end || is_control(&name) => Some(name),
        _ if is_end => Some(tokenizer.id_to_token(id).unwrap_or_else(|| format!("<end-{id}>"))),
        _ => None,
    };
    let bytes = match control {
        Some(name) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
        None => tokenizer.token_bytes(id)?,
    };
    Some(bytes).filter(|bytes| !bytes.is_empty() && bytes.len() <= MAX_TOKEN_BYTES)
}

/// A tokenizer for llguidance. It does not force tokens: the model selects the tokenization of a forced text.
struct Env {
    trie: TokTrie,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
