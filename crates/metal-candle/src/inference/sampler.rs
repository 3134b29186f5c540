//! [`Sampler`]: samples tokens with penalties and filters, in time linear in the vocabulary.

// ranks and ties need exact comparisons
#![allow(clippy::float_cmp)]

use super::mask::AllowedTokens;
use super::sampling::SamplingConfig;
use crate::data::Random;
use crate::error::{Error, Result};
use crate::models::{Decoded, DecodingSampling};
use metal_candle_kernels::sampling::{BLOCK, block_maxima, exponentials, sum_of_exponentials, sums_before};
use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};

/// The number of logits that top-k compares at a time.
const GROUP: usize = 16;

/// A token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// The natural logarithm of its probability in the model, before penalties, bias, mask, temperature and filters.
    pub log_probability: f32,
}

/// Samples tokens with a [`SamplingConfig`] and counts them for the penalties.
///
/// No filter sorts the vocabulary. Top-k collects the logits that are not below the k-th largest block maximum. Top-p draws
/// from all tokens and accepts the draw if the tokens that rank before it (more probable, or equally probable with a lower
/// id) have a total probability below `top_p`; otherwise it draws again from these tokens. Each draw uses one number of
/// [`Random`]: the position of the token in the cumulative distribution in id order.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    draws: Random,
    /// The count of each token in the penalty window.
    counts: HashMap<u32, u32>,
    /// The tokens of the window, oldest first; empty for an unlimited window.
    window: VecDeque<u32>,
    scratch: Scratch,
}

/// Buffers that are reused for each token.
#[derive(Debug, Clone, Default)]
struct Scratch {
    adjusted: Vec<f32>,
    maxima: Vec<f32>,
    sorted_maxima: Vec<f32>,
    candidates: Vec<(u32, f32)>,
    values: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
}

impl Sampler {
    /// Creates a sampler with an empty penalty window.
    ///
    /// # Errors
    /// A setting is out of its range.
    pub fn new(config: SamplingConfig) -> Result<Self> {
        config.validate()?;
        let draws = Random::new(config.seed.unwrap_or_else(entropy));
        Ok(Self { config, draws, counts: HashMap::new(), window: VecDeque::new(), scratch: Scratch::default() })
    }

    /// The settings.
    pub fn config(&self) -> &SamplingConfig {
        &self.config
    }

    /// Adds tokens, such as the prompt, to the penalty window.
    pub fn observe(&mut self, ids: &[u32]) {
        if !self.config.has_penalties() {
            return;
        }
        for &id in ids {
            *self.counts.entry(id).or_insert(0) += 1;
            let Some(limit) = self.config.penalty_window else { continue };
            self.window.push_back(id);
            if self.window.len() > limit
                && let Some(oldest) = self.window.pop_front()
                && let Some(count) = self.counts.get_mut(&oldest)
            {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&oldest);
                }
            }
        }
    }

    /// Samples the next token and adds it to the penalty window.
    ///
    /// # Shapes
    /// `logits`: `[vocab]`.
    ///
    /// # Errors
    /// There are no logits, one is NaN or positive infinity, all are negative infinity after the bias, or a token of the bias
    /// or the window is not in the vocabulary.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Choice> {
        self.sample_allowed(logits, None, 0).map(|(choice, _)| choice)
    }

    /// As [`Sampler::sample`], but only from the allowed tokens. Also returns the `num_top` most probable tokens of `logits`,
    /// sorted by descending probability, then by id.
    pub(super) fn sample_allowed(
        &mut self,
        logits: &[f32],
        allowed: Option<&AllowedTokens>,
        num_top: usize,
    ) -> Result<(Choice, Vec<Choice>)> {
        let drawn = self.draw(logits, allowed)?;
        let token = drawn.index as u32;
        let chosen = self.scratch.describe(logits, token, (drawn.maximum, drawn.total), num_top)?;
        self.observe(&[token]);
        Ok(chosen)
    }

    /// Scores `token`, as [`Sampler::sample_allowed`] does for the sampled token. Does not add it to the penalty window.
    pub(super) fn score(&mut self, logits: &[f32], token: u32, num_top: usize) -> Result<(Choice, Vec<Choice>)> {
        self.scratch.describe(logits, token, (None, None), num_top)
    }

    /// The settings for sampling on a device with the same result; `None` if there are penalties or a bias.
    pub(super) fn choice_on_device(&self) -> Option<DecodingSampling> {
        if !self.counts.is_empty() || !self.config.logit_bias.is_empty() {
            return None;
        }
        let temperature = if self.config.is_greedy() { 0.0 } else { self.config.temperature as f32 };
        Some(DecodingSampling {
            temperature,
            top_p: self.config.top_p as f32,
            min_p: self.config.min_p as f32,
            top_k: self.config.top_k,
            random: self.draws.state(),
        })
    }

    /// Records a token that a device sampled.
    pub(super) fn accept(&mut self, decoded: Decoded) -> Choice {
        self.draws = Random::from_state(decoded.random);
        self.observe(&[decoded.token]);
        Choice { token: decoded.token, log_probability: decoded.log_probability }
    }

    /// Copies the settings that do not depend on the state of the sampler.
    pub(crate) fn set_filters(&mut self, config: &SamplingConfig) {
        self.config.temperature = config.temperature;
        self.config.top_k = config.top_k;
        self.config.top_p = config.top_p;
        self.config.min_p = config.min_p;
    }

    /// Samples the next token, without its probability and without recording it.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        Ok(self.draw(logits, None)?.index as u32)
    }

    fn draw(&mut self, logits: &[f32], allowed: Option<&AllowedTokens>) -> Result<Drawn> {
        if logits.is_empty() {
            return Err(Error::shape("logits", "[vocab]", &[0]));
        }
        let Self { config, draws, counts, scratch, .. } = self;
        if counts.is_empty() && config.logit_bias.is_empty() && allowed.is_none() {
            return scratch.choose(logits, config, draws);
        }
        let mut adjusted = std::mem::take(&mut scratch.adjusted);
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        let drawn = adjust(&mut adjusted, config, counts)
            .and_then(|()| allowed.map_or(Ok(()), |allowed| allowed.apply(&mut adjusted)))
            .and_then(|()| scratch.choose(&adjusted, config, draws));
        scratch.adjusted = adjusted;
        Ok(Drawn { index: drawn?.index, maximum: None, total: None })
    }
}

