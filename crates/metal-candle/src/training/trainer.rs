//! [`Trainer`]: trains an adapter or a model on a dataset.

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

/// Trains an adapter, or all parameters of a model with [`Trainer::full`].
///
/// Each epoch shuffles the samples with the seed and packs them into batches. A step is one update after one or several
/// batches. Two runs with the same seed write the same bytes.
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
    /// Locked during a run.
    callbacks: Mutex<Vec<Callback>>,
    latest: Mutex<T>,
    best: Mutex<Option<T>>,
}

impl Trainer<LoRAAdapter> {
    /// Creates a trainer of an adapter; the weights of its model are frozen.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn new(adapter: LoRAAdapter, config: TrainingConfig) -> Result<Self> {
        Self::of(adapter, config)
    }

    /// LoRA+ (<https://arxiv.org/abs/2402.12354>): the learning rate of each B, and of vectors, is `ratio` times that of A.
    /// The highest learning rate of embedding adapters is 1e-6.
    #[must_use]
    pub fn with_lora_plus_ratio(mut self, ratio: f64) -> Self {
        self.options.lora_plus_ratio = Some(ratio);
        self
    }

    /// The adapter after the last run; the initial adapter before the first run.
    pub fn lora_adapter(&self) -> LoRAAdapter {
        lock(&self.latest).clone()
    }

    /// The adapter with the lowest evaluation loss; none without evaluations.
    pub fn best_adapter(&self) -> Option<LoRAAdapter> {
        lock(&self.best).clone()
    }
}

impl Trainer<Model> {
    /// Creates a trainer of all parameters of a model, in f32.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn full(model: Model, config: TrainingConfig) -> Result<Self> {
        Self::of(model, config)
    }

    /// The model after the last run (in f32); the initial model before the first run.
    pub fn model(&self) -> Model {
        lock(&self.latest).clone()
    }

    /// The model with the lowest evaluation loss; none without evaluations.
    pub fn best_model(&self) -> Option<Model> {
        lock(&self.best).clone()
    }
}

impl<T: Trained> Trainer<T> {
    /// Creates a trainer of any type that implements [`Trained`].
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

    /// The trained adapter or model after the last run; the initial one before the first run.
    pub fn latest(&self) -> T {
        lock(&self.latest).clone()
    }

    /// The adapter or model with the lowest evaluation loss; none without evaluations.
    pub fn best(&self) -> Option<T> {
        lock(&self.best).clone()
    }

    /// Maximum number of tokens in a batch (default 2048). A longer sample gets a batch of its own.
    #[must_use]
    pub fn with_batch_tokens(mut self, tokens: usize) -> Self {
        self.options.batch_tokens = tokens;
        self
    }

    /// Maximum number of tokens in a micro-batch. Larger batches are split, which changes gradients by rounding only. A longer
    /// sample gets a micro-batch of its own.
    #[must_use]
    pub fn with_micro_batch_tokens(mut self, tokens: usize) -> Self {
        self.options.micro_batch_tokens = Some(tokens);
        self
    }

    /// The number of blocks, from the first trained one on, that save only their input and are recomputed in the backward
    /// pass (gradient checkpointing, <https://arxiv.org/abs/1604.06174>, section 4). Gradients are the same; it takes less
    /// memory and up to a third more time.
    #[must_use]
    pub fn with_checkpointed_blocks(mut self, blocks: usize) -> Self {
        self.options.checkpointed_blocks = blocks;
        self
    }

    /// Predicts the memory and work of [`Trainer::train`] on `dataset`.
    ///
    /// # Errors
    /// Settings or samples cannot be used.
    pub fn plan(&self, dataset: &Dataset) -> Result<TrainingPlan> {
        check(&self.config, &self.options)?;
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        TrainingPlan::new(&self.start, &self.config, &self.options, dataset)
    }

    /// Returns the trainer, with a micro-batch size and checkpointed blocks such that the run fits in `limit` bytes, and its
    /// plan. If the run fits already, the settings do not change.
    ///
    /// # Errors
    /// No settings fit, or settings or samples cannot be used.
    pub fn fitted(mut self, dataset: &Dataset, limit: usize) -> Result<(Self, TrainingPlan)> {
        check(&self.config, &self.options)?;
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        let (options, plan) = plan::fit(&self.start, &self.config, &self.options, dataset, limit)?;
        self.options = options;
        Ok((self, plan))
    }

    /// Measures the tokens per second on the first `batches` micro-batches of `dataset`, without training.
    ///
    /// # Errors
    /// Settings or samples cannot be used.
    pub fn measure(&self, dataset: &Dataset, batches: usize) -> Result<f64> {
        check_dataset(dataset, self.start.run_model().config().vocab_size)?;
        plan::measure(&self.start, &self.options, dataset, batches)
    }

