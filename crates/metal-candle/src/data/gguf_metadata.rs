//! Converts a tokenizer and its chat template to GGUF metadata, as llama.cpp's converter does.

use super::gguf_scores::scores_of;
use super::gguf_splitting::{padding, shortened, splitting_of};
use super::{ChatTemplate, Tokenizer};
use crate::error::{Error, Result};
use crate::files::{END_MARKS, GgufValue};
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use tokenizers::AddedToken;

/// The score of a token without merges, and of an embedding row without a token.
const ADDED_SCORE: f64 = -1000.0;
const PADDING_SCORE: f64 = -10000.0;
/// The character for a space in `SentencePiece` tokens.
const SPACE: &str = "\u{2581}";
/// Marks of Gemma 4 that llama.cpp treats as text, so that it can parse the text between them.
const GEMMA4_TEXT: [&str; 7] =
    ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|\"|>"];

/// A tokenizer as metadata of a GGUF file.
///
/// Integers are `u32`, integers in lists are `i32`, and floats are `f32`.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTokenizer {
    /// Keys and values, in the order in which llama.cpp's converter writes them.
    pub metadata: Vec<(String, GgufValue)>,
    /// Notes on properties of the tokenizer that GGUF metadata cannot express.
    pub notes: Vec<String>,
}

/// The kind of vocabulary in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece { add_space_prefix: bool },
    Gemma4,
}

/// The token types of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Tokenizer {
    /// Converts the tokenizer and its chat template to the `tokenizer.*` metadata of a GGUF file.
    ///
    /// `num_rows` is the number of rows of the model's embedding; rows without a token get names such as `[PAD7]`. `config` is
    /// the model's `config.json` or null: its special token ids are used where the tokenizer names none.
    ///
    /// # Errors
    /// GGUF cannot express the tokenizer, or a token has no row in the embedding.
    pub fn to_gguf(&self, num_rows: usize, config: &Value) -> Result<GgufTokenizer> {
        let wrong = |message: String| Error::format(self.path(), message);
        let json = self.raw().to_string(false).map_err(|error| wrong(error.to_string()))?;
        let json: Value = serde_json::from_str(&json).map_err(|error| wrong(error.to_string()))?;
        let mut notes = Vec::new();
        let kind = Kind::of(&json, &mut notes).map_err(wrong)?;
        let mut written = Written { metadata: Vec::new() };
        let vocabulary = Vocabulary::of(self, &json, kind, num_rows).map_err(wrong)?;
        let pairs = pairs(&json["model"]["merges"]);
        match kind {
            Kind::ByteLevel => {
                let splitting = splitting_of(self, &json).map_err(wrong)?;
                notes.extend(splitting.notes);
                written.text("model", "gpt2");
                written.text("pre", splitting.name);
                vocabulary.write_tokens(&mut written);
                vocabulary.write_types(&mut written);
                written.list("merges", merges(&pairs).map_err(wrong)?.into_iter().map(GgufValue::Text));
            }
            Kind::SentencePiece { .. } => {
                let scores = vocabulary.scores(&pairs).map_err(wrong)?;
                written.text("model", "llama");
                written.text("pre", "default");
                vocabulary.write_tokens(&mut written);
                written.list("scores", scores.into_iter().map(GgufValue::Float));
                vocabulary.write_types(&mut written);
            }
            Kind::Gemma4 => {
                written.text("model", "gemma4");
                vocabulary.write_tokens(&mut written);
                written.list("scores", vocabulary.tokens.iter().map(|_| GgufValue::Float(ADDED_SCORE)));
                vocabulary.write_types(&mut written);
                written.list("merges", merges(&pairs).map_err(wrong)?.into_iter().map(GgufValue::Text));
            }
        }
        notes.extend(vocabulary.notes);
        self.write_special(&json, config, num_rows, &mut written, &mut notes)?;
        match kind {
            Kind::ByteLevel => {}
            Kind::SentencePiece { add_space_prefix } => written.flag("add_space_prefix", add_space_prefix),
            Kind::Gemma4 => written.flag("add_space_prefix", false),
        }
        if let Some(template) = self.chat_template() {
            written.templates(template);
        }
        Ok(GgufTokenizer { metadata: written.metadata, notes })
    }

    /// Writes the ids of the special tokens, and which of them are added to a text.
    fn write_special(
        &self,
        json: &Value,
        config: &Value,
        num_rows: usize,
        written: &mut Written,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        let id_of = |token: Option<&str>, key: &str| {
            let named = token.and_then(|token| self.token_to_id(token)).map(u64::from);
            let listed = || config[key].as_u64().or_else(|| config[key].get(0)?.as_u64());
            named.or_else(listed).filter(|&id| id < num_rows as u64)
        };
        let text = "a";
        let (with, without) = (self.encode(text, true)?, self.encode(text, false)?);
        let around = (0..=with.len().saturating_sub(without.len()))
            .find(|&at| with[at..].starts_with(&without))
            .map_or((&with[..0], &with[..0]), |at| (&with[..at], &with[at + without.len()..]));
        let (before, after) = around;
        let single = |ids: &[u32]| if let [id] = ids { Some(u64::from(*id)) } else { None };
        let bos = id_of(self.bos_token(), "bos_token_id");
        // without a named BOS token, llama.cpp's converter uses the token that comes before every text
        let bos = if self.bos_token().is_none() { single(before).or(bos) } else { bos };
        let eos = id_of(self.eos_token(), "eos_token_id").or_else(|| single(after));
        let (add_bos, add_eos) = (bos.is_some() && single(before) == bos, eos.is_some() && single(after) == eos);
        if (!before.is_empty() && !add_bos) || (!after.is_empty() && !add_eos) {
            let name = |ids: &[u32]| ids.iter().filter_map(|id| self.id_to_token(*id)).collect::<Vec<_>>().join(" ");
            notes.push(format!(
                "the tokenizer adds `{}` before and `{}` after a text; a GGUF file can only express its BOS and EOS tokens there",
                name(before),
                name(after),
            ));
        }
        let unknown = self.unk_token().or_else(|| json["model"]["unk_token"].as_str());
        let end = self.end_of_turn_id().map(u64::from);
        // programs also find end-of-turn tokens by their text
        let eot = end.filter(|&id| Some(id) != eos && !self.is_known_end(id));
        for (name, id) in [
            ("bos", bos),
            ("eos", eos),
            ("eot", eot),
            ("unknown", id_of(unknown, "unk_token_id")),
            ("padding", id_of(self.pad_token(), "pad_token_id")),
        ] {
            if let Some(id) = id {
                written.value(&format!("{name}_token_id"), GgufValue::Integer(i128::from(id)));
            }
        }
        written.flag("add_bos_token", add_bos);
        written.flag("add_eos_token", add_eos);
        Ok(())
    }

    /// Whether programs know from its text that a token ends a turn.
    fn is_known_end(&self, id: u64) -> bool {
        let token = u32::try_from(id).ok().and_then(|id| self.id_to_token(id));
        token.is_some_and(|token| END_MARKS.contains(&token.as_str()))
    }
}

