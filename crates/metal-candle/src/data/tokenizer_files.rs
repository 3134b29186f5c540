//! Reads tokenizer folders without a complete `tokenizer.json`: `vocab.json` with `merges.txt`, and tokens of side files.

use super::side_files::{MAX_TOKENIZER_BYTES, read_json_if_exists, token_text};
use crate::error::{Error, Result};
use crate::files::{guard, read_json, read_text};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

/// How Qwen2 splits a text before byte-level BPE.
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The named special tokens, in the order in which transformers adds them.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Tokenizer files that are not supported.
const OTHER_FILES: [&str; 9] = [
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
];

const ADVICE: &str = "write one with transformers: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`";

/// Whether `folder` has the files of a tokenizer that [`super::Tokenizer::from_folder`] might read.
pub(super) fn has_tokenizer(folder: &Path) -> bool {
    let is_file = |name: &str| folder.join(name).is_file();
    is_file("tokenizer.json") || (is_file("vocab.json") && is_file("merges.txt"))
}

/// A byte-level BPE tokenizer as transformers builds it from `vocab.json` and `merges.txt`.
struct Class {
    normalizer: Value,
    pre_tokenizer: Value,
    /// The default special tokens.
    defaults: &'static [&'static str],
}

impl Class {
    /// The class of a folder; the error is the name of an unsupported class.
    fn find(config: &Map<String, Value>, model_type: Option<&str>) -> std::result::Result<Self, String> {
        let name = config.get("tokenizer_class").and_then(Value::as_str).or(model_type).unwrap_or_default();
        let name = name.strip_suffix("Fast").unwrap_or(name);
        let name = name.strip_suffix("Tokenizer").unwrap_or(name);
        let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
        match name.to_ascii_lowercase().as_str() {
            "qwen2" | "qwen3" => {
                let split = json!({"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": false});
                Ok(Self {
                    normalizer: json!({"type": "NFC"}),
                    pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [split, byte_level(prefix, false)]}),
                    defaults: &["unk_token", "eos_token", "pad_token"],
                })
            }
            "gpt2" => Ok(Self {
                normalizer: Value::Null,
                pre_tokenizer: byte_level(prefix, true),
                defaults: &["unk_token", "bos_token", "eos_token"],
            }),
            _ => Err(name.to_string()),
        }
    }
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": false, "use_regex": use_regex})
}

/// Creates a `tokenizer.json` from `vocab.json` and `merges.txt`, and returns it with the path to name in errors.
///
/// Default special tokens of the tokenizer's class are added to `config` if it does not name them.
///
/// # Errors
/// A file is missing or invalid, or these files do not describe the tokenizer completely.
pub(super) fn from_vocab_and_merges(folder: &Path, config: &mut Map<String, Value>) -> Result<(PathBuf, Vec<u8>)> {
    let missing = folder.join("tokenizer.json");
    let (vocab_path, merges_path) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if !vocab_path.is_file() || !merges_path.is_file() {
        let found: Vec<String> =
            OTHER_FILES.iter().filter(|name| folder.join(name).is_file()).map(|name| format!("`{name}`")).collect();
        if found.is_empty() {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
            return Err(Error::read(missing, source));
        }
        return Err(Error::format(missing, format!("expected this file, found only {}; {ADVICE}", found.join(", "))));
    }
    let model_config = read_json_if_exists(&folder.join("config.json"))?.unwrap_or(Value::Null);
    let class = Class::find(config, model_config["model_type"].as_str()).map_err(|name| {
        let message = format!(
            "expected this file: `vocab.json` and `merges.txt` are read for Qwen2 and GPT-2 tokenizers, found the class \
             `{name}`; {ADVICE}, or set `tokenizer_class` in tokenizer_config.json"
        );
        Error::format(&missing, message)
    })?;
    for name in class.defaults {
        config.entry(*name).or_insert_with(|| Value::from("<|endoftext|>"));
    }
    let vocab: Map<String, Value> = read_json(&vocab_path, MAX_TOKENIZER_BYTES)?;
    for (token, id) in &vocab {
        if id.as_u64().is_none_or(|id| u32::try_from(id).is_err()) {
            return Err(Error::format(vocab_path, format!("`{token}`: expected a token id, found `{id}`")));
        }
    }
    let merges = merges(&merges_path, &vocab)?;
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": class.normalizer, "pre_tokenizer": class.pre_tokenizer, "post_processor": null,
        "decoder": byte_level(true, true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    Ok((vocab_path, tokenizer.to_string().into_bytes()))
}

/// The pairs of a `merges.txt`; all tokens must be in `vocab`.
fn merges(path: &Path, vocab: &Map<String, Value>) -> Result<Vec<Value>> {
    let text = read_text(path, MAX_TOKENIZER_BYTES)?;
    let mut merges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let wrong = |message: String| Error::format(path, format!("line {}: {message}", index + 1));
        let Some((first, second)) = line.split_once(' ').filter(|(_, second)| !second.contains(' ')) else {
            return Err(wrong("expected two tokens with a space between them".to_string()));
        };
        let merged = format!("{first}{second}");
        if let Some(token) = [first, second, &merged].into_iter().find(|token| !vocab.contains_key(*token)) {
            return Err(wrong(format!("the token `{token}` is not in vocab.json")));
        }
        merges.push(json!([first, second]));
    }
    Ok(merges)
}

