//! Executes one run of the trainer: steps, evaluations, checkpoints and resuming.

mod group;

use super::config::{Options, TrainingConfig};
use super::epoch::{Indices, plan_epoch};
use super::evaluation::evaluate_in;
use super::gradients::{GradientSum, clip_factor, global_norm};
use super::metrics_file::MetricsFile;
use super::micro_batches::{MicroBatching, micro_batches};
use super::monitor::TrainingMonitor;
use super::optimizer::Optimizer;
use super::progress::Progress;
use super::report::{Callback, EvaluationMetrics, StepMetrics, StopReason, TrainingEvent, TrainingMetrics};
use super::run_folder::{Checkpoint, Checkpoints};
use super::run_settings::{check_settings, describe_settings, is_quantized_on_gpu};
use super::samples::{count_tokens, shorten, source_of};
use super::trained::{OfModel, Parameter, Trained};
use super::warnings::{TrainingWarning, dataset_warnings};
use crate::data::{Dataset, Random, batch_of};
use crate::error::{Error, Result};
use crate::files::{SafetensorsFile, write_safetensors};
use crate::models::{Batch, Gradients, LossOptions, Model, Targets};
use crate::ops::LowRankUpdates;
use crate::profile::{Kind, span};
use candle_core::Tensor;
use serde_json::{Map, Value};
use std::time::Instant;

/// The file of the optimizer's state in a checkpoint.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";

pub(super) struct Run<'a, T: Trained> {
    start: &'a T,
    config: &'a TrainingConfig,
    options: &'a Options,
    dataset: &'a Dataset,
    total_steps: usize,
    callbacks: &'a mut Vec<Callback>,
    parameters: Vec<Parameter>,
    /// The trained parameters of the model itself.
    of_model: OfModel,
    optimizer: Optimizer,
    gradients: GradientSum,
    /// The trained adapter or model; its parameters are views of the optimizer's.
    live: T,
    terms: Option<LowRankUpdates>,
    progress: Progress,
    /// The steps of the current epoch, and the generator after drawing their order.
    epoch: Option<(Vec<Vec<Indices>>, Random)>,
    best: Option<Tensor>,
    folder: Option<(Checkpoints, MetricsFile)>,
    /// All settings that affect what the steps compute.
    settings: Map<String, Value>,
    metrics: TrainingMetrics,
    monitor: TrainingMonitor,
    /// The current micro-batch size, which shrinks when memory runs out.
    micro_batching: MicroBatching,
    is_stopped: bool,
}

impl<'a, T: Trained> Run<'a, T> {
    pub(super) fn new(
        start: &'a T,
        config: &'a TrainingConfig,
        options: &'a Options,
        dataset: &'a Dataset,
        total_steps: usize,
        callbacks: &'a mut Vec<Callback>,
    ) -> Result<Self> {
        let parameters = start.trainable();
        let highest_rate = config.lr_scheduler.highest();
        let group = |parameter: &Parameter| options.group(parameter, highest_rate);
        let optimizer = Optimizer::new(&start.values()?, &parameters, options.optimizer(config), group)?;
        let num_trainable_parameters = parameters.iter().map(|parameter| parameter.len).sum();
        let live = start.with_values(&optimizer.parameters()?)?;
        let metrics = TrainingMetrics {
            stop_reason: StopReason::Completed,
            num_steps: 0,
            num_epochs: 0,
            steps: Vec::new(),
            evaluations: Vec::new(),
            best: None,
            num_trainable_parameters,
            num_gradient_tensors: 0,
            gradient_bytes: 0,
            saved_bytes: 0,
            tokens: 0,
            trained_tokens: 0,
            seconds: 0.0,
        };
        let device = start.run_model().device().candle();
        let mut run = Self {
            terms: live.run_terms()?,
            gradients: GradientSum::zeros(num_trainable_parameters, &device)?,
            progress: Progress::new(options.seed),
            start,
            config,
            options,
            dataset,
            total_steps,
            callbacks,
            of_model: OfModel::new(start, &parameters),
            parameters,
            optimizer,
            live,
            epoch: None,
            best: None,
            folder: None,
            settings: Map::new(),
            metrics,
            monitor: TrainingMonitor::new(config.max_grad_norm),
            micro_batching: MicroBatching::new(options, start.run_model().device()),
            is_stopped: false,
        };
        run.open_folder()?;
        Ok(run)
    }

