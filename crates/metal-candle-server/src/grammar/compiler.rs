//! Compiles grammars to token masks for a vocabulary.

use super::error::GrammarError;
use super::kind::Grammar;
use super::mask::GrammarMask;
use super::message::compile_message;
use super::vocabulary::Vocabulary;
use super::{gbnf, schema};
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use metal_candle::data::Tokenizer;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Stack size of a compiling thread. Schemas and grammars are parsed recursively.
const STACK_BYTES: usize = 256 << 20;
/// Maximum number of compiling threads, including threads past their deadline.
const MAX_COMPILING: usize = 2;
/// Maximum nesting of brackets in a Lark grammar.
const MAX_NESTING: usize = 100;
/// Maximum number of rules in a Lark grammar, which are parsed recursively.
const MAX_RULES: usize = 1000;
/// Maximum size of a converted grammar, in bytes.
const MAX_CONVERTED: usize = 256 << 10;

/// The limits of grammars in requests.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub(crate) struct GrammarLimits {
    /// Maximum size of a schema, expression or grammar, in bytes.
    pub(crate) max_bytes: usize,
    /// Longest time to compile a grammar.
    pub(crate) deadline: Duration,
    /// Maximum number of states in a sequence's lexer. A state needs 1 to 2 KB.
    pub(crate) max_lexer_states: usize,
    /// The number of cached grammars.
    pub(crate) cached: usize,
}

impl Default for GrammarLimits {
    fn default() -> Self {
        Self { max_bytes: 64 << 10, deadline: Duration::from_secs(2), max_lexer_states: 50_000, cached: 64 }
    }
}

/// Compiles grammars for one model. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct GrammarCompiler {
    inner: Arc<Inner>,
}

struct Inner {
    factory: ParserFactory,
    vocabulary: Arc<Vocabulary>,
    limits: GrammarLimits,
    cache: Mutex<VecDeque<(Key, Arc<Mutex<Matcher>>)>>,
    /// The number of compiling threads.
    compiling: AtomicUsize,
}

