//! `fuse`: an adapter merged into its model's weights.

use crate::model_source::{ModelArguments, ModelSource, check_adapter, load_adapter};
use crate::output::{Output, bytes};
use crate::run_folder::{FREE_HINT, check_free, fill_folder, recorded_template};
use crate::templates::TemplateArguments;
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::files::read_bounded;
use metal_candle::models::{Batch, Rows, save_model, write_atomically};
use metal_candle::{Model, ModelLoader};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Files that say how text becomes tokens and back.
const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];

/// Tokens of the comparison.
const NUM_COMPARED: usize = 32;

/// Flags of `fuse`.
#[derive(Debug, Clone, Args)]
pub(crate) struct FuseArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,

    /// The adapter to merge: a run folder, a PEFT folder or an mlx-lm folder.
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub(crate) adapter: PathBuf,

    /// The folder to write; it must not exist or be empty.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
}

pub(crate) fn run(flags: &FuseArguments, output: Output) -> Result<()> {
    check_adapter(&flags.adapter)?;
    check_free(&flags.output, FREE_HINT)?;
    let source = ModelSource::find(&flags.model.model, output)?;
    let model = source.load(flags.model.dtype, flags.model.device, output)?;
    let adapter = load_adapter(&model, &flags.adapter, &source)?;
    let template = TemplateArguments::default();
    // a folder of weights alone can be merged too
    let has_tokenizer = Tokenizer::is_in_folder(source.folder());
    let tokenizer = has_tokenizer.then(|| template.tokenizer(&source, Some(&flags.adapter))).transpose()?;
    let merged = adapter.merge(&model)?;
    let merged = match &tokenizer {
        Some(tokenizer) => with_end_of_turn(merged, tokenizer)?,
        None => merged,
    };
    fill_folder(&flags.output, FREE_HINT, || {
        save_model(&merged, &flags.output)?;
        copy_tokenizer(source.folder(), &flags.output)?;
        if let (Some(tokenizer), Some(_)) = (&tokenizer, recorded_template(&flags.adapter)?.chat_template) {
            write_template(tokenizer, &flags.output)?;
        }
        Ok(())
    })?;
    drop(merged);

    let written = ModelLoader::new().with_device(model.device()).load(&flags.output)?;
    let ids: Vec<u32> = probe(model.config().vocab_size);
    let batch = Batch::single(&ids);
    let with_adapter = adapter.run_model().forward(&batch, Some(&adapter.terms()?), None, Rows::All)?;
    let with_merged = written.forward(&batch, None, None, Rows::All)?;
    let difference = largest_difference(&with_adapter, &with_merged)?;
    let without = model.forward(&batch, None, None, Rows::All)?;
    let effect = largest_difference(&with_adapter, &without)?;

    let size = std::fs::metadata(flags.output.join("model.safetensors")).map_or(0, |file| file.len());
    if output.json {
        Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "dtype": written.dtype().as_str(),
            "bytes": size,
            "max_logit_difference": difference,
            "max_adapter_effect": effect,
        }))?;
    } else {
        output.note(format_args!(
            "wrote {} ({} in {})\nlogits of the merged model and of model + adapter differ by at most {difference:.2e} ({}); \
             the adapter itself changes them by up to {effect:.2e}",
            flags.output.display(),
            bytes(size),
            written.dtype().as_str(),
            rounding(&written),
        ));
    }
    if difference > 0.5 * effect && effect > 0.0 {
        Output::warn(
            "rounding to the model's dtype takes away most of what the adapter does; `--dtype f32` keeps it exact",
        );
    }
    Ok(())
}

/// The model with the token that ends a turn of the chat template among those that end a text.
pub(crate) fn with_end_of_turn(model: Model, tokenizer: &Tokenizer) -> metal_candle::Result<Model> {
    let mut config = model.config().clone();
    let end = tokenizer.end_of_turn_id().filter(|&id| (id as usize) < config.vocab_size);
    let Some(end) = end.filter(|end| !config.eos_token_ids.contains(end)) else { return Ok(model) };
    config.eos_token_ids.push(end);
    let tensors = model.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    Model::from_tensors(config, tensors, model.device())
}

/// Writes the chat template of a tokenizer into a folder, if it is a single one.
pub(crate) fn write_template(tokenizer: &Tokenizer, folder: &Path) -> metal_candle::Result<()> {
    let Some([(_, source)]) = tokenizer.chat_template().map(ChatTemplate::sources) else { return Ok(()) };
    write_atomically(folder.join("chat_template.jinja"), |file| file.write_all(source.as_bytes()))
}

fn rounding(model: &Model) -> &'static str {
    match model.dtype() {
        DType::F32 => "the order of additions",
        _ => "the rounding of its weights",
    }
}

/// Ids for a comparison, spread over the vocabulary.
pub(super) fn probe(vocab_size: usize) -> Vec<u32> {
    (0..NUM_COMPARED).map(|i| (i * 7919 % vocab_size) as u32).collect()
}

pub(super) fn largest_difference(a: &candle_core::Tensor, b: &candle_core::Tensor) -> metal_candle::Result<f32> {
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
}

/// Most bytes of such a file.
const MAX_COPIED_BYTES: u64 = 256 << 20;

/// Copies the files that say how text becomes tokens, and conversations text.
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
