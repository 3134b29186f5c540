//! The events and metrics of a training run.

use super::warnings::TrainingWarning;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Receives the events of a run; `Break` stops the run.
pub(super) type Callback = Box<dyn FnMut(&TrainingEvent) -> ControlFlow<()> + Send>;

/// An event of a training run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TrainingEvent {
    /// The run started, or resumed after `step` steps.
    Started {
        /// Steps completed before.
        step: usize,
        /// Steps at the end of the run, unless it stops early.
        total_steps: usize,
        /// Number of parameters that are trained.
        num_trainable_parameters: usize,
    },
    /// An optimizer step was completed.
    Step {
        /// The step, from 1.
        step: usize,
        /// The pass over the data it belongs to, from 1.
        epoch: usize,
        /// Mean loss before the update, in nats per trained token.
        loss: f64,
        /// Learning rate of the update.
        learning_rate: f64,
        /// Global norm of the gradients before clipping.
        grad_norm: f64,
        /// Tokens of the step, trained or not.
        tokens: usize,
        /// Tokens of the step divided by its duration.
        tokens_per_second: f64,
    },
    /// The evaluation dataset was measured.
    Evaluated {
        /// Completed steps.
        step: usize,
        /// Mean loss in nats per trained token.
        loss: f64,
        /// Whether it is the lowest so far.
        is_best: bool,
    },
    /// A problem that the user should check. Warnings do not change the run.
    Warning {
        /// Completed steps.
        step: usize,
        /// The warning.
        warning: TrainingWarning,
    },
    /// A checkpoint was written.
    Checkpointed {
        /// Completed steps.
        step: usize,
        /// Its folder.
        path: PathBuf,
    },
    /// The run ended.
    Finished {
        /// Completed steps.
        step: usize,
        /// Why the run ended.
        stop_reason: StopReason,
    },
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// All epochs or steps were completed.
    Completed,
    /// The evaluation loss did not improve for the allowed number of evaluations.
    EarlyStopping,
    /// A callback stopped the run.
    Callback,
}

/// One optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// The pass over the data it belongs to, from 1.
    pub epoch: usize,
    /// Mean loss before the update, in nats per trained token.
    pub loss: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, trained or not.
    pub tokens: usize,
    /// Tokens of the step whose prediction was trained.
    pub trained_tokens: usize,
    /// Tokens of the step divided by its duration.
    pub tokens_per_second: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationMetrics {
    /// Completed steps.
    pub step: usize,
    /// Mean loss in nats per trained token.
    pub loss: f64,
}

/// The result of [`Trainer::train`](super::Trainer::train). A resumed run lists the steps since it was resumed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TrainingMetrics {
    /// Why the run ended.
    pub stop_reason: StopReason,
    /// Completed steps, including those before the run was resumed.
    pub num_steps: usize,
    /// Complete passes over the data, including those before the run was resumed.
    pub num_epochs: usize,
    /// Each step.
    pub steps: Vec<StepMetrics>,
    /// Each evaluation.
    pub evaluations: Vec<EvaluationMetrics>,
    /// The evaluation with the lowest loss, including those before the run was resumed.
    pub best: Option<EvaluationMetrics>,
    /// Number of parameters that are trained.
    pub num_trainable_parameters: usize,
    /// The number of gradients of one backward pass: one per trainable tensor, none for frozen tensors.
    pub num_gradient_tensors: usize,
    /// Memory of these gradients, in bytes.
    pub gradient_bytes: usize,
    /// Peak bytes saved between a forward pass and its backward pass.
    pub saved_bytes: usize,
    /// Tokens seen, trained or not, including those before the run was resumed.
    pub tokens: usize,
    /// Tokens whose prediction was trained, including those before the run was resumed.
    pub trained_tokens: usize,
    /// Duration of the steps, without evaluations and checkpoints, in seconds.
    pub seconds: f64,
}

impl TrainingMetrics {
    /// The loss of the last step, in nats per trained token.
    pub fn final_loss(&self) -> Option<f64> {
        self.steps.last().map(|step| step.loss)
    }

    /// Tokens of the listed steps divided by their duration.
    pub fn tokens_per_second(&self) -> f64 {
        self.steps.iter().map(|step| step.tokens).sum::<usize>() as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}
