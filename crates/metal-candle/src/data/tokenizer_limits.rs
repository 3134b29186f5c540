//! Limits how much a tokenizer can grow a text; computed from `tokenizer.json` before the tokenizer is built or run.

use base64::Engine as _;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Maximum number of bytes that one byte of a text may become; published tokenizers stay below 100.
const MAX_GROWTH: u64 = 1000;
/// Maximum size of a normalized text, in bytes. The `tokenizers` crate needs about twenty times this memory.
const MAX_NORMALIZED_BYTES: u64 = 256 << 20;
/// Maximum number of steps of the normalizers and pre-tokenizers, or of the decoders; each reads the whole text.
const MAX_STEPS: usize = 256;
/// Maximum number of pieces in a template of a post-processor.
const MAX_TEMPLATE_PIECES: usize = 256;
/// Maximum size of a prefix or suffix of words or characters, in bytes.
const MAX_AFFIX_BYTES: usize = 256;
/// Maximum number of characters in a word for `WordPiece`, whose search takes quadratic time.
const MAX_WORD_CHARS: u64 = 1000;

/// The parts of a `tokenizer.json` that change the length of a text.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: ModelParts,
}

#[derive(Default, Deserialize)]
struct ModelParts {
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    max_input_chars_per_word: Value,
}

/// How much a tokenizer can grow a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Growth {
    bytes_per_byte: u64,
}

impl Growth {
    /// Computes the growth from a `tokenizer.json`. The `tokenizers` crate reports invalid files later.
    ///
    /// # Errors
    /// A text may grow too much; names the part of the file and the reason.
    pub(super) fn of(tokenizer_json: &[u8]) -> std::result::Result<Self, String> {
        let Ok(parts) = serde_json::from_slice::<Parts>(tokenizer_json) else {
            return Ok(Self { bytes_per_byte: 1 });
        };
        let mut encoding = steps(&parts.normalizer, "normalizers", "normalizer")?;
        encoding.extend(steps(&parts.pre_tokenizer, "pretokenizers", "pre_tokenizer")?);
        let bytes_per_byte = bounded(growth(&encoding), "`normalizer` and `pre_tokenizer`")?;
        let decoding = steps(&parts.decoder, "decoders", "decoder")?;
        bounded(growth(&decoding), "`decoder`")?;
        check_templates(&parts.post_processor)?;
        for (name, affix) in [
            ("continuing_subword_prefix", &parts.model.continuing_subword_prefix),
            ("end_of_word_suffix", &parts.model.end_of_word_suffix),
        ] {
            let length = affix.as_str().map_or(0, str::len);
            if length > MAX_AFFIX_BYTES {
                return Err(format!("`model.{name}`: expected at most {MAX_AFFIX_BYTES} bytes, found {length}"));
            }
        }
        if let Some(found) = parts.model.max_input_chars_per_word.as_u64().filter(|found| *found > MAX_WORD_CHARS) {
            let name = "`model.max_input_chars_per_word`";
            return Err(format!("{name}: expected at most {MAX_WORD_CHARS} characters, found {found}"));
        }
        Ok(Self { bytes_per_byte })
    }

    /// Checks that a text of `num_bytes` stays within bounds.
    ///
    /// # Errors
    /// It may become too long.
    pub(super) fn check(self, num_bytes: usize) -> std::result::Result<(), String> {
        let most = MAX_NORMALIZED_BYTES / self.bytes_per_byte.max(1);
        if num_bytes as u64 <= most {
            return Ok(());
        }
        Err(format!("expected at most {most} bytes, found {num_bytes}; split the text"))
    }
}

fn bounded(growth: u64, part: &str) -> std::result::Result<u64, String> {
    if growth > MAX_GROWTH {
        return Err(format!("{part} may expand one byte of a text to {growth} bytes, expected at most {MAX_GROWTH}"));
    }
    Ok(growth)
}

/// A step on a text.
#[derive(Debug, Default)]
struct Step {
    /// The replacement of each match.
    content: String,
    /// The last character of a match; `None` for any.
    last: Option<char>,
    /// Whether `content` may also be inserted before each character or text.
    is_inserted: bool,
    /// Maximum number of bytes that any byte may become.
    factor: u64,
}

/// The steps of a component and of the components inside it.
fn steps(component: &Value, list: &str, part: &str) -> std::result::Result<Vec<Step>, String> {
    let mut found = Vec::new();
    let mut num_precompiled = 0;
    // `serde_json` bounds the depth
    let mut pending = vec![component];
    while let Some(component) = pending.pop() {
        if let Some(inner) = component.get(list).and_then(Value::as_array) {
            pending.extend(inner.iter().rev());
        } else if let Value::Object(_) = component {
            found.push(step(component, &mut num_precompiled));
        }
        if found.len() + pending.len() > MAX_STEPS {
            return Err(format!("`{part}`: expected at most {MAX_STEPS} steps"));
        }
    }
    Ok(found)
}