/// Merges `tokenizer_config.json` and `special_tokens_map.json` with the precedence of transformers: the map overrides an
/// old configuration, and a configuration with `added_tokens_decoder` overrides the map.
pub(super) fn merge_configs(config: Option<Value>, map: Option<&Value>) -> Map<String, Value> {
    let mut config = match config {
        Some(Value::Object(config)) => config,
        _ => Map::new(),
    };
    if is_empty(config.get("extra_special_tokens"))
        && let Some(tokens) = config.remove("additional_special_tokens")
    {
        config.insert("extra_special_tokens".to_string(), tokens);
    }
    if config.contains_key("added_tokens_decoder") {
        return config;
    }
    for (name, value) in map.and_then(Value::as_object).into_iter().flatten() {
        match (config.get_mut(name), value) {
            (Some(Value::Array(known)), Value::Array(list)) if name == "extra_special_tokens" => {
                let new: Vec<Value> = list.iter().filter(|token| !known.contains(token)).cloned().collect();
                known.extend(new);
            }
            _ => {
                config.insert(name.clone(), value.clone());
            }
        }
    }
    config
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(value) => value.is_null(),
        None => true,
    }
}

/// Adds the tokens that only the side files name, in the order of transformers, so that they get the same ids:
/// `added_tokens_decoder` by id, `added_tokens.json` by id, then the special tokens that are still missing.
///
/// # Errors
/// A token is malformed, or would get a different id than the listed one.
pub(super) fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    folder: &Path,
    config: &Map<String, Value>,
) -> Result<()> {
    let known = tokenizer.get_added_vocabulary().get_added_tokens_decoder().clone();
    let (path, listed) = listed_tokens(folder, config)?;
    let mut tokens: Vec<AddedToken> = listed.iter().map(|(_, token)| token.clone()).collect();
    for token in special_tokens(config) {
        let is_known = known.values().chain(&tokens).any(|other| other.content == token.content);
        if !is_known {
            tokens.push(token);
        }
    }
    tokens.retain(|token| !known.values().any(|other| other == token));
    if tokens.is_empty() {
        return Ok(());
    }
    let new: Vec<&(u32, AddedToken)> =
        listed.iter().filter(|(_, token)| tokenizer.token_to_id(&token.content).is_none()).collect();
    let added = guard(|| tokenizer.add_tokens(tokens));
    added.map_err(|panic| Error::format(&path, panic))?.map_err(|error| Error::format(&path, error))?;
    for (id, token) in new {
        let found = tokenizer.token_to_id(&token.content);
        if found.is_some_and(|found| found != *id) {
            let message = format!(
                "`{}` is listed with id {id}, but the tokenizer assigns the id {} to its next token; {}",
                token.content,
                found.unwrap_or_default(),
                "list the tokens without gaps after the vocabulary, or add the token to tokenizer.json"
            );
            return Err(Error::format(&path, message));
        }
    }
    Ok(())
}

