//! Measures how an export changes a model, on text and on the adapter's change, before anything is written.

use crate::error::UserError;
use crate::eval_data::{self, EvalData};
use crate::output::{Output, grouped};
use crate::run_folder::RunFolder;
use anyhow::Result;
use clap::Args;
use metal_candle::adapters::Survival;
use metal_candle::data::{Dataset, DatasetFiles, Tokenizer};
use metal_candle::files::write_atomically;
use metal_candle::inference::{Adapted, Divergence};
use metal_candle::models::{save_model, save_model_with};
use metal_candle::{Model, ModelConfig};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Maximum number of compared tokens.
const MAX_TOKENS: usize = 2048;

/// The length of text windows, in tokens.
const WINDOW: usize = 512;

/// The metadata key of a proof.
pub(crate) const PROOF: &str = "metal_candle.proof";

/// Maximum number of names of weights in a message.
const MAX_NAMED: usize = 5;

/// The flag for the text of a proof.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Proof")]
pub(crate) struct ProofText {
    /// Compare source and result on this text: a JSONL file, a folder with splits, or a text file
    /// [default: the validation rows of the adapter's run, else the built-in model's sample data].
    #[arg(long, value_name = "PATH")]
    pub(crate) proof: Option<PathBuf>,
}

/// The flags for the proof of a merged adapter.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Proof")]
pub(crate) struct ProofArguments {
    #[command(flatten)]
    pub(crate) text: ProofText,

    /// Fail if less than this share of the adapter's change of any weight survives rounding.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    pub(crate) min_survival: f64,

    /// Use types with more bits for weights that would lose more than that.
    #[arg(long)]
    pub(crate) auto: bool,
}

/// The measurements.
pub(crate) struct Proof {
    /// The name of the text and the divergence on it; none without a tokenizer.
    text: Option<(String, Divergence)>,
    survivals: Vec<Survival>,
}

impl ProofArguments {
    /// Checks the flags.
    pub(crate) fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.min_survival) {
            let message = format!("`--min-survival`: expected a share from 0 to 1, found {}", self.min_survival);
            return Err(UserError::new(message).into());
        }
        self.text.check()
    }
}

impl ProofText {
    /// Checks that the text exists.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.proof {
            Some(path) => DatasetFiles::find_for_evaluation(path).map(drop).map_err(Into::into),
            None => Ok(()),
        }
    }

    /// Compares a result with its source.
    pub(crate) fn measure(
        &self,
        source: Adapted,
        result: &Model,
        tokenizer: Option<&Tokenizer>,
        run: Option<&Path>,
        survivals: Vec<Survival>,
    ) -> Result<Proof> {
        let Some(tokenizer) = tokenizer else { return Ok(Proof { text: None, survivals }) };
        let (name, dataset) = self.rows(result, tokenizer, run)?;
        let mut samples = dataset.samples;
        let mut tokens = 0;
        samples.retain(|sample| {
            let fits = tokens == 0 || tokens + sample.ids.len() <= MAX_TOKENS;
            tokens += if fits { sample.ids.len() } else { 0 };
            fits
        });
        let divergence = Divergence::measure(source, (result, None), &samples)?;
        Ok(Proof { text: Some((name, divergence)), survivals })
    }

    fn rows(&self, model: &Model, tokenizer: &Tokenizer, run: Option<&Path>) -> Result<(String, Dataset)> {
        let config = model.config();
        let window = WINDOW.min(config.max_sequence_length());
        let read = |file: &Path| EvalData::read(file, tokenizer, window, config.vocab_size);
        if let Some(path) = &self.proof {
            let file = DatasetFiles::find_for_evaluation(path)?;
            return Ok((file.display().to_string(), read(&file)?.dataset));
        }
        if let Some((name, rows)) = run.and_then(|run| validation_rows(run, tokenizer, config)) {
            return Ok((name, rows));
        }
        let file = DatasetFiles::find_for_evaluation(&crate::nano::data()?)?;
        let text = eval_data::texts(&file)?;
        let (samples, _) = eval_data::windows(&text, tokenizer, window)?;
        Ok(("the sample data of the built-in model".into(), Dataset::from_samples(samples)))
    }
}