type Key = [u8; 32];

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").field("limits", &self.inner.limits).finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// Creates a compiler for logits of width `vocab_size` and texts that end with one of `end_ids`.
    ///
    /// # Errors
    /// The tokens have no fixed bytes, or `end_ids` is empty.
    pub(crate) fn new(tokenizer: &Tokenizer, vocab_size: usize, end_ids: &[u32]) -> Result<Self, GrammarError> {
        Self::with_limits(tokenizer, vocab_size, end_ids, GrammarLimits::default())
    }

    /// As [`GrammarCompiler::new`], with other limits.
    ///
    /// # Errors
    /// As [`GrammarCompiler::new`].
    pub(crate) fn with_limits(
        tokenizer: &Tokenizer,
        vocab_size: usize,
        end_ids: &[u32],
        limits: GrammarLimits,
    ) -> Result<Self, GrammarError> {
        let vocabulary = Vocabulary::new(tokenizer, vocab_size, end_ids)?;
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&vocabulary.env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Invalid(compile_message(&error.to_string())))?;
        factory.quiet();
        let parser = factory.limits_mut();
        parser.max_lexer_states = limits.max_lexer_states;
        parser.max_grammar_size = MAX_GRAMMAR_SIZE;
        parser.verbose_errors = false;
        let inner = Inner {
            factory,
            vocabulary: Arc::new(vocabulary),
            limits,
            cache: Mutex::default(),
            compiling: AtomicUsize::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Compiles a grammar to a mask at the start of a text. Blocks for up to [`GrammarLimits::deadline`].
    ///
    /// # Errors
    /// The grammar is invalid, too complex or not supported, or too many grammars are compiling.
    pub(crate) fn compile(&self, grammar: &Grammar) -> Result<GrammarMask, GrammarError> {
        let source = Source::new(grammar, self.inner.limits.max_bytes)?;
        let key = source.key();
        let matcher = match self.inner.cached(&key) {
            Some(matcher) => matcher,
            None => self.compile_source(source, key)?,
        };
        let matcher = matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Ok(GrammarMask::new(matcher, Arc::clone(&self.inner.vocabulary)))
    }

    fn compile_source(&self, source: Source, key: Key) -> Result<Arc<Mutex<Matcher>>, GrammarError> {
        let slot = Slot::take(&self.inner).ok_or(GrammarError::Busy)?;
        let (sender, receiver) = sync_channel(1);
        let compile = move || {
            let result = slot.inner.build(source);
            if let Ok(matcher) = &result {
                slot.inner.store(key, Arc::clone(matcher));
            }
            drop(slot);
            // the receiver is gone after the deadline
            let _ = sender.send(result);
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn(compile);
        thread.map_err(|_| GrammarError::Busy)?;
        let failed = |message: &str| Err(GrammarError::Invalid(message.into()));
        match receiver.recv_timeout(self.inner.limits.deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => failed("the grammar takes too long to compile"),
            Err(RecvTimeoutError::Disconnected) => failed("the grammar cannot be compiled"),
        }
    }
}

/// Maximum number of symbols in the rules of a grammar.
const MAX_GRAMMAR_SIZE: usize = 100_000;

impl Inner {
    fn build(&self, source: Source) -> Result<Arc<Mutex<Matcher>>, GrammarError> {
        let invalid = |error: String| GrammarError::Invalid(compile_message(&error));
        let parser =
            self.factory.create_parser(source.into_grammar()).map_err(|error| invalid(format!("{error:#}")))?;
        let mut matcher = Matcher::new(Ok(parser));
        // this fails if the grammar matches no text, and fills caches
        let mask = matcher.compute_mask_or_eos().map_err(|error| invalid(error.to_string()))?;
        // an excessive number of alternatives only shows after a token
        let mut probe = matcher.deep_clone();
        if let Some(first) = mask.first_bit_set().filter(|_| !probe.is_stopped()) {
            let next = probe.consume_token(first as u32).and_then(|()| probe.compute_mask_or_eos());
            next.map_err(|_| GrammarError::Invalid("the grammar is too complex".into()))?;
        }
        Ok(Arc::new(Mutex::new(matcher)))
    }

    fn cached(&self, key: &Key) -> Option<Arc<Mutex<Matcher>>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let index = cache.iter().position(|(known, _)| known == key)?;
        let entry = cache.remove(index)?;
        let matcher = Arc::clone(&entry.1);
        cache.push_back(entry);
        Some(matcher)
    }

    fn store(&self, key: Key, matcher: Arc<Mutex<Matcher>>) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|(known, _)| *known != key);
        cache.push_back((key, matcher));
        while cache.len() > self.limits.cached {
            cache.pop_front();
        }
    }
}

/// A permit for one compiling thread.
struct Slot {
    inner: Arc<Inner>,
}

