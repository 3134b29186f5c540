//! Everything a run needs before its first step.

use super::Prepared;
use super::answers::Question;
use crate::commands::fuse::{copy_tokenizer, with_end_of_turn, write_template};
use crate::error::UserError;
use crate::model_source::{ModelSource, NANO, check_adapter, load_adapter};
use crate::output::Output;
use crate::run_folder::RunFolder;
use crate::run_record::{RunRecord, seconds_since_epoch};
use crate::settings::{PathValues, TrainSettings, parse_layers};
use crate::templates::with_template;
use anyhow::Result;
use candle_core::DType;
use metal_candle::Model;
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::{Dataset, DatasetOptions, Datasets, SplitOptions, Tokenizer, TrainedTurns};
use metal_candle::models::save_model;
use metal_candle::training::{
    AdamWConfig, LRScheduler, Trained, Trainer, TrainingConfig, TrainingWarning, cut_rows_warning, template_warning,
};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// Loads model, adapter and data; a resumed run renders its data as on the day it was started.
pub(super) fn prepare(mut settings: TrainSettings, resumed: Option<&RunFolder>, output: Output) -> Result<Prepared> {
    let given = settings.clone();
    let name = settings.model.clone().unwrap_or_else(|| NANO.into());
    let mut source = ModelSource::find(&name, output)?;
    source.name = shown(Path::new(&name));
    let config = source.config()?;
    settings.complete(&config)?;
    if let Some(adapter) = &settings.adapter {
        check_adapter(adapter)?;
    }
    let data_path = match &settings.data {
        Some(path) => path.clone(),
        None if settings.is_nano() => crate::nano::data()?,
        None => {
            return Err(UserError::new("there is nothing to train on: `--data` is missing")
                .with_hint(
                    "--data takes a JSONL file or a folder with train.jsonl; `metal-candle train --help` has examples",
                )
                .into());
        }
    };
    let data_name = settings.data.as_ref().map_or_else(|| "its sample data".to_owned(), |path| shown(path));
    let variables: Vec<&str> = settings.template_var.iter().flatten().map(String::as_str).collect();
    let tokenizer = with_template(&source, settings.chat_template.as_deref(), &variables)?;
    let recorded =
        resumed.and_then(|run| RunRecord::read(run.path()).ok().flatten()).map_or(0, |record| record.started);
    let started = if recorded == 0 { seconds_since_epoch() } else { recorded };
    let now = UNIX_EPOCH + Duration::from_secs(started);
    let template = tokenizer.chat_template().cloned().map(|template| template.with_clock(move || now));
    let tokenizer = tokenizer.with_chat_template(template);
    let options = DatasetOptions {
        max_tokens: settings.max_tokens_per_sample,
        truncate: settings.truncate == Some(true),
        trained_turns: match settings.train_last_turn_only {
            Some(true) => TrainedTurns::Last,
            _ => TrainedTurns::All,
        },
        mask_prompt: settings.mask_prompt != Some(false),
        vocab_size: Some(config.vocab_size),
    };
    let split =
        SplitOptions { valid_fraction: settings.valid_fraction.unwrap_or(0.0), seed: settings.seed.unwrap_or(0) };
    let data = Datasets::load(&data_path, &tokenizer, &options, &split)?;
    for note in &data.notes {
        output.note(format_args!("note: {note}"));
    }

    let is_full = settings.full == Some(true);
    let device = settings.device.unwrap_or(crate::values::DeviceKind::Auto);
    let model = if settings.from_scratch == Some(true) {
        Model::initialize(config, settings.seed.unwrap_or(0), device.open(output)?)?
    } else if is_full && settings.train_last_layers.is_none() {
        // all weights are trained in f32, whatever they are saved in
        source.load(Some(crate::values::WeightType::F32), device, output)?
    } else {
        source.load(settings.dtype, device, output)?
    };
    let adapter = if is_full { None } else { Some(adapter(&settings, &model, &name, &source, &tokenizer)?) };
    // a start that rounds weights makes another model
    let model = adapter.as_ref().map_or(model, |adapter| adapter.model().clone());
    Ok(Prepared { given, settings, source, model, adapter, tokenizer, data, data_name, started, num_devices: 1 })
}

/// A path as seen from the working folder.
fn shown(path: &Path) -> String {
    let folder = std::env::current_dir().ok();
    let inside = folder.as_ref().and_then(|folder| path.strip_prefix(folder).ok());
    match inside.filter(|inside| !inside.as_os_str().is_empty()) {
        Some(inside) => inside.display().to_string(),
        None => path.display().to_string(),
    }
}

