//! Predicts the memory and work of a run, and finds settings that fit in a memory limit.

use super::config::{Options, TrainingConfig};
use super::epoch::plan_epoch;
use super::micro_batches::micro_batches;
use super::samples::count_tokens;
use super::trained::{OfModel, Trained};
use crate::data::Dataset;
use crate::error::{Error, Result, format_bytes};
use crate::models::{LossOptions, StepMemory, TokenRows};
use candle_core::DType;
use std::time::Instant;

/// The memory and the work of a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainingPlan {
    /// The weights of the model, in bytes.
    pub weights_bytes: usize,
    /// The trained parameters, their gradients and the saved copies, in bytes.
    pub trained_bytes: usize,
    /// The state of the optimizer, in bytes.
    pub optimizer_bytes: usize,
    /// The memory of the largest micro-batch: activations and temporary buffers.
    pub step: StepMemory,
    /// The peak of all of these, in bytes, without the program, tokenizer and data.
    pub peak_bytes: usize,
    /// The number of optimizer steps.
    pub steps: usize,
    /// Tokens of all steps, trained or not.
    pub tokens: usize,
    /// Tokens whose prediction is trained.
    pub trained_tokens: usize,
    /// Tokens of the longest sample.
    pub longest_sample: usize,
    /// Tokens of the largest batch of a step.
    pub largest_batch: usize,
    /// Maximum number of tokens in a micro-batch; larger batches are split.
    pub micro_batch_tokens: usize,
    /// The number of blocks that are recomputed in the backward pass.
    pub checkpointed_blocks: usize,
    /// The number of blocks with a backward pass.
    pub trained_blocks: usize,
}

impl TrainingPlan {
    /// The plan of a run whose settings have been checked.
    pub(super) fn new<T: Trained>(
        start: &T,
        config: &TrainingConfig,
        options: &Options,
        dataset: &Dataset,
    ) -> Result<Self> {
        let model = start.run_model();
        let parameters = start.trainable();
        let trained: usize = parameters.iter().map(|parameter| parameter.len).sum();
        let vector = trained * DType::F32.size_in_bytes();
        let terms = start.run_terms()?;
        let of_model = OfModel::new(start, &parameters);
        let trainable = of_model.with(terms.as_ref());

        let (mut order, mut steps, mut epochs) = (super::progress::Progress::new(options.seed).order, 0, 0);
        let (mut tokens, mut trained_tokens, mut largest_batch) = (0, 0, 0);
        let mut largest = (0, 0);
        let mut step = StepMemory::default();
        let is_over = |steps: usize, epochs: usize| match options.max_steps {
            Some(most) => steps >= most,
            None => epochs >= config.num_epochs,
        };
        while !is_over(steps, epochs) {
            for batches in plan_epoch(options, dataset, &mut order)? {
                if is_over(steps, epochs) {
                    break;
                }
                steps += 1;
                for batch in &batches {
                    largest_batch = largest_batch.max(count_tokens(dataset, batch).0);
                    for part in micro_batches(dataset, batch, options.micro_batch_tokens) {
                        let size = count_tokens(dataset, &part);
                        tokens += size.0;
                        trained_tokens += size.1;
                        // a micro-batch with fewer tokens and fewer trained tokens needs no more memory
                        if size.0 > largest.0 || size.1 > largest.1 {
                            largest = (size.0.max(largest.0), size.1.max(largest.1));
                            let needed = model.step_memory(size.0, size.1, trainable, options.checkpointed_blocks)?;
                            if needed.peak > step.peak {
                                step = needed;
                            }
                        }
                    }
                }
            }
            epochs += 1;
        }
        // the initial values, the optimizer's copy, the sum of the gradients, and the best state
        let weights_bytes: usize = model.parameters().iter().map(|(_, weight)| weight.num_bytes()).sum();
        let copies = 2 + usize::from(terms.is_some()) + usize::from(options.evaluation.is_some());
        // a parameter with trained rows is copied for the run, in addition to the model's and the initial one
        let of_rows = |rows: TokenRows| {
            let weight = &model.parameters()[rows.parameter].1;
            2 * weight.elem_count() * weight.dtype().size_in_bytes()
        };
        let of_rows: usize = start.token_rows().into_iter().map(of_rows).sum();
        let trained_bytes = copies * vector + of_rows;
        let optimizer_bytes = options.optimizer(config).state_bytes(&parameters)?;
        let trained_blocks = model.trained_blocks(trainable)?;
        Ok(Self {
            weights_bytes,
            trained_bytes,
            optimizer_bytes,
            step,
            peak_bytes: weights_bytes + trained_bytes + optimizer_bytes + step.peak.max(vector),
            steps,
            tokens,
            trained_tokens,
            longest_sample: dataset.lengths().into_iter().max().unwrap_or(0),
            largest_batch,
            micro_batch_tokens: options.micro_batch_tokens.unwrap_or(largest_batch).min(largest_batch),
            checkpointed_blocks: options.checkpointed_blocks.min(trained_blocks),
            trained_blocks,
        })
    }
}