impl Slot {
    fn take(inner: &Arc<Inner>) -> Option<Self> {
        let count = |running: usize| (running < MAX_COMPILING).then_some(running + 1);
        inner.compiling.fetch_update(Ordering::AcqRel, Ordering::Acquire, count).ok()?;
        Some(Self { inner: Arc::clone(inner) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.inner.compiling.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A grammar for llguidance.
enum Source {
    Schema(Value),
    Regex(String),
    Lark(String),
    Around(String, Box<Source>),
}

/// The name of the inner grammar of [`Grammar::Around`].
const INNER: &str = "answer";

impl Source {
    fn new(grammar: &Grammar, max_bytes: usize) -> Result<Self, GrammarError> {
        Ok(match grammar {
            Grammar::JsonObject => Self::Schema(schema::prepared(&json!({"type": "object"}), max_bytes)?),
            Grammar::JsonSchema(value) => Self::Schema(schema::prepared(value, max_bytes)?),
            Grammar::Regex(text) => Self::Regex(regex(text, max_bytes)?),
            Grammar::Lark(text) => {
                check_lark(text, max_bytes)?;
                Self::Lark(text.clone())
            }
            Grammar::Gbnf(text) => {
                check_size(text, max_bytes)?;
                let lark = gbnf::to_lark(text)?;
                check_lark(&lark, MAX_CONVERTED)?;
                Self::Lark(lark)
            }
            Grammar::Around(lark, inner) => {
                check_lark(lark, max_bytes)?;
                Self::Around(lark.clone(), Box::new(Self::new(inner, max_bytes)?))
            }
        })
    }

    fn key(&self) -> Key {
        let hash = |tag: u8| Sha256::new().chain_update([tag]);
        let hash = match self {
            Self::Schema(schema) => hash(0).chain_update(schema.to_string()),
            Self::Regex(text) => hash(1).chain_update(text),
            Self::Lark(text) => hash(2).chain_update(text),
            Self::Around(text, inner) => hash(3).chain_update(inner.key()).chain_update(text),
        };
        hash.finalize().into()
    }

    fn into_grammar(self) -> TopLevelGrammar {
        match self {
            Self::Schema(schema) => TopLevelGrammar::from_json_schema(schema),
            Self::Regex(text) => TopLevelGrammar::from_regex(&text),
            Self::Lark(text) => TopLevelGrammar::from_lark(text),
            Self::Around(text, inner) => {
                let mut all =
                    TopLevelGrammar::from_grammar(GrammarWithLexer { name: None, ..GrammarWithLexer::from_lark(text) });
                for grammar in inner.into_grammar().grammars {
                    all.grammars.push(GrammarWithLexer { name: Some(INNER.into()), ..grammar });
                }
                all
            }
        }
    }
}

fn check_size(text: &str, max_bytes: usize) -> Result<(), GrammarError> {
    let bytes = text.len();
    if bytes > max_bytes {
        return Err(GrammarError::Invalid(format!("the grammar has {bytes} bytes, expected at most {max_bytes}")));
    }
    if text.trim().is_empty() {
        return Err(GrammarError::Invalid("the grammar is empty".into()));
    }
    Ok(())
}

/// Removes the anchors of a regular expression, which always matches the whole text.
fn regex(text: &str, max_bytes: usize) -> Result<String, GrammarError> {
    check_size(text, max_bytes)?;
    let is_escaped = |text: &str| text.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1;
    if is_escaped(text) {
        return Err(GrammarError::Invalid("the regular expression ends with a backslash".into()));
    }
    let mut text = text;
    if !text.contains('|') {
        text = text.strip_prefix('^').unwrap_or(text);
        text = text.strip_suffix('$').filter(|rest| !is_escaped(rest)).unwrap_or(text);
    }
    if text.is_empty() {
        return Err(GrammarError::Invalid("the regular expression matches only the empty text".into()));
    }
    Ok(text.to_string())
}

/// Checks the size of a grammar before it is parsed recursively.
fn check_lark(text: &str, max_bytes: usize) -> Result<(), GrammarError> {
    check_size(text, max_bytes)?;
    let (mut depth, mut rules): (usize, usize) = (0, 0);
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => skip_to(&mut bytes, b'"'),
            b'#' => while bytes.next_if(|&byte| byte != b'\n').is_some() {},
            b'/' if bytes.peek() == Some(&b'/') => while bytes.next_if(|&byte| byte != b'\n').is_some() {},
            b'/' => skip_to(&mut bytes, b'/'),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b':' if depth == 0 => rules += 1,
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(GrammarError::Invalid(format!("the grammar has more than {MAX_NESTING} nested brackets")));
        }
        if rules > MAX_RULES {
            return Err(GrammarError::Invalid(format!("the grammar has more than {MAX_RULES} rules")));
        }
    }
    Ok(())
}

/// Skips to the end of a text with escapes.
fn skip_to(bytes: &mut impl Iterator<Item = u8>, end: u8) {
    while let Some(byte) = bytes.next() {
        if byte == b'\\' {
            bytes.next();
        } else if byte == end {
            return;
        }
    }
}
