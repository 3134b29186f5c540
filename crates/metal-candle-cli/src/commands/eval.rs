//! `eval`: measures loss, perplexity and bits per byte.

use crate::error::UserError;
use crate::eval_data::EvalData;
use crate::kv_cache::parse_type;
use crate::matmul_precision::PrecisionArguments;
use crate::model_source::{AdaptedModelArguments, Loaded, NANO};
use crate::output::{Output, grouped};
use crate::settings::check_max_tokens;
use crate::templates::TemplateArguments;
use anyhow::Result;
use clap::Args;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{Dataset, DatasetFiles};
use metal_candle::inference::{KVCacheType, prompt_log_probabilities};
use metal_candle::ops::LowRankUpdates;
use metal_candle::training::{Evaluation, bits_per_byte, evaluate};
use metal_candle::{Error, Model};
use serde_json::json;
use std::path::PathBuf;

/// Maximum number of tokens in a batch.
const BATCH_TOKENS: usize = 2048;

/// Flags of `eval`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EvalArguments {
    /// A JSONL file, a text file, or a folder with splits: its test rows, else its valid rows, else its train rows are used
    /// [default: the built-in model's sample data].
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Longest row, in tokens; a text file is split into windows of this size [default: the model's context, at most
    /// 2048].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_tokens_per_sample: Option<usize>,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) precision: PrecisionArguments,

    /// Evaluate as in generation, with a KV cache of this type (`f32`, `f16`, `bf16`, `q8_0` or `q4_0`), instead of as in
    /// training. Use it to compare cache types.
    #[arg(long, value_name = "TYPE", value_parser = parse_type, help_heading = "Model")]
    pub(crate) kv_cache: Option<KVCacheType>,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,
}

pub(crate) fn run(flags: &EvalArguments, output: Output) -> Result<()> {
    let path = match &flags.data {
        Some(path) => path.clone(),
        None if flags.model.model.model == NANO => crate::nano::data()?,
        None => {
            return Err(UserError::new("`--data` is missing")
                .with_hint("--data accepts a JSONL file, a folder with splits, or a text file")
                .into());
        }
    };
    let file = DatasetFiles::find_for_evaluation(&path)?;
    let loaded = Loaded::new(&flags.model, flags.precision, output)?;
    let tokenizer = flags.template.tokenizer(&loaded.source, flags.model.adapter.as_deref())?;
    let context = loaded.model.config().max_sequence_length();
    check_max_tokens(flags.max_tokens_per_sample, loaded.model.config())?;
    let max_tokens = flags.max_tokens_per_sample.unwrap_or(2048).min(context);
    if max_tokens < 2 {
        let message = format!("expected at least 2, found {max_tokens}");
        return Err(Error::Argument { name: "max_tokens_per_sample".into(), message }.into());
    }
    let EvalData { dataset, num_bytes } =
        EvalData::read(&file, &tokenizer, max_tokens, loaded.model.config().vocab_size)?;
    let terms = loaded.adapter.as_ref().map(LoRAAdapter::low_rank_updates).transpose()?;
    let evaluation = match flags.kv_cache {
        Some(kind) => evaluate_cached(&loaded.model, terms.as_ref(), &dataset, kind)?,
        None => evaluate(&loaded.model, terms.as_ref(), &dataset, BATCH_TOKENS.max(max_tokens))?,
    };
    let bits = bits_per_byte(evaluation.total_loss, num_bytes.max(1));
    if output.json {
        Output::print_json(&json!({
            "data": file.to_string_lossy(),
            "samples": dataset.len(),
            "tokens": evaluation.trained_tokens,
            "bytes": num_bytes,
            "kv_cache": flags.kv_cache.map(KVCacheType::name),
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

/// The loss of the trained tokens, computed with a KV cache of this type, one row at a time.
fn evaluate_cached(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    dataset: &Dataset,
    kind: KVCacheType,
) -> metal_candle::Result<Evaluation> {
    let mut evaluation = Evaluation { total_loss: 0.0, trained_tokens: 0 };
    for sample in &dataset.samples {
        let scores = prompt_log_probabilities(model, terms, &sample.ids, 0, Some(kind))?;
        let trained = scores.iter().zip(sample.trained.iter().skip(1)).filter(|(_, is_trained)| **is_trained);
        for ((log_probability, _), _) in trained {
            evaluation.total_loss -= f64::from(*log_probability);
            evaluation.trained_tokens += 1;
        }
    }
    Ok(evaluation)
}