    fn open_folder(&mut self) -> Result<()> {
        self.settings = describe_settings(self.start, self.config, self.options, self.dataset);
        let Some(folder) = &self.options.run_folder else { return self.agree() };
        if self.rank() > 0 {
            let checkpoints = Checkpoints::of_other(folder);
            if self.options.resume
                && let Some(checkpoint) = checkpoints.newest()?
            {
                self.restore(&checkpoint, &checkpoints)?;
            }
            return self.agree();
        }
        let checkpoints = Checkpoints::open(folder)?;
        let newest = checkpoints.newest()?;
        let step = match newest {
            Some(checkpoint) if self.options.resume => {
                self.restore(&checkpoint, &checkpoints)?;
                Some(self.progress.step)
            }
            Some(checkpoint) => {
                let message =
                    format!("`{}` already exists: resume the run or choose another folder", checkpoint.path.display());
                return Err(Error::argument("run_folder", message));
            }
            None => None,
        };
        self.agree()?;
        // the previous run may have been killed between writing a checkpoint and removing old ones; by now, all ranks have read theirs
        if step.is_some() {
            self.prune(&checkpoints)?;
        }
        let metrics = MetricsFile::open(&folder.join("metrics.jsonl"), step)?;
        self.folder = Some((checkpoints, metrics));
        Ok(())
    }

    /// Runs the remaining steps.
    pub(super) fn execute(&mut self) -> Result<TrainingMetrics> {
        self.emit(&TrainingEvent::Started {
            step: self.progress.step,
            total_steps: self.total_steps,
            num_trainable_parameters: self.metrics.num_trainable_parameters,
        });
        let valid = self.options.evaluation.as_ref().map(|evaluation| &evaluation.dataset);
        if self.progress.step == 0 {
            self.warn([self.options.warnings.clone(), dataset_warnings(self.dataset, valid)].concat());
        }
        if self.options.evaluation.is_some() && self.progress.num_evaluations == 0 {
            self.evaluate()?;
        }
        self.is_stopped = self.stops()?;
        while !self.is_stopped && self.end().is_none() {
            let (batches, epoch_ends) = self.next_batches()?;
            let before = self.progress.clone();
            let device = self.live.run_model().device();
            let of_step = span("step", Kind::Group);
            let step = device.step(|| self.step(&batches));
            drop(of_step);
            let step = match step {
                Ok(step) => step,
                Err(error)
                    if error.is_out_of_memory()
                        && self.micro_batching.shrink(
                            self.live.run_model(),
                            self.dataset,
                            &self.shares(&batches).concat(),
                        ) =>
                {
                    self.progress = before;
                    self.save()?;
                    let warning = TrainingWarning::OutOfMemory {
                        micro_batch_tokens: self.micro_batching.micro_batch_tokens,
                        checkpointed_blocks: self.micro_batching.checkpointed_blocks,
                        reason: error.to_string(),
                    };
                    self.warn(vec![warning]);
                    continue;
                }
                Err(error) => {
                    self.progress = before;
                    if is_divergence(&error) {
                        self.save()?;
                    }
                    return Err(error);
                }
            };
            self.advance(epoch_ends);
            self.report(step)?;
            let mut is_due = self.options.save_interval.is_some_and(|steps| self.progress.step.is_multiple_of(steps));
            if self.evaluation_is_due(epoch_ends) {
                is_due |= self.evaluate()?;
            }
            self.is_stopped = self.stops()?;
            if is_due || self.is_stopped || self.end().is_some() {
                self.save()?;
            }
        }
        self.check_parameters()?;
        let stop_reason = self.end().unwrap_or(StopReason::Callback);
        self.emit(&TrainingEvent::Finished { step: self.progress.step, stop_reason });
        self.metrics.stop_reason = stop_reason;
        self.metrics.num_steps = self.progress.step;
        self.metrics.num_epochs = self.progress.epoch;
        self.metrics.best = self.progress.best.map(|(step, loss)| EvaluationMetrics { step, loss });
        self.metrics.tokens = self.progress.tokens;
        self.metrics.trained_tokens = self.progress.trained_tokens;
        Ok(self.metrics.clone())
    }

    /// The trained adapter or model, with its own copy of the parameters.
    pub(super) fn snapshot(&self) -> Result<T> {
        self.start.with_values(&self.values()?)
    }

    /// A copy of the parameters to save.
    fn values(&self) -> Result<Tensor> {
        match self.optimizer.averaged_parameters()? {
            Some(averaged) => Ok(averaged),
            None => Ok(self.optimizer.parameters()?.force_contiguous()?),
        }
    }