/// Adds BOS and EOS tokens around every text if `config` sets `add_bos_token` and `add_eos_token`.
///
/// # Errors
/// A token cannot be part of a template.
pub(super) fn set_post_processor(
    tokenizer: &mut tokenizers::Tokenizer,
    folder: &Path,
    config: &Map<String, Value>,
) -> Result<()> {
    let wrong = |message: String| Error::format(folder.join("tokenizer_config.json"), message);
    let mut template = vec!["$A".to_string()];
    let mut special = Vec::new();
    for (flag, name, is_first) in [("add_bos_token", "bos_token", true), ("add_eos_token", "eos_token", false)] {
        if config.get(flag).and_then(Value::as_bool) != Some(true) {
            continue;
        }
        let token = config.get(name).and_then(token_text);
        let token = token.and_then(|token| Some((tokenizer.token_to_id(&token)?, token)));
        let Some((id, token)) = token else {
            // transformers does not add it either
            continue;
        };
        template.insert(if is_first { 0 } else { template.len() }, token.clone());
        special.push((token, id));
    }
    if special.is_empty() {
        return Ok(());
    }
    special.dedup();
    let mut builder = TemplateProcessing::builder();
    let builder = builder.try_single(template).map_err(wrong)?;
    let processor = builder.special_tokens(special).build().map_err(|error| wrong(error.to_string()))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// The tokens that side files list by id, sorted, and the file that lists them.
fn listed_tokens(folder: &Path, config: &Map<String, Value>) -> Result<(PathBuf, Vec<(u32, AddedToken)>)> {
    let path = folder.join("tokenizer_config.json");
    let is_named =
        |content: &str| NAMED.iter().any(|name| config.get(*name).and_then(token_text).as_deref() == Some(content));
    let mut listed: Vec<(u32, AddedToken)> = Vec::new();
    if let Some(decoder) = config.get("added_tokens_decoder").filter(|decoder| !decoder.is_null()) {
        let wrong = |found: &str| {
            Error::format(&path, format!("`added_tokens_decoder`: expected an object of tokens by id, found `{found}`"))
        };
        for (id, token) in decoder.as_object().ok_or_else(|| wrong(&decoder.to_string()))? {
            let token = added_token(token, false).ok_or_else(|| wrong(id))?;
            let token = AddedToken { special: token.special || is_named(&token.content), ..token };
            listed.push((id.parse().map_err(|_| wrong(id))?, token));
        }
        listed.sort_by_key(|(id, _)| *id);
        return Ok((path, listed));
    }
    let path = folder.join("added_tokens.json");
    let Some(encoder) = read_json_if_exists(&path)? else { return Ok((path, listed)) };
    let wrong = |found: &str| Error::format(&path, format!("expected an object of token ids, found `{found}`"));
    let extra = config.get("extra_special_tokens").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for (content, id) in encoder.as_object().ok_or_else(|| wrong(&encoder.to_string()))? {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(&id.to_string()))?;
        // as in transformers, only these lists count, not `additional_special_tokens` of the map
        let is_extra = extra.iter().any(|token| token_text(token).as_deref() == Some(content));
        listed.push((id, AddedToken::from(content, is_extra || is_named(content))));
    }
    listed.sort_by_key(|(id, _)| *id);
    Ok((path, listed))
}

/// The special tokens of a configuration, in the order of transformers.
fn special_tokens(config: &Map<String, Value>) -> Vec<AddedToken> {
    let other = config.keys().map(String::as_str).filter(|name| name.ends_with("_token") && !NAMED.contains(name));
    let named = NAMED.into_iter().chain(other).filter_map(|name| config.get(name));
    let mut tokens: Vec<AddedToken> = named.filter_map(|token| added_token(token, true)).collect();
    let list = |name: &str| config.get(name).and_then(Value::as_array).into_iter().flatten();
    let list = |name: &str| list(name).filter_map(|token| added_token(token, true)).collect::<Vec<AddedToken>>();
    match config.get("extra_special_tokens") {
        Some(Value::Array(_)) => tokens.extend(list("extra_special_tokens")),
        Some(Value::Object(map)) => {
            tokens.extend(map.values().filter_map(|token| added_token(token, true)));
            tokens.extend(list("additional_special_tokens"));
        }
        _ => tokens.extend(list("additional_special_tokens")),
    }
    tokens
}

/// Parses a token: a string, or an object with `content` and flags.
fn added_token(token: &Value, special: bool) -> Option<AddedToken> {
    let content = token_text(token)?;
    let flag = |name: &str| token.get(name).and_then(Value::as_bool);
    let special = special || flag("special").unwrap_or(false);
    Some(
        AddedToken::from(content, special)
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}
