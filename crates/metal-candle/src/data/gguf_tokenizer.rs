//! Tokenizers of GGUF files, built from the metadata as a `tokenizer.json` and a `tokenizer_config.json`.

use super::gguf_pre_tokenizer::PreTokenizer;
use super::gguf_vocabulary::{MERGES, TokenType, Vocabulary, wrong};
use super::{ChatTemplate, Tokenizer};
use crate::error::Result;
use crate::files::{GgufFile, GgufValue};
use serde_json::{Map, Value, json};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TEMPLATE: &str = "tokenizer.chat_template";
/// What stands for a space in SentencePiece tokens.
const SPACE: &str = "\u{2581}";

/// How a vocabulary divides a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece,
    Gemma4,
}

impl Kind {
    fn of(file: &GgufFile) -> Result<Self> {
        match file.text(MODEL)? {
            Some("gpt2") => Ok(Self::ByteLevel),
            Some("llama") => Ok(Self::SentencePiece),
            Some("gemma4") => Ok(Self::Gemma4),
            Some(other) => {
                let message = format!("expected `gpt2`, `llama` or `gemma4`, found `{other}`, which is not supported");
                Err(wrong(file, MODEL, message))
            }
            None => Err(wrong(file, MODEL, "expected the kind of the tokenizer, found none")),
        }
    }

    /// The id of a special token that the file does not name, as llama.cpp sets it for SentencePiece.
    fn default_id(self, name: &str, vocabulary: &Vocabulary<'_>) -> Option<u32> {
        let id = match name {
            "unknown" => 0,
            "bos" => 1,
            "eos" => 2,
            _ => return None,
        };
        (self == Self::SentencePiece && id < vocabulary.len()).then_some(id as u32)
    }
}

/// The ids of all tokens that end an answer: EOS, EOT, EOM and tokens with known spellings such as `<|im_end|>`. EOS is first.
///
/// # Errors
/// The vocabulary is not supported or damaged.
#[allow(dead_code)] // the loader of GGUF models is going to use it
pub(crate) fn end_of_generation_ids(file: &GgufFile) -> Result<Vec<u32>> {
    let kind = Kind::of(file)?;
    let vocabulary = Vocabulary::of(file)?;
    vocabulary.ends(kind.default_id("eos", &vocabulary))
}

/// The parts of a `tokenizer.json` that depend on the kind of the vocabulary.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether a BOS token is added where the file does not say.
    add_bos: bool,
}

impl Tokenizer {
    /// Reads the tokenizer and the chat template from the metadata of a GGUF file.
    ///
    /// Vocabularies of the kinds `gpt2` (byte-level BPE), `llama` (SentencePiece BPE) and `gemma4` are supported.
    ///
    /// # Errors
    /// The vocabulary is of another kind, or the metadata are damaged.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let kind = Kind::of(file)?;
        let vocabulary = Vocabulary::of(file)?;
        let parts = match kind {
            Kind::ByteLevel => byte_level(file, &vocabulary)?,
            Kind::SentencePiece => sentence_piece(file, &vocabulary, kind)?,
            Kind::Gemma4 => gemma4(file, &vocabulary)?,
        };
        let mut config = Map::new();
        for (name, key) in
            [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
        {
            let id = vocabulary.named_id(name)?.or_else(|| kind.default_id(name, &vocabulary));
            if let Some(token) = id.and_then(|id| vocabulary.token(id)) {
                config.insert(key.to_string(), Value::from(token));
            }
        }
        let flag = |name: &str| file.flag(&format!("tokenizer.ggml.{name}"));
        // llama.cpp sets it for Gemma 4 whatever the file says
        let add_bos = kind == Kind::Gemma4 || flag("add_bos_token")?.unwrap_or(parts.add_bos);
        let add_eos = flag("add_eos_token")?.unwrap_or(false);
        config.insert("add_bos_token".to_string(), Value::from(add_bos));
        config.insert("add_eos_token".to_string(), Value::from(add_eos));
        if let Some(template) = chat_template(file)? {
            config.insert("chat_template".to_string(), template);
        }
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added_tokens(file, &vocabulary)?,
            "normalizer": parts.normalizer, "pre_tokenizer": parts.pre_tokenizer, "decoder": parts.decoder,
            "post_processor": post_processor(&vocabulary, &config), "model": parts.model,
        });
        drop(parts);
        let config = Value::Object(config);
        let template = ChatTemplate::from_tokenizer_config(&config)?;
        let config = config.as_object().cloned().unwrap_or_default();
        Self::from_parts(file.path(), tokenizer.to_string().as_bytes(), template, &config, None)
    }
}

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Parts> {
    let name = file.text(PRE)?;
    let pre = PreTokenizer::named(name).map_err(|message| wrong(file, PRE, message))?;
    let merges = match vocabulary.merges()? {
        Some(merges) => merges,
        // the tokens are in the order of the merges
        None if name == Some("kimi-k2") => {
            let order: Vec<f64> = (0..vocabulary.len()).map(|id| -(id as f64)).collect();
            vocabulary.derived_merges(&order)?
        }
        None => return Err(wrong(file, MERGES, "expected the merges of the tokens, found none")),
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = pre.patterns.iter().map(split).collect();
    steps.push(bytes.clone());
    Ok(Parts {
        normalizer: if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        decoder: bytes,
        model: bpe(vocabulary, &merges, None, false, pre.ignore_merges),
        add_bos: pre.add_bos,
    })
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary<'_>, kind: Kind) -> Result<Parts> {
    let merges = vocabulary.derived_merges(&vocabulary.scores()?)?;
    let unknown = vocabulary.named_id("unknown")?.or_else(|| kind.default_id("unknown", vocabulary));
    let unknown = unknown.and_then(|id| vocabulary.token(id));
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: bpe(vocabulary, &merges, unknown, true, false),
        add_bos: true,
    })
}

