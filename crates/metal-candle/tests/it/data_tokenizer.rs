//! Tokenizers against transformers, and decoding one token at a time.

use metal_candle::Error;
use metal_candle::data::Tokenizer;
use proptest::prelude::*;
use serde_json::Value;
use std::path::Path;
use std::sync::LazyLock;

pub(crate) static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    Tokenizer::from_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer")).unwrap()
});

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn texts_encode_and_decode_as_in_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/cases.json");
    let cases: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(TOKENIZER.vocab_size() as u64, cases["vocab_size"].as_u64().unwrap());
    for case in cases["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(TOKENIZER.encode(text, true).unwrap(), ids_of(&case["ids"]), "{text:?}");
        assert_eq!(TOKENIZER.encode_with_offsets(text, true).unwrap().ids, ids_of(&case["ids"]), "{text:?}");
    }
    for case in cases["decode"].as_array().into_iter().flatten() {
        let ids = ids_of(&case["ids"]);
        for (key, skip) in [("text", false), ("text_without_special", true)] {
            if let Some(text) = case[key].as_str() {
                assert_eq!(TOKENIZER.decode(&ids, skip).unwrap(), text);
            }
        }
    }
}

#[test]
fn a_folder_tells_the_special_tokens() {
    assert_eq!(TOKENIZER.eos_token(), Some("<|im_end|>"));
    assert_eq!(TOKENIZER.eos_token_id(), Some(482));
    assert_eq!(TOKENIZER.bos_token(), None);
    assert_eq!(TOKENIZER.id_to_token(481).as_deref(), Some("<|im_start|>"));
    assert_eq!(TOKENIZER.token_to_id("<|endoftext|>"), Some(480));
    assert!(TOKENIZER.is_special(482) && !TOKENIZER.is_special(64) && !TOKENIZER.is_special(u32::MAX));
    assert_eq!(TOKENIZER.id_to_token(u32::MAX), None);
    assert_eq!(TOKENIZER.decode(&[64, u32::MAX, 482], true).unwrap(), "a");
}

#[test]
fn truncation_and_padding_of_the_file_are_not_done() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let text = "fn main() { println!(\"hello\"); }";
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    assert_eq!(tokenizer.encode(text, true).unwrap(), TOKENIZER.encode(text, true).unwrap());
    assert_eq!(tokenizer.eos_token_id(), None);
    assert_eq!(tokenizer.with_eos_token("<|im_end|>").unwrap().eos_token_id(), Some(482));
    assert!(matches!(TOKENIZER.clone().with_eos_token("nothing"), Err(Error::Argument { .. })));
}

#[test]
fn damaged_files_are_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
    let bytes = std::fs::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    json["normalizer"] = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    let odd_normalizer = json.to_string();
    let replace = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    json["normalizer"] = serde_json::json!({"type": "Sequence", "normalizers": vec![replace; 40]});
    let growing = json.to_string();
    for damaged in [
        &b""[..],
        b"{}",
        b"null",
        b"\xff\xfe",
        &bytes[..bytes.len() / 2],
        odd_normalizer.as_bytes(),
        growing.as_bytes(),
    ] {
        std::fs::write(&path, damaged).unwrap();
        assert!(matches!(Tokenizer::from_folder(folder.path()), Err(Error::Format { .. })));
    }
    let missing = folder.path().join("nothing");
    assert!(matches!(Tokenizer::from_folder(&missing), Err(Error::Read { path, .. }) if path.starts_with(&missing)));
}

#[test]
fn offsets_are_bytes_of_the_text() {
    let text = "fn naïve() { \"🦀\" }<|im_end|>\n";
    let encoding = TOKENIZER.encode_with_offsets(text, false).unwrap();
    for (&id, &(start, end)) in encoding.ids.iter().zip(&encoding.offsets) {
        let piece = &text[start..end];
        let token = TOKENIZER.decode(&[id], false).unwrap();
        assert!(token == piece || token.contains('\u{fffd}'), "{token:?} {piece:?}");
    }
}

fn stream(ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut decoder = TOKENIZER.stream_decoder(skip_special);
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
    pieces.extend(decoder.flush().unwrap());
    assert_eq!(decoder.flush().unwrap(), None);
    pieces
}

#[test]
fn an_emoji_comes_in_one_piece() {
    let ids = TOKENIZER.encode("x🦀y", false).unwrap();
    assert!(ids.len() > 3, "the emoji should be several tokens: {ids:?}");
    assert_eq!(stream(&ids, true), ["x", "🦀", "y"]);
    // without its last byte it never becomes a character
    assert_eq!(stream(&ids[..ids.len() - 2], true), ["x", "\u{fffd}"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn pieces_of_any_text_are_the_text(text in "\\PC*|[a-z \\n🦀é漢]*") {
        let ids = TOKENIZER.encode(&text, false).unwrap();
        let pieces = stream(&ids, false);
        prop_assert_eq!(pieces.concat(), TOKENIZER.decode(&ids, false).unwrap());
        let is_broken = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
        prop_assert!(is_broken(&text) || !pieces.iter().any(|piece| is_broken(piece)));
    }

    #[test]
    fn pieces_of_any_tokens_are_their_text(ids in prop::collection::vec(0u32..510, 0..40), skip in any::<bool>()) {
        prop_assert_eq!(stream(&ids, skip).concat(), TOKENIZER.decode(&ids, skip).unwrap());
    }
}
