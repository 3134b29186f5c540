//! The optimizers and their settings.

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// Settings of AdamW; the learning rate comes from the schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the mean of the gradients.
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients.
    pub beta2: f64,
    /// Added to the square root of the mean of the squared gradients.
    pub eps: f64,
    /// Decoupled weight decay: the share of each parameter subtracted by a step of learning rate 1.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Settings of Adam (<https://arxiv.org/abs/1412.6980>).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Decay rate of the mean of the gradients.
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients.
    pub beta2: f64,
    /// Added to the square root of the mean of the squared gradients.
    pub eps: f64,
    /// Share of each parameter that is added to its gradient.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Settings of stochastic gradient descent: `m <- momentum m + g`, `p <- p - rate m`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Share of the moment that is retained; 0 for no momentum.
    pub momentum: f64,
    /// Whether a step follows `g + momentum m` (Nesterov); needs `momentum` above 0.
    pub nesterov: bool,
    /// Share of each parameter that is added to its gradient.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { momentum: 0.9, nesterov: false, weight_decay: 0.0 }
    }
}

/// Settings of Lion (<https://arxiv.org/abs/2302.06675>). Each element moves by the learning rate, which should be a third
/// to a tenth of AdamW's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionConfig {
    /// Weight of the moment in the direction of a step.
    pub beta1: f64,
    /// Decay rate of the moment.
    pub beta2: f64,
    /// Decoupled weight decay: the share of each parameter subtracted by a step of learning rate 1.
    pub weight_decay: f64,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.1 }
    }
}

/// Settings of Adafactor (<https://arxiv.org/abs/1804.04235>). The learning rate comes from the schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdafactorConfig {
    /// The decay rate of the mean of the squared gradients in step `t` is `1 - t^beta2_decay`.
    pub beta2_decay: f64,
    /// Added to the squared gradients.
    pub eps: f64,
    /// Updates with a larger root mean square are scaled down to it, per tensor.
    pub clip_threshold: f64,
    /// Decoupled weight decay: the share of each parameter subtracted by a step of learning rate 1.
    pub weight_decay: f64,
    /// Whether the learning rate of a tensor is multiplied by the tensor's root mean square.
    pub scale_parameter: bool,
    /// Lower bound of this factor.
    pub least_scale: f64,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self {
            beta2_decay: -0.8,
            eps: 1e-30,
            clip_threshold: 1.0,
            weight_decay: 0.0,
            scale_parameter: false,
            least_scale: 1e-3,
        }
    }
}

/// How Muon's learning rate depends on the shape of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MuonScale {
    /// `sqrt(max(1, rows / columns))`.
    Original,
    /// `0.2 sqrt(max(rows, columns))`: updates are as large as AdamW's, so AdamW's learning rates can be used
    /// (<https://arxiv.org/abs/2502.16982>, section 2.2).
    #[default]
    MatchAdamW,
    /// `sqrt(rows / columns)`.
    Spectral,
}

impl MuonScale {
    pub(super) fn factor(self, rows: usize, columns: usize) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        match self {
            Self::Original => (rows / columns).max(1.0).sqrt(),
            Self::MatchAdamW => 0.2 * rows.max(columns).sqrt(),
            Self::Spectral => (rows / columns).sqrt(),
        }
    }
}

/// Settings of Muon (<https://kellerjordan.github.io/posts/muon/>). Matrices move along the orthogonal matrix nearest to
/// the mean of their gradients; vectors, embeddings and the head use AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuonConfig {
    /// Decay rate of the mean of the gradients.
    pub momentum: f64,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Decoupled weight decay: the share of each matrix subtracted by a step of learning rate 1.
    pub weight_decay: f64,
    /// Newton-Schulz iterations towards the orthogonal matrix.
    pub iterations: usize,
    /// How the learning rate depends on the shape.
    pub scale: MuonScale,
    /// Settings of AdamW for the rest.
    pub adamw: AdamWConfig,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            weight_decay: 0.1,
            iterations: 5,
            scale: MuonScale::default(),
            adamw: AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() },
        }
    }
}

/// Settings of schedule-free AdamW (<https://arxiv.org/abs/2405.15682>). Gradients are taken between the latest parameters
/// and the average of all parameters; the average is evaluated and saved. Use it with a warm-up and then a constant rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduleFreeAdamWConfig {
    /// Weight of the average at the point where gradients are taken; above 0.
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients.
    pub beta2: f64,
    /// Added to the square root of the mean of the squared gradients.
    pub eps: f64,
    /// Decoupled weight decay: the share of each parameter subtracted by a step of learning rate 1.
    pub weight_decay: f64,
}

