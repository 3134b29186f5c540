//! Predicts the memory and time of a run, for the command `plan` and the first lines of `train`.

use super::prepared::Prepared;
use crate::error::UserError;
use crate::output::{Output, bytes, duration, grouped};
use crate::settings::TrainSettings;
use crate::values::parse_bytes;
use anyhow::Result;
use clap::Args;
use metal_candle::data::Dataset;
use metal_candle::inference::SchedulerConfig;
use metal_candle::training::{Trained, Trainer, TrainingPlan};
use metal_candle::{MemoryInUse, Model};
use serde_json::json;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Flags of `plan`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlanArguments {
    /// Read settings from a TOML file whose keys are the names of these flags; flags override the file.
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub(crate) config: Option<PathBuf>,

    /// Number of micro-batches to run to estimate the time; 0 for no estimate.
    #[arg(long, value_name = "COUNT", default_value_t = 3, help_heading = "Run")]
    pub(crate) measure: usize,

    #[command(flatten)]
    pub(crate) settings: TrainSettings,
}

/// The share of the free memory that a run may use unless `--memory` is given.
const SHARE_OF_FREE: f64 = 0.9;

/// The plan of a trainer that fits in memory, and the other memory.
pub(super) struct Fitted {
    pub(super) plan: TrainingPlan,
    /// The program, its tokenizer and data, in bytes, if the system reports it.
    program_bytes: Option<usize>,
    /// The limit, in bytes, if known.
    limit: Option<usize>,
    /// The KV cache while answers are generated.
    cache_bytes: usize,
    /// Whether a smaller micro-batch or checkpointed blocks were chosen.
    is_changed: bool,
}

impl Prepared {
    /// Makes the run fit in the limit of `--memory` or in free memory.
    pub(super) fn fit<T: Trained>(&self, trainer: Trainer<T>) -> Result<(Trainer<T>, Fitted)> {
        let whole = trainer.plan(&self.data.train)?;
        let mut memory = self.model.device().memory();
        // CPU processes share the free memory and the limit
        let sharing = if self.model.device().is_cpu() { self.num_devices } else { 1 };
        if let Some(memory) = &mut memory {
            memory.free /= sharing;
        }
        let program_bytes = memory.map(|memory| program_bytes(&self.model, memory));
        let budget = match &self.settings.memory {
            Some(text) => {
                let bytes = parse_bytes(text).map_err(|message| UserError::new(format!("`--memory`: {message}")))?;
                Some(bytes / sharing)
            }
            None => memory.map(|memory| memory.used + (SHARE_OF_FREE * memory.free as f64) as usize),
        };
        let cache_bytes = self.cache_bytes();
        let Some(budget) = budget else {
            let fitted = Fitted { plan: whole, program_bytes, limit: None, cache_bytes, is_changed: false };
            return Ok((trainer, fitted));
        };
        let limit = budget.saturating_sub(program_bytes.unwrap_or(0));
        let (trainer, plan) = trainer.fitted(&self.data.train, limit)?;
        let is_changed = plan != whole;
        Ok((trainer, Fitted { plan, program_bytes, limit: Some(budget), cache_bytes, is_changed }))
    }

    /// The size of the KV cache for the longest answer before and after training.
    fn cache_bytes(&self) -> usize {
        let rows: Vec<&Dataset> = [self.data.test.as_ref(), self.data.valid.as_ref()].into_iter().flatten().collect();
        let longest = rows.iter().flat_map(|rows| rows.lengths()).max().unwrap_or(0);
        SchedulerConfig::of(&self.model).cache_bytes(&self.model, 1, longest + super::answers::MAX_SAMPLE_TOKENS)
    }
}

/// The memory in use besides the weights. Pages of mapped weights are in memory only after their first use.
fn program_bytes(model: &Model, memory: MemoryInUse) -> usize {
    let (mut loaded, mut mapped) = (0, 0);
    for (_, weight) in model.parameters() {
        *(if weight.is_mapped() { &mut mapped } else { &mut loaded }) += weight.num_bytes();
    }
    memory.used.saturating_sub(loaded + memory.mapped.min(mapped))
}

impl Fitted {
    /// The peak memory, in bytes.
    fn peak_bytes(&self) -> usize {
        let resting = self.plan.weights_bytes + self.plan.trained_bytes + self.plan.optimizer_bytes;
        self.plan.peak_bytes.max(resting + self.cache_bytes) + self.program_bytes.unwrap_or(0)
    }

    /// The temporary buffers of a step beside the saved activations, at the peak, in bytes.
    fn temporary_bytes(&self) -> usize {
        self.plan.step.peak.saturating_sub(self.plan.step.saved)
    }

