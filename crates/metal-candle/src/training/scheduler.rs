//! Learning-rate schedules: pure functions of the step.

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
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
    /// As [`LRScheduler::Cosine`], but from `max_lr` again in each of `num_cycles` cycles of equal length.
    CosineRestarts {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The step at which the last cycle reaches `min_lr`.
        total_steps: usize,
        /// The rate at the start of each cycle.
        max_lr: f64,
        /// The rate that each cycle falls to.
        min_lr: f64,
        /// The number of cycles.
        num_cycles: usize,
    },
    /// `min_lr + (max_lr - min_lr) (1 - p)^power` with `p` the share of the steps after the warm-up that are done.
    Polynomial {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate after the warm-up.
        max_lr: f64,
        /// The rate at the end.
        min_lr: f64,
        /// The exponent.
        power: f64,
    },
    /// Stays at `max_lr` and falls over the last `decay_steps` (WSD, <https://arxiv.org/abs/2404.06395>, section 4.2).
    WarmupStableDecay {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// Steps over which the rate falls.
        decay_steps: usize,
        /// The rate between warm-up and decay.
        max_lr: f64,
        /// The rate at the end.
        min_lr: f64,
        /// How it falls.
        shape: DecayShape,
    },
    /// `max_lr sqrt(timescale / (timescale + steps after the warm-up))`.
    InverseSqrt {
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// The rate after the warm-up.
        max_lr: f64,
        /// The rate halves in three times this number of steps after the warm-up.
        timescale: usize,
    },
}

/// How a rate falls from 1 to 0 with the share `p` of the steps done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DecayShape {
    /// `1 - p`.
    Linear,
    /// `(1 + cos(pi p)) / 2`.
    Cosine,
    /// `1 - sqrt(p)` (<https://arxiv.org/abs/2405.18392>, section 3).
    #[default]
    OneMinusSqrt,
}

impl DecayShape {
    fn at(self, progress: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::OneMinusSqrt => "one-minus-sqrt",
        }
    }
}

impl LRScheduler {
    /// The same rate at every step.
    pub fn constant(learning_rate: f64) -> Self {
        Self::Constant { learning_rate }
    }

    /// Rises over `warmup_steps`, then falls linearly from `max_lr` to `min_lr` at `total_steps`.
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

    /// Rises over `warmup_steps`, then falls `num_cycles` times along half a cosine from `max_lr` to `min_lr`, the last time
    /// at `total_steps`.
    pub fn cosine_restarts(
        warmup_steps: usize,
        total_steps: usize,
        max_lr: f64,
        min_lr: f64,
        num_cycles: usize,
    ) -> Self {
        Self::CosineRestarts { warmup_steps, total_steps, max_lr, min_lr, num_cycles }
    }

    /// Rises over `warmup_steps`, then falls as a power of the share of steps left from `max_lr` to `min_lr` at
    /// `total_steps`.
    pub fn polynomial(warmup_steps: usize, total_steps: usize, max_lr: f64, min_lr: f64, power: f64) -> Self {
        Self::Polynomial { warmup_steps, total_steps, max_lr, min_lr, power }
    }

    /// Rises over `warmup_steps`, stays at `max_lr`, and falls over `decay_steps` to `min_lr` at `total_steps`.
    pub fn warmup_stable_decay(
        warmup_steps: usize,
        total_steps: usize,
        decay_steps: usize,
        max_lr: f64,
        min_lr: f64,
        shape: DecayShape,
    ) -> Self {
        Self::WarmupStableDecay { warmup_steps, total_steps, decay_steps, max_lr, min_lr, shape }
    }

    /// Rises over `warmup_steps`, then falls with the inverse square root of the step; the time scale is the warm-up, or
    /// 10,000 steps without one.
    pub fn inverse_sqrt(warmup_steps: usize, max_lr: f64) -> Self {
        Self::InverseSqrt { warmup_steps, max_lr, timescale: if warmup_steps > 0 { warmup_steps } else { 10_000 } }
    }

    /// The highest rate of the schedule.
    pub(crate) fn highest(&self) -> f64 {
        self.parts().max_lr
    }

