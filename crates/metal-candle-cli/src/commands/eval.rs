//! `eval`: loss, perplexity and bits per byte.

use crate::error::UserError;
use crate::model_source::{AdaptedModelArguments, Loaded, NANO};
use crate::output::{Output, grouped};
use crate::settings::check_max_tokens;
use crate::templates::TemplateArguments;
use anyhow::Result;
use clap::Args;
use metal_candle::Error;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{Dataset, DatasetFiles, DatasetOptions, Encoding, Sample, Tokenizer};
use metal_candle::training::{bits_per_byte, evaluate};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Most bytes of a text file, which is encoded at once.
const MAX_TEXT_BYTES: u64 = 1024 << 20;

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
    let file = file_of(&path)?;
    let loaded = Loaded::new(&flags.model, output)?;
    let tokenizer = flags.template.tokenizer(&loaded.source, flags.model.adapter.as_deref())?;
    let context = loaded.model.config().max_sequence_length();
    check_max_tokens(flags.max_tokens_per_sample, loaded.model.config())?;
    let max_tokens = flags.max_tokens_per_sample.unwrap_or(2048).min(context);
    if max_tokens < 2 {
        let message = format!("expected at least 2, found {max_tokens}");
        return Err(Error::Argument { name: "max_tokens_per_sample".into(), message }.into());
    }
    let (dataset, num_bytes) = if is_rows(&file) {
        let vocab_size = Some(loaded.model.config().vocab_size);
        let options = DatasetOptions { max_tokens: Some(max_tokens), vocab_size, ..DatasetOptions::default() };
        let dataset = Dataset::from_file(&file, &tokenizer, &options)?;
        let num_bytes = trained_bytes(&dataset, &tokenizer)?;
        (dataset, num_bytes)
    } else {
        let text = metal_candle::files::read_text(&file, MAX_TEXT_BYTES)?;
        let (samples, num_bytes) = windows(&text, &tokenizer, max_tokens)?;
        (Dataset::from_samples(samples), num_bytes)
    };
    if dataset.is_empty() {
        return Err(Error::Format { path: file, message: "there is nothing to measure in it".into() }.into());
    }
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

/// The file to measure: of a folder the test split, else the valid split, else all rows.
fn file_of(path: &Path) -> metal_candle::Result<PathBuf> {
    let files = DatasetFiles::find(path)?;
    Ok(files.test.or(files.valid).unwrap_or(files.train))
}

fn is_rows(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["jsonl", "json"].iter().any(|name| extension.eq_ignore_ascii_case(name)))
}

/// A text in overlapping windows and the number of its bytes that are measured: each token but the first is measured once, and but
/// for the first window after half a window at least. A BOS token comes first only where the tokenizer puts one there.
fn windows(text: &str, tokenizer: &Tokenizer, max_tokens: usize) -> metal_candle::Result<(Vec<Sample>, usize)> {
    let Encoding { ids, offsets } = tokenizer.encode_with_offsets(text, true)?;
    let num_bytes = text.len() - offsets.first().map_or(0, |&(_, end)| end);
    let mut samples = Vec::new();
    let mut measured = 1;
    while measured < ids.len() {
        let start = if measured == 1 { 0 } else { measured - max_tokens / 2 };
        let end = (start + max_tokens).min(ids.len());
        let trained = (start..end).map(|index| index >= measured).collect();
        samples.push(Sample { ids: ids[start..end].to_vec(), trained, source: None });
        measured = end;
    }
    Ok((samples, num_bytes))
}

/// The bytes of text that the trained tokens stand for.
fn trained_bytes(dataset: &Dataset, tokenizer: &Tokenizer) -> metal_candle::Result<usize> {
    let mut num_bytes = 0;
    for sample in &dataset.samples {
        let trained = |index: usize| index > 0 && sample.trained[index];
        let mut start = 0;
        while let Some(begin) = (start..sample.ids.len()).find(|&index| trained(index)) {
            let end = (begin..sample.ids.len()).find(|&index| !trained(index)).unwrap_or(sample.ids.len());
            num_bytes += tokenizer.decode(&sample.ids[begin..end], true)?.len();
            start = end;
        }
    }
    Ok(num_bytes)
}
