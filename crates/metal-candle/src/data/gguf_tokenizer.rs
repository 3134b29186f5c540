//! Converts the tokenizer in the metadata of a GGUF file to a `tokenizer.json` and a `tokenizer_config.json`.

use super::gguf_bpe::{byte_level, gemma4, sentence_piece};
use super::gguf_vocabulary::{TokenType, Vocabulary, wrong};
use super::{ChatTemplate, Tokenizer};
use crate::error::Result;
use crate::files::{GgufFile, GgufValue};
use serde_json::{Map, Value, json};

const MODEL: &str = "tokenizer.ggml.model";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The kind of a vocabulary.
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
                let message = format!("expected `gpt2`, `llama` or `gemma4`, found `{other}`");
                Err(wrong(file, MODEL, message))
            }
            None => Err(wrong(file, MODEL, "expected the kind of the tokenizer, found none")),
        }
    }

    /// The default id of a special token that the file does not name, as in llama.cpp for `SentencePiece`.
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

impl Tokenizer {
    /// Whether the metadata of a GGUF file have a tokenizer. llama.cpp writes `no_vocab` as the kind if there is none.
    pub fn is_in_gguf(file: &GgufFile) -> bool {
        file.metadata().contains_key(MODEL) && !matches!(file.text(MODEL), Ok(Some("no_vocab" | "none")))
    }