/// The smallest micro-batch to try before checkpointing blocks: smaller matrix products are slow.
const MICRO_BATCH_TOKENS: usize = 512;

/// Finds settings with which a run fits in `limit` bytes, and returns its plan: first a smaller micro-batch, then as few
/// checkpointed blocks as needed, then one sample at a time.
pub(super) fn fit<T: Trained>(
    start: &T,
    config: &TrainingConfig,
    options: &Options,
    dataset: &Dataset,
    limit: usize,
) -> Result<(Options, TrainingPlan)> {
    let plan_of = |micro_batch_tokens: usize, checkpointed_blocks: usize| -> Result<(Options, TrainingPlan)> {
        let mut options = options.clone();
        options.micro_batch_tokens = Some(micro_batch_tokens);
        options.checkpointed_blocks = checkpointed_blocks;
        let plan = TrainingPlan::new(start, config, &options, dataset)?;
        Ok((options, plan))
    };
    let plan = TrainingPlan::new(start, config, options, dataset)?;
    if plan.peak_bytes <= limit {
        return Ok((options.clone(), plan));
    }
    let smallest = plan.longest_sample.max(1);
    let mut sizes = vec![plan.micro_batch_tokens];
    while sizes[sizes.len() - 1] > smallest.max(MICRO_BATCH_TOKENS) {
        sizes.push((sizes[sizes.len() - 1] / 2).max(smallest.max(MICRO_BATCH_TOKENS)));
    }
    for &tokens in &sizes {
        let fitted = plan_of(tokens, plan.checkpointed_blocks)?;
        if fitted.1.peak_bytes <= limit {
            return Ok(fitted);
        }
    }
    let tokens = sizes[sizes.len() - 1];
    for tokens in [tokens, smallest.min(tokens)] {
        let all = plan_of(tokens, plan.trained_blocks)?;
        if all.1.peak_bytes > limit {
            continue;
        }
        // memory falls with each checkpointed block, so a binary search finds the fewest
        let (mut too_few, mut enough) = (plan.checkpointed_blocks, plan.trained_blocks);
        let mut best = all;
        while enough - too_few > 1 {
            let middle = usize::midpoint(too_few, enough);
            let tried = plan_of(tokens, middle)?;
            if tried.1.peak_bytes <= limit {
                (enough, best) = (middle, tried);
            } else {
                too_few = middle;
            }
        }
        return Ok(best);
    }
    let least = plan_of(smallest.min(tokens), plan.trained_blocks)?.1;
    let size = |bytes: usize| format_bytes(bytes as u64);
    Err(Error::Memory {
        needed: least.peak_bytes,
        limit,
        detail: format!(
            "the plan needs {}; with the longest sample ({} tokens) alone and every block checkpointed it needs {}: \
             weights {}, trained parameters {}, optimizer {}, step {}",
            size(plan.peak_bytes),
            plan.longest_sample,
            size(least.peak_bytes),
            size(least.weights_bytes),
            size(least.trained_bytes),
            size(least.optimizer_bytes),
            size(least.step.peak),
        ),
    })
}

/// Measures the tokens per second of forward and backward passes on the first micro-batches, without updates.
pub(super) fn measure<T: Trained>(start: &T, options: &Options, dataset: &Dataset, batches: usize) -> Result<f64> {
    let mut order = super::progress::Progress::new(options.seed).order;
    let planned = plan_epoch(options, dataset, &mut order)?;
    let parts = planned.iter().flatten().flat_map(|batch| micro_batches(dataset, batch, options.micro_batch_tokens));
    let terms = start.run_terms()?;
    let of_model = OfModel::new(start, &start.trainable());
    let trainable = of_model.with(terms.as_ref());
    let loss_options = LossOptions { checkpointed_blocks: options.checkpointed_blocks, ..LossOptions::default() };
    let mut best: f64 = 0.0;
    for part in parts.take(batches) {
        let samples: Vec<_> = part.iter().map(|&index| &dataset.samples[index]).collect();
        let (batch, targets) = crate::data::batch_of(&samples);
        let started = Instant::now();
        start.run_model().loss_and_gradients(&batch, &targets, trainable, loss_options)?;
        best = best.max(batch.num_tokens() as f64 / started.elapsed().as_secs_f64().max(f64::MIN_POSITIVE));
    }
    Ok(best)
}
