//! Computes the frequencies of rotary embeddings, and their scaling for sequences longer than those of pretraining.

use crate::error::{Error, Result};
use metal_candle_kernels::Pairs;

/// The rotary embedding of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RotarySpec {
    /// The number of leading elements of a head that are rotated. With an odd number, the element after them is rotated
    /// with the last one, and the frequencies follow from the odd number.
    pub(crate) dim: usize,
    pub(crate) theta: f64,
    pub(crate) scaling: RotaryScaling,
    pub(crate) pairs: Pairs,
    pub(crate) max_position_embeddings: usize,
}

/// How the frequencies `f = theta^(-2 i / dim)` are scaled: `rope_type` of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RotaryScaling {
    /// No scaling.
    Default,
    /// `f / factor`.
    Linear { factor: f64 },
    /// Theta grows with sequences longer than `max_position_embeddings`.
    Dynamic { factor: f64 },
    /// `f / factor` for long wavelengths, `f` for short ones, and an interpolation in between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: usize },
    /// `YaRN` (<https://arxiv.org/abs/2309.00071>): the interpolation depends on the number of rotations, and cosines
    /// and sines are scaled.
    Yarn {
        /// None for `max_position_embeddings / original_max_position_embeddings`.
        factor: Option<f64>,
        original_max_position_embeddings: usize,
        beta_fast: f64,
        beta_slow: f64,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        /// The factor on cosines and sines; `None` to derive it from the other settings.
        attention_factor: Option<f64>,
        /// Whether the bounds of the interpolation are rounded to whole pairs.
        truncate: bool,
    },
    /// `LongRoPE` (<https://arxiv.org/abs/2402.13753>): a divisor for each pair, with other divisors for sequences
    /// longer than `original_max_position_embeddings`, and a factor on cosines and sines.
    LongRope {
        /// `[num_pairs]`.
        short_factor: Vec<f64>,
        /// `[num_pairs]`.
        long_factor: Vec<f64>,
        /// None for `max_position_embeddings / original_max_position_embeddings`.
        factor: Option<f64>,
        original_max_position_embeddings: usize,
        /// The factor on cosines and sines; `None` to derive it from the other settings.
        attention_factor: Option<f64>,
    },
    /// `f / factor` for the first pairs; the others are not rotated.
    #[allow(dead_code, reason = "for Gemma 4, which is not supported yet")]
    Proportional { factor: f64, rotated_pairs: usize },
}

impl RotarySpec {
    /// The number of pairs of elements that are rotated.
    pub(crate) fn num_pairs(&self) -> usize {
        self.dim.div_ceil(2)
    }