impl Default for ScheduleFreeAdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// An optimizer and its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay.
    AdamW(AdamWConfig),
    /// Adam with weight decay added to the gradients.
    Adam(AdamConfig),
    /// Stochastic gradient descent.
    Sgd(SgdConfig),
    /// Steps along the sign of a moment.
    Lion(LionConfig),
    /// Stores only the row and column means of a matrix's squared gradients.
    Adafactor(AdafactorConfig),
    /// Orthogonal steps for matrices.
    Muon(MuonConfig),
    /// AdamW with 8-bit moments (<https://arxiv.org/abs/2110.02861>). CPU only.
    AdamW8bit(AdamWConfig),
    /// AdamW that needs no learning-rate decay.
    ScheduleFreeAdamW(ScheduleFreeAdamWConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl From<AdamWConfig> for OptimizerConfig {
    fn from(config: AdamWConfig) -> Self {
        Self::AdamW(config)
    }
}

/// The allowed values of a setting.
#[derive(Clone, Copy)]
enum Range {
    /// 0 to below 1.
    Share,
    /// Above 0 and below 1.
    ProperShare,
    /// At least 0.
    NotNegative,
    /// Above 0.
    Positive,
    /// At most 0.
    NotPositive,
}

impl Range {
    fn has(self, value: f64) -> bool {
        value.is_finite()
            && match self {
                Self::Share => (0.0..1.0).contains(&value),
                Self::ProperShare => value > 0.0 && value < 1.0,
                Self::NotNegative => value >= 0.0,
                Self::Positive => value > 0.0,
                Self::NotPositive => value <= 0.0,
            }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Share => "of at least 0 and below 1",
            Self::ProperShare => "above 0 and below 1",
            Self::NotNegative => "of at least 0",
            Self::Positive => "above 0",
            Self::NotPositive => "of at most 0",
        }
    }
}

impl OptimizerConfig {
    /// Its name: `adamw`, `adam`, `sgd`, `lion`, `adafactor`, `muon`, `adamw-8bit` or `schedule-free-adamw`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::Adam(_) => "adam",
            Self::Sgd(_) => "sgd",
            Self::Lion(_) => "lion",
            Self::Adafactor(_) => "adafactor",
            Self::Muon(_) => "muon",
            Self::AdamW8bit(_) => "adamw-8bit",
            Self::ScheduleFreeAdamW(_) => "schedule-free-adamw",
        }
    }

    /// The numeric settings and their ranges.
    fn numbers(&self) -> Vec<(&'static str, f64, Range)> {
        let adam = |beta1, beta2, eps, weight_decay| {
            vec![
                ("beta1", beta1, Range::Share),
                ("beta2", beta2, Range::Share),
                ("eps", eps, Range::Positive),
                ("weight_decay", weight_decay, Range::NotNegative),
            ]
        };
        match *self {
            Self::AdamW(c) | Self::AdamW8bit(c) => adam(c.beta1, c.beta2, c.eps, c.weight_decay),
            Self::Adam(c) => adam(c.beta1, c.beta2, c.eps, c.weight_decay),
            Self::ScheduleFreeAdamW(c) => {
                let mut numbers = adam(c.beta1, c.beta2, c.eps, c.weight_decay);
                numbers[0].2 = Range::ProperShare;
                numbers
            }
            Self::Sgd(c) => vec![
                ("momentum", c.momentum, if c.nesterov { Range::ProperShare } else { Range::Share }),
                ("weight_decay", c.weight_decay, Range::NotNegative),
            ],
            Self::Lion(c) => vec![
                ("beta1", c.beta1, Range::Share),
                ("beta2", c.beta2, Range::Share),
                ("weight_decay", c.weight_decay, Range::NotNegative),
            ],
            Self::Adafactor(c) => vec![
                ("beta2_decay", c.beta2_decay, Range::NotPositive),
                ("eps", c.eps, Range::Positive),
                ("clip_threshold", c.clip_threshold, Range::Positive),
                ("weight_decay", c.weight_decay, Range::NotNegative),
                ("least_scale", c.least_scale, Range::NotNegative),
            ],
            Self::Muon(c) => vec![
                ("momentum", c.momentum, Range::Share),
                ("weight_decay", c.weight_decay, Range::NotNegative),
                ("iterations", c.iterations as f64, Range::Positive),
                ("adamw.beta1", c.adamw.beta1, Range::Share),
                ("adamw.beta2", c.adamw.beta2, Range::Share),
                ("adamw.eps", c.adamw.eps, Range::Positive),
                ("adamw.weight_decay", c.adamw.weight_decay, Range::NotNegative),
            ],
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (name, value, range) in self.numbers() {
            if !range.has(value) {
                let message = format!("expected a number {}, found `{value}`", range.text());
                return Err(Error::argument(format!("optimizer_config.{name}"), message));
            }
        }
        Ok(())
    }

    /// The settings for a checkpoint; floats are stored as text, so that they are restored exactly.
    pub(crate) fn to_json(self) -> Value {
        let mut map = Map::new();
        // checkpoints written before there were other optimizers have no name
        if !matches!(self, Self::AdamW(_)) {
            map.insert("name".into(), json!(self.name()));
        }
        map.extend(self.numbers().into_iter().map(|(name, value, _)| (name.into(), json!(value.to_string()))));
        match self {
            Self::Sgd(c) => map.extend([("nesterov".into(), json!(c.nesterov))]),
            Self::Adafactor(c) => map.extend([("scale_parameter".into(), json!(c.scale_parameter))]),
            Self::Muon(c) => {
                map.extend([("nesterov".into(), json!(c.nesterov)), ("scale".into(), json!(format!("{:?}", c.scale)))]);
            }
            _ => {}
        }
        Value::Object(map)
    }
}
