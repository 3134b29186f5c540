//! Finds the name in `tokenizer.ggml.pre` for the splitting of a byte-level BPE tokenizer.

use super::Tokenizer;
use super::gguf_pre_names::{TEXT, published_name};
use super::gguf_pre_tokenizer::{GPT2, PreTokenizer, WHOLE_TEXT};
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Model as _, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

/// Texts, besides [`TEXT`], on which two splittings with different regexes must agree to be considered equal.
const PROBES: [&str; 4] = [
    "Hello, it's  1234567 ÀB'RE DON'T\r\n\n\t漢字かな 가나 ไทย x²½Ⅷ🤗🏽 e\u{301} \u{1}a/b\n/ ",
    "fn main() {\n    let x = [0x1F; 10];\t// 3.14159e-10\r\n}\n\n\n   return;  \n",
    "  leading, trailing  \u{a0}\u{2003}spaces…“quotes”‘s ’s don’t 'S 'Ll ''ve $1,234.56 50% a_b __init__ C++ #1 @x ~/.rc",
    "Ünïcödé ΑΒΓδε Привет мир שלום عربي ١٢٣ देवनागरी १२३ 12 123 1234 12345 123456 1234567890 CamelCaseXMLHttp iOS15",
];

/// The name of a splitting.
pub(super) struct Named {
    pub(super) name: &'static str,
    /// Properties that the name does not express.
    pub(super) notes: Vec<String>,
}

/// Finds the name of the splitting of a byte-level BPE tokenizer whose `tokenizer.json` is `json`.
///
/// # Errors
/// The splitting has no name.
pub(super) fn splitting_of(tokenizer: &Tokenizer, json: &Value) -> Result<Named, String> {
    let nfc = is_nfc(&json["normalizer"])?;
    let ignore_merges = json["model"]["ignore_merges"].as_bool().unwrap_or(false);
    let patterns = patterns(&json["pre_tokenizer"])?;
    let published =
        [true, false].into_iter().find_map(|special| published_name(&tokenizer.encode(TEXT, special).ok()?));
    let is_equal = |known: &PreTokenizer| patterns.as_deref().is_some_and(|patterns| known.patterns == patterns);
    let mut candidates: Vec<(&'static str, PreTokenizer)> =
        PreTokenizer::all().filter(|(_, known)| is_equal(known)).collect();
    if candidates.is_empty() {
        // the regexes are written differently, or a step has a different type
        let known = PreTokenizer::all().filter(|(name, _)| published == Some(*name));
        candidates.extend(known.filter(|(_, known)| splits_alike(tokenizer.raw(), *known)));
    }
    // names with the same `ignore_merges` and normalizer first, and the published name first among them
    candidates.sort_by_key(|(name, known)| {
        (known.ignore_merges != ignore_merges, known.nfc != nfc, published != Some(*name))
    });
    let Some((name, known)) = candidates.first().copied() else {
        let found = serde_json::to_string(&json["pre_tokenizer"]).unwrap_or_default();
        let message = "expected a pre-tokenizer that llama.cpp has a name for, as a GGUF file stores only the name of the splitting";
        return Err(format!("{message}; found {}", shortened(&found)));
    };
    let mut notes = Vec::new();
    if known.ignore_merges != ignore_merges
        && let Some(token) = unmerged_token(tokenizer.raw())
    {
        let (is, not) = if ignore_merges { ("is", "not ") } else { ("is not", "") };
        return Err(format!(
            "expected merges that make every token, since `{name}`, the name of the splitting in a GGUF file, says that whole words \
             are {not}looked up first; found `{token}`, which {is} looked up first"
        ));
    }
    if known.nfc != nfc {
        notes.push(format!(
            "the tokenizer {} texts to NFC, which `tokenizer.ggml.pre` = `{name}` does not express: texts that are not in NFC may get other tokens",
            if nfc { "normalizes" } else { "does not normalize" },
        ));
    }
    Ok(Named { name, notes })
}

/// Whether the normalizer is NFC. GGUF has no other normalizer for byte-level BPE.
fn is_nfc(normalizer: &Value) -> Result<bool, String> {
    match normalizer["type"].as_str() {
        None if normalizer.is_null() => Ok(false),
        Some("NFC") => Ok(true),
        Some("Sequence") => {
            let steps = normalizer["normalizers"].as_array().map_or(&[][..], Vec::as_slice);
            steps.iter().try_fold(false, |nfc, step| Ok(is_nfc(step)? || nfc))
        }
        _ => {
            let found = shortened(&normalizer.to_string());
            Err(format!("expected no normalizer or `NFC`, as GGUF has no key for another one; found {found}"))
        }
    }
}

/// The regexes of a pre-tokenizer that isolates matches and then maps bytes to characters; `None` if it has other steps.
///
/// # Errors
/// It adds a space before texts, or does not map bytes.
fn patterns(pre_tokenizer: &Value) -> Result<Option<Vec<String>>, String> {
    let mut steps = Vec::new();
    flatten(pre_tokenizer, &mut steps);
    let is_bytes = |step: &&Value| step["type"] == "ByteLevel";
    let Some(bytes) = steps.iter().find(|step| is_bytes(step)) else {
        let found = shortened(&pre_tokenizer.to_string());
        return Err(format!("expected a pre-tokenizer with a step `ByteLevel`, found {found}"));
    };
    if bytes["add_prefix_space"].as_bool().unwrap_or(true) {
        return Err(
            "expected `add_prefix_space` false, as GGUF has no key for a space before byte-level texts; found true"
                .into(),
        );
    }
    if !steps.last().is_some_and(is_bytes) {
        return Ok(None);
    }
    let mut patterns = Vec::new();
    let is_known = steps.into_iter().all(|step| add_pattern(step, &mut patterns).is_some());
    Ok(is_known.then_some(patterns))
}

fn flatten<'a>(pre_tokenizer: &'a Value, steps: &mut Vec<&'a Value>) {
    match pre_tokenizer["pretokenizers"].as_array() {
        Some(inner) => inner.iter().for_each(|step| flatten(step, steps)),
        None => steps.push(pre_tokenizer),
    }
}