/// A sampled index, with intermediate results about the logits.
struct Drawn {
    index: usize,
    /// The largest logit.
    maximum: Option<f32>,
    /// The sum of the exponentials of the differences from the largest logit.
    total: Option<f64>,
}

/// Applies penalties and bias.
fn adjust(logits: &mut [f32], config: &SamplingConfig, counts: &HashMap<u32, u32>) -> Result<()> {
    let vocab = logits.len();
    let outside = |name: &str, id: u32| {
        Error::argument(name, format!("token `{id}` is outside the vocabulary of {vocab} tokens"))
    };
    for (&id, &count) in counts {
        let logit = logits.get_mut(id as usize).ok_or_else(|| outside("penalty_window", id))?;
        let mut value = f64::from(*logit);
        value = if value > 0.0 { value / config.repetition_penalty } else { value * config.repetition_penalty };
        value -= config.frequency_penalty * f64::from(count) + config.presence_penalty;
        *logit = value as f32;
    }
    for (&id, &bias) in &config.logit_bias {
        *logits.get_mut(id as usize).ok_or_else(|| outside("logit_bias", id))? += bias;
    }
    Ok(())
}

/// The largest logit; writes the maximum of each block to `maxima`.
fn largest(logits: &[f32], maxima: &mut Vec<f32>) -> Result<f32> {
    let problem = |what: String| Err(Error::argument("logits", what));
    if !block_maxima(logits, maxima) {
        let token = logits.iter().position(|logit| logit.is_nan()).unwrap_or(0);
        return problem(format!("expected numbers, found NaN for token `{token}`"));
    }
    let largest = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::INFINITY {
        let token = logits.iter().position(|&logit| logit == largest).unwrap_or(0);
        return problem(format!("expected finite numbers, found infinity for token `{token}`"));
    }
    if largest == f32::NEG_INFINITY {
        return problem("expected a token that may be chosen, found negative infinity for all".into());
    }
    Ok(largest)
}

/// The first index of `largest`, found with the maxima of the blocks.
fn position_of(largest: f32, logits: &[f32], maxima: &[f32]) -> usize {
    let block = maxima.iter().position(|&maximum| maximum == largest).unwrap_or(0);
    let start = block * BLOCK;
    start + logits[start..].iter().position(|&logit| logit == largest).unwrap_or(0)
}

/// Compares tokens by descending logit, then by id.
fn rank((id, logit): (u32, f32), (other_id, other): (u32, f32)) -> Ordering {
    // partial_cmp, not total_cmp: 0 and -0 are equal
    other.partial_cmp(&logit).unwrap_or(Ordering::Equal).then(id.cmp(&other_id))
}

impl Scratch {
    /// Computes the log-probability of a token, and the `num_top` most probable tokens. `known` are the largest logit and the sum
    /// of the exponentials of the differences from it, if they are known.
    fn describe(
        &mut self,
        logits: &[f32],
        token: u32,
        known: (Option<f32>, Option<f64>),
        num_top: usize,
    ) -> Result<(Choice, Vec<Choice>)> {
        // `maxima` may be from the logits after penalties
        let maximum = match known.0 {
            Some(maximum) => maximum,
            None => largest(logits, &mut self.maxima)?,
        };
        let total = known.1.unwrap_or_else(|| sum_of_exponentials(logits, maximum));
        let choice = |token: u32, logit: f32| {
            let log_probability = (f64::from(logit) - f64::from(maximum) - total.ln()) as f32;
            Choice { token, log_probability }
        };
        let mut top = Vec::new();
        if num_top > 0 {
            self.collect_largest(logits, num_top);
            self.candidates.sort_unstable_by(|a, b| rank(*a, *b));
            top.extend(self.candidates.iter().map(|&(token, logit)| choice(token, logit)));
        }
        let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        Ok((choice(token, logit), top))
    }