    /// The rate of the update after `step` updates: step 0 is the first one.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let Parts { warmup_steps, total_steps, max_lr, min_lr } = self.parts();
        if step < warmup_steps {
            return max_lr * step as f64 / warmup_steps as f64;
        }
        let progress = progress(step, warmup_steps, total_steps);
        let left = match *self {
            Self::Constant { .. } => return max_lr,
            Self::InverseSqrt { timescale, .. } => {
                return max_lr / ((timescale + step - warmup_steps) as f64 / timescale as f64).sqrt();
            }
            Self::Linear { .. } => 1.0 - progress,
            Self::Cosine { .. } => DecayShape::Cosine.at(progress),
            Self::CosineRestarts { .. } if progress >= 1.0 => 0.0,
            Self::CosineRestarts { num_cycles, .. } => DecayShape::Cosine.at((num_cycles as f64 * progress) % 1.0),
            Self::Polynomial { power, .. } => (1.0 - progress).powf(power),
            Self::WarmupStableDecay { decay_steps, .. } if step + decay_steps < total_steps => return max_lr,
            Self::WarmupStableDecay { .. } if step >= total_steps => 0.0,
            Self::WarmupStableDecay { decay_steps, shape, .. } => {
                shape.at(self::progress(step, total_steps.saturating_sub(decay_steps), total_steps))
            }
        };
        min_lr + (max_lr - min_lr) * left
    }

    /// The settings that most schedules have.
    fn parts(&self) -> Parts {
        match *self {
            Self::Constant { learning_rate: rate } => {
                Parts { warmup_steps: 0, total_steps: 0, max_lr: rate, min_lr: rate }
            }
            Self::Linear { warmup_steps, total_steps, max_lr, min_lr }
            | Self::Cosine { warmup_steps, total_steps, max_lr, min_lr }
            | Self::CosineRestarts { warmup_steps, total_steps, max_lr, min_lr, .. }
            | Self::Polynomial { warmup_steps, total_steps, max_lr, min_lr, .. }
            | Self::WarmupStableDecay { warmup_steps, total_steps, max_lr, min_lr, .. } => {
                Parts { warmup_steps, total_steps, max_lr, min_lr }
            }
            Self::InverseSqrt { warmup_steps, max_lr, .. } => {
                Parts { warmup_steps, total_steps: warmup_steps, max_lr, min_lr: 0.0 }
            }
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::argument("lr_scheduler", message));
        let Parts { warmup_steps, total_steps, max_lr, min_lr } = self.parts();
        if warmup_steps > total_steps {
            return refuse(format!("the warm-up of {warmup_steps} steps is longer than the schedule of {total_steps}"));
        }
        for rate in [max_lr, min_lr] {
            if !rate.is_finite() || rate < 0.0 {
                return refuse(format!("expected a learning rate of at least 0, found `{rate}`"));
            }
        }
        match *self {
            Self::CosineRestarts { num_cycles: 0, .. } => refuse("num_cycles: expected at least 1, found 0".into()),
            Self::InverseSqrt { timescale: 0, .. } => refuse("timescale: expected at least 1, found 0".into()),
            Self::Polynomial { power, .. } if !power.is_finite() || power <= 0.0 => {
                refuse(format!("power: expected a number above 0, found `{power}`"))
            }
            Self::WarmupStableDecay { decay_steps, .. } if decay_steps > total_steps - warmup_steps => {
                let left = total_steps - warmup_steps;
                refuse(format!("the decay of {decay_steps} steps is longer than the {left} after the warm-up"))
            }
            _ => Ok(()),
        }
    }

    /// The schedule for a checkpoint; floats are stored as text, so that they are restored exactly.
    pub(crate) fn to_json(self) -> Value {
        let Parts { warmup_steps, total_steps, max_lr, min_lr } = self.parts();
        let with = |kind: &str, more: &[(&str, Value)]| {
            let mut map = Map::new();
            map.insert("kind".into(), json!(kind));
            map.insert("warmup_steps".into(), json!(warmup_steps));
            map.insert("total_steps".into(), json!(total_steps));
            map.insert("max_lr".into(), json!(max_lr.to_string()));
            map.insert("min_lr".into(), json!(min_lr.to_string()));
            map.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
            Value::Object(map)
        };
        match self {
            Self::Constant { learning_rate } => {
                json!({"kind": "constant", "learning_rate": learning_rate.to_string()})
            }
            Self::Linear { .. } => with("linear", &[]),
            Self::Cosine { .. } => with("cosine", &[]),
            Self::CosineRestarts { num_cycles, .. } => with("cosine-restarts", &[("num_cycles", json!(num_cycles))]),
            Self::Polynomial { power, .. } => with("polynomial", &[("power", json!(power.to_string()))]),
            Self::WarmupStableDecay { decay_steps, shape, .. } => {
                with("warmup-stable-decay", &[("decay_steps", json!(decay_steps)), ("shape", json!(shape.name()))])
            }
            Self::InverseSqrt { timescale, .. } => with("inverse-sqrt", &[("timescale", json!(timescale))]),
        }
    }
}

/// The settings that most schedules have.
struct Parts {
    warmup_steps: usize,
    total_steps: usize,
    max_lr: f64,
    min_lr: f64,
}

fn progress(step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
    let decaying = total_steps.saturating_sub(warmup_steps).max(1);
    (step.saturating_sub(warmup_steps) as f64 / decaying as f64).min(1.0)
}