fn gemma4(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Parts> {
    let merges = vocabulary.merges()?;
    let merges = merges.ok_or_else(|| wrong(file, MERGES, "expected the merges of the tokens, found none"))?;
    let unknown = vocabulary.named_id("unknown")?.and_then(|id| vocabulary.token(id));
    let lines = json!({"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated", "invert": false});
    let decoders = [replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    Ok(Parts {
        normalizer: replace(" ", SPACE),
        pre_tokenizer: lines,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: bpe(vocabulary, &merges, unknown, true, false),
        add_bos: true,
    })
}

fn replace(pattern: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}

fn bpe(
    vocabulary: &Vocabulary<'_>,
    merges: &[(&str, &str)],
    unknown: Option<&str>,
    byte_fallback: bool,
    ignore_merges: bool,
) -> Value {
    let vocab: Map<String, Value> = vocabulary.iter().map(|(id, token, _)| (token.to_string(), id.into())).collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": unknown.is_some(), "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
    })
}

/// The tokens that are found in a text before it is divided.
fn added_tokens(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>> {
    // the tokens of Phi-3 take the spaces after them, which no key says; llama.cpp looks at the name as well
    let name = file.text("general.name")?.unwrap_or_default().to_lowercase();
    let takes_spaces = name.contains("phi-3") || name.contains("phi3");
    let added = vocabulary.iter().filter_map(|(id, token, kind)| {
        let special = match kind {
            TokenType::Control | TokenType::Unknown => true,
            TokenType::UserDefined => false,
            TokenType::Normal | TokenType::Byte => return None,
        };
        let rstrip = takes_spaces && !["<unk>", "<s>", "<|endoftext|>"].contains(&token);
        Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": rstrip,
            "normalized": false, "special": special}))
    });
    Ok(added.collect())
}

/// Puts the BOS and EOS tokens around every text where `config` says so.
fn post_processor(vocabulary: &Vocabulary<'_>, config: &Map<String, Value>) -> Value {
    let mut special = Map::new();
    let mut token = |flag: &str, name: &str| {
        let token = config.get(name).and_then(Value::as_str).filter(|_| config[flag] == true)?;
        let id = vocabulary.id(token)?;
        special.insert(token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
        Some(token)
    };
    let (bos, eos) = (token("add_bos_token", "bos_token"), token("add_eos_token", "eos_token"));
    if special.is_empty() {
        return Value::Null;
    }
    let around = |sequence: &str, type_id: u32| {
        let mark = |token: Option<&str>| token.map(|token| json!({"SpecialToken": {"id": token, "type_id": type_id}}));
        let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        [mark(bos), Some(text), mark(eos)].into_iter().flatten().collect::<Vec<Value>>()
    };
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special})
}

/// The chat templates, as `chat_template` of a `tokenizer_config.json`.
fn chat_template(file: &GgufFile) -> Result<Option<Value>> {
    let default = file.text(TEMPLATE)?;
    let mut named = Vec::new();
    for (key, value) in file.metadata() {
        let Some(name) = key.strip_prefix(TEMPLATE).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let GgufValue::Text(source) = value else {
            return Err(wrong(file, key, "expected a string"));
        };
        named.push(json!({"name": name, "template": source}));
    }
    if named.is_empty() {
        return Ok(default.map(Value::from));
    }
    named.splice(0..0, default.map(|source| json!({"name": "default", "template": source})));
    Ok(Some(Value::Array(named)))
}
