//! The trainer.

use super::config::{EvaluationOptions, Options, TrainingConfig, check};
use super::distributed::Group;
use super::epoch::plan_epoch;
use super::optimizer::OptimizerConfig;
use super::plan::{self, TrainingPlan};
use super::progress::Progress;
use super::report::{Callback, TrainingEvent, TrainingMetrics};
use super::run::Run;
use super::samples::check_dataset;
use super::scheduler::LRScheduler;
use super::trained::Trained;
use super::warnings::TrainingWarning;
use crate::adapters::LoRAAdapter;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::models::Model;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Trains an adapter, or with [`Trainer::full`] all parameters of a model.
///
/// Each epoch shuffles the samples by the seed and packs them into batches; a step is one update after one or several
/// batches. Two runs with the same seed give the same bytes.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// use metal_candle::data::{Dataset, Sample};
/// use metal_candle::training::{AdamWConfig, LRScheduler, LoRAAdapter, Trainer, TrainingConfig};
///
/// let model = metal_candle::ModelLoader::new().load("model.safetensors")?;
/// let adapter = LoRAAdapter::builder(&model).with_rank(8).build()?;
/// let config = TrainingConfig {
///     num_epochs: 3,
///     lr_scheduler: LRScheduler::warmup_cosine(100, 1000, 1e-4, 1e-6),
///     optimizer_config: AdamWConfig::default(),
///     max_grad_norm: Some(1.0),
/// };
/// let dataset = Dataset::from_samples(vec![Sample { ids: vec![1, 2, 3], trained: vec![true; 3], source: None }]);
/// let trainer = Trainer::new(adapter, config)?.with_gradient_accumulation(4);
/// let metrics = trainer.train(&dataset)?;
/// println!("loss {:?}", metrics.final_loss());
/// trainer.lora_adapter().save("adapter")?;
/// # Ok(())
/// # }
/// ```
pub struct Trainer<T: Trained = LoRAAdapter> {
    config: TrainingConfig,
    options: Options,
    start: T,
    /// Held while a run is going on.
    callbacks: Mutex<Vec<Callback>>,
    latest: Mutex<T>,
    best: Mutex<Option<T>>,
}

impl Trainer<LoRAAdapter> {
    /// A trainer of an adapter; the weights of its model are frozen.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn new(adapter: LoRAAdapter, config: TrainingConfig) -> Result<Self> {
        Self::of(adapter, config)
    }

    /// LoRA+ (<https://arxiv.org/abs/2402.12354>): the learning rate of each B is `ratio` times that of A, as is that of
    /// vectors; adapters of embeddings learn with 1e-6 at the height of the schedule.
    #[must_use]
    pub fn with_lora_plus_ratio(mut self, ratio: f64) -> Self {
        self.options.lora_plus_ratio = Some(ratio);
        self
    }

    /// The adapter as the last run left it, or as it was given when there was none.
    pub fn lora_adapter(&self) -> LoRAAdapter {
        lock(&self.latest).clone()
    }

    /// The adapter with the lowest evaluation loss; none without evaluations.
    pub fn best_adapter(&self) -> Option<LoRAAdapter> {
        lock(&self.best).clone()
    }
}

impl Trainer<Model> {
    /// A trainer of all parameters of a model, in f32.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn full(model: Model, config: TrainingConfig) -> Result<Self> {
        Self::of(model, config)
    }

    /// The model as the last run left it (in f32), or as it was given when there was none.
    pub fn model(&self) -> Model {
        lock(&self.latest).clone()
    }

    /// The model with the lowest evaluation loss; none without evaluations.
    pub fn best_model(&self) -> Option<Model> {
        lock(&self.best).clone()
    }
}

impl<T: Trained> Trainer<T> {
    /// A trainer of anything that is [`Trained`].
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn of(start: T, config: TrainingConfig) -> Result<Self> {
        let options = Options::default();
        check(&config, &options)?;
        start.check()?;
        Ok(Self {
            config,
            options,
            latest: Mutex::new(start.clone()),
            best: Mutex::new(None),
            callbacks: Mutex::new(Vec::new()),
            start,
        })
    }

    /// What was trained as the last run left it, or as it was given when there was none.
    pub fn latest(&self) -> T {
        lock(&self.latest).clone()
    }

    /// The same after the evaluation with the lowest loss; none without evaluations.
    pub fn best(&self) -> Option<T> {
        lock(&self.best).clone()
    }

    /// Most tokens of a batch, 2048 unless set; a longer sample gets a batch of its own.
    #[must_use]
    pub fn with_batch_tokens(mut self, tokens: usize) -> Self {
        self.options.batch_tokens = tokens;
        self
    }