fn step(component: &Value, num_precompiled: &mut u64) -> Step {
    let text = |name: &str| component.get(name).and_then(Value::as_str).unwrap_or_default();
    let plain = Step { factor: 1, ..Step::default() };
    match text("type") {
        "Replace" => {
            let content = text("content").to_string();
            let pattern = component.get("pattern").unwrap_or(&Value::Null);
            if let Some(pattern) = pattern.get("String").and_then(Value::as_str) {
                Step { content, last: pattern.chars().last(), is_inserted: pattern.is_empty(), ..plain }
            } else {
                let is_inserted = pattern.get("Regex").and_then(Value::as_str).is_none_or(may_be_empty);
                Step { content, last: None, is_inserted, ..plain }
            }
        }
        "Prepend" => Step { content: text("prepend").to_string(), is_inserted: true, last: Some('\0'), ..plain },
        "Metaspace" => {
            let content = component.get("replacement").and_then(Value::as_str).unwrap_or("\u{2581}").to_string();
            Step { content, is_inserted: true, last: Some(' '), ..plain }
        }
        "WordPiece" => Step { content: text("prefix").to_string() + " ", is_inserted: true, last: Some(' '), ..plain },
        // each byte becomes a character of up to two bytes, and a space may come before it
        "ByteLevel" if component.get("add_prefix_space").and_then(Value::as_bool) == Some(true) => {
            Step { content: " ".to_string(), is_inserted: true, last: Some('\0'), factor: 2 }
        }
        // Unicode normalization grows few characters, and a second pass grows nothing
        "ByteLevel" | "NFKC" | "NFKD" | "BertNormalizer" => Step { factor: 2, ..plain },
        "Precompiled" => {
            let longest = longest_entry(text("precompiled_charsmap"));
            *num_precompiled += 1;
            // the long entries replace characters of several bytes
            Step { factor: if *num_precompiled == 1 { (longest / 8).max(2) } else { longest.max(2) }, ..plain }
        }
        _ => plain,
    }
}

/// Whether a pattern may match the empty text. Only patterns of literal characters, classes and `+` are known not to.
fn may_be_empty(pattern: &str) -> bool {
    fancy_regex::Regex::new(pattern).map_or(true, |regex| regex.is_match("").unwrap_or(true))
        || ["(?=", "(?!", "(?<", "\\b", "\\B", "\\G", "\\K"].iter().any(|part| pattern.contains(part))
}

/// The length of the longest text in a `precompiled_charsmap`, in bytes.
fn longest_entry(charsmap: &str) -> u64 {
    let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(charsmap) else { return 1 };
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else { return 1 };
    let texts = rest.get(u32::from_le_bytes(*size) as usize..).unwrap_or_default();
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(1).max(1) as u64
}

/// Maximum number of bytes that one byte of a text may become after all steps.
fn growth(steps: &[Step]) -> u64 {
    // the bytes that each character becomes, from the last step to the first; other characters grow by the factor `other`
    let mut of_char: BTreeMap<char, u64> = BTreeMap::new();
    let mut other = 1_u64;
    for step in steps.iter().rev() {
        let bytes = |c: char| of_char.get(&c).copied().unwrap_or_else(|| other.saturating_mul(c.len_utf8() as u64));
        let content = step.content.chars().map(bytes).fold(0, u64::saturating_add);
        let inserted = if step.is_inserted { content } else { 0 };
        let mut next: BTreeMap<char, u64> =
            of_char.iter().map(|(c, bytes)| (*c, bytes.saturating_add(inserted))).collect();
        let mut next_other = other.saturating_add(inserted);
        match step.last {
            Some(last) => {
                next.insert(last, bytes(last).max(content).saturating_add(inserted));
            }
            None if !step.content.is_empty() => {
                next_other = next_other.max(content.saturating_add(inserted));
                for bytes in next.values_mut() {
                    *bytes = (*bytes).max(content.saturating_add(inserted));
                }
            }
            None => {}
        }
        if step.factor > 1 {
            // this step may turn any byte into any character
            let most = next.iter().map(|(c, bytes)| bytes.div_ceil(c.len_utf8() as u64)).max().unwrap_or(0);
            next_other = next_other.max(most).saturating_mul(step.factor);
            next.clear();
        }
        (of_char, other) = (next, next_other);
    }
    let most = of_char.iter().map(|(c, bytes)| bytes.div_ceil(c.len_utf8() as u64)).max().unwrap_or(0);
    other.max(most)
}

