//! The tokens that end a text, as a GGUF file names them.

use crate::error::Result;
use crate::files::GgufFile;

/// Spellings of tokens that end a turn or a text in published vocabularies. A file names only some of them by a key.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<|return|>",
    "<|call|>",
    "<|eom_id|>",
    "<｜end▁of▁sentence｜>",
];

/// The ids of the tokens that end a text, the one that the file names first.
pub(super) fn end_of_generation_ids(file: &GgufFile) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut add = |id: usize| {
        if let Ok(id) = u32::try_from(id)
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    };
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        file.size(&format!("tokenizer.ggml.{key}"))?.into_iter().for_each(&mut add);
    }
    let tokens = file.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let find = |text: &str| tokens.iter().position(|token| *token == text);
    // where both others exist, this one only ends a part of an answer
    let has_calls = find("<|return|>").is_some() && find("<|call|>").is_some();
    for text in ENDS.iter().filter(|text| !(has_calls && **text == "<|end|>")) {
        find(text).into_iter().for_each(&mut add);
    }
    Ok(ids)
}
