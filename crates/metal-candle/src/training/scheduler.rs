//! Learning-rate schedules: pure functions of the step.

use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::f64::consts::PI;

/// How the learning rate changes over the steps.
///
/// A rate rises from 0 to `max_lr` over `warmup_steps`, falls to `min_lr` at `total_steps` and stays there.
///
/// ```
/// use metal_candle::training::LRScheduler;
///
/// let schedule = LRScheduler::warmup_cosine(100, 1000, 1e-4, 1e-6);
/// assert_eq!(schedule.learning_rate(0), 0.0);
/// assert_eq!(schedule.learning_rate(100), 1e-4);
/// assert!((schedule.learning_rate(1000) - 1e-6).abs() < 1e-15);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum LRScheduler {
    /// The same rate at every step.
    Constant {
        /// The rate.
        learning_rate: f64,
    },
    /// `min_lr + (max_lr - min_lr) (1 - p)` with `p` the share of the steps after the warm-up that are done.
    Linear {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate after the warm-up.
        max_lr: f64,
        /// The rate at the end.
        min_lr: f64,
    },
    /// `min_lr + (max_lr - min_lr) (1 + cos(pi p)) / 2` with `p` the share of the steps after the warm-up that are done
    /// (SGDR, <https://arxiv.org/abs/1608.03983>, section 3).
    Cosine {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate after the warm-up.
        max_lr: f64,
        /// The rate at the end.
        min_lr: f64,
    },
}

impl LRScheduler {
    /// The same rate at every step.
    pub fn constant(learning_rate: f64) -> Self {
        Self::Constant { learning_rate }
    }

    /// Rises over `warmup_steps`, then falls in a line from `max_lr` to `min_lr` at `total_steps`.
    pub fn linear(warmup_steps: usize, total_steps: usize, max_lr: f64, min_lr: f64) -> Self {
        Self::Linear { warmup_steps, total_steps, max_lr, min_lr }
    }

    /// Falls along half a cosine from `max_lr` to `min_lr` at `total_steps`.
    pub fn cosine(total_steps: usize, max_lr: f64, min_lr: f64) -> Self {
        Self::Cosine { warmup_steps: 0, total_steps, max_lr, min_lr }
    }

    /// Rises over `warmup_steps`, then falls along half a cosine from `max_lr` to `min_lr` at `total_steps`.
    pub fn warmup_cosine(warmup_steps: usize, total_steps: usize, max_lr: f64, min_lr: f64) -> Self {
        Self::Cosine { warmup_steps, total_steps, max_lr, min_lr }
    }

    /// The rate of the update after `step` updates: step 0 is the first one.
    pub fn learning_rate(&self, step: usize) -> f64 {
        match *self {
            Self::Constant { learning_rate } => learning_rate,
            Self::Linear { warmup_steps, total_steps, max_lr, min_lr } => rising(step, warmup_steps, max_lr)
                .unwrap_or_else(|| min_lr + (max_lr - min_lr) * (1.0 - progress(step, warmup_steps, total_steps))),
            Self::Cosine { warmup_steps, total_steps, max_lr, min_lr } => rising(step, warmup_steps, max_lr)
                .unwrap_or_else(|| {
                    let progress = progress(step, warmup_steps, total_steps);
                    min_lr + (max_lr - min_lr) * 0.5 * (1.0 + (PI * progress).cos())
                }),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let (max_lr, min_lr) = match *self {
            Self::Constant { learning_rate } => (learning_rate, learning_rate),
            Self::Linear { warmup_steps, total_steps, max_lr, min_lr }
            | Self::Cosine { warmup_steps, total_steps, max_lr, min_lr } => {
                if warmup_steps > total_steps {
                    return Err(Error::argument(
                        "lr_scheduler",
                        format!("the warm-up of {warmup_steps} steps is longer than the schedule of {total_steps}"),
                    ));
                }
                (max_lr, min_lr)
            }
        };
        for rate in [max_lr, min_lr] {
            if !rate.is_finite() || rate < 0.0 {
                return Err(Error::argument("lr_scheduler", format!("`{rate}` is no learning rate")));
            }
        }
        Ok(())
    }

    /// The schedule as it is kept in a checkpoint; floats are text, so that they come back exactly.
    pub(crate) fn to_json(self) -> Value {
        match self {
            Self::Constant { learning_rate } => {
                json!({"kind": "constant", "learning_rate": learning_rate.to_string()})
            }
            Self::Linear { warmup_steps, total_steps, max_lr, min_lr } => json!({
                "kind": "linear", "warmup_steps": warmup_steps, "total_steps": total_steps,
                "max_lr": max_lr.to_string(), "min_lr": min_lr.to_string(),
            }),
            Self::Cosine { warmup_steps, total_steps, max_lr, min_lr } => json!({
                "kind": "cosine", "warmup_steps": warmup_steps, "total_steps": total_steps,
                "max_lr": max_lr.to_string(), "min_lr": min_lr.to_string(),
            }),
        }
    }
}

fn rising(step: usize, warmup_steps: usize, max_lr: f64) -> Option<f64> {
    (step < warmup_steps).then(|| max_lr * step as f64 / warmup_steps as f64)
}

fn progress(step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
    let decaying = total_steps.saturating_sub(warmup_steps).max(1);
    (step.saturating_sub(warmup_steps) as f64 / decaying as f64).min(1.0)
}