/// Checks that the templates of post-processors contain the text once and few tokens.
fn check_templates(processor: &Value) -> std::result::Result<(), String> {
    let mut num_pieces = 0;
    let mut pending = vec![processor];
    while let Some(processor) = pending.pop() {
        pending.extend(processor.get("processors").and_then(Value::as_array).into_iter().flatten());
        let single = processor.get("single").and_then(Value::as_array).into_iter().flatten();
        let mut num_texts = 0;
        for piece in single {
            num_texts += usize::from(piece.get("Sequence").is_some());
            num_pieces += 1;
        }
        let special = processor.get("special_tokens").and_then(Value::as_object).into_iter().flatten();
        num_pieces += special.filter_map(|(_, token)| Some(token.get("ids")?.as_array()?.len())).sum::<usize>();
        if num_texts > 1 {
            return Err(format!(
                "`post_processor`: expected a template with the text once, found it {num_texts} times"
            ));
        }
        if num_pieces > MAX_TEMPLATE_PIECES || pending.len() > MAX_STEPS {
            return Err(format!("`post_processor`: expected templates of at most {MAX_TEMPLATE_PIECES} pieces"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Growth;
    use serde_json::{Value, json};

    fn replace(pattern: &str, content: &str) -> Value {
        json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
    }

    fn of(normalizers: &[Value], pre_tokenizers: &[Value]) -> Result<u64, String> {
        let json = json!({"normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers}});
        Growth::of(json.to_string().as_bytes()).map(|growth| growth.bytes_per_byte)
    }

    #[test]
    fn published_tokenizers_are_within_limits() {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false});
        let spaces = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"});
        // Qwen2, Llama 2, Gemma, T5, many replacements of one character
        assert_eq!(of(&[json!({"type": "NFC"})], &[json!({"type": "Split"}), bytes.clone()]), Ok(2));
        assert_eq!(of(&[json!({"type": "Prepend", "prepend": "▁"}), replace(" ", "▁")], &[]), Ok(6));
        assert_eq!(of(&[replace(" ", "▁")], &[json!({"type": "Split"})]), Ok(3));
        let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYmNkAA=="});
        assert!(of(&[charsmap.clone(), spaces.clone()], std::slice::from_ref(&metaspace)).unwrap() < 50);
        let quotes: Vec<Value> = (0..100).map(|_| replace("``", "<|quote|>")).collect();
        assert!(of(&quotes, &[bytes]).unwrap() < 50);
        assert!(
            of(&[json!({"type": "NFKD"}), json!({"type": "Lowercase"}), charsmap, spaces], &[metaspace]).unwrap() < 100
        );
    }

    #[test]
    fn unbounded_growth_is_refused() {
        let twice: Vec<Value> = (0..30).map(|_| replace("a", "aa")).collect();
        let by_turns: Vec<Value> = (0..30).flat_map(|_| [replace("a", "bb"), replace("b", "aa")]).collect();
        let regex = json!({"type": "Replace", "pattern": {"Regex": "a|x*"}, "content": "bb"});
        let long = replace("a", &"b".repeat(1_000_000));
        let pieces = replace("ab", &"xab".repeat(400));
        let prepend = json!({"type": "Prepend", "prepend": "a".repeat(100_000)});
        let bytes: Vec<Value> = (0..30).map(|_| json!({"type": "ByteLevel"})).collect();
        let charsmaps: Vec<Value> =
            (0..30).map(|_| json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYmNkAA=="})).collect();
        for normalizers in [twice, by_turns, vec![regex; 20], vec![long], vec![pieces], vec![prepend], charsmaps] {
            let message = of(&normalizers, &[]).unwrap_err();
            assert!(message.contains("may expand one byte of a text"), "{message}");
        }
        of(&bytes, &[]).unwrap_err();
        of(&[], &bytes).unwrap_err();
        of(&vec![json!({"type": "NFC"}); 300], &[]).unwrap_err();
        let twice: Vec<Value> = (0..30).map(|_| replace("a", "aa")).collect();
        let sequence = json!([{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}]);
        for other in [
            json!({"decoder": {"type": "Sequence", "decoders": twice}}),
            json!({"post_processor": {"type": "TemplateProcessing", "single": sequence}}),
            json!({"post_processor": {"special_tokens": {"a": {"ids": vec![1; 1000]}}}}),
            json!({"model": {"end_of_word_suffix": "a".repeat(1000)}}),
            json!({"model": {"max_input_chars_per_word": 1_000_000}}),
        ] {
            Growth::of(other.to_string().as_bytes()).unwrap_err();
        }
        let growth = Growth::of(json!({"normalizer": replace(" ", "▁")}).to_string().as_bytes()).unwrap();
        growth.check(1 << 20).unwrap();
        assert!(growth.check(100 << 20).unwrap_err().contains("split the text"));
    }
}