    /// Prints the first lines of `train`.
    pub(super) fn note(&self, output: Output) {
        let plan = &self.plan;
        let limit = self.limit.map_or_else(String::new, |limit| format!(" of {}", bytes(limit as u64)));
        let program =
            self.program_bytes.map(|program| format!(", program {}", bytes(program as u64))).unwrap_or_default();
        let how = if self.is_changed { ", chosen to fit" } else { "" };
        output.note(format_args!(
            "memory   about {}{limit}: weights {}, trained {}, optimizer {}, activations {}, step {}{program}",
            bytes(self.peak_bytes() as u64),
            bytes(plan.weights_bytes as u64),
            bytes(plan.trained_bytes as u64),
            bytes(plan.optimizer_bytes as u64),
            bytes(plan.step.saved as u64),
            bytes(self.temporary_bytes() as u64),
        ));
        if plan.micro_batch_tokens < plan.largest_batch || plan.checkpointed_blocks > 0 {
            output.note(format_args!(
                "         micro-batches of {} tokens, {} of {} blocks checkpointed{how}",
                grouped(plan.micro_batch_tokens as u64),
                plan.checkpointed_blocks,
                plan.trained_blocks,
            ));
        }
    }
}

/// Prints the plan of a run.
pub(super) fn print<T: Trained>(
    trainer: Trainer<T>,
    prepared: &Prepared,
    flags: &PlanArguments,
    output: Output,
) -> Result<()> {
    let (trainer, fitted) = prepared.fit(trainer)?;
    let plan = &fitted.plan;
    let speed = match flags.measure {
        0 => None,
        batches => Some(trainer.measure(&prepared.data.train, batches)?).filter(|speed| *speed > 0.0),
    };
    let seconds = speed.map(|speed| plan.tokens as f64 / speed);
    if output.json {
        Output::print_json(&json!({
            "peak_memory_bytes": fitted.peak_bytes(),
            "memory_limit_bytes": fitted.limit,
            "weights_bytes": plan.weights_bytes,
            "trained_bytes": plan.trained_bytes,
            "optimizer_bytes": plan.optimizer_bytes,
            "kept_activations_bytes": plan.step.saved,
            "step_bytes": plan.step.peak,
            "head_bytes": plan.step.head,
            "kv_cache_bytes": fitted.cache_bytes,
            "program_bytes": fitted.program_bytes,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "trained_tokens": plan.trained_tokens,
            "longest_sample": plan.longest_sample,
            "batch_tokens": plan.largest_batch,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "checkpointed_blocks": plan.checkpointed_blocks,
            "trained_blocks": plan.trained_blocks,
            "tokens_per_second": speed,
            "seconds": seconds,
        }))?;
        return Ok(());
    }
    let mut text = String::new();
    let mut line = |name: &str, value: String, remark: &str| {
        // writing to a string does not fail
        let _ = writeln!(text, "{}", format!("{name:14} {value:>12}  {remark}").trim_end());
    };
    let size = |count: usize| bytes(count as u64);
    let count = |count: usize| grouped(count as u64);
    line("weights", size(plan.weights_bytes), "");
    line("trained", size(plan.trained_bytes), "parameters, gradients and saved copies");
    line("optimizer", size(plan.optimizer_bytes), "");
    line("activations", size(plan.step.saved), "saved between forward and backward pass");
    line("step", size(fitted.temporary_bytes()), "temporary, at the peak");
    line("head", size(plan.step.head), "of the step: logits and loss");
    line("kv cache", size(fitted.cache_bytes), "for answers before and after training");
    if let Some(program) = fitted.program_bytes {
        line("program", size(program), "the program itself, tokenizer and data");
    }
    let limit = fitted.limit.map_or_else(String::new, |limit| format!("of a limit of {}", size(limit)));
    line("peak", size(fitted.peak_bytes()), &limit);
    line("steps", count(plan.steps), "");
    line("tokens", count(plan.tokens), &format!("of which {} are trained", count(plan.trained_tokens)));
    line("batch", count(plan.largest_batch), "tokens at most");
    line("longest row", count(plan.longest_sample), "tokens");
    let chosen = if fitted.is_changed { "tokens, chosen to fit" } else { "tokens" };
    line("micro-batch", count(plan.micro_batch_tokens), chosen);
    let remark = format!("of {} blocks save only their input and are recomputed", plan.trained_blocks);
    line("checkpointed", count(plan.checkpointed_blocks), &remark);
    if let (Some(speed), Some(seconds)) = (speed, seconds) {
        line("speed", format!("{speed:.0}"), "tokens/s, measured on the first micro-batches");
        line("time", duration(seconds), "for the steps, without evaluations and answers");
    }
    Output::print(text)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::program_bytes;
    use metal_candle::{Device, MemoryInUse, ModelLoader};

    #[test]
    fn mapped_weights_count_only_while_they_are_in_memory() {
        let folder = crate::nano::folder().unwrap();
        let model = ModelLoader::new().with_device(Device::CPU).load(folder).unwrap();
        let mapped: usize = model.parameters().iter().filter(|(_, w)| w.is_mapped()).map(|(_, w)| w.num_bytes()).sum();
        let all: usize = model.parameters().iter().map(|(_, weight)| weight.num_bytes()).sum();
        assert!(mapped > 0);
        let found = |used, mapped| program_bytes(&model, MemoryInUse { used, mapped, free: 0 });
        assert_eq!(found(all - mapped + 1000, 0), 1000);
        assert_eq!(found(all - mapped + 1000, 400), 600);
        // other mapped files, such as the program's own
        assert_eq!(found(all + 5000, mapped + 3000), 5000);
    }
}