    /// Most tokens that are computed at once: larger batches are computed in parts, which add up to the same gradients but
    /// for rounding. A longer sample is computed by itself.
    #[must_use]
    pub fn with_micro_batch_tokens(mut self, tokens: usize) -> Self {
        self.options.micro_batch_tokens = Some(tokens);
        self
    }

    /// The number of blocks, from the first one trained, that keep only their input and are computed anew in the backward
    /// pass: the same gradients, less memory, up to a third more work (<https://arxiv.org/abs/1604.06174>, section 4).
    #[must_use]
    pub fn with_checkpointed_blocks(mut self, blocks: usize) -> Self {
        self.options.checkpointed_blocks = blocks;
        self
    }

    /// What [`Trainer::train`] of `dataset` will need.
    ///
    /// # Errors
    /// Settings or samples cannot be used.
    pub fn plan(&self, dataset: &Dataset) -> Result<TrainingPlan> {
        check(&self.config, &self.options)?;
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        TrainingPlan::new(&self.start, &self.config, &self.options, dataset)
    }

    /// The trainer with a micro-batch and checkpointed blocks that make the run fit into `limit` bytes, and its plan. What
    /// fits already stays as it is.
    ///
    /// # Errors
    /// Nothing fits, or settings or samples cannot be used.
    pub fn fitted(mut self, dataset: &Dataset, limit: usize) -> Result<(Self, TrainingPlan)> {
        check(&self.config, &self.options)?;
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        let (options, plan) = plan::fit(&self.start, &self.config, &self.options, dataset, limit)?;
        self.options = options;
        Ok((self, plan))
    }

    /// Tokens a second, measured on the first `batches` micro-batches of `dataset`; nothing is trained.
    ///
    /// # Errors
    /// Settings or samples cannot be used.
    pub fn measure(&self, dataset: &Dataset, batches: usize) -> Result<f64> {
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        plan::measure(&self.start, &self.options, dataset, batches)
    }

    /// Most samples of a batch.
    #[must_use]
    pub fn with_batch_samples(mut self, samples: usize) -> Self {
        self.options.batch_samples = samples;
        self
    }

    /// These batches in this order in each epoch, given by the numbers of the samples from 0, in place of shuffling and
    /// packing.
    #[must_use]
    pub fn with_batches(mut self, batches: Vec<Vec<usize>>) -> Self {
        self.options.batches = Some(batches);
        self
    }

    /// Batches of a step. Each trained token of a step has the same weight, whatever its batch.
    #[must_use]
    pub fn with_gradient_accumulation(mut self, batches: usize) -> Self {
        self.options.gradient_accumulation = batches;
        self
    }