    /// The averaged parameters to evaluate and save, if the optimizer has them.
    fn averaged(&self) -> Result<Option<T>> {
        self.optimizer.averaged_parameters()?.map(|values| self.start.with_values(&values)).transpose()
    }

    /// The adapter or model of the best evaluation.
    pub(super) fn best(&self) -> Result<Option<T>> {
        self.best.as_ref().map(|values| self.start.with_values(values)).transpose()
    }

    /// Why the run is over; none if steps remain.
    fn end(&self) -> Option<StopReason> {
        let is_complete = match self.options.max_steps {
            Some(steps) => self.progress.step >= steps,
            None => self.progress.epoch >= self.config.num_epochs,
        };
        let is_hopeless =
            self.options.patience.is_some_and(|patience| self.progress.evaluations_since_best >= patience);
        if is_complete { Some(StopReason::Completed) } else { is_hopeless.then_some(StopReason::EarlyStopping) }
    }

    /// The batches of the next step, and whether it is the last of its epoch.
    fn next_batches(&mut self) -> Result<(Vec<Indices>, bool)> {
        if self.epoch.is_none() {
            let mut order = self.progress.order.clone();
            self.epoch = Some((plan_epoch(self.options, self.dataset, &mut order)?, order));
        }
        let steps = self.epoch.as_ref().map_or(&[][..], |(steps, _)| steps);
        let Some(batches) = steps.get(self.progress.step_in_epoch) else {
            let message =
                format!("an epoch has {} steps, the checkpoint is at {}", steps.len(), self.progress.step_in_epoch);
            return Err(Error::argument("resume", message));
        };
        Ok((batches.clone(), self.progress.step_in_epoch + 1 == steps.len()))
    }

    /// Computes the loss and gradients of all batches, then makes one update.
    fn step(&mut self, batches: &[Indices]) -> Result<StepMetrics> {
        let started = Instant::now();
        let (tokens, trained_tokens) = count_tokens(self.dataset, batches.iter().flatten());
        let own_loss = self.loss_and_gradients(batches, trained_tokens as f64);
        let total_loss = match &self.options.group {
            None => own_loss?,
            Some(group) => {
                let _span = span("all-reduce", Kind::Optimizer);
                let total_loss = group.sum_of_losses(own_loss)?;
                group.all_reduce(self.gradients.tensor())?;
                total_loss
            }
        };
        let _span = span("optimizer", Kind::Optimizer);
        let grad_norm = global_norm(self.gradients.tensor())?;
        if !grad_norm.is_finite() {
            let rows = batches.iter().flatten().map(|&index| source_of(self.dataset, index)).collect();
            return Err(Error::NonFiniteGradient {
                step: self.progress.step + 1,
                parameters: self.non_finite_parameters()?,
                rows: shorten(rows),
            });
        }
        let learning_rate = self.config.lr_scheduler.learning_rate(self.progress.step);
        let factor = clip_factor(grad_norm, self.config.max_grad_norm);
        self.optimizer.step(self.gradients.tensor(), learning_rate, factor)?;
        self.refresh()?;
        let seconds = started.elapsed().as_secs_f64();
        self.metrics.seconds += seconds;
        Ok(StepMetrics {
            step: self.progress.step + 1,
            epoch: self.progress.epoch + 1,
            loss: total_loss / trained_tokens as f64,
            learning_rate,
            grad_norm,
            tokens,
            trained_tokens,
            tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
        })
    }

    /// Computes the loss sum and gradients of this rank's batches; `weight` is the number of trained tokens of all ranks.
    fn loss_and_gradients(&mut self, batches: &[Indices], weight: f64) -> Result<f64> {
        let share = self.shares(batches).swap_remove(self.rank());
        let parts: Vec<Indices> = share
            .iter()
            .flat_map(|batch| micro_batches(self.dataset, batch, self.micro_batching.micro_batch_tokens))
            .collect();
        let mut made: Vec<(&Indices, Batch, Targets)> = Vec::with_capacity(parts.len());
        for indices in &parts {
            let samples: Vec<_> = indices.iter().map(|&index| &self.dataset.samples[index]).collect();
            let (batch, targets) = batch_of(&samples);
            made.push((indices, batch, targets));
        }
        let mut seeds = self.seeds();
        if made.is_empty() {
            self.gradients =
                GradientSum::zeros(self.metrics.num_trainable_parameters, self.gradients.tensor().device())?;
        }
        let mut total_loss = 0.0;
        for (number, (indices, batch, targets)) in made.iter().enumerate() {
            let options = LossOptions {
                label_smoothing: self.options.label_smoothing as f32,
                grad_scale: (1.0 / weight) as f32,
                dropout_seed: seeds.next_u64(),
                neftune_noise_alpha: self.options.neftune_noise_alpha as f32,
                checkpointed_blocks: self.micro_batching.checkpointed_blocks,
            };
            let trainable = self.of_model.with(self.terms.as_ref());
            self.micro_batching.check(self.live.run_model(), batch, targets, trainable)?;
            let (losses, gradients) = self.live.run_model().loss_and_gradients(batch, targets, trainable, options)?;
            if losses.rows.iter().any(|loss| !loss.is_finite()) {
                return Err(self.non_finite_loss(indices, batch, &losses.rows));
            }
            total_loss += losses.rows.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            let _span = span("gradients", Kind::Optimizer);
            self.add(&gradients, number == 0)?;
        }
        if self.options.group.is_none() {
            self.progress.dropout = seeds;
        }
        Ok(total_loss)
    }

