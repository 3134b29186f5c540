//! The kinds of optimizers and schedules, and the settings that each of them has.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the learning rate changes over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Schedule {
    /// The same at each step.
    Constant,
    /// Rises over the warm-up steps, then stays.
    WarmupConstant,
    /// Rises over the warm-up steps, then falls in a straight line to the minimum.
    Linear,
    /// Falls along half a cosine to the minimum.
    Cosine,
    /// Rises over the warm-up steps, then falls along half a cosine to the minimum.
    WarmupCosine,
    /// The same several times, each time from the highest rate.
    CosineRestarts,
    /// Rises over the warm-up steps, then falls as a power of the share of steps left.
    Polynomial,
    /// Rises over the warm-up steps, stays, and falls over the last steps.
    #[value(alias = "wsd")]
    #[serde(alias = "wsd")]
    WarmupStableDecay,
    /// Rises over the warm-up steps, then falls as one over the root of the steps.
    InverseSqrt,
}

/// What makes the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// Adam with weight decay as a part of the gradients.
    #[serde(rename = "adam")]
    Adam,
    /// Stochastic gradient descent with momentum; half the state of AdamW, or none with --momentum 0.
    #[serde(rename = "sgd")]
    Sgd,
    /// Steps along the signs of a moment; half the state of AdamW.
    #[serde(rename = "lion")]
    Lion,
    /// Means of rows and columns in place of second moments; hardly any state.
    #[serde(rename = "adafactor")]
    Adafactor,
    /// Orthogonal steps for matrices, AdamW for the rest; half the state of AdamW.
    #[serde(rename = "muon")]
    Muon,
    /// AdamW with moments of a byte an element; a quarter of its state, on the CPU only.
    #[value(name = "adamw-8bit")]
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// AdamW that averages its steps in place of lowering the learning rate.
    #[value(name = "schedule-free-adamw")]
    #[serde(rename = "schedule-free-adamw")]
    ScheduleFreeAdamW,
}

/// How the learning rate falls at the end of warmup-stable-decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DecayKind {
    /// In a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
    /// As 1 minus the root of the share of steps done.
    OneMinusSqrt,
}

/// The settings that only some schedules have.
pub(super) const OF_SCHEDULES: [&str; 6] =
    ["warmup_steps", "min_learning_rate", "num_cycles", "power", "decay_steps", "decay_shape"];
/// The settings that only some optimizers have.
pub(super) const OF_OPTIMIZERS: [&str; 5] = ["beta1", "beta2", "eps", "momentum", "nesterov"];

impl Schedule {
    /// The settings of [`OF_SCHEDULES`] that this schedule has.
    pub(super) fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Constant => &[],
            Self::WarmupConstant | Self::InverseSqrt => &["warmup_steps"],
            Self::Cosine => &["min_learning_rate"],
            Self::Linear | Self::WarmupCosine => &["warmup_steps", "min_learning_rate"],
            Self::CosineRestarts => &["warmup_steps", "min_learning_rate", "num_cycles"],
            Self::Polynomial => &["warmup_steps", "min_learning_rate", "power"],
            Self::WarmupStableDecay => &["warmup_steps", "min_learning_rate", "decay_steps", "decay_shape"],
        }
    }
}

impl OptimizerKind {
    /// The settings of [`OF_OPTIMIZERS`] that this optimizer has.
    pub(super) fn settings(self) -> &'static [&'static str] {
        match self {
            Self::AdamW | Self::Adam | Self::AdamW8bit | Self::ScheduleFreeAdamW => &["beta1", "beta2", "eps"],
            Self::Sgd => &["momentum", "nesterov"],
            Self::Lion => &["beta1", "beta2"],
            Self::Adafactor => &[],
            Self::Muon => &["beta1", "beta2", "eps", "momentum", "nesterov"],
        }
    }

    /// The usual learning rate of this optimizer divided by that of AdamW.
    pub(super) fn rate_to_adamw(self) -> f64 {
        match self {
            Self::Lion => 0.3,
            Self::ScheduleFreeAdamW => 2.0,
            Self::Sgd => 200.0,
            Self::AdamW | Self::Adam | Self::Adafactor | Self::Muon | Self::AdamW8bit => 1.0,
        }
    }

    pub(super) fn default_schedule(self) -> Schedule {
        if self == Self::ScheduleFreeAdamW { Schedule::WarmupConstant } else { Schedule::WarmupCosine }
    }
}

/// The default of the learning rate of an adapter with AdamW.
pub(crate) fn lora_learning_rate(is_nano: bool) -> f64 {
    if is_nano { 3e-3 } else { 2e-4 }
}