impl Kind {
    fn of(json: &Value, notes: &mut Vec<String>) -> std::result::Result<Self, String> {
        let model = &json["model"];
        match model["type"].as_str() {
            Some("BPE") => {}
            other => {
                let found = other.unwrap_or("another model");
                return Err(format!(
                    "expected a tokenizer with a model `BPE`, found `{found}`, which cannot be written to a GGUF file"
                ));
            }
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if let Some(found) = model[key].as_str().filter(|text| !text.is_empty()) {
                return Err(format!("expected no `{key}`, as GGUF has no key for it; found `{found}`"));
            }
        }
        if model["byte_fallback"] != true {
            return Ok(Self::ByteLevel);
        }
        let spaces = Spaces::of(json)?;
        let has = |token: &str| !model["vocab"][token].is_null();
        if has("<|turn>") && has("<turn|>") && !spaces.prefix {
            return Ok(Self::Gemma4);
        }
        if spaces.only_first {
            notes.push(
                "the tokenizer adds a space before a text only, not after special tokens; a GGUF file cannot express this, so text right \
                after a special token may get other tokens"
                    .to_string(),
            );
        }
        Ok(Self::SentencePiece { add_space_prefix: spaces.prefix })
    }
}

/// How a tokenizer with byte fallback replaces spaces with `▁`.
#[derive(Debug, Default)]
struct Spaces {
    is_replaced: bool,
    /// Whether a space is added before texts.
    prefix: bool,
    /// Whether it is added before the first part of a text only.
    only_first: bool,
}

impl Spaces {
    fn of(json: &Value) -> std::result::Result<Self, String> {
        let mut spaces = Self::default();
        spaces.add(&json["normalizer"])?;
        spaces.add(&json["pre_tokenizer"])?;
        if spaces.is_replaced {
            return Ok(spaces);
        }
        Err(format!("expected a normalizer that replaces spaces by `{SPACE}` as SentencePiece does, found none"))
    }

