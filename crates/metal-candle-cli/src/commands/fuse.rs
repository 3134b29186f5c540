//! `fuse`: an adapter merged into its model's weights.

use crate::adapter_output::{AdapterOutputArguments, largest_difference, probe};
use crate::model_folder::{with_end_of_turn, write_template};
use crate::output::{Output, bytes};
use crate::run_folder::{FREE_HINT, fill_folder, recorded_template};
use crate::templates::TemplateArguments;
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::models::{Rows, save_model};
use metal_candle::{Model, ModelLoader};
use serde_json::json;

/// Flags of `fuse`.
#[derive(Debug, Clone, Args)]
pub(crate) struct FuseArguments {
    #[command(flatten)]
    pub(crate) files: AdapterOutputArguments,
}

pub(crate) fn run(flags: &FuseArguments, output: Output) -> Result<()> {
    let flags = &flags.files;
    let (source, model, adapter) = flags.load(output)?;
    let template = TemplateArguments::default();
    // a folder of weights alone can be merged too
    let has_tokenizer = source.has_tokenizer();
    let tokenizer = has_tokenizer.then(|| template.tokenizer(&source, Some(&flags.adapter))).transpose()?;
    let merged = adapter.merge(&model)?;
    let merged = match &tokenizer {
        Some(tokenizer) => with_end_of_turn(merged, tokenizer)?,
        None => merged,
    };
    fill_folder(&flags.output, FREE_HINT, || {
        save_model(&merged, &flags.output)?;
        source.write_tokenizer(&flags.output)?;
        if let (Some(tokenizer), Some(_)) = (&tokenizer, recorded_template(&flags.adapter)?.chat_template) {
            write_template(tokenizer, &flags.output)?;
        }
        Ok(())
    })?;
    drop(merged);

    let written = ModelLoader::new().with_device(model.device()).load(&flags.output)?;
    let batch = probe(&model);
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
            "rounding to the model's dtype removes most of the adapter's effect; `--dtype f32` keeps it exact",
        );
    }
    Ok(())
}

fn rounding(model: &Model) -> &'static str {
    match model.dtype() {
        DType::F32 => "the order of additions",
        _ => "the rounding of its weights",
    }
}
