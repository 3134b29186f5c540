//! Converts the BPE models of GGUF files to parts of a `tokenizer.json`.

use super::gguf_pre_tokenizer::{PreTokenizer, byte_level as byte_level_step};
use super::gguf_vocabulary::{MERGES, Vocabulary, wrong};
use crate::error::Result;
use crate::files::GgufFile;
use serde_json::{Map, Value, json};

const PRE: &str = "tokenizer.ggml.pre";
/// The character for a space in `SentencePiece` tokens.
const SPACE: &str = "\u{2581}";

/// The parts of a `tokenizer.json` that depend on the kind of the vocabulary.
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
    /// Whether a BOS token is added if the file does not say.
    pub(super) add_bos: bool,
}

/// Byte-level BPE.
///
/// # Errors
/// The pre-tokenizer is unknown, or the merges are missing or damaged.
pub(super) fn byte_level(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Parts> {
    let name = file.text(PRE)?;
    let pre = PreTokenizer::named(name).map_err(|message| wrong(file, PRE, message))?;
    let merges = match vocabulary.merges()? {
        Some(merges) => merges,
        // the order of the tokens is the order of the merges
        None if name == Some("kimi-k2") => {
            let order: Vec<f64> = (0..vocabulary.len()).map(|id| -(id as f64)).collect();
            vocabulary.derived_merges(&order)?
        }
        None => return Err(wrong(file, MERGES, "expected the merges of the tokens, found none")),
    };
    Ok(Parts {
        normalizer: if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: pre.json(),
        decoder: byte_level_step(),
        model: bpe(vocabulary, &merges, None, false, pre.ignore_merges),
        add_bos: pre.add_bos,
    })
}

/// `SentencePiece` BPE, whose merges are derived from the scores.
///
/// # Errors
/// The scores are missing or damaged.
pub(super) fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary<'_>, unknown: Option<&str>) -> Result<Parts> {
    let merges = vocabulary.derived_merges(&vocabulary.scores()?)?;
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

/// BPE of characters with `SentencePiece` spaces, and merges that the file lists.
///
/// # Errors
/// The merges are missing or damaged.
pub(super) fn gemma4(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Parts> {
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
