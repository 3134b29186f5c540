//! Settings of a training run.

use super::loss::check_label_smoothing;
use super::{AdamWConfig, LRScheduler};
use crate::data::Dataset;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// The usual settings of a training run; the `with_*` methods of [`Trainer`](super::Trainer) have more.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingConfig {
    /// Passes over the data.
    pub num_epochs: usize,
    /// The learning rate of each step.
    pub lr_scheduler: LRScheduler,
    /// Settings of AdamW.
    pub optimizer_config: AdamWConfig,
    /// Gradients whose global norm is larger are scaled down to it.
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

/// What the `with_*` methods of the trainer set.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) batch_tokens: usize,
    pub(super) batch_samples: usize,
    pub(super) batches: Option<Vec<Vec<usize>>>,
    pub(super) gradient_accumulation: usize,
    pub(super) label_smoothing: f64,
    pub(super) max_steps: Option<usize>,
    pub(super) seed: u64,
    pub(super) evaluation: Option<EvaluationOptions>,
    pub(super) patience: Option<usize>,
    pub(super) run_folder: Option<PathBuf>,
    pub(super) save_interval: Option<usize>,
    pub(super) kept_checkpoints: usize,
    pub(super) resume: bool,
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
            batch_tokens: 2048,
            batch_samples: usize::MAX,
            batches: None,
            gradient_accumulation: 1,
            label_smoothing: 0.0,
            max_steps: None,
            seed: 0,
            evaluation: None,
            patience: None,
            run_folder: None,
            save_interval: None,
            kept_checkpoints: 2,
            resume: false,
        }
    }
}

pub(super) fn check(config: &TrainingConfig, options: &Options) -> Result<()> {
    config.lr_scheduler.check()?;
    config.optimizer_config.check()?;
    if let Some(norm) = config.max_grad_norm.filter(|norm| !norm.is_finite() || *norm <= 0.0) {
        return Err(Error::argument("max_grad_norm", format!("expected a number above 0, found `{norm}`")));
    }
    check_label_smoothing(options.label_smoothing)?;
    let counts = [
        ("batch_tokens", options.batch_tokens),
        ("batch_samples", options.batch_samples),
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
