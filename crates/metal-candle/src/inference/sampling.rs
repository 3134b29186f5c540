//! The settings of sampling: strategies, filters and penalties.

use crate::error::{Error, Result};
use crate::models::GenerationDefaults;
use std::collections::BTreeMap;

/// A sampling strategy; [`SamplingConfig`] combines several.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum SamplingStrategy {
    /// The token with the largest logit; among equal logits, the one with the lowest id.
    #[default]
    Greedy,
    /// A token sampled from the `k` most probable tokens.
    TopK {
        /// The number of tokens, at least 1.
        k: usize,
    },
    /// A token sampled from the smallest set of most probable tokens with a total probability of at least `p`
    /// (<https://arxiv.org/abs/1904.09751>, section 3.1).
    TopP {
        /// The total probability, above 0 and up to 1.
        p: f64,
    },
    /// A token sampled from the tokens that are at least `p` times as probable as the most probable one
    /// (<https://arxiv.org/abs/2407.01082>, section 3).
    MinP {
        /// The share of the largest probability, 0 to 1.
        p: f64,
    },
    /// A token sampled from all tokens, with the logits divided by `temperature`.
    Temperature {
        /// The divisor; 0 is greedy.
        temperature: f64,
    },
}

/// Sampling settings: filters, penalties and the seed.
///
/// They are applied in this order: repetition penalty, frequency and presence penalty, logit bias, temperature, top-k,
/// top-p, min-p. Each filter uses the renormalized probabilities after the previous filter. The default samples from the
/// model's own distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// The divisor of the logits; 0 selects the largest logit, and the filters have no effect.
    pub temperature: f64,
    /// The number of most probable tokens to sample from; 0 for all.
    pub top_k: usize,
    /// The total probability of the most probable tokens to sample from; 1 for all.
    pub top_p: f64,
    /// The lowest probability to sample from, as a share of the highest one; 0 for all.
    pub min_p: f64,
    /// Positive logits of tokens in the window are divided by this, and negative logits multiplied
    /// (<https://arxiv.org/abs/1909.05858>, section 4.1); 1 has no effect.
    pub repetition_penalty: f64,
    /// Subtracted from the logit of each token in the window.
    pub presence_penalty: f64,
    /// Subtracted from the logit of a token for each of its occurrences in the window.
    pub frequency_penalty: f64,
    /// The number of last tokens, of prompt and generated text, in the penalty window; `None` for all.
    pub penalty_window: Option<usize>,
    /// Added to the logit of a token; negative infinity bans the token.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The seed: the same seed, settings and logits produce the same tokens on every machine. `None` uses a seed from the
    /// operating system.
    pub seed: Option<u64>,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: None,
            logit_bias: BTreeMap::new(),
            seed: None,
        }
    }
}

impl From<SamplingStrategy> for SamplingConfig {
    fn from(strategy: SamplingStrategy) -> Self {
        let config = Self::default();
        match strategy {
            SamplingStrategy::Greedy => Self::greedy(),
            SamplingStrategy::TopK { k } => config.with_top_k(k),
            SamplingStrategy::TopP { p } => config.with_top_p(p),
            SamplingStrategy::MinP { p } => config.with_min_p(p),
            SamplingStrategy::Temperature { temperature } => config.with_temperature(temperature),
        }
    }
}

impl From<&GenerationDefaults> for SamplingConfig {
    /// The settings of `generation_config.json`; greedy if the file says so or has no sampling settings.
    fn from(defaults: &GenerationDefaults) -> Self {
        let GenerationDefaults { do_sample, temperature, top_k, top_p, min_p, repetition_penalty } = *defaults;
        let draws = do_sample.unwrap_or(temperature.is_some() || top_k.is_some() || top_p.is_some());
        Self {
            temperature: if draws { temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: top_k.unwrap_or(0),
            top_p: top_p.unwrap_or(1.0),
            min_p: min_p.unwrap_or(0.0),
            repetition_penalty: repetition_penalty.unwrap_or(1.0),
            ..Self::default()
        }
    }
}

impl SamplingConfig {
    /// Always selects the largest logit.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Sets the divisor of the logits; 0 is greedy.
    #[must_use]
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets the number of most probable tokens to sample from; 0 for all.
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = top_k;
        self
    }

    /// Sets the total probability of the tokens to sample from; 1 for all.
    #[must_use]
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets the lowest probability as a share of the highest one; 0 for all.
    #[must_use]
    pub fn with_min_p(mut self, min_p: f64) -> Self {
        self.min_p = min_p;
        self
    }

    /// Sets the repetition penalty; 1 for none.
    #[must_use]
    pub fn with_repetition_penalty(mut self, repetition_penalty: f64) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Sets the presence penalty; 0 for none.
    #[must_use]
    pub fn with_presence_penalty(mut self, presence_penalty: f64) -> Self {
        self.presence_penalty = presence_penalty;
        self
    }

    /// Sets the frequency penalty; 0 for none.
    #[must_use]
    pub fn with_frequency_penalty(mut self, frequency_penalty: f64) -> Self {
        self.frequency_penalty = frequency_penalty;
        self
    }

    /// Sets the number of last tokens in the penalty window; `None` for all.
    #[must_use]
    pub fn with_penalty_window(mut self, penalty_window: Option<usize>) -> Self {
        self.penalty_window = penalty_window;
        self
    }

    /// Adds `bias` to the logit of token `id`; negative infinity bans it.
    #[must_use]
    pub fn with_logit_bias(mut self, id: u32, bias: f32) -> Self {
        self.logit_bias.insert(id, bias);
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Whether the largest logit is always selected.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether there is a penalty on earlier tokens.
    #[allow(clippy::float_cmp)]
    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks the range of every setting.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f64, right: bool, expected: &str| {
            if right { Ok(()) } else { Err(Error::argument(name, format!("expected {expected}, found {value}"))) }
        };
        let finite = "a finite number";
        check(
            "temperature",
            self.temperature,
            self.temperature >= 0.0 && self.temperature.is_finite(),
            "a finite number of at least 0",
        )?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0 and up to 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        check(
            "repetition_penalty",
            self.repetition_penalty,
            self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
            "a finite number above 0",
        )?;
        check("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), finite)?;
        check("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), finite)?;
        for (id, &bias) in &self.logit_bias {
            if bias.is_nan() || bias == f32::INFINITY {
                let message = format!("token `{id}`: expected a finite number or negative infinity, found {bias}");
                return Err(Error::argument("logit_bias", message));
            }
        }
        Ok(())
    }
}
