//! Tests of [`super::gguf_metadata`]: the written keys, and the tokenizer after a round trip.

#![allow(clippy::unwrap_used)]

use super::{ChatTemplate, GgufTokenizer, Tokenizer};
use crate::files::gguf_testing::write;
use crate::files::{GgufFile, GgufValue};
use serde_json::{Value, json};
use std::path::Path;

fn open(written: &GgufTokenizer) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let metadata: Vec<(&str, GgufValue)> =
        written.metadata.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    std::fs::write(&path, write(&metadata, &[])).unwrap();
    Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap()
}

fn read(json: &Value, config: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

fn value<'a>(written: &'a GgufTokenizer, key: &str) -> Option<&'a GgufValue> {
    let key = format!("tokenizer.{key}");
    written.metadata.iter().find(|(known, _)| *known == key).map(|(_, value)| value)
}

fn texts(items: &[&str]) -> GgufValue {
    GgufValue::List(items.iter().map(|item| GgufValue::Text((*item).to_string())).collect())
}

fn integers(items: &[i128]) -> GgufValue {
    GgufValue::List(items.iter().map(|item| GgufValue::Integer(*item)).collect())
}

fn error(json: &Value) -> String {
    read(json, &Value::Null).to_gguf(16, &Value::Null).unwrap_err().to_string()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
}

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn steps(steps: &[Value]) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps})
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokens a, b, ab, a space, 1, a special token, a mark not flagged as special, a word and another special token.
fn byte_level(pre_tokenizer: &Value) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": bytes(true),
        "pre_tokenizer": pre_tokenizer,
        "added_tokens": [added(5, "<s>", true), added(6, "<|fim|>", false), added(7, "word", false), added(8, "</s>", true)],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "1": 4}, "merges": [["a", "b"]]},
    })
}

/// `<unk>`, `<s>`, `</s>`, the bytes of a line break and of é, text, and an added token of two spaces.
fn sentence_piece(normalizer: &Value, pre_tokenizer: &Value) -> Value {
    let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "▁ab"];
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_string(), id.into())).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true), added(12, "▁▁", false)],
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["▁", "a"], ["a", "b"], ["▁", "ab"], ["▁a", "b"]]},
    })
}

fn prepend_and_replace() -> Value {
    json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]})
}

#[test]
fn byte_level_tokenizers_are_written_key_by_key() {
    let config = json!({"bos_token": "<s>", "unk_token": "<s>", "chat_template": [
        {"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool use", "template": "{{ tools }}"}]});
    let tokenizer = read(&byte_level(&steps(&[split(LLAMA3), bytes(false)])), &config);
    let written =
        tokenizer.to_gguf(10, &json!({"eos_token_id": [8, 5], "bos_token_id": 3, "pad_token_id": 700})).unwrap();
    let text = |text: &str| GgufValue::Text(text.to_string());
    let expected = [
        ("ggml.model", text("gpt2")),
        ("ggml.pre", text("dbrx")),
        ("ggml.tokens", texts(&["a", "b", "ab", "Ġ", "1", "<s>", "<|fim|>", "word", "</s>", "[PAD9]"])),
        ("ggml.token_type", integers(&[1, 1, 1, 1, 1, 3, 3, 4, 3, 5])),
        ("ggml.merges", texts(&["a b"])),
        ("ggml.bos_token_id", GgufValue::Integer(5)),
        ("ggml.eos_token_id", GgufValue::Integer(8)),
        ("ggml.unknown_token_id", GgufValue::Integer(5)),
        ("ggml.add_bos_token", GgufValue::Flag(false)),
        ("ggml.add_eos_token", GgufValue::Flag(false)),
        ("chat_template.tool_use", text("{{ tools }}")),
        ("chat_templates", texts(&["tool_use"])),
        ("chat_template", text("{{ messages[0].content }}")),
    ];
    let found: Vec<(&str, GgufValue)> =
        written.metadata.iter().map(|(key, value)| (key.strip_prefix("tokenizer.").unwrap(), value.clone())).collect();
    assert_eq!(found, expected);
    assert_eq!(written.notes, [""; 0]);
    let again = open(&written);
    for part in ["ab ba<s>word1", "a<|fim|></s>"] {
        assert_eq!(again.encode(part, true).unwrap(), tokenizer.encode(part, true).unwrap(), "{part}");
    }
    assert_eq!(again.to_gguf(10, &Value::Null).unwrap(), written);
}

