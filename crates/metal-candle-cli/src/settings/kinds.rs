//! The optimizers and schedules of the command line, and the settings of each.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The learning-rate schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Schedule {
    /// Constant.
    Constant,
    /// Rises over the warm-up steps, then stays constant.
    WarmupConstant,
    /// Rises over the warm-up steps, then falls linearly to the minimum.
    Linear,
    /// Falls along half a cosine to the minimum.
    Cosine,
    /// Rises over the warm-up steps, then falls along half a cosine to the minimum.
    WarmupCosine,
    /// Like warmup-cosine, but falls several times from the highest rate.
    CosineRestarts,
    /// Rises over the warm-up steps, then falls as a power of the share of steps left.
    Polynomial,
    /// Rises over the warm-up steps, stays constant, and falls over the last steps.
    #[value(alias = "wsd")]
    #[serde(alias = "wsd")]
    WarmupStableDecay,
    /// Rises over the warm-up steps, then falls with the inverse square root of the step.
    InverseSqrt,
}

/// The optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// Adam with weight decay added to the gradients.
    #[serde(rename = "adam")]
    Adam,
    /// Stochastic gradient descent with momentum; half the state of AdamW, or none with --momentum 0.
    #[serde(rename = "sgd")]
    Sgd,
    /// Steps along the sign of a moment; half the state of AdamW.
    #[serde(rename = "lion")]
    Lion,
    /// Row and column means instead of second moments; almost no state.
    #[serde(rename = "adafactor")]
    Adafactor,
    /// Orthogonal steps for matrices, AdamW for the rest; half the state of AdamW.
    #[serde(rename = "muon")]
    Muon,
    /// AdamW with 8-bit moments; a quarter of its state, CPU only.
    #[value(name = "adamw-8bit")]
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// AdamW that averages its steps instead of lowering the learning rate.
    #[value(name = "schedule-free-adamw")]
    #[serde(rename = "schedule-free-adamw")]
    ScheduleFreeAdamW,
}

/// The decay shapes of warmup-stable-decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DecayKind {
    /// Linear.
    Linear,
    /// Half a cosine.
    Cosine,
    /// 1 minus the square root of the share of completed steps.
    OneMinusSqrt,
}

/// The settings of only some schedules.
pub(super) const OF_SCHEDULES: [&str; 6] =
    ["warmup_steps", "min_learning_rate", "num_cycles", "power", "decay_steps", "decay_shape"];
/// The settings of only some optimizers.
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

    /// The typical learning rate of this optimizer divided by AdamW's.
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

/// The default learning rate of an adapter with AdamW.
pub(crate) fn lora_learning_rate(is_nano: bool) -> f64 {
    if is_nano { 3e-3 } else { 2e-4 }
}
