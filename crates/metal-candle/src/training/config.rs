//! Settings of a training run.

use super::TrainingWarning;
use super::distributed::Group;
use super::loss::check_label_smoothing;
use super::{AdamWConfig, LRScheduler, OptimizerConfig, Parameter, ParameterGroup};
use crate::data::Dataset;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// The common settings of a training run; the `with_*` methods of [`Trainer`](super::Trainer) set the others.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingConfig {
    /// Passes over the data.
    pub num_epochs: usize,
    /// The learning rate of each step.
    pub lr_scheduler: LRScheduler,
    /// Settings of AdamW; [`Trainer::with_optimizer`](super::Trainer::with_optimizer) takes another optimizer.
    pub optimizer_config: AdamWConfig,
    /// Gradients with a larger global norm are scaled down to this norm.
    pub max_grad_norm: Option<f64>,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            num_epochs: 1,
            lr_scheduler: LRScheduler::constant(1e-4),
            optimizer_config: AdamWConfig::default(),
            max_grad_norm: Some(1.0),
        }
    }
}

/// The settings of the trainer's `with_*` methods.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// Replaces AdamW with the settings of the configuration.
    pub(super) optimizer: Option<OptimizerConfig>,
    pub(super) lora_plus_ratio: Option<f64>,
    pub(super) decay_matrices_only: bool,
    pub(super) batch_tokens: usize,
    pub(super) batch_samples: usize,
    /// Batches with more tokens are split into micro-batches.
    pub(super) micro_batch_tokens: Option<usize>,
    pub(super) checkpointed_blocks: usize,
    pub(super) batches: Option<Vec<Vec<usize>>>,
    pub(super) gradient_accumulation: usize,
    pub(super) label_smoothing: f64,
    pub(super) neftune_noise_alpha: f64,
    pub(super) max_steps: Option<usize>,
    pub(super) seed: u64,
    pub(super) evaluation: Option<EvaluationOptions>,
    pub(super) patience: Option<usize>,
    pub(super) run_folder: Option<PathBuf>,
    pub(super) save_interval: Option<usize>,
    pub(super) kept_checkpoints: usize,
    pub(super) resume: bool,
    /// The ranks that train together; none if this process trains alone.
    pub(super) group: Option<Group>,
    /// Warnings found before the run starts.
    pub(super) warnings: Vec<TrainingWarning>,
}

#[derive(Debug, Clone)]
pub(super) struct EvaluationOptions {
    pub(super) dataset: Dataset,
    /// In steps; 0 for the end of each epoch.
    pub(super) interval: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            optimizer: None,
            lora_plus_ratio: None,
            decay_matrices_only: false,
            batch_tokens: 2048,
            batch_samples: usize::MAX,
            micro_batch_tokens: None,
            checkpointed_blocks: 0,
            batches: None,
            gradient_accumulation: 1,
            label_smoothing: 0.0,
            neftune_noise_alpha: 0.0,
            max_steps: None,
            seed: 0,
            evaluation: None,
            patience: None,
            run_folder: None,
            save_interval: None,
            kept_checkpoints: 2,
            resume: false,
            group: None,
            warnings: Vec::new(),
        }
    }
}

impl Options {
    pub(super) fn optimizer(&self, config: &TrainingConfig) -> OptimizerConfig {
        self.optimizer.unwrap_or(OptimizerConfig::AdamW(config.optimizer_config))
    }

    /// The group of a parameter; `highest_rate` is that of the schedule.
    pub(super) fn group(&self, parameter: &Parameter, highest_rate: f64) -> ParameterGroup {
        let is_vector = parameter.shape.len() < 2;
        ParameterGroup {
            learning_rate_factor: self.lora_plus_ratio.map_or(1.0, |ratio| {
                if parameter.name.contains("embed_tokens.lora_") {
                    // the setting is an absolute rate, and the schedule multiplies it by a factor
                    if highest_rate > 0.0 { LORA_PLUS_EMBEDDING_RATE / highest_rate } else { 0.0 }
                } else if parameter.name.ends_with("lora_B") || is_vector {
                    ratio
                } else {
                    1.0
                }
            }),
            decays: !(self.decay_matrices_only && is_vector),
        }
    }
}

/// The learning rate of embedding adapters with LoRA+, as in PEFT.
const LORA_PLUS_EMBEDDING_RATE: f64 = 1e-6;

pub(super) fn check(config: &TrainingConfig, options: &Options) -> Result<()> {
    config.lr_scheduler.check()?;
    options.optimizer(config).check()?;
    if let Some(ratio) = options.lora_plus_ratio.filter(|ratio| !ratio.is_finite() || *ratio <= 0.0) {
        return Err(Error::argument("lora_plus_ratio", format!("expected a number above 0, found `{ratio}`")));
    }
    if let Some(norm) = config.max_grad_norm.filter(|norm| !norm.is_finite() || *norm <= 0.0) {
        return Err(Error::argument("max_grad_norm", format!("expected a number above 0, found `{norm}`")));
    }
    check_label_smoothing(options.label_smoothing)?;
    let alpha = options.neftune_noise_alpha;
    if !alpha.is_finite() || alpha < 0.0 {
        return Err(Error::argument(
            "neftune_noise_alpha",
            format!("expected a number of at least 0, found `{alpha}`"),
        ));
    }
    let counts = [
        ("batch_tokens", options.batch_tokens),
        ("batch_samples", options.batch_samples),
        ("micro_batch_tokens", options.micro_batch_tokens.unwrap_or(1)),
        ("gradient_accumulation", options.gradient_accumulation),
        ("save_interval", options.save_interval.unwrap_or(1)),
        ("kept_checkpoints", options.kept_checkpoints),
        ("patience", options.patience.unwrap_or(1)),
        ("max_steps", options.max_steps.unwrap_or(1)),
    ];
    for (name, count) in counts {
        if count == 0 {
            return Err(Error::argument(name, "expected at least 1, found 0"));
        }
    }
    if options.max_steps.is_none() && config.num_epochs == 0 {
        return Err(Error::argument("num_epochs", "expected at least 1, found 0"));
    }
    for (name, needs, is_there) in [
        ("patience", "an evaluation dataset", options.patience.is_none() || options.evaluation.is_some()),
        ("save_interval", "a run folder", options.save_interval.is_none() || options.run_folder.is_some()),
        ("resume", "a run folder", !options.resume || options.run_folder.is_some()),
    ] {
        if !is_there {
            return Err(Error::argument(name, format!("needs {needs}")));
        }
    }
    Ok(())
}