    fn add(&mut self, step: &Value) -> std::result::Result<(), String> {
        let inner = step["normalizers"].as_array().or_else(|| step["pretokenizers"].as_array());
        if let Some(steps) = inner {
            return steps.iter().try_for_each(|step| self.add(step));
        }
        match step["type"].as_str() {
            None if step.is_null() => {}
            Some("Prepend") if step["prepend"] == SPACE && !self.is_replaced => self.prefix = true,
            Some("Replace") if step["content"] == SPACE && step["pattern"]["String"] == " " => self.is_replaced = true,
            Some("Metaspace") if step["replacement"] == SPACE && step["split"] == false && !self.is_replaced => {
                self.is_replaced = true;
                self.prefix = step["prepend_scheme"] != "never";
                self.only_first = step["prepend_scheme"] == "first";
            }
            // the spaces have been replaced, so this does not split, and no token crosses a line break
            Some("Split")
                if self.is_replaced && (step["pattern"]["String"] == " " || step["pattern"]["Regex"] == "\n+") => {}
            _ => {
                let found = shortened(&step.to_string());
                return Err(format!(
                    "expected the normalizer and pre-tokenizer of a SentencePiece vocabulary, as GGUF has no key for others; found {found}"
                ));
            }
        }
        Ok(())
    }
}

/// The tokens of the GGUF file.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<TokenType>,
    notes: Vec<String>,
}

impl Vocabulary {
    fn of(tokenizer: &Tokenizer, json: &Value, kind: Kind, num_rows: usize) -> std::result::Result<Self, String> {
        let mut found: Vec<Option<String>> = Vec::new();
        let size =
            u32::try_from(num_rows).map_err(|_| format!("expected at most {} rows, found {num_rows}", u32::MAX))?;
        let mut all: Vec<(String, u32)> = tokenizer.raw().get_vocab(true).into_iter().collect();
        all.sort_unstable_by(|a, b| {
            a.1.cmp(&b.1).then_with(|| is_byte(&b.0).cmp(&is_byte(&a.0))).then_with(|| a.0.cmp(&b.0))
        });
        if let Some((token, id)) = all.last().filter(|(_, id)| *id >= size) {
            return Err(format!(
                "expected ids below {num_rows}, the number of rows of the embedding, found `{token}` with id {id}: use the tokenizer \
                 of this model"
            ));
        }
        found.resize(num_rows, None);
        for (token, id) in all {
            found[id as usize].get_or_insert(token);
        }
        let base = json["model"]["vocab"].as_object();
        let added: HashMap<u32, AddedToken> = tokenizer.raw().get_added_tokens_decoder().into_iter().collect();
        let unknown = json["model"]["unk_token"].as_str();
        let is_base = |token: &str| base.is_some_and(|base| base.contains_key(token));
        let known: HashSet<String> = found.iter().flatten().cloned().collect();
        let (mut tokens, mut types) = (Vec::with_capacity(num_rows), Vec::with_capacity(num_rows));
        for (token, id) in found.into_iter().zip(0_u32..) {
            let (token, kind) = match (token, added.get(&id)) {
                (None, _) => (unused_name(id, &known), TokenType::Unused),
                (Some(token), Some(added)) => {
                    let kind = added_type(added, kind, unknown, is_base(&added.content));
                    // these tokens are matched before spaces are replaced
                    let token = if kind == TokenType::UserDefined { token.replace(SPACE, " ") } else { token };
                    (token, kind)
                }
                (Some(token), None) if kind != Kind::ByteLevel && is_byte(&token) => (token, TokenType::Byte),
                (Some(token), None) if token == padding(id) => (token, TokenType::Unused),
                (Some(token), None) => (token, TokenType::Normal),
            };
            tokens.push(token);
            types.push(kind);
        }
        let mut seen = HashSet::with_capacity(tokens.len());
        if let Some(token) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
            return Err(format!("expected distinct tokens after `{SPACE}` became a space, found `{token}` twice"));
        }
        Ok(Self { notes: notes_of(&added), tokens, types })
    }

    fn scores(&self, merges: &[(String, String)]) -> std::result::Result<Vec<f64>, String> {
        let rows = || self.tokens.iter().zip(&self.types);
        let normal: Vec<Option<&str>> =
            rows().map(|(token, kind)| (*kind == TokenType::Normal).then_some(token.as_str())).collect();
        let mut scores = scores_of(&normal, merges)?;
        for (score, (_, kind)) in scores.iter_mut().zip(rows()) {
            match kind {
                TokenType::UserDefined => *score = ADDED_SCORE,
                TokenType::Unused => *score = PADDING_SCORE,
                _ => {}
            }
        }
        Ok(scores)
    }

    fn write_tokens(&self, written: &mut Written) {
        written.list("tokens", self.tokens.iter().cloned().map(GgufValue::Text));
    }

    fn write_types(&self, written: &mut Written) {
        written.list("token_type", self.types.iter().map(|kind| GgufValue::Integer(*kind as i128)));
    }
}