#[test]
fn the_built_in_tokenizer_is_the_same_after_a_round_trip() {
    let tokenizer = Tokenizer::from_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano")).unwrap();
    let written = tokenizer.to_gguf(tokenizer.vocab_size(), &Value::Null).unwrap();
    assert_eq!(value(&written, "ggml.pre"), Some(&GgufValue::Text("qwen2".into())));
    assert_eq!(written.notes, [""; 0]);
    let again = open(&written);
    for text in ["Hello, it's  1234567 DON'T\r\n\n\t漢字🤗🏽 e\u{301}", "<|im_start|>user\nhi<|im_end|>\n", ""] {
        for add_special in [false, true] {
            let expected = tokenizer.encode(text, add_special).unwrap();
            assert_eq!(again.encode(text, add_special).unwrap(), expected, "{text:?}");
            assert_eq!(again.decode(&expected, true).unwrap(), tokenizer.decode(&expected, true).unwrap());
        }
    }
    let sources = |tokenizer: &Tokenizer| tokenizer.chat_template().map(|template| template.sources().to_vec());
    assert_eq!(sources(&again), sources(&tokenizer));
    assert_eq!((again.eos_token(), again.pad_token()), (tokenizer.eos_token(), tokenizer.pad_token()));
}

#[test]
fn equivalent_pre_tokenizers_get_the_same_name() {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let inverted =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": true});
    for (pre_tokenizer, nfc, whole_words, expected) in [
        (bytes(true), false, false, "gpt-2"),
        (bytes(true), true, false, "mpt"),
        (steps(&[digits.clone(), bytes(true)]), false, false, "smollm"),
        (steps(&[steps(&[split(r"\p{N}")]), bytes(true)]), false, false, "smollm"),
        (steps(&[digits, bytes(true)]), true, false, "command-r"),
        (steps(&[split(LLAMA3), bytes(false)]), false, true, "llama-bpe"),
        (steps(&[inverted(LLAMA3), bytes(false)]), false, false, "dbrx"),
        (steps(&[split(&LLAMA3.replace("{1,3}", "")), bytes(false)]), true, false, "qwen2"),
        (steps(&[split(&LLAMA3.replace("{1,3}", "")), bytes(false)]), false, false, "deepseek-r1-qwen"),
    ] {
        let mut json = byte_level(&pre_tokenizer);
        json["model"]["ignore_merges"] = whole_words.into();
        if nfc {
            json["normalizer"] = json!({"type": "NFC"});
        }
        let written = read(&json, &Value::Null).to_gguf(10, &Value::Null).unwrap();
        assert_eq!(value(&written, "ggml.pre"), Some(&GgufValue::Text(expected.into())), "{pre_tokenizer}");
        assert_eq!(written.notes, [""; 0]);
    }
    // no name has both NFC and this splitting
    let mut json = byte_level(&steps(&[split(LLAMA3), bytes(false)]));
    json["normalizer"] = json!({"type": "NFC"});
    let written = read(&json, &Value::Null).to_gguf(10, &Value::Null).unwrap();
    assert!(written.notes[0].contains("NFC"), "{:?}", written.notes);
}

#[test]
fn tokens_without_merges_need_a_name_that_ignores_merges() {
    let mut json = byte_level(&bytes(true));
    json["model"]["vocab"]["abb"] = 10.into();
    // this token is never found without a merge, so every name is right
    assert!(read(&json, &Value::Null).to_gguf(11, &Value::Null).is_ok());
    json["model"]["ignore_merges"] = true.into();
    assert!(error(&json).contains("found `abb`, which is looked up first"));
    json["model"]["vocab"]["abb"] = json!(null);
    json["model"]["vocab"].as_object_mut().unwrap().remove("abb");
    assert!(read(&json, &Value::Null).to_gguf(11, &Value::Null).is_ok());
}

#[test]
fn sentence_piece_tokenizers_are_written_with_scores() {
    let tokenizer =
        read(&sentence_piece(&prepend_and_replace(), &Value::Null), &json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let written = tokenizer.to_gguf(14, &Value::Null).unwrap();
    let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, 0.0, -2.0, -1000.0, -10000.0];
    let scores = GgufValue::List(scores.into_iter().map(GgufValue::Float).collect());
    assert_eq!(value(&written, "ggml.scores"), Some(&scores));
    assert_eq!(value(&written, "ggml.token_type"), Some(&integers(&[2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 4, 5])));
    for (key, expected) in
        [("ggml.add_space_prefix", true), ("ggml.add_bos_token", true), ("ggml.add_eos_token", false)]
    {
        assert_eq!(value(&written, key), Some(&GgufValue::Flag(expected)), "{key}");
    }
    assert_eq!(value(&written, "ggml.merges"), None);
    assert_eq!(written.notes, [""; 0]);
    let again = open(&written);
    for text in ["ab", "aab", "bab é\n", "a<s>b", ""] {
        assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap(), "{text}");
    }
    // an added token is found before spaces are replaced
    assert_eq!(again.encode("a  b", false).unwrap(), [10, 12, 6, 8]);
}