    /// Reads the tokenizer and the chat template from the metadata of a GGUF file.
    ///
    /// Vocabularies of the kinds `gpt2` (byte-level BPE), `llama` (`SentencePiece` BPE) and `gemma4` are supported.
    ///
    /// # Errors
    /// The vocabulary is of a different kind, or the metadata are damaged.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let kind = Kind::of(file)?;
        let vocabulary = Vocabulary::of(file)?;
        let unknown = vocabulary.named_id("unknown")?.or_else(|| kind.default_id("unknown", &vocabulary));
        let parts = match kind {
            Kind::ByteLevel => byte_level(file, &vocabulary)?,
            Kind::SentencePiece => sentence_piece(file, &vocabulary, unknown.and_then(|id| vocabulary.token(id)))?,
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
        // llama.cpp always adds BOS for Gemma 4
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

/// The tokens that are matched before the text is split.
fn added_tokens(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>> {
    // the tokens of Phi-3 include the spaces after them, but no key says so; llama.cpp also checks the name
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

/// Adds BOS and EOS tokens to every text if `config` says so.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::data::{Message, Tokenizer};
    use crate::files::gguf_testing::write;
    use crate::files::{GgufFile, GgufValue, end_of_generation_ids};

    fn text(text: &str) -> GgufValue {
        GgufValue::Text(text.to_string())
    }

    fn texts(texts: &[&str]) -> GgufValue {
        GgufValue::List(texts.iter().map(|item| text(item)).collect())
    }

    fn integers(numbers: &[i128]) -> GgufValue {
        GgufValue::List(numbers.iter().map(|number| GgufValue::Integer(*number)).collect())
    }

    fn floats(numbers: &[f64]) -> GgufValue {
        GgufValue::List(numbers.iter().map(|number| GgufValue::Float(*number)).collect())
    }

    type Metadata = Vec<(&'static str, GgufValue)>;

    fn open(metadata: &Metadata) -> GgufFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, write(metadata, &[])).unwrap();
        GgufFile::open(&path).unwrap()
    }

    fn with(mut metadata: Metadata, key: &'static str, value: GgufValue) -> Metadata {
        metadata.retain(|(known, _)| *known != key);
        metadata.push((key, value));
        metadata
    }

    fn error(metadata: &Metadata) -> String {
        Tokenizer::from_gguf(&open(metadata)).unwrap_err().to_string()
    }

    /// The tokens a, b, c, ab, a mark, a user-defined token, a space and an end-of-turn mark.
    fn byte_level() -> Metadata {
        vec![
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("qwen2")),
            ("tokenizer.ggml.tokens", texts(&["a", "b", "c", "ab", "<s>", "<t>", "Ġ", "<|im_end|>"])),
            ("tokenizer.ggml.token_type", integers(&[1, 1, 1, 1, 3, 4, 1, 1])),
            ("tokenizer.ggml.merges", texts(&["a b"])),
            ("tokenizer.ggml.bos_token_id", GgufValue::Integer(4)),
            ("tokenizer.ggml.eos_token_id", GgufValue::Integer(5)),
            ("tokenizer.chat_template", text("{{ bos_token }}{{ messages[0].content }}")),
        ]
    }

    /// `<unk>`, `<s>`, `</s>`, the bytes of a line break and of é, and text.
    fn sentence_piece() -> Metadata {
        let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "▁ab"];
        vec![
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.token_type", integers(&[2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1])),
            ("tokenizer.ggml.scores", floats(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -2.0, -1.0, -3.0])),
        ]
    }

    #[test]
    fn files_without_a_tokenizer_are_recognized() {
        assert!(Tokenizer::is_in_gguf(&open(&byte_level())));
        assert!(!Tokenizer::is_in_gguf(&open(&vec![("tokenizer.ggml.model", text("no_vocab"))])));
        assert!(!Tokenizer::is_in_gguf(&open(&Vec::new())));
    }

    #[test]
    fn byte_level_tokens_are_merged_and_marks_are_found() {
        let tokenizer = Tokenizer::from_gguf(&open(&byte_level())).unwrap();
        let ids = tokenizer.encode("ab c<s><t>ba<|im_end|>", true).unwrap();
        assert_eq!(ids, [3, 6, 2, 4, 5, 1, 0, 7]);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab c<s><t>ba<|im_end|>");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab c<t>ba");
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("<t>")));
        let template = tokenizer.chat_template().unwrap();
        assert_eq!(template.render(&[Message::user("a")], None, false, &serde_json::Map::default()).unwrap(), "<s>a");
    }

    #[test]
    fn the_splitting_determines_bos_and_whole_words() {
        let llama = with(byte_level(), "tokenizer.ggml.pre", text("llama-bpe"));
        assert_eq!(Tokenizer::from_gguf(&open(&llama)).unwrap().encode("ab", true).unwrap(), [4, 3]);
        let off = with(llama.clone(), "tokenizer.ggml.add_bos_token", GgufValue::Flag(false));
        assert_eq!(Tokenizer::from_gguf(&open(&off)).unwrap().encode("ab", true).unwrap(), [3]);
        let eos = with(llama.clone(), "tokenizer.ggml.add_eos_token", GgufValue::Flag(true));
        assert_eq!(Tokenizer::from_gguf(&open(&eos)).unwrap().encode("ab", true).unwrap(), [4, 3, 5]);
        let tokens = texts(&["a", "b", "c", "ab", "<s>", "<t>", "abc", "d"]);
        let whole = with(llama, "tokenizer.ggml.tokens", tokens.clone());
        assert_eq!(Tokenizer::from_gguf(&open(&whole)).unwrap().encode("abc", false).unwrap(), [6]);
        let merged = with(byte_level(), "tokenizer.ggml.tokens", tokens);
        assert_eq!(Tokenizer::from_gguf(&open(&merged)).unwrap().encode("abc", false).unwrap(), [3, 2]);
    }

    #[test]
    fn sentence_piece_merges_the_best_score_first_and_falls_back_to_bytes() {
        let tokenizer = Tokenizer::from_gguf(&open(&sentence_piece())).unwrap();
        assert_eq!(tokenizer.encode("ab", true).unwrap(), [1, 11]);
        // `▁a` is merged before `ab`
        assert_eq!(tokenizer.encode("aab", true).unwrap(), [1, 10, 9]);
        assert_eq!(tokenizer.encode("bab", false).unwrap(), [6, 8, 9]);
        for text in ["ab", " a  b", "é\na", "a</s>"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{ids:?}");
        }
        assert_eq!(tokenizer.encode("é\n", false).unwrap(), [6, 4, 5, 3]);
        assert_eq!(tokenizer.eos_token_id(), Some(2));
        let plain = with(sentence_piece(), "tokenizer.ggml.add_space_prefix", GgufValue::Flag(false));
        let plain = Tokenizer::from_gguf(&open(&plain)).unwrap();
        assert_eq!(plain.encode("ab a", false).unwrap(), [9, 10]);
        assert_eq!(plain.decode(&[10, 9], false).unwrap(), " aab");
    }

    #[test]
    fn several_chat_templates_are_read() {
        let named = with(byte_level(), "tokenizer.chat_template.tool_use", text("tools"));
        let tokenizer = Tokenizer::from_gguf(&open(&named)).unwrap();
        let names: Vec<&str> =
            tokenizer.chat_template().unwrap().sources().iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["default", "tool_use"]);
    }

    #[test]
    fn known_end_of_turn_tokens_end_answers() {
        assert_eq!(end_of_generation_ids(&open(&byte_level())).unwrap(), [5, 7]);
        assert_eq!(end_of_generation_ids(&open(&sentence_piece())).unwrap(), [2]);
        let tokens = ["a", "b", "c", "ab", "<|end|>", "<|return|>", "<|call|>", "</s>"];
        let harmony = with(byte_level(), "tokenizer.ggml.tokens", texts(&tokens));
        assert_eq!(end_of_generation_ids(&open(&harmony)).unwrap(), [5, 6]);
        let tokens = ["a", "b", "c", "ab", "<|end|>", "<|return|>", "d", "</s>"];
        let without = with(byte_level(), "tokenizer.ggml.tokens", texts(&tokens));
        let without = with(without, "tokenizer.ggml.eot_token_id", GgufValue::Integer(6));
        assert_eq!(end_of_generation_ids(&open(&without)).unwrap(), [5, 6, 4]);
    }

    #[test]
    fn damaged_metadata_are_refused() {
        let (bytes, pieces) = (byte_level(), sentence_piece());
        for (metadata, parts) in [
            (vec![], &["`tokenizer.ggml.model`", "found none"][..]),
            (with(bytes.clone(), "tokenizer.ggml.model", text("bert")), &["`tokenizer.ggml.model`", "found `bert`"]),
            (with(bytes.clone(), "tokenizer.ggml.pre", text("other")), &["`tokenizer.ggml.pre`", "found `other`"]),
            (with(bytes.clone(), "tokenizer.ggml.tokens", texts(&[])), &["`tokenizer.ggml.tokens`", "found none"]),
            (with(bytes.clone(), "tokenizer.ggml.tokens", texts(&["a", "a"])), &["found `a` as 0 and 1"]),
            (with(bytes.clone(), "tokenizer.ggml.token_type", integers(&[1])), &["expected 8 types", "found 1"]),
            (with(bytes.clone(), "tokenizer.ggml.token_type", integers(&[9; 8])), &["expected types from 0 to 6"]),
            (with(bytes.clone(), "tokenizer.ggml.merges", texts(&["a d"])), &["`tokenizer.ggml.merges`", "found `d`"]),
            (with(bytes.clone(), "tokenizer.ggml.merges", texts(&["ab"])), &["entry 0: expected two tokens"]),
            (with(bytes.clone(), "tokenizer.ggml.merges", text("ab")), &["`tokenizer.ggml.merges`: expected a list"]),
            (with(bytes.clone(), "tokenizer.ggml.eos_token_id", GgufValue::Integer(8)), &["below 8", "found 8"]),
            (with(bytes.clone(), "tokenizer.ggml.eos_token_id", GgufValue::Integer(-1)), &["not negative"]),
            (with(bytes, "tokenizer.chat_template.x", GgufValue::Flag(true)), &["`tokenizer.chat_template.x`"]),
            (with(pieces.clone(), "tokenizer.ggml.scores", floats(&[0.0])), &["expected 12 scores", "found 1"]),
            (with(pieces.clone(), "tokenizer.ggml.scores", floats(&[f64::NAN; 12])), &["expected numbers, found"]),
            (with(pieces, "tokenizer.ggml.scores", texts(&["a"; 12])), &["expected numbers, found"]),
        ] {
            let message = error(&metadata);
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
        let mut none = byte_level();
        none.retain(|(key, _)| *key != "tokenizer.ggml.merges");
        assert!(error(&none).contains("expected the merges"));
    }
}
