//! `eval`: loss, perplexity and bits per byte.

use crate::error::UserError;
use crate::held_out::{self, HeldOut};
use crate::model_source::{AdaptedModelArguments, Loaded, NANO};
use crate::output::{Output, grouped};
use crate::settings::check_max_tokens;
use crate::templates::TemplateArguments;
use anyhow::Result;
use clap::Args;
use metal_candle::Error;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::training::{bits_per_byte, evaluate};
use serde_json::json;
use std::path::PathBuf;

/// Tokens computed at once.
const BATCH_TOKENS: usize = 2048;

/// Flags of `eval`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EvalArguments {
    /// A JSONL file, a folder with splits, or a text file [default: the sample data of the built-in model].
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Longest row, in tokens; a text file is read in windows of this size [default: 2048 or what the model can do].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_tokens_per_sample: Option<usize>,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,
}

pub(crate) fn run(flags: &EvalArguments, output: Output) -> Result<()> {
    let path = match &flags.data {
        Some(path) => path.clone(),
        None if flags.model.model.model == NANO => crate::nano::data()?,
        None => {
            return Err(UserError::new("there is nothing to measure on: `--data` is missing")
                .with_hint("--data takes a JSONL file, a folder with splits, or a text file")
                .into());
        }
    };
    let file = held_out::file_of(&path)?;
    let loaded = Loaded::new(&flags.model, output)?;
    let tokenizer = flags.template.tokenizer(&loaded.source, flags.model.adapter.as_deref())?;
    let context = loaded.model.config().max_sequence_length();
    check_max_tokens(flags.max_tokens_per_sample, loaded.model.config())?;
    let max_tokens = flags.max_tokens_per_sample.unwrap_or(2048).min(context);
    if max_tokens < 2 {
        let message = format!("expected at least 2, found {max_tokens}");
        return Err(Error::Argument { name: "max_tokens_per_sample".into(), message }.into());
    }
    let HeldOut { dataset, num_bytes } =
        HeldOut::read(&file, &tokenizer, max_tokens, loaded.model.config().vocab_size)?;
    let terms = loaded.adapter.as_ref().map(LoRAAdapter::terms).transpose()?;
    let evaluation = evaluate(&loaded.model, terms.as_ref(), &dataset, BATCH_TOKENS.max(max_tokens))?;
    let bits = bits_per_byte(evaluation.total_loss, num_bytes.max(1));
    if output.json {
        Output::print_json(&json!({
            "data": file.to_string_lossy(),
            "samples": dataset.len(),
            "tokens": evaluation.trained_tokens,
            "bytes": num_bytes,
            "loss": evaluation.loss(),
            "perplexity": evaluation.perplexity(),
            "bits_per_byte": bits,
        }))?;
        return Ok(());
    }
    Output::print(format_args!(
        "data           {}\ntokens         {} ({} bytes of text)\nloss           {:.4} nats per token\nperplexity     {:.3}\nbits per byte  {bits:.4}\n",
        file.display(),
        grouped(evaluation.trained_tokens as u64),
        grouped(num_bytes as u64),
        evaluation.loss(),
        evaluation.perplexity(),
    ))?;
    Ok(())
}
