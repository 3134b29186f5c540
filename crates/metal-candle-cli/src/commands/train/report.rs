//! Prints the output of `train`.

use super::answers::Question;
use super::prepared::Prepared;
use super::profiler::Profiled;
use crate::memory;
use crate::model_source::NANO;
use crate::output::{Output, bytes, counted, duration, grouped};
use crate::rank;
use crate::run_folder::RunFolder;
use crate::values::MixtureName;
use anyhow::Result;
use metal_candle::data::{Dataset, Datasets, Tokenizer};
use metal_candle::training::{StopReason, TrainingMetrics};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Generated answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Written {
    /// The answer for the shown row.
    pub(super) sample: Option<String>,
    /// The number of exactly right answers.
    pub(super) num_right: usize,
}

/// The report at the end of a run.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) run: RunFolder,
    /// The folder of the adapter, or of the model.
    pub(super) kept: PathBuf,
    pub(super) is_full: bool,
    /// The model, as named by the user.
    pub(super) model: String,
    /// The type to which its weights were quantized while loading.
    pub(super) quantize: Option<MixtureName>,
    pub(super) metrics: TrainingMetrics,
    pub(super) total_steps: usize,
    /// The evaluations: step and loss.
    pub(super) valid: Vec<(f64, f64)>,
    pub(super) num_questions: usize,
    pub(super) before: Written,
    pub(super) after: Written,
    /// A prompt for the next command.
    pub(super) example: Option<String>,
    /// The profile of the first steps, if it was recorded.
    pub(super) profiled: Option<Profiled>,
}

/// The number of rows of each split.
pub(super) fn rows(data: &Datasets) -> String {
    let tokens: usize = data.train.lengths().iter().sum();
    let count = |dataset: &Dataset| grouped(dataset.len() as u64);
    let mut parts = vec![format!("{} rows ({} tokens) to train on", count(&data.train), grouped(tokens as u64))];
    for (dataset, purpose) in [(&data.valid, "to validate"), (&data.test, "to test")] {
        parts.extend(dataset.as_ref().map(|dataset| format!("{} {purpose}", count(dataset))));
    }
    parts.join(", ")
}

/// Prints model, adapter and data before the run.
pub(super) fn summary(prepared: &Prepared, rows: &str, run: &RunFolder, total_steps: usize, output: Output) {
    let Prepared { settings, source, model, adapter, .. } = prepared;
    let config = model.config();
    output.note(format_args!(
        "model    {} ({} blocks, hidden {}, {} parameters, {}, on {}{})",
        source.name,
        config.num_hidden_layers,
        config.hidden_size,
        grouped(config.num_parameters() as u64),
        model.weight_type(),
        if prepared.num_devices > 1 { format!("{} x ", prepared.num_devices) } else { String::new() },
        model.device(),
    ));
    match adapter {
        Some(adapter) => {
            let mut modules: Vec<_> = adapter.modules().iter().map(|module| module.module).collect();
            modules.sort_unstable();
            modules.dedup();
            let saved: Vec<_> = adapter.saved_parameters().iter().map(|saved| saved.name.as_str()).collect();
            output.note(format_args!(
                "adapter  rank {}, alpha {} on {} ({}): {} parameters, {:.2} % of the model's",
                adapter.rank(),
                adapter.alpha(),
                counted(adapter.modules().len(), "layer"),
                modules.join(", "),
                grouped(adapter.num_parameters() as u64),
                100.0 * adapter.num_parameters() as f64 / config.num_parameters() as f64,
            ));
            if !saved.is_empty() {
                output.note(format_args!("         trained in full: {}", saved.join(", ")));
            }
        }
        None => match settings.train_last_layers {
            Some(1) => output.note("adapter  none: the last block is trained"),
            Some(count) => output.note(format_args!("adapter  none: the last {count} blocks are trained")),
            None => output.note("adapter  none: all weights are trained"),
        },
    }
    output.note(format_args!("data     {}: {rows}", prepared.data_name));
    output.note(format_args!(
        "run      {}: {} of up to {} tokens, learning rate {:e}",
        run.path().display(),
        counted(total_steps, "step"),
        settings.batch_tokens.unwrap_or(0).saturating_mul(settings.gradient_accumulation_steps.unwrap_or(1)),
        settings.learning_rate.unwrap_or(0.0),
    ));
}

/// Prints a row, the expected answer, and the model's answer before training.
pub(super) fn sample_before(
    tokenizer: &Tokenizer,
    question: Option<&Question>,
    written: &Written,
    output: Output,
) -> Result<()> {
    let (Some(question), Some(text)) = (question, &written.sample) else { return Ok(()) };
    output.note(format_args!(
        "\na row that is not trained:\n{}\nwhat should follow:\n{}\nwhat the model writes before training:\n{}\n",
        indented(&question.prompt_text(tokenizer)?),
        indented(&question.answer_text(tokenizer)?),
        indented(text),
    ));
    Ok(())
}