    /// Samples from these logits.
    fn choose(&mut self, logits: &[f32], config: &SamplingConfig, draws: &mut Random) -> Result<Drawn> {
        let largest = largest(logits, &mut self.maxima)?;
        let maximum = Some(largest);
        if config.is_greedy() || config.top_k == 1 {
            return Ok(Drawn { index: position_of(largest, logits, &self.maxima), maximum, total: None });
        }
        if config.top_k == 0 || config.top_k >= logits.len() {
            let (index, total) = self.draw(logits, largest, config, draws);
            return Ok(Drawn { index, maximum, total: (config.temperature == 1.0).then_some(total) });
        }
        self.collect_largest(logits, config.top_k);
        let mut values = std::mem::take(&mut self.values);
        values.clear();
        values.extend(self.candidates.iter().map(|&(_, logit)| logit));
        let (place, _) = self.draw(&values, largest, config, draws);
        self.values = values;
        let index = self.candidates.get(place).map_or(0, |&(id, _)| id as usize);
        Ok(Drawn { index, maximum, total: None })
    }

    /// Collects the `k` largest logits in id order; among equal logits, those with the lowest ids.
    fn collect_largest(&mut self, logits: &[f32], k: usize) {
        let Self { maxima, sorted_maxima, candidates, .. } = self;
        candidates.clear();
        // at least `k` blocks have a logit not below this bound, so the `k` largest logits are not below it
        let bound = if k <= maxima.len() {
            sorted_maxima.clone_from(maxima);
            *sorted_maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        for (number, block) in logits.chunks(BLOCK).enumerate() {
            if maxima[number] < bound {
                continue;
            }
            for (part, group) in block.chunks(GROUP).enumerate() {
                // most groups have no such logit: one comparison of the maximum, which is vectorized
                if group.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a }) >= bound {
                    let ids = (number * BLOCK + part * GROUP) as u32..;
                    candidates.extend(ids.zip(group.iter().copied()).filter(|&(_, logit)| logit >= bound));
                }
            }
        }
        if candidates.len() > k {
            candidates.select_nth_unstable_by(k - 1, |a, b| rank(*a, *b));
            candidates.truncate(k);
            candidates.sort_unstable_by_key(|&(id, _)| id);
        }
    }

    /// Draws an index from `logits` with temperature, top-p and min-p; also returns the sum of all weights.
    fn draw(&mut self, logits: &[f32], maximum: f32, config: &SamplingConfig, draws: &mut Random) -> (usize, f64) {
        let Self { weights, sums, .. } = self;
        let floor = config.min_p as f32;
        let total = exponentials(logits, maximum, config.temperature, floor, weights, sums);
        let mut chosen = pick(weights, sums, None, draws);
        if config.top_p < 1.0 {
            // each draw has on average half the rank of the previous one, so this takes few iterations
            while sums_before(weights, chosen, sums) >= config.top_p * total {
                chosen = pick(weights, sums, Some(chosen), draws);
            }
        }
        (chosen, total)
    }
}

/// Draws an index by weight from those that rank before `pivot`; `sums` has their weight in each block.
fn pick(weights: &[f32], sums: &[f64], pivot: Option<usize>, draws: &mut Random) -> usize {
    let counts = |index: usize, weight: f32| {
        pivot.is_none_or(|pivot| weight > weights[pivot] || (weight == weights[pivot] && index < pivot))
    };
    let target = draws.next_f64() * sums.iter().sum::<f64>();
    let mut below = 0.0;
    // because of rounding the draw may fall past the end: use the last possible index
    let mut block = sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
    for (number, sum) in sums.iter().enumerate().take(block) {
        if below + sum > target {
            block = number;
            break;
        }
        below += sum;
    }
    let start = block * BLOCK;
    let end = weights.len().min(start + BLOCK);
    let mut last = start;
    for (index, &weight) in (start..end).zip(&weights[start..end]) {
        if weight > 0.0 && counts(index, weight) {
            last = index;
            below += f64::from(weight);
            if below > target {
                break;
            }
        }
    }
    last
}

/// A number that differs from call to call and from process to process.
fn entropy() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn penalties_and_bias_by_hand() {
        let config = SamplingConfig::default()
            .with_repetition_penalty(2.0)
            .with_frequency_penalty(0.5)
            .with_presence_penalty(0.25)
            .with_logit_bias(2, -1.5);
        let mut sampler = Sampler::new(config.clone()).unwrap();
        sampler.observe(&[0, 1, 0]);
        let mut logits = [2.0, -2.0, 1.0, 0.0];
        adjust(&mut logits, &config, &sampler.counts).unwrap();
        // 2 / 2 - 2 * 0.5 - 0.25; -2 * 2 - 0.5 - 0.25; 1 - 1.5; unchanged
        assert_eq!(logits, [-0.25, -4.75, -0.5, 0.0]);
    }
}
