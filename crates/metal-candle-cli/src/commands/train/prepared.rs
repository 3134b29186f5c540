//! Holds the settings, model and data of a run, and configures its trainer.

use super::answers::Question;
use crate::error::UserError;
use crate::model_folder::write_template;
use crate::model_source::ModelSource;
use crate::run_record::RunRecord;
use crate::settings::TrainSettings;
use anyhow::Result;
use metal_candle::Model;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{Dataset, Datasets, Tokenizer};
use metal_candle::training::{
    AdamWConfig, LRScheduler, Trained, Trainer, TrainingConfig, TrainingPlan, TrainingWarning, cut_rows_warning,
    template_warning,
};
use serde_json::Value;
use std::path::Path;

/// Settings, model and data of a run before its first step.
pub(super) struct Prepared {
    /// The settings from the file and the flags.
    pub(super) given: TrainSettings,
    /// The complete settings.
    pub(super) settings: TrainSettings,
    pub(super) source: ModelSource,
    pub(super) model: Model,
    /// The adapter to train; none if all weights are trained.
    pub(super) adapter: Option<LoRAAdapter>,
    pub(super) tokenizer: Tokenizer,
    pub(super) data: Datasets,
    /// The data, as named by the user.
    pub(super) data_name: String,
    /// When the run was first started, in seconds since 1970 (UTC). Chat templates use it as the current time.
    pub(super) started: u64,
    /// The number of processes that train together.
    pub(super) num_devices: usize,
}

impl Prepared {
    /// The initial configuration of the trainer; [`Prepared::configure`] sets the optimizer, and the schedule is set once the
    /// number of steps is known.
    pub(super) fn training_config(&self) -> TrainingConfig {
        let settings = &self.settings;
        TrainingConfig {
            num_epochs: settings.epochs.unwrap_or(1),
            lr_scheduler: LRScheduler::constant(settings.learning_rate.unwrap_or(0.0)),
            optimizer_config: AdamWConfig::default(),
            max_grad_norm: settings.max_grad_norm.filter(|norm| *norm != 0.0),
        }
    }

    /// The trainer with all settings that do not depend on the number of steps.
    pub(super) fn configure<T: Trained>(&self, trainer: Trainer<T>) -> Result<Trainer<T>> {
        let settings = &self.settings;
        let at_least_one = |name: &str, count: Option<usize>| match count {
            Some(count) if !(1..=1 << 30).contains(&count) => {
                Err(UserError::new(format!("`--{name}`: expected 1 to {}, found {count}", 1 << 30)))
            }
            count => Ok(count.unwrap_or(1)),
        };
        let mut trainer = trainer
            .with_optimizer(settings.optimizer_config())
            .with_decay_matrices_only(settings.decay_matrices_only == Some(true))
            .with_batch_tokens(at_least_one("batch-tokens", settings.batch_tokens)?)
            .with_gradient_accumulation(at_least_one(
                "gradient-accumulation-steps",
                settings.gradient_accumulation_steps,
            )?)
            .with_label_smoothing(settings.label_smoothing.unwrap_or(0.0))
            .with_neftune_noise_alpha(settings.neftune_noise_alpha.unwrap_or(0.0))
            .with_seed(settings.seed.unwrap_or(0));
        if settings.micro_batch_tokens.is_some() {
            let tokens = at_least_one("micro-batch-tokens", settings.micro_batch_tokens)?;
            trainer = trainer.with_micro_batch_tokens(tokens);
        }
        trainer = trainer.with_checkpointed_blocks(match settings.checkpointed_blocks.as_deref() {
            None | Some("none") => 0,
            Some("all") => self.model.config().num_hidden_layers,
            Some(count) => count.parse().map_err(|_| {
                UserError::new(format!("`--checkpointed-blocks`: expected `none`, `all` or a number, found `{count}`"))
            })?,
        });
        at_least_one("save-interval", settings.save_interval)?;
        at_least_one("epochs", settings.epochs)?;
        if settings.steps.is_some() {
            trainer = trainer.with_max_steps(at_least_one("steps", settings.steps)?);
        }
        Ok(trainer)
    }