    /// Share of the target taken from the wanted token and spread over the whole vocabulary, 0 to 1.
    #[must_use]
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.options.label_smoothing = label_smoothing;
        self
    }

    /// Noise on the embedded tokens in training (NEFTune, <https://arxiv.org/abs/2310.05914>, section 2), uniform within
    /// `alpha / sqrt(length * hidden_size)` for a sample of `length` tokens; 0 for none.
    #[must_use]
    pub fn with_neftune_noise_alpha(mut self, alpha: f64) -> Self {
        self.options.neftune_noise_alpha = alpha;
        self
    }

    /// Exactly this many steps, over as many epochs as they need.
    #[must_use]
    pub fn with_max_steps(mut self, steps: usize) -> Self {
        self.options.max_steps = Some(steps);
        self
    }

    /// Another optimizer than AdamW with the settings of the configuration.
    #[must_use]
    pub fn with_optimizer(mut self, optimizer: impl Into<OptimizerConfig>) -> Self {
        self.options.optimizer = Some(optimizer.into());
        self
    }

    /// Whether weight decay applies to matrices only, not to norms and biases; it applies to all unless set.
    #[must_use]
    pub fn with_decay_matrices_only(mut self, matrices_only: bool) -> Self {
        self.options.decay_matrices_only = matrices_only;
        self
    }

    /// Another schedule than that of the configuration.
    #[must_use]
    pub fn with_lr_scheduler(mut self, lr_scheduler: LRScheduler) -> Self {
        self.config.lr_scheduler = lr_scheduler;
        self
    }

    /// Seed of the order of the samples and of dropout.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.options.seed = seed;
        self
    }

    /// Measures the loss of `dataset` before the first step, after every `interval` steps (0: after each epoch) and
    /// after the last one.
    #[must_use]
    pub fn with_evaluation(mut self, dataset: Dataset, interval: usize) -> Self {
        self.options.evaluation = Some(EvaluationOptions { dataset, interval });
        self
    }

    /// Stops when `patience` evaluations in a row have not been better than the best one.
    #[must_use]
    pub fn with_early_stopping(mut self, patience: usize) -> Self {
        self.options.patience = Some(patience);
        self
    }

    /// Writes `metrics.jsonl` and `checkpoints/` into this folder. There is a checkpoint after the last step, after each
    /// evaluation that is the best so far and before an error of the loss.
    #[must_use]
    pub fn with_run_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.options.run_folder = Some(folder.into());
        self
    }

    /// Also writes a checkpoint after every `steps` steps.
    #[must_use]
    pub fn with_save_interval(mut self, steps: usize) -> Self {
        self.options.save_interval = Some(steps);
        self
    }

    /// Keeps the newest `count` checkpoints, 2 unless set, and the best.
    #[must_use]
    pub fn with_kept_checkpoints(mut self, count: usize) -> Self {
        self.options.kept_checkpoints = count;
        self
    }

    /// Goes on from the newest undamaged checkpoint of the run folder, if there is one.
    #[must_use]
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.options.resume = resume;
        self
    }

    /// Trains together with the other processes of a group: each computes a share of every step's samples, and the sum
    /// of the gradients is taken once a step. Files are written by rank 0 only; the folder of a run that goes on is read by all.
    /// Dropout and `NEFTune` depend on the number of processes, everything else does not but for rounding.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.options.group = Some(group);
        self
    }

    /// Adds a warning of something found before the run, which is told when the run begins.
    #[must_use]
    pub fn with_warning(mut self, warning: TrainingWarning) -> Self {
        self.options.warnings.push(warning);
        self
    }

    /// Calls `callback` at each event; the run stops after the current step when it breaks.
    #[must_use]
    pub fn with_callback(self, callback: impl FnMut(&TrainingEvent) -> ControlFlow<()> + Send + 'static) -> Self {
        lock(&self.callbacks).push(Box::new(callback));
        self
    }

    /// The settings.
    pub fn config(&self) -> &TrainingConfig {
        &self.config
    }

    /// Refuses settings that [`Trainer::train`] would refuse.
    ///
    /// # Errors
    /// A setting is out of its range, or two of them contradict each other.
    pub fn check(&self) -> Result<()> {
        check(&self.config, &self.options)
    }

    /// The number of steps that [`Trainer::train`] makes of `dataset`, unless it stops early.
    ///
    /// # Errors
    /// A setting is out of its range, or the dataset is empty.
    pub fn total_steps(&self, dataset: &Dataset) -> Result<usize> {
        if let Some(steps) = self.options.max_steps {
            return Ok(steps);
        }
        let mut order = Progress::new(self.options.seed).order;
        let mut steps = 0;
        for _ in 0..self.config.num_epochs {
            steps += plan_epoch(&self.options, dataset, &mut order)?.len();
        }
        Ok(steps)
    }

    /// Trains from the parameters the trainer was given, or resumes, until the end of the run.
    ///
    /// # Errors
    /// Settings or samples cannot be used; a trainable tensor gets no gradient; the loss is NaN or infinite (a checkpoint
    /// is written first); a file cannot be written; the checkpoint to resume from belongs to another run; another process of
    /// the group failed.
    pub fn train(&self, dataset: &Dataset) -> Result<TrainingMetrics> {
        let outcome = self.run(dataset);
        if let (Some(group), Err(error)) = (&self.options.group, &outcome) {
            group.fail(error);
        }
        outcome
    }

    fn run(&self, dataset: &Dataset) -> Result<TrainingMetrics> {
        self.check()?;
        let vocab_size = self.start.run_model().config().vocab_size;
        check_dataset(dataset, vocab_size)?;
        if let Some(evaluation) = &self.options.evaluation {
            check_dataset(&evaluation.dataset, vocab_size)?;
        }
        let total_steps = self.total_steps(dataset)?;
        let mut callbacks = self.callbacks.try_lock().map_err(|_| Error::argument("trainer", "is training already"))?;
        let mut run = Run::new(&self.start, &self.config, &self.options, dataset, total_steps, &mut callbacks)?;
        let outcome = run.execute();
        // what was learned is kept when the run fails
        *lock(&self.latest) = run.snapshot()?;
        *lock(&self.best) = run.best()?;
        outcome
    }
}

impl<T: Trained> fmt::Debug for Trainer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trainer").field("config", &self.config).field("options", &self.options).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