/// Adds the regex of a step that isolates matches; `None` if the step is of a different kind.
fn add_pattern(step: &Value, patterns: &mut Vec<String>) -> Option<()> {
    let flag = |name: &str| step[name].as_bool();
    let regex = match step["type"].as_str()? {
        "ByteLevel" if flag("use_regex") == Some(false) => return Some(()),
        "ByteLevel" => GPT2,
        "Digits" if flag("individual_digits")? => r"\p{N}",
        "Digits" => r"\p{N}+",
        "Split" => step["pattern"]["Regex"].as_str().filter(|regex| {
            let is_isolated = step["behavior"] == "Isolated" && flag("invert") != Some(true);
            // an inverted "remove" keeps the matches and removes the text between them
            let is_inverted = step["behavior"] == "Removed" && flag("invert") == Some(true);
            is_isolated || is_inverted && WHOLE_TEXT.contains(regex)
        })?,
        _ => return None,
    };
    patterns.push(regex.to_string());
    Some(())
}

/// Whether a tokenizer splits all probes like a known splitting.
fn splits_alike(tokenizer: &tokenizers::Tokenizer, known: PreTokenizer) -> bool {
    let Ok(other) = serde_json::from_value::<PreTokenizerWrapper>(known.json()) else { return false };
    let Some(own) = tokenizer.get_pre_tokenizer() else { return false };
    let pieces = |splitting: &PreTokenizerWrapper, text: &str| {
        let mut split = PreTokenizedString::from(text);
        splitting.pre_tokenize(&mut split).ok()?;
        let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Some(pieces.into_iter().map(|(piece, _, _)| piece.to_string()).collect::<Vec<String>>())
    };
    PROBES.iter().chain([&TEXT]).all(|text| {
        let own = pieces(own, text);
        own.is_some() && own == pieces(&other, text)
    })
}

/// A token that cannot be merged from its characters, so it is only found as a whole word.
fn unmerged_token(tokenizer: &tokenizers::Tokenizer) -> Option<String> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let mut model = model.clone();
    model.ignore_merges = false;
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let mut tokens: Vec<(String, u32)> = model.get_vocab().into_iter().collect();
    tokens.retain(|(token, id)| !added.contains_key(id) && *token != padding(*id));
    tokens.sort_unstable_by_key(|(_, id)| *id);
    let is_merged = |token: &str| model.tokenize(token).is_ok_and(|tokens| tokens.len() == 1);
    tokens.into_iter().map(|(token, _)| token).find(|token| !is_merged(token))
}

/// The name of a row of the embedding without a token.
pub(super) fn padding(id: u32) -> String {
    format!("[PAD{id}]")
}

/// A text of at most 300 characters for a message.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