#[test]
fn space_prefixes_are_found_in_every_form() {
    let metaspace =
        |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let merged =
        json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
    for (normalizer, pre_tokenizer, prefix, num_notes) in [
        (Value::Null, metaspace("first"), true, 1),
        (Value::Null, metaspace("always"), true, 0),
        (Value::Null, metaspace("never"), false, 0),
        (replace, merged, false, 0),
    ] {
        let tokenizer = read(&sentence_piece(&normalizer, &pre_tokenizer), &Value::Null);
        let written = tokenizer.to_gguf(13, &Value::Null).unwrap();
        assert_eq!(value(&written, "ggml.add_space_prefix"), Some(&GgufValue::Flag(prefix)), "{pre_tokenizer}");
        assert_eq!(written.notes.len(), num_notes, "{:?}", written.notes);
        assert_eq!(open(&written).encode("ab a", true).unwrap(), tokenizer.encode("ab a", true).unwrap());
    }
}

#[test]
fn gemma4_is_written_with_merges() {
    let mut json =
        sentence_piece(&json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}), &split("\n+"));
    json["model"]["vocab"]["▁▁"] = 12.into();
    json["model"]["vocab"]["<|turn>"] = 13.into();
    json["model"]["vocab"]["<turn|>"] = 14.into();
    let list = json["added_tokens"].as_array_mut().unwrap();
    list.extend([added(13, "<|turn>", true), added(14, "<turn|>", true), added(15, "<|channel>", true)]);
    let tokenizer = read(&json, &json!({"bos_token": "<s>"}));
    let written = tokenizer.to_gguf(16, &Value::Null).unwrap();
    assert_eq!(value(&written, "ggml.model"), Some(&GgufValue::Text("gemma4".into())));
    assert_eq!(value(&written, "ggml.pre"), None);
    assert_eq!(value(&written, "ggml.merges"), Some(&texts(&["▁ a", "a b", "▁ ab", "▁a b"])));
    assert_eq!(value(&written, "ggml.token_type"), Some(&integers(&[3, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 3, 3, 4])));
    let again = open(&written);
    for text in ["ab a\n\nb", "<|turn>a<turn|>"] {
        assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap(), "{text}");
    }
}

#[test]
fn unusual_end_of_turn_tokens_are_written() {
    let template = ChatTemplate::new("{% for m in messages %}{{ m.content }}</s>{% endfor %}").unwrap();
    let tokenizer = read(&byte_level(&bytes(true)), &json!({"eos_token": "<s>"})).with_chat_template(Some(template));
    let written = tokenizer.to_gguf(10, &Value::Null).unwrap();
    assert_eq!(value(&written, "ggml.eot_token_id"), Some(&GgufValue::Integer(8)));
}

#[test]
fn tokenizers_that_gguf_cannot_express_are_refused() {
    let plain = || byte_level(&bytes(true));
    let with = |key: &str, value: Value| {
        let mut json = plain();
        json[key] = value;
        json
    };
    let mut prefix = bytes(true);
    prefix["add_prefix_space"] = true.into();
    let mut suffix = plain();
    suffix["model"]["end_of_word_suffix"] = "</w>".into();
    let mut spaces = plain();
    spaces["model"]["vocab"] = json!({"a": 0, "a b": 1, "a ba": 2});
    spaces["model"]["merges"] = json!([["a b", "a"]]);
    let word_level = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    let mut missing = sentence_piece(&prepend_and_replace(), &Value::Null);
    missing["model"]["merges"].as_array_mut().unwrap().pop();
    for (json, parts) in [
        (with("model", word_level), &["expected a tokenizer with a model `BPE`", "`WordLevel`"][..]),
        (with("normalizer", json!({"type": "Lowercase"})), &["expected no normalizer or `NFC`", "Lowercase"]),
        (with("pre_tokenizer", json!({"type": "Whitespace"})), &["a step `ByteLevel`", "Whitespace"]),
        (with("pre_tokenizer", prefix), &["`add_prefix_space` false"]),
        (with("pre_tokenizer", steps(&[split("[0-9]|x"), bytes(false)])), &["has a name for", "[0-9]|x"]),
        (suffix, &["expected no `end_of_word_suffix`", "`</w>`"]),
        (spaces, &["merges of tokens without spaces", "found `a b` and `a`"]),
        (sentence_piece(&json!({"type": "NFKC"}), &Value::Null), &["SentencePiece vocabulary", "NFKC"]),
        (sentence_piece(&Value::Null, &Value::Null), &["replaces spaces by `▁`"]),
        (missing, &["`▁a` and `b` are missing"]),
    ] {
        let message = error(&json);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let message = read(&plain(), &Value::Null).to_gguf(8, &Value::Null).unwrap_err().to_string();
    assert!(message.contains("expected ids below 8") && message.contains("found `</s>` with id 8"), "{message}");
}
