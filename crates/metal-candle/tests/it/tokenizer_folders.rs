//! Tokenizer folders in other forms against transformers: tokens of side files, `vocab.json` with `merges.txt`.

use metal_candle::data::Tokenizer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// Writes `vocab.json` and `merges.txt` of the golden tokenizer.
fn write_vocab_and_merges(folder: &Path) {
    let model = &read("tokenizer.json")["model"];
    std::fs::write(folder.join("vocab.json"), model["vocab"].to_string()).unwrap();
    let pair = |pair: &Value| match pair {
        Value::String(pair) => pair.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    };
    let merges: Vec<String> = model["merges"].as_array().unwrap().iter().map(pair).collect();
    std::fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
}

fn with_files(files: &[(&str, Value)], has_tokenizer_json: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    if has_tokenizer_json {
        std::fs::copy(golden("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    } else {
        write_vocab_and_merges(folder.path());
    }
    folder
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for row in read("folders.json").as_array().unwrap() {
        let files = row["files"].as_object().unwrap();
        let files: Vec<(&str, Value)> = files.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let folder = with_files(&files, row["tokenizer_json"] == true);
        let name = &row["name"];
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(json!(tokenizer.vocab_size()), row["vocab_size"], "{name}");
        for case in row["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(json!(ids), case["ids"], "{name}: {text:?}");
            assert_eq!(json!(tokenizer.encode_with_offsets(text, false).unwrap().ids), case["ids"], "{name}: {text:?}");
            // a BOS token that the text starts with already is not doubled here
            let is_doubled = row["files"]["tokenizer_config.json"]["add_bos_token"] == true
                && tokenizer.bos_token().is_some_and(|bos| text.starts_with(bos));
            let expected = &case["with_special"].as_array().unwrap()[usize::from(is_doubled)..];
            assert_eq!(json!(tokenizer.encode(text, true).unwrap()), json!(expected), "{name}: {text:?}");
            let decoded = [tokenizer.decode(&ids, false).unwrap(), tokenizer.decode(&ids, true).unwrap()];
            assert_eq!(json!(decoded), case["decoded"], "{name}: {text:?}");
        }
    }
}

#[test]
fn tokenizers_of_other_kinds_are_refused_with_advice() {
    let refused = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        Tokenizer::from_folder(folder.path()).unwrap_err().to_string()
    };
    for name in ["tokenizer.model", "spiece.model", "tekken.json", "vocab.txt", "vocab.json"] {
        let message = refused(&[(name, "{}")]);
        assert!(message.contains(&format!("found only `{name}`")) && message.contains("save_pretrained"), "{message}");
    }
    let class = r#"{"tokenizer_class": "RobertaTokenizer"}"#;
    let message = refused(&[("vocab.json", "{}"), ("merges.txt", ""), ("tokenizer_config.json", class)]);
    assert!(message.contains("`Roberta`") && message.contains("save_pretrained"), "{message}");
    let class = r#"{"tokenizer_class": "GPT2Tokenizer"}"#;
    let gpt2 =
        |vocab, merges| refused(&[("vocab.json", vocab), ("merges.txt", merges), ("tokenizer_config.json", class)]);
    let vocab = r#"{"a": 0, "b": 1, "ab": 2}"#;
    for (vocab, merges, expected) in [
        (vocab, "a b c", "merges.txt` is not valid: line 1: expected two tokens"),
        (vocab, "#version: 0.2\na b\nb a", "line 3: the token `ba` is not in vocab.json"),
        (r#"{"a": -1}"#, "", "`a`: expected a token id, found `-1`"),
        (r#"{"a": 4294967296}"#, "", "`a`: expected a token id, found `4294967296`"),
        ("[]", "", "vocab.json` is not valid"),
    ] {
        let message = gpt2(vocab, merges);
        assert!(message.contains(expected), "{message}");
    }
    assert!(refused(&[]).contains("cannot read"), "{}", refused(&[]));
}

#[test]
fn wrong_lists_of_tokens_are_refused() {
    let next = read("folders.json")[0]["vocab_size"].as_u64().unwrap() - 8;
    let token = json!({"content": "<|mark|>", "special": true});
    let gap = (next + 1).to_string();
    for (file, value, expected) in [
        ("tokenizer_config.json", json!({"added_tokens_decoder": {gap: token}}), "`<|mark|>` is listed with id 503"),
        ("added_tokens.json", json!({"<|mark|>": next + 7}), "`<|mark|>` is listed with id 509"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"x": token}}), "tokens by id, found `x`"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": [1]}), "tokens by id, found `[1]`"),
        ("added_tokens.json", json!({"a": "b"}), "added_tokens.json` is not valid: expected an object of token ids"),
    ] {
        let message = Tokenizer::from_folder(with_files(&[(file, value)], true).path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