/// An unused token name for a row without a token.
fn unused_name(id: u32, known: &HashSet<String>) -> String {
    let mut name = padding(id);
    while known.contains(&name) {
        name.push('_');
    }
    name
}

/// The type of an added token.
fn added_type(added: &AddedToken, kind: Kind, unknown: Option<&str>, is_base: bool) -> TokenType {
    let content = added.content.as_str();
    match kind {
        Kind::Gemma4 if GEMMA4_TEXT.contains(&content) => TokenType::UserDefined,
        Kind::Gemma4 if is_byte(content) => TokenType::Byte,
        Kind::Gemma4 if !added.special => {
            if is_base {
                TokenType::Normal
            } else {
                TokenType::UserDefined
            }
        }
        Kind::SentencePiece { .. } if unknown == Some(content) => TokenType::Unknown,
        _ if added.special || looks_special(content) => TokenType::Control,
        _ => TokenType::UserDefined,
    }
}

/// Whether llama.cpp's converter treats a token as special although the tokenizer does not.
fn looks_special(token: &str) -> bool {
    let is_between = |start: &str, end: &str| token.starts_with(start) && token.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&token)
        || is_between("<|", "|>")
        || is_between("<｜", "｜>")
        || is_between("<unused", ">")
}

/// Whether a token represents one byte: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Notes on properties of added tokens that a GGUF file cannot express.
fn notes_of(added: &HashMap<u32, AddedToken>) -> Vec<String> {
    let mut strict: Vec<(&u32, &AddedToken)> =
        added.iter().filter(|(_, token)| token.lstrip || token.rstrip || token.single_word).collect();
    if strict.is_empty() {
        return Vec::new();
    }
    strict.sort_by_key(|(id, _)| **id);
    let names: Vec<String> = strict.iter().take(8).map(|(_, token)| format!("`{}`", token.content)).collect();
    let more =
        if strict.len() > names.len() { format!(" and {} more", strict.len() - names.len()) } else { String::new() };
    vec![format!(
        "{}{more}: these tokens include the spaces around them, or match whole words only, which a GGUF file cannot express; \
        llama.cpp assumes it for models whose `general.name` contains `phi-3`",
        names.join(", ")
    )]
}

/// The merges of a `tokenizer.json`.
fn pairs(merges: &Value) -> Vec<(String, String)> {
    let pair = |merge: &Value| match merge {
        Value::String(line) => line.split_once(' ').map(|(first, second)| (first.to_string(), second.to_string())),
        _ => Some((merge.get(0)?.as_str()?.to_string(), merge.get(1)?.as_str()?.to_string())),
    };
    merges.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// The merges as in a GGUF file: two tokens separated by a space.
fn merges(pairs: &[(String, String)]) -> std::result::Result<Vec<String>, String> {
    let line = |(first, second): &(String, String)| {
        let line = format!("{first} {second}");
        // readers split at the first space after the first character
        let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        if at == Some(first.len()) {
            return Ok(line);
        }
        Err(format!(
            "expected merges of tokens without spaces, as a GGUF file separates them by a space; found `{first}` and `{second}`"
        ))
    };
    pairs.iter().map(line).collect()
}

/// The metadata written so far.
struct Written {
    metadata: Vec<(String, GgufValue)>,
}

impl Written {
    fn value(&mut self, name: &str, value: GgufValue) {
        self.metadata.push((format!("tokenizer.ggml.{name}"), value));
    }

    fn text(&mut self, name: &str, text: &str) {
        self.value(name, GgufValue::Text(text.to_string()));
    }

    fn flag(&mut self, name: &str, flag: bool) {
        self.value(name, GgufValue::Flag(flag));
    }

    fn list(&mut self, name: &str, values: impl Iterator<Item = GgufValue>) {
        self.value(name, GgufValue::List(values.collect()));
    }

    fn templates(&mut self, template: &ChatTemplate) {
        let sources = template.sources();
        let is_default = |name: &str| name == "default" || sources.len() == 1;
        let mut names = Map::new();
        for (name, source) in sources.iter().filter(|(name, _)| !is_default(name)) {
            let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
            let name: String = name.chars().map(letter).collect();
            if names.insert(name.clone(), Value::Null).is_none() {
                self.metadata.push((format!("tokenizer.chat_template.{name}"), GgufValue::Text(source.clone())));
            }
        }
        if !names.is_empty() {
            let names = names.into_iter().map(|(name, _)| GgufValue::Text(name)).collect();
            self.metadata.push(("tokenizer.chat_templates".to_string(), GgufValue::List(names)));
        }
        if let Some((_, source)) = sources.iter().find(|(name, _)| is_default(name)) {
            self.metadata.push(("tokenizer.chat_template".to_string(), GgufValue::Text(source.clone())));
        }
    }
}