    /// Rebuilds the copies that do not share storage with the parameters.
    fn refresh(&mut self) -> Result<()> {
        if self.live.terms_are_copies() {
            self.live = self.live.refreshed(&self.optimizer.parameters()?)?;
            self.terms = self.live.run_terms()?;
        }
        Ok(())
    }

    /// Adds the gradients of a batch and returns an error if a trainable tensor has none.
    fn add(&mut self, gradients: &Gradients, is_first: bool) -> Result<()> {
        let found = |parameter: &Parameter| {
            gradients.get(parameter.gradient).filter(|gradient| gradient.elem_count() == parameter.len)
        };
        let missing: Vec<&str> = self
            .parameters
            .iter()
            .filter(|parameter| found(parameter).is_none())
            .map(|parameter| parameter.name.as_str())
            .collect();
        if !missing.is_empty() {
            let message = format!("no gradient reaches `{}`", missing.join("`, `"));
            return Err(Error::argument("trainable parameters", message));
        }
        let parts: Vec<(usize, &Tensor)> =
            self.parameters.iter().filter_map(|parameter| Some((parameter.offset, found(parameter)?))).collect();
        self.gradients.add(&parts, gradients.low_rank_buffer.as_ref().map(|buffer| &buffer.flat), is_first)?;
        let made = || gradients.iter();
        self.metrics.num_gradient_tensors = made().count();
        self.metrics.gradient_bytes =
            made().map(|gradient| gradient.elem_count() * gradient.dtype().size_in_bytes()).sum();
        self.metrics.saved_bytes = self.metrics.saved_bytes.max(gradients.saved_bytes);
        Ok(())
    }

    fn non_finite_loss(&self, indices: &Indices, batch: &Batch, losses: &[f32]) -> Error {
        let spans = batch.offsets().windows(2).map(|span| &losses[span[0]..span[1]]);
        let rows = indices
            .iter()
            .zip(spans)
            .filter(|(_, losses)| losses.iter().any(|loss| !loss.is_finite()))
            .map(|(&index, _)| source_of(self.dataset, index))
            .collect();
        let loss = losses.iter().map(|&loss| f64::from(loss)).sum();
        Error::NonFiniteLoss { step: self.progress.step + 1, loss, rows: shorten(rows) }
    }

    fn non_finite_parameters(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for parameter in &self.parameters {
            let gradient = self.gradients.tensor().narrow(0, parameter.offset, parameter.len)?;
            if !global_norm(&gradient)?.is_finite() {
                names.push(parameter.name.clone());
            }
        }
        Ok(shorten(names))
    }

    fn advance(&mut self, epoch_ends: bool) {
        self.progress.step += 1;
        self.progress.step_in_epoch += 1;
        if epoch_ends {
            self.progress.epoch += 1;
            self.progress.step_in_epoch = 0;
            if let Some((_, order)) = self.epoch.take() {
                self.progress.order = order;
            }
        }
    }

    fn report(&mut self, step: StepMetrics) -> Result<()> {
        self.progress.tokens += step.tokens;
        self.progress.trained_tokens += step.trained_tokens;
        if let Some((_, metrics)) = &mut self.folder {
            metrics.step(&step)?;
        }
        self.metrics.steps.push(step);
        self.emit(&TrainingEvent::Step {
            step: step.step,
            epoch: step.epoch,
            loss: step.loss,
            learning_rate: step.learning_rate,
            grad_norm: step.grad_norm,
            tokens: step.tokens,
            tokens_per_second: step.tokens_per_second,
        });
        let warnings = self.monitor.step(&step);
        self.warn(warnings);
        Ok(())
    }