    /// Maximum number of samples in a batch.
    #[must_use]
    pub fn with_batch_samples(mut self, samples: usize) -> Self {
        self.options.batch_samples = samples;
        self
    }

    /// Uses these batches of sample indices in this order in each epoch, instead of shuffling and packing.
    #[must_use]
    pub fn with_batches(mut self, batches: Vec<Vec<usize>>) -> Self {
        self.options.batches = Some(batches);
        self
    }

    /// The number of batches per step. Each trained token of a step has the same weight, in any batch.
    #[must_use]
    pub fn with_gradient_accumulation(mut self, batches: usize) -> Self {
        self.options.gradient_accumulation = batches;
        self
    }

    /// Label smoothing, 0 to 1: the share of the target distribution that is uniform over the vocabulary.
    #[must_use]
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.options.label_smoothing = label_smoothing;
        self
    }

    /// Adds noise to the embedded tokens (NEFTune, <https://arxiv.org/abs/2310.05914>, section 2), uniform within
    /// `alpha / sqrt(length * hidden_size)` for a sample of `length` tokens; 0 for no noise.
    #[must_use]
    pub fn with_neftune_noise_alpha(mut self, alpha: f64) -> Self {
        self.options.neftune_noise_alpha = alpha;
        self
    }

    /// Trains exactly this number of steps, instead of `num_epochs`.
    #[must_use]
    pub fn with_max_steps(mut self, steps: usize) -> Self {
        self.options.max_steps = Some(steps);
        self
    }

    /// Uses this optimizer instead of AdamW with the settings of the configuration.
    #[must_use]
    pub fn with_optimizer(mut self, optimizer: impl Into<OptimizerConfig>) -> Self {
        self.options.optimizer = Some(optimizer.into());
        self
    }

    /// Whether weight decay applies to matrices only, not to norms and biases (default: to all parameters).
    #[must_use]
    pub fn with_decay_matrices_only(mut self, matrices_only: bool) -> Self {
        self.options.decay_matrices_only = matrices_only;
        self
    }

    /// Uses this schedule instead of the one in the configuration.
    #[must_use]
    pub fn with_lr_scheduler(mut self, lr_scheduler: LRScheduler) -> Self {
        self.config.lr_scheduler = lr_scheduler;
        self
    }

    /// The seed of the sample order and of dropout.
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

    /// Writes `metrics.jsonl` and `checkpoints/` into this folder. Checkpoints are written after the last step, after each
    /// evaluation that is the best so far, and before an error about the loss is returned.
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

    /// Keeps the newest `count` checkpoints (default 2), and the best one.
    #[must_use]
    pub fn with_kept_checkpoints(mut self, count: usize) -> Self {
        self.options.kept_checkpoints = count;
        self
    }

    /// Resumes from the newest undamaged checkpoint of the run folder, if there is one.
    #[must_use]
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.options.resume = resume;
        self
    }

    /// Trains together with the other processes of a group: each computes a shard of every step's samples, and gradients are
    /// summed once per step. Only rank 0 writes files; all ranks read the run folder to resume. Dropout and `NEFTune` depend
    /// on the number of processes; everything else differs by rounding only.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.options.group = Some(group);
        self
    }

    /// Adds a warning found before the run. It is reported when the run starts.
    #[must_use]
    pub fn with_warning(mut self, warning: TrainingWarning) -> Self {
        self.options.warnings.push(warning);
        self
    }

    /// Calls `callback` at each event. If it returns `Break`, the run stops after the current step.
    #[must_use]
    pub fn with_callback(self, callback: impl FnMut(&TrainingEvent) -> ControlFlow<()> + Send + 'static) -> Self {
        lock(&self.callbacks).push(Box::new(callback));
        self
    }

    /// The settings.
    pub fn config(&self) -> &TrainingConfig {
        &self.config
    }

    /// Checks the settings without training.
    ///
    /// # Errors
    /// A setting is out of its range, or two of them contradict each other.
    pub fn check(&self) -> Result<()> {
        check(&self.config, &self.options)
    }

    /// The number of steps of [`Trainer::train`] on `dataset`, unless it stops early.
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

    /// Trains from the initial parameters, or resumes, until the end of the run.
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
        let mut callbacks =
            self.callbacks.try_lock().map_err(|_| Error::argument("trainer", "a run is in progress already"))?;
        let mut run = Run::new(&self.start, &self.config, &self.options, dataset, total_steps, &mut callbacks)?;
        let outcome = run.execute();
        // keep the trained parameters even if the run fails
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
