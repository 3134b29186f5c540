//! Finds the end-of-generation tokens of a GGUF file, by key and by text.

use super::gguf::GgufFile;
use super::gguf_header::GgufValue;
use crate::error::Result;
use std::collections::HashMap;

/// Tokens that end a turn or a text in published vocabularies. A file names only some of them by a key.
pub(crate) const END_MARKS: [&str; 19] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Tokens that end a text only if they are control tokens: in some vocabularies they are text, such as HTML tags.
const CONTROL_END_MARKS: [&str; 3] = ["</s>", "<eos>", "[EOS]"];
/// The type of a control token.
const CONTROL: GgufValue = GgufValue::Integer(3);

/// The ids of the tokens that end a generation: EOS, EOT, EOM and known tokens. EOS is first.
///
/// # Errors
/// A key has a value of a different type.
pub(crate) fn end_of_generation_ids(file: &GgufFile) -> Result<Vec<u32>> {
    let mut ids: Vec<usize> = Vec::new();
    let is_sentence_piece = file.text("tokenizer.ggml.model")? == Some("llama");
    ids.extend(file.size("tokenizer.ggml.eos_token_id")?.or(is_sentence_piece.then_some(2)));
    for name in ["eot", "eom"] {
        ids.extend(file.size(&format!("tokenizer.ggml.{name}_token_id"))?);
    }
    let tokens = file.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = file.list("tokenizer.ggml.token_type")?.unwrap_or_default();
    let places: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    ids.extend(END_MARKS.iter().filter_map(|mark| places.get(mark)));
    let control = CONTROL_END_MARKS.iter().filter_map(|mark| places.get(mark));
    ids.extend(control.filter(|&&id| types.get(id) == Some(&CONTROL)));
    // in these vocabularies, `<|end|>` ends only a part of an answer
    let has = |mark: &str| places.contains_key(mark);
    if (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>")) {
        ids.retain(|id| places.get("<|end|>") != Some(id));
    }
    let mut unique = Vec::new();
    for id in ids.into_iter().filter_map(|id| u32::try_from(id).ok()) {
        if !unique.contains(&id) {
            unique.push(id);
        }
    }
    Ok(unique)
}