fn adapter(
    settings: &TrainSettings,
    model: &Model,
    name: &str,
    source: &ModelSource,
    tokenizer: &Tokenizer,
) -> Result<LoRAAdapter> {
    if let Some(path) = &settings.adapter {
        return load_adapter(model, path, source);
    }
    let modules = TargetModule::parse_list(&settings.target_modules.clone().unwrap_or_default().join(","))?;
    let mut builder = LoRAAdapter::builder(model)
        .with_rank(settings.rank.unwrap_or(8))
        .with_alpha(settings.alpha.unwrap_or(16.0))
        .with_dropout(settings.dropout.unwrap_or(0.0))
        .with_target_modules(modules)
        .with_rslora(settings.use_rslora == Some(true))
        .with_dora(settings.use_dora == Some(true))
        .with_start(settings.start()?)
        .with_modules_to_save(settings.modules_to_save.clone().unwrap_or_default())
        .with_ensure_weight_tying(settings.ensure_weight_tying == Some(true))
        .with_bias(settings.trained_biases()?)
        .with_trainable_tokens(settings.trainable_token_ids(tokenizer)?)
        .with_seed(settings.seed.unwrap_or(0))
        .with_base_model(name);
    if let Some(layers) = &settings.layers {
        builder = builder.with_layers(parse_layers(layers, model.config().num_hidden_layers)?);
    }
    for (pattern, rank) in settings.rank_pattern.as_ref().map_or(Ok(Vec::new()), PathValues::ranks)? {
        builder = builder.with_rank_pattern(pattern, rank);
    }
    for (pattern, alpha) in settings.alpha_pattern.iter().flat_map(|patterns| &patterns.0) {
        builder = builder.with_alpha_pattern(pattern, *alpha);
    }
    Ok(builder.build()?)
}

impl Prepared {
    /// What the trainer is made with; [`Prepared::configure`] says which optimizer, and the schedule comes when the number
    /// of steps is known.
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

    /// What can be warned of before the first step; a run that goes on has been warned.
    pub(super) fn warnings(&self, resumes: bool) -> Result<Vec<TrainingWarning>> {
        if resumes {
            return Ok(Vec::new());
        }
        let train = &self.data.train;
        let cut = self.settings.max_tokens_per_sample.filter(|_| self.settings.truncate == Some(true));
        let mut warnings: Vec<_> = cut.and_then(|max_tokens| cut_rows_warning(train, max_tokens)).into_iter().collect();
        // with all weights the marks are trained too
        if let Some(adapter) = &self.adapter {
            warnings.extend(template_warning(&self.model, Some(&adapter.terms()?), &self.tokenizer, train)?);
        }
        Ok(warnings)
    }

    /// Writes the chat template into a folder, if it is not the model's own.
    pub(super) fn write_template(&self, folder: &Path) -> Result<()> {
        if self.settings.chat_template.is_some() {
            write_template(&self.tokenizer, folder)?;
        }
        Ok(())
    }

    /// What the run's record says of it from the start.
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

    /// A row to show what the model writes for it: one that is not trained, if there is such.
    pub(super) fn to_show(&self) -> Option<Question> {
        let held_out = self.data.test.as_ref().filter(|test| !test.is_empty());
        let rows: &Dataset = held_out.or(self.data.valid.as_ref()).unwrap_or(&self.data.train);
        Question::to_show(rows)
    }
}

/// Writes a model whose weights were trained, in the dtype asked for or else that of the model it comes from.
pub(super) fn save_full(model: &Model, folder: &Path, prepared: &Prepared) -> Result<()> {
    let dtype = match prepared.settings.dtype {
        Some(dtype) => dtype.dtype(),
        None => prepared.source.dtype().unwrap_or(DType::F32),
    };
    let mut tensors = HashMap::new();
    for (name, tensor) in model.parameters() {
        tensors.insert(name.clone(), tensor.to_dtype(dtype).map_err(metal_candle::Error::from)?);
    }
    let model = Model::from_tensors(model.config().clone(), tensors, model.device())?;
    save_model(&with_end_of_turn(model, &prepared.tokenizer)?, folder)?;
    copy_tokenizer(prepared.source.folder(), folder)?;
    prepared.write_template(folder)?;
    Ok(())
}