    /// Warnings before the first step; a resumed run has printed them already.
    pub(super) fn warnings(&self, resumes: bool) -> Result<Vec<TrainingWarning>> {
        if resumes {
            return Ok(Vec::new());
        }
        let train = &self.data.train;
        let cut = self.settings.max_tokens_per_sample.filter(|_| self.settings.truncate == Some(true));
        let mut warnings: Vec<_> = cut.and_then(|max_tokens| cut_rows_warning(train, max_tokens)).into_iter().collect();
        // training all weights also trains the special tokens
        if let Some(adapter) = &self.adapter {
            warnings.extend(template_warning(&self.model, Some(&adapter.low_rank_updates()?), &self.tokenizer, train)?);
        }
        Ok(warnings)
    }

    /// Writes the chat template into a folder, if it differs from the model's own.
    pub(super) fn write_template(&self, folder: &Path) -> Result<()> {
        if self.settings.chat_template.is_some() {
            write_template(&self.tokenizer, folder)?;
        }
        Ok(())
    }

    /// The initial record of the run.
    pub(super) fn record(&self) -> Result<RunRecord> {
        let settings = match serde_json::to_value(&self.settings)? {
            Value::Object(settings) => settings.into_iter().filter(|(_, value)| !value.is_null()).collect(),
            _ => serde_json::Map::new(),
        };
        Ok(RunRecord {
            model: self.source.name.clone(),
            data: self.data_name.clone(),
            device: match self.num_devices {
                1 => self.model.device().to_string(),
                count => format!("{count} x {}", self.model.device()),
            },
            settings,
            started: self.started,
            ..RunRecord::default()
        })
    }

    /// The questions whose answers are compared with the test rows.
    pub(super) fn questions(&self) -> Vec<Question> {
        let count = self.settings.test_samples.unwrap_or(0);
        self.data.test.as_ref().map_or_else(Vec::new, |test| Question::first(test, count))
    }

    /// A row whose answer is shown before and after training; an untrained row if there is one.
    pub(super) fn to_show(&self) -> Option<Question> {
        let test = self.data.test.as_ref().filter(|test| !test.is_empty());
        let rows: &Dataset = test.or(self.data.valid.as_ref()).unwrap_or(&self.data.train);
        Question::to_show(rows)
    }

    /// Sets the remaining settings of the trainer and returns the number of steps. Moves the validation rows to the trainer.
    pub(super) fn schedule<T: Trained>(&mut self, trainer: Trainer<T>) -> Result<(Trainer<T>, usize)> {
        let trainer = self.configure(trainer)?;
        let total_steps = trainer.total_steps(&self.data.train)?;
        self.settings.complete_for(total_steps);
        let trainer = trainer.with_lr_scheduler(self.settings.scheduler(total_steps));
        let interval = self.settings.eval_interval.unwrap_or(0);
        let trainer = match self.data.valid.take() {
            Some(valid) if !valid.is_empty() => trainer.with_evaluation(valid, interval),
            _ => trainer,
        };
        let trainer = match self.settings.early_stopping_patience {
            None | Some(0) => trainer,
            Some(patience) => trainer.with_early_stopping(patience),
        };
        Ok((trainer, total_steps))
    }

    /// Records the chosen micro-batch and checkpointed blocks in the settings, so that the run resumes with them.
    pub(super) fn note_choice(&mut self, plan: &TrainingPlan) {
        for settings in [&mut self.given, &mut self.settings] {
            if plan.micro_batch_tokens < plan.largest_batch {
                settings.micro_batch_tokens = Some(plan.micro_batch_tokens);
            }
            if plan.checkpointed_blocks > 0 {
                settings.checkpointed_blocks = Some(plan.checkpointed_blocks.to_string());
            }
        }
    }
}
