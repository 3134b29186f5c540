//! `logits`: writes the logits of token ids to a file.

use crate::error::UserError;
use crate::matmul_precision::PrecisionArguments;
use crate::model_source::{AdaptedModelArguments, Loaded};
use crate::output::Output;
use anyhow::Result;
use clap::Args;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::{Batch, Rows, SafetensorsFile, write_safetensors};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Flags of `logits`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogitsArguments {
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, value_name = "ID,ID,...")]
    pub(crate) ids: Vec<u32>,

    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) precision: PrecisionArguments,
}

pub(crate) fn run(flags: &LogitsArguments, output: Output) -> Result<()> {
    let loaded = Loaded::new(&flags.model, flags.precision, output)?;
    let folders = [Some(loaded.source.folder()), flags.model.adapter.as_deref()];
    for folder in folders.into_iter().flatten() {
        for folder in [folder, &folder.join("adapter")] {
            refuse_file_of(folder, &flags.out)?;
        }
    }
    let terms = loaded.adapter.as_ref().map(LoRAAdapter::low_rank_updates).transpose()?;
    let logits = loaded.model.forward(&Batch::single(&flags.ids), terms.as_ref(), None, Rows::All)?;
    write_safetensors(&flags.out, &[("logits", logits.clone())], &[])?;
    let (tokens, vocab) = logits.dims2().map_err(metal_candle::Error::from)?;
    if output.json {
        let out = flags.out.to_string_lossy();
        Output::print_json(&json!({ "out": out, "tensor": "logits", "shape": [tokens, vocab], "dtype": "f32" }))?;
    } else {
        output.note(format_args!("wrote `logits`, f32 [{tokens}, {vocab}], to {}", flags.out.display()));
    }
    Ok(())
}

/// Refuses to overwrite a file of a model or adapter; earlier logits in the same folder may be overwritten.
fn refuse_file_of(folder: &Path, out: &Path) -> Result<()> {
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_own = files.filter_map(|file| file.path().canonicalize().ok()).any(|file| file == target);
    let is_logits = |file: SafetensorsFile| file.entries().len() == 1 && file.entry("logits").is_some();
    if is_own && !SafetensorsFile::open(&target).is_ok_and(is_logits) {
        let message = format!("`--out`: `{}` belongs to the model and is not overwritten", out.display());
        return Err(UserError::new(message).into());
    }
    Ok(())
}
