//! Events and metrics of a training run.

use super::warnings::TrainingWarning;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Receives the events of a run; `Break` stops the run.
pub(super) type Callback = Box<dyn FnMut(&TrainingEvent) -> ControlFlow<()> + Send>;

/// Something that happened in a training run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TrainingEvent {
    /// The run begins, or goes on after `step` steps.
    Started {
        /// Steps done already.
        step: usize,
        /// Steps at the end of the run, unless it stops early.
        total_steps: usize,
        /// Number of parameters that are trained.
        num_trainable_parameters: usize,
    },
    /// An optimizer step was made.
    Step {
        /// The step, from 1.
        step: usize,
        /// The pass over the data it belongs to, from 1.
        epoch: usize,
        /// Mean loss before the update, in nats a trained token.
        loss: f64,
        /// Learning rate of the update.
        learning_rate: f64,
        /// Global norm of the gradients before clipping.
        grad_norm: f64,
        /// Tokens of the step, trained or not.
        tokens: usize,
        /// Tokens of the step by its duration.
        tokens_per_second: f64,
    },
    /// The evaluation dataset was measured.
    Evaluated {
        /// Steps done.
        step: usize,
        /// Mean loss in nats a trained token.
        loss: f64,
        /// Whether it is the lowest so far.
        is_best: bool,
    },
    /// Something should be looked at. Warnings change nothing of a run.
    Warning {
        /// Steps done.
        step: usize,
        /// What was seen.
        warning: TrainingWarning,
    },
    /// A checkpoint was written.
    Checkpointed {
        /// Steps done.
        step: usize,
        /// Its folder.
        path: PathBuf,
    },
    /// The run is over.
    Finished {
        /// Steps done.
        step: usize,
        /// Why.
        stop_reason: StopReason,
    },
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// All epochs or steps were done.
    Completed,
    /// The evaluation loss did not improve for as many evaluations as was allowed.
    EarlyStopping,
    /// A callback asked for it.
    Callback,
}

/// One optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// The pass over the data it belongs to, from 1.
    pub epoch: usize,
    /// Mean loss before the update, in nats a trained token.
    pub loss: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, trained or not.
    pub tokens: usize,
    /// Tokens of the step whose prediction was trained.
    pub trained_tokens: usize,
    /// Tokens of the step by its duration.
    pub tokens_per_second: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationMetrics {
    /// Steps done.
    pub step: usize,
    /// Mean loss in nats a trained token.
    pub loss: f64,
}

/// What a call of [`Trainer::train`](super::Trainer::train) did. A resumed run lists the steps since it was resumed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainingMetrics {
    /// Why the run ended.
    pub stop_reason: StopReason,
    /// Steps done, those before a resumption too.
    pub num_steps: usize,
    /// Complete passes over the data, those before a resumption too.
    pub num_epochs: usize,
    /// Each step.
    pub steps: Vec<StepMetrics>,
    /// Each evaluation.
    pub evaluations: Vec<EvaluationMetrics>,
    /// The evaluation with the lowest loss, those before a resumption too.
    pub best: Option<EvaluationMetrics>,
    /// Number of parameters that are trained.
    pub num_trainable_parameters: usize,
    /// Gradients that one backward pass made: one for each trainable tensor, none for frozen ones.
    pub num_gradient_tensors: usize,
    /// Memory of these gradients, in bytes.
    pub gradient_bytes: usize,
    /// Most bytes that were kept between a forward and its backward pass.
    pub saved_bytes: usize,
    /// Tokens seen, trained or not, those before a resumption too.
    pub tokens: usize,
    /// Tokens whose prediction was trained, those before a resumption too.
    pub trained_tokens: usize,
    /// Duration of the steps, without evaluations and checkpoints, in seconds.
    pub seconds: f64,
}

impl TrainingMetrics {
    /// The loss of the last step, in nats a trained token.
    pub fn final_loss(&self) -> Option<f64> {
        self.steps.last().map(|step| step.loss)
    }

    /// Tokens of the listed steps by their duration.
    pub fn tokens_per_second(&self) -> f64 {
        self.steps.iter().map(|step| step.tokens).sum::<usize>() as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}
