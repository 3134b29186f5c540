//! `convert`: an adapter written in another format.

use crate::adapter_output::{AdapterOutputArguments, largest_difference, probe};
use crate::error::UserError;
use crate::output::Output;
use crate::run_folder::{FREE_HINT, fill_folder};
use anyhow::Result;
use clap::{Args, ValueEnum};
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::Rows;
use serde_json::json;

/// A format of adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AdapterFormat {
    /// `adapter_model.safetensors` and `adapter_config.json`, as PEFT reads them.
    Peft,
    /// `adapters.safetensors` and `adapter_config.json`, as mlx-lm reads them.
    Mlx,
}

/// Flags of `convert`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConvertArguments {
    /// The format to write.
    #[arg(long, value_enum)]
    pub(crate) format: AdapterFormat,

    #[command(flatten)]
    pub(crate) files: AdapterOutputArguments,
}

pub(crate) fn run(flags: &ConvertArguments, output: Output) -> Result<()> {
    let ConvertArguments { format, files: flags } = flags;
    let (_, model, mut adapter) = flags.load(output)?;
    if adapter.base_model().is_none() {
        adapter = adapter.with_base_model(&flags.model.model);
    }
    let batch = probe(&model);
    let logits_of = |adapter: &LoRAAdapter| -> metal_candle::Result<_> {
        adapter.run_model().forward(&batch, Some(&adapter.terms()?), None, Rows::All)
    };
    let expected = logits_of(&adapter)?;
    if !largest_difference(&expected, &expected)?.is_finite() {
        return Err(UserError::new("the logits with this adapter are not finite: it overflows").into());
    }
    fill_folder(&flags.output, FREE_HINT, || match format {
        AdapterFormat::Peft => Ok(adapter.save(&flags.output)?),
        AdapterFormat::Mlx => Ok(adapter.save_mlx(&flags.output)?),
    })?;

    let written = LoRAAdapter::load(&model, &flags.output)?;
    let difference = largest_difference(&expected, &logits_of(&written)?)?;
    if output.json {
        Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "modules": written.modules().len(),
            "parameters": written.num_parameters(),
            "max_logit_difference": difference,
        }))?;
    } else {
        output.note(format_args!(
            "wrote {} ({} modules)\nlogits with the adapter and with the one written differ by at most {difference:.2e}",
            flags.output.display(),
            written.modules().len(),
        ));
    }
    Ok(())
}