    fn evaluation_is_due(&self, epoch_ends: bool) -> bool {
        self.options.evaluation.as_ref().is_some_and(|evaluation| {
            let by_interval = match evaluation.interval {
                0 => epoch_ends,
                steps => self.progress.step.is_multiple_of(steps),
            };
            by_interval || self.end().is_some()
        })
    }

    /// Evaluates, and returns whether this step needs a checkpoint.
    fn evaluate(&mut self) -> Result<bool> {
        let Some(options) = &self.options.evaluation else { return Ok(false) };
        let measure = |model: &Model, terms: Option<&LowRankUpdates>| -> Result<f64> {
            let group = self.options.group.as_ref();
            Ok(evaluate_in(group, model, terms, &options.dataset, self.options.batch_tokens)?.loss())
        };
        self.check_parameters()?;
        let loss = match self.averaged()? {
            Some(averaged) => measure(averaged.run_model(), averaged.run_terms()?.as_ref())?,
            None => measure(self.live.run_model(), self.terms.as_ref())?,
        };
        let step = self.progress.step;
        let is_best = self.progress.best.is_none_or(|(_, best)| loss < best);
        self.progress.num_evaluations += 1;
        if is_best {
            self.progress.best = Some((step, loss));
            self.progress.evaluations_since_best = 0;
            self.best = Some(self.values()?);
        } else {
            self.progress.evaluations_since_best += 1;
        }
        let evaluation = EvaluationMetrics { step, loss };
        if let Some((_, metrics)) = &mut self.folder {
            metrics.evaluation(&evaluation)?;
        }
        self.metrics.evaluations.push(evaluation);
        self.emit(&TrainingEvent::Evaluated { step, loss, is_best });
        let warnings = self.monitor.evaluation(&evaluation);
        self.warn(warnings);
        Ok(is_best)
    }

    fn emit(&mut self, event: &TrainingEvent) {
        for callback in self.callbacks.iter_mut() {
            self.is_stopped |= callback(event).is_break();
        }
    }

    fn warn(&mut self, warnings: Vec<TrainingWarning>) {
        let step = self.progress.step;
        for warning in warnings {
            self.emit(&TrainingEvent::Warning { step, warning });
        }
    }

    fn save(&mut self) -> Result<()> {
        let Some((checkpoints, metrics)) = &self.folder else { return Ok(()) };
        metrics.sync()?;
        let step = self.progress.step;
        let mut state = Map::new();
        state.insert("progress".into(), self.progress.to_json());
        state.insert("settings".into(), Value::Object(self.settings.clone()));
        let (averaged, optimizer_state) = (self.averaged()?, self.optimizer.state()?);
        let path = checkpoints.save(step, state, |folder| {
            averaged.as_ref().unwrap_or(&self.live).save_files(folder)?;
            write_safetensors(folder.join(OPTIMIZER_FILE), &optimizer_state, &[])
        })?;
        self.prune(checkpoints)?;
        self.emit(&TrainingEvent::Checkpointed { step, path });
        Ok(())
    }

    fn prune(&self, checkpoints: &Checkpoints) -> Result<()> {
        checkpoints.prune(self.options.kept_checkpoints, self.progress.best.map(|(step, _)| step))
    }

    fn restore(&mut self, checkpoint: &Checkpoint, checkpoints: &Checkpoints) -> Result<()> {
        let part = |key: &str| -> Result<_> {
            checkpoint.state.object(key)?.ok_or_else(|| checkpoint.state.missing(key, "an object"))
        };
        let is_on_gpu = is_quantized_on_gpu(self.start.run_model());
        check_settings(&checkpoint.path, &self.settings, part("settings")?.map(), is_on_gpu)?;
        self.progress = Progress::from_json(&part("progress")?)?;
        let values = self.start.load_values(&checkpoint.path)?;
        let file = SafetensorsFile::open(checkpoint.path.join(OPTIMIZER_FILE))?;
        self.optimizer.restore(&values, |name| file.tensor(name), self.progress.step)?;
        self.refresh()?;
        self.best = match self.progress.best {
            None => None,
            Some((0, _)) => Some(self.start.values()?),
            Some((step, _)) => match checkpoints.load(step) {
                Ok(best) => Some(self.start.load_values(&best.path)?),
                Err(error) => {
                    tracing::warn!("the best checkpoint cannot be read: {error}");
                    None
                }
            },
        };
        Ok(())
    }
}

fn is_divergence(error: &Error) -> bool {
    matches!(error, Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. })
}
