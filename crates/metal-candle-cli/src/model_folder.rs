//! Writes the files of a model folder besides its weights: tokenizer, chat template, end-of-text tokens.

use metal_candle::Model;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::files::{read_bounded, write_atomically};
use std::path::Path;

/// The files of a tokenizer and its chat template.
const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];

/// Largest accepted file of a tokenizer, in bytes.
const MAX_COPIED_BYTES: u64 = 256 << 20;

/// Copies the files of the tokenizer and its chat template.
pub(crate) fn copy_tokenizer(from: &Path, to: &Path) -> metal_candle::Result<()> {
    for name in TOKENIZER_FILES {
        let path = from.join(name);
        if path.exists() {
            let bytes = read_bounded(&path, MAX_COPIED_BYTES)?;
            write_atomically(to.join(name), |file| file.write_all(&bytes))?;
        }
    }
    Ok(())
}

/// Adds the token that ends a turn of the chat template to the end-of-text tokens of the model.
pub(crate) fn with_end_of_turn(model: Model, tokenizer: &Tokenizer) -> metal_candle::Result<Model> {
    let mut config = model.config().clone();
    let end = tokenizer.end_of_turn_id().filter(|&id| (id as usize) < config.vocab_size);
    let Some(end) = end.filter(|end| !config.eos_token_ids.contains(end)) else { return Ok(model) };
    config.eos_token_ids.push(end);
    let tensors = model.parameters().iter().map(|(name, weight)| Ok((name.clone(), weight.tensor()?)));
    let tensors = tensors.collect::<metal_candle::Result<_>>()?;
    Model::from_tensors(config, tensors, model.device())
}

/// Writes the chat template of a tokenizer into a folder, unless it has several named ones.
pub(crate) fn write_template(tokenizer: &Tokenizer, folder: &Path) -> metal_candle::Result<()> {
    let Some([(_, source)]) = tokenizer.chat_template().map(ChatTemplate::sources) else { return Ok(()) };
    write_atomically(folder.join("chat_template.jinja"), |file| file.write_all(source.as_bytes()))
}