    /// # Errors
    /// The first setting that is out of range.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("rotary embedding", message));
        let half = self.num_pairs();
        if self.dim == 0 {
            return wrong("expected at least one element to rotate, found 0".into());
        }
        if !(self.theta.is_finite() && self.theta >= 1.0) {
            return wrong(format!("expected a theta of at least 1, found {}", self.theta));
        }
        if self.max_position_embeddings == 0 {
            return wrong("expected a `max_position_embeddings` of at least 1, found 0".into());
        }
        let factors: Vec<(&str, f64)> = match &self.scaling {
            RotaryScaling::Default => Vec::new(),
            RotaryScaling::Linear { factor } => vec![("factor", *factor)],
            RotaryScaling::Dynamic { factor } => {
                if self.dim < 3 {
                    return wrong(format!("dynamic scaling needs at least 3 elements to rotate, found {}", self.dim));
                }
                vec![("factor", *factor)]
            }
            RotaryScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: o,
            } => {
                if high_freq_factor <= low_freq_factor {
                    return wrong(format!(
                        "expected a `high_freq_factor` above the `low_freq_factor` of {low_freq_factor}, found {high_freq_factor}"
                    ));
                }
                vec![
                    ("factor", *factor),
                    ("low_freq_factor", *low_freq_factor),
                    ("original_max_position_embeddings", *o as f64),
                ]
            }
            RotaryScaling::Yarn { factor, original_max_position_embeddings: o, beta_fast, beta_slow, .. } => {
                if self.theta <= 1.0 {
                    return wrong("yarn scaling needs a theta above 1".into());
                }
                if !self.dim.is_multiple_of(2) {
                    return wrong(format!(
                        "yarn scaling needs an even number of elements to rotate, found {}",
                        self.dim
                    ));
                }
                vec![
                    ("factor", factor.unwrap_or(1.0)),
                    ("beta_fast", *beta_fast),
                    ("beta_slow", *beta_slow),
                    ("original_max_position_embeddings", *o as f64),
                ]
            }
            RotaryScaling::LongRope {
                short_factor, long_factor, factor, original_max_position_embeddings: o, ..
            } => {
                for (name, factors) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                    if factors.len() != half || !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
                        return wrong(format!(
                            "expected a `{name}` of {half} positive numbers, half of the elements that rotate; found {} numbers",
                            factors.len()
                        ));
                    }
                }
                if *o < 2 {
                    return wrong(format!("expected an `original_max_position_embeddings` above 1, found {o}"));
                }
                vec![("factor", factor.unwrap_or(1.0))]
            }
            RotaryScaling::Proportional { factor, rotated_pairs } => {
                if *rotated_pairs > half {
                    return wrong(format!("expected at most {half} pairs that rotate, found {rotated_pairs}"));
                }
                vec![("factor", *factor)]
            }
        };
        match factors.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            Some((name, value)) => wrong(format!("expected a positive `{name}`, found {value}")),
            None => Ok(()),
        }
    }

    /// The factor on cosines and sines.
    pub(crate) fn attention_factor(&self) -> f64 {
        let extension = |factor: &Option<f64>, original: usize| {
            factor.unwrap_or(self.max_position_embeddings as f64 / original as f64)
        };
        match &self.scaling {
            RotaryScaling::Yarn {
                factor,
                original_max_position_embeddings,
                mscale,
                mscale_all_dim,
                attention_factor,
                ..
            } => {
                let factor = extension(factor, *original_max_position_embeddings);
                let of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
                attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
                    (Some(mscale), Some(all)) if *mscale != 0.0 && *all != 0.0 => of(*mscale) / of(*all),
                    _ => of(1.0),
                })
            }
            RotaryScaling::LongRope {
                factor, original_max_position_embeddings: original, attention_factor, ..
            } => {
                let factor = extension(factor, *original);
                attention_factor.unwrap_or_else(|| {
                    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (*original as f64).ln()).sqrt() }
                })
            }
            _ => 1.0,
        }
    }

    /// The frequency of each pair for a sequence of `length` tokens: `[num_pairs]`.
    pub(crate) fn frequencies(&self, length: usize) -> Vec<f32> {
        let (dim, max) = (self.dim as f64, self.max_position_embeddings as f64);
        match &self.scaling {
            RotaryScaling::Default => self.unscaled(self.theta),
            RotaryScaling::Linear { factor } => self.unscaled(self.theta).iter().map(|f| f / *factor as f32).collect(),
            RotaryScaling::Dynamic { factor } => {
                let growth = factor * max.max(length as f64) / max - (factor - 1.0);
                self.unscaled(self.theta * growth.powf(dim / (dim - 2.0)))
            }
            RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } => {
                let scaled = |f: f32| {
                    let f = f64::from(f);
                    let rotations = self.original_length() / (2.0 * std::f64::consts::PI / f);
                    let share = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                    f * ((1.0 - share) / factor + share)
                };
                self.unscaled(self.theta).into_iter().map(|f| scaled(f) as f32).collect()
            }
            RotaryScaling::Yarn { factor, beta_fast, beta_slow, truncate, .. } => {
                let original = self.original_length();
                let factor = factor.unwrap_or(max / original);
                let pair_of = |rotations: f64| {
                    dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if high - low == 0.0 {
                    high += 0.001;
                }
                let scaled = |(i, f): (usize, f32)| {
                    let (f, share) = (f64::from(f), ((i as f64 - low) / (high - low)).clamp(0.0, 1.0));
                    (f * (1.0 - share) + f / factor * share) as f32
                };
                self.unscaled(self.theta).into_iter().enumerate().map(scaled).collect()
            }
            RotaryScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
                let divisors = if length > *original_max_position_embeddings { long_factor } else { short_factor };
                let powers = (0..self.num_pairs()).map(|i| self.power(self.theta, i));
                powers.zip(divisors).map(|(power, divisor)| 1.0 / (*divisor as f32 * power)).collect()
            }
            RotaryScaling::Proportional { factor, rotated_pairs } => {
                let mut frequencies = self.unscaled(self.theta);
                frequencies[*rotated_pairs..].fill(0.0);
                frequencies.iter().map(|f| f / *factor as f32).collect()
            }
        }
    }

    /// The sequence length up to which all sequences have the same frequencies; `None` if all do.
    pub(super) fn fixed_until(&self) -> Option<usize> {
        match &self.scaling {
            RotaryScaling::Dynamic { .. } => Some(self.max_position_embeddings),
            RotaryScaling::LongRope { original_max_position_embeddings, .. } => Some(*original_max_position_embeddings),
            _ => None,
        }
    }

    fn original_length(&self) -> f64 {
        match &self.scaling {
            RotaryScaling::Llama3 { original_max_position_embeddings, .. }
            | RotaryScaling::Yarn { original_max_position_embeddings, .. } => *original_max_position_embeddings as f64,
            _ => self.max_position_embeddings as f64,
        }
    }

    /// `theta^(2 i / dim)`, rounded to f32 as the reference implementation does.
    fn power(&self, theta: f64, i: usize) -> f32 {
        let exponent = (2 * i) as f32 / self.dim as f32;
        theta.powf(f64::from(exponent)) as f32
    }

    fn unscaled(&self, theta: f64) -> Vec<f32> {
        (0..self.num_pairs()).map(|i| 1.0 / self.power(theta, i)).collect()
    }
}