impl Report {
    pub(super) fn print(&self, output: Output, seconds: f64) -> Result<()> {
        if output.json {
            Output::print_json(&self.as_json(seconds))?;
        }
        let is_stopped = self.metrics.stop_reason == StopReason::Callback;
        if let (Some(profiled), false) = (&self.profiled, output.json) {
            profiled.print(output);
        }
        if let (Some(text), false) = (&self.after.sample, is_stopped) {
            output.note(format_args!("\nwhat the model writes after training:\n{}\n", indented(text)));
        }
        if let (Some((_, first)), Some((_, last))) = (self.valid.first(), self.valid.last()) {
            output.note(format_args!(
                "validation loss {first:.4} before, {last:.4} after (perplexity {:.2}, {:.2})",
                first.exp(),
                last.exp()
            ));
            if let Some(best) = self.metrics.best.filter(|best| best.loss < *last) {
                output.note(format_args!("                {:.4} at step {}: that state is kept", best.loss, best.step));
            }
        }
        if self.num_questions > 0 && !is_stopped {
            let share = |right: usize| 100.0 * right as f64 / self.num_questions as f64;
            output.note(format_args!(
                "exactly right   {} of {} test rows before ({:.1} %), {} after ({:.1} %)",
                self.before.num_right,
                self.num_questions,
                share(self.before.num_right),
                self.after.num_right,
                share(self.after.num_right),
            ));
        }
        let how = match self.metrics.stop_reason {
            StopReason::EarlyStopping => ", stopped early",
            StopReason::Callback => ", stopped",
            _ => "",
        };
        let speed = match self.metrics.steps.len() {
            0 => String::new(),
            _ => format!(", {:.0} tokens/s", self.metrics.tokens_per_second()),
        };
        let memory = memory::peak().map_or_else(String::new, |peak| format!(", at most {} of memory", bytes(peak)));
        output.note(format_args!(
            "done            {} of {}{how} in {}{speed}{memory}",
            self.metrics.num_steps,
            counted(self.total_steps, "step"),
            duration(seconds),
        ));
        let kind = if self.is_full { "model" } else { "adapter" };
        output.note(format_args!("{kind:<15} {}", self.kept.display()));
        output.note(format_args!("picture         {}", self.run.picture().display()));
        if is_stopped {
            output.note(format_args!(
                "resume with     metal-candle train --resume {}{}",
                self.run.path().display(),
                rank::flag()
            ));
        } else {
            output.note(format_args!("try it          {}", self.next_command()));
        }
        Ok(())
    }

    fn next_command(&self) -> String {
        let prompt = match &self.example {
            Some(text) => shell_quoted(text.trim()),
            None => "\"...\"".to_owned(),
        };
        let run = self.run.path().display();
        if self.is_full {
            return format!("metal-candle generate --model {} --temperature 0 --prompt {prompt}", self.kept.display());
        }
        let model = if self.model == NANO { String::new() } else { format!("--model {} ", self.model) };
        // the adapter needs the quantized weights it was trained on
        let quantize =
            self.quantize.map_or_else(String::new, |MixtureName(mixture)| format!("--quantize {} ", mixture.name));
        format!("metal-candle generate {model}{quantize}--adapter {run} --temperature 0 --prompt {prompt}")
    }

    fn as_json(&self, seconds: f64) -> serde_json::Value {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let stop_reason = match self.metrics.stop_reason {
            StopReason::EarlyStopping => "early_stopping",
            StopReason::Callback => "stopped",
            _ => "completed",
        };
        let kept_as = if self.is_full { "model" } else { "adapter" };
        let mut object = json!({
            "run": path(self.run.path()),
            kept_as: path(&self.kept),
            "steps": self.metrics.num_steps,
            "total_steps": self.total_steps,
            "epochs": self.metrics.num_epochs,
            "stop_reason": stop_reason,
            "final_loss": self.metrics.final_loss(),
            "valid_loss_before": self.valid.first().map(|point| point.1),
            "valid_loss_after": self.valid.last().map(|point| point.1),
            "best_step": self.metrics.best.map(|best| best.step),
            "best_valid_loss": self.metrics.best.map(|best| best.loss),
            "num_trainable_parameters": self.metrics.num_trainable_parameters,
            "tokens": self.metrics.tokens,
            "trained_tokens": self.metrics.trained_tokens,
            "tokens_per_second": self.metrics.tokens_per_second(),
            "seconds": seconds,
            "peak_memory_bytes": memory::peak(),
            "sample_before": self.before.sample,
            "sample_after": self.after.sample,
        });
        if let Some(profiled) = &self.profiled {
            object["profile"] = json!(path(&profiled.path));
        }
        if self.num_questions > 0 && self.metrics.stop_reason != StopReason::Callback {
            object["test_samples"] = json!(self.num_questions);
            object["exactly_right_before"] = json!(self.before.num_right);
            object["exactly_right_after"] = json!(self.after.num_right);
        }
        object
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// Quotes a text as one word for a POSIX shell.
fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::shell_quoted;

    #[test]
    fn quoted_for_the_shell() {
        assert_eq!(shell_quoted("a 'b' $c"), "'a '\\''b'\\'' $c'");
    }
}