/// The validation rows of the adapter's run, if they still exist.
fn validation_rows(adapter: &Path, tokenizer: &Tokenizer, config: &ModelConfig) -> Option<(String, Dataset)> {
    let path = std::path::absolute(adapter).ok()?;
    let (_, mut settings) = path.ancestors().take(3).find_map(|folder| RunFolder::open(folder).ok())?;
    settings.complete(config).ok()?;
    let valid = settings.datasets(tokenizer, config.vocab_size).ok()?.valid.filter(|rows| !rows.is_empty())?;
    let name = settings.data.map_or_else(|| "the sample data".into(), |path| path.display().to_string());
    Some((format!("the validation rows of {name}"), valid))
}

/// Writes a model folder, with the proof in the metadata of the weights and as a file.
pub(crate) fn save_proved(model: &Model, folder: &Path, proof: Option<&Proof>) -> Result<()> {
    let Some(proof) = proof else { return Ok(save_model(model, folder)?) };
    save_model_with(model, folder, &[(PROOF, &proof.to_line())])?;
    save_report(folder, proof)
}

/// Writes a proof as the file `proof.json` of a folder.
pub(crate) fn save_report(folder: &Path, proof: &Proof) -> Result<()> {
    let report = format!("{:#}\n", proof.to_json());
    Ok(write_atomically(folder.join("proof.json"), |file| file.write_all(report.as_bytes()))?)
}

impl Proof {
    /// The weights with a survival below `min_survival`.
    pub(crate) fn lost(survivals: &[Survival], min_survival: f64) -> Vec<&Survival> {
        // NaN counts as lost
        survivals
            .iter()
            .filter(|survival| survival.share.partial_cmp(&min_survival).is_none_or(std::cmp::Ordering::is_lt))
            .collect()
    }

    /// The error about lost changes, with a hint.
    pub(crate) fn refusal(lost: &[&Survival], min_survival: f64, hint: &str) -> UserError {
        let named: Vec<String> =
            lost.iter().take(MAX_NAMED).map(|one| format!("`{}` {:.3}", one.name, one.share)).collect();
        let more = if lost.len() > MAX_NAMED { format!(" and {} more", lost.len() - MAX_NAMED) } else { String::new() };
        UserError::new(format!(
            "less than {min_survival} of the adapter's change would survive rounding in {} weights: {}{more}; nothing was written",
            lost.len(),
            named.join(", "),
        ))
        .with_hint(hint)
    }

    /// The weight with the smallest survival.
    fn least(&self) -> Option<&Survival> {
        self.survivals.iter().min_by(|a, b| a.share.total_cmp(&b.share))
    }

    /// The whole proof, for reports.
    pub(crate) fn to_json(&self) -> Value {
        let mut report = json!({});
        if let Some((text, divergence)) = &self.text {
            report["text"] = json!(text);
            report["tokens"] = json!(divergence.tokens);
            report["mean_kl"] = json!(divergence.mean_kl);
            report["max_kl"] = json!(divergence.max_kl);
            report["top1_agreement"] = json!(divergence.top1_agreement);
            report["source_perplexity"] = json!(divergence.source_perplexity);
            report["result_perplexity"] = json!(divergence.result_perplexity);
        }
        if let Some(least) = self.least() {
            report["min_survival"] = json!(least.share);
            let shares = self.survivals.iter().map(|one| (one.name.clone(), json!(one.share)));
            report["survival"] = Value::Object(shares.collect());
        }
        report
    }

    /// The proof as one line for metadata, without the survival of single weights.
    pub(crate) fn to_line(&self) -> String {
        let mut report = self.to_json();
        if let Some(report) = report.as_object_mut() {
            report.remove("survival");
        }
        report.to_string()
    }

    /// Prints it for people.
    pub(crate) fn note(&self, output: Output) {
        if let Some((text, d)) = &self.text {
            output.note(format_args!(
                "on {} tokens of {text}: KL {:.2e} nats (largest {:.2e}), same best token {:.1} %, perplexity {:.3} -> {:.3}",
                grouped(d.tokens as u64),
                d.mean_kl,
                d.max_kl,
                100.0 * d.top1_agreement,
                d.source_perplexity,
                d.result_perplexity,
            ));
        } else {
            output.note(format_args!("no tokenizer, so source and result are not compared on text"));
        }
        if let Some(least) = self.least() {
            output.note(format_args!(
                "at least {:.3} of the adapter's change survives in each weight (`{}`)",
                least.share, least.name
            ));
        }
    }
}
