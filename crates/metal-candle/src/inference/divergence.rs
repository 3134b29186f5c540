//! Compares the predictions of two models.

use crate::data::Sample;
use crate::error::{Error, Result};
use crate::models::{Batch, Model, Rows};
use crate::ops::LowRankUpdates;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// A model and optionally an adapter.
pub type Adapted<'a> = (&'a Model, Option<&'a LowRankUpdates>);

/// The divergence of the next-token probabilities of two models, over the trained tokens of samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// The number of predicted tokens.
    pub tokens: usize,
    /// The mean of the Kullback-Leibler divergence `sum p ln(p / q)` from source `p` to result `q`, in nats.
    pub mean_kl: f64,
    /// The largest divergence of a token.
    pub max_kl: f64,
    /// The share of tokens for which both models have the same most likely token.
    pub top1_agreement: f64,
    /// The perplexity of the source.
    pub source_perplexity: f64,
    /// The perplexity of the result.
    pub result_perplexity: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    tokens: usize,
    kl: f64,
    max_kl: f64,
    agreements: usize,
    losses: [f64; 2],
}

impl Divergence {
    /// Compares two models on samples, sample by sample.
    ///
    /// # Errors
    /// The vocabularies differ, no token is trained, or the probabilities of a model are not finite.
    pub fn measure(source: Adapted, result: Adapted, samples: &[Sample]) -> Result<Self> {
        let (own, other) = (source.0.config().vocab_size, result.0.config().vocab_size);
        if own != other {
            let message = format!("expected a vocabulary of {own} tokens, found {other}");
            return Err(Error::argument("result", message));
        }
        let mut sums = Sums::default();
        for sample in samples {
            let predicting: Vec<usize> =
                (1..sample.ids.len()).filter(|&at| sample.trained[at]).map(|at| at - 1).collect();
            if predicting.is_empty() {
                continue;
            }
            let batch = Batch::single(&sample.ids);
            let logits = |(model, terms): Adapted| -> Result<Vec<f32>> {
                let logits = model.forward(&batch, terms, None, Rows::Of(&predicting))?;
                to_vec(&logits)
            };
            let (p, q) = (logits(source)?, logits(result)?);
            let rows = predicting.par_iter().zip(p.par_chunks_exact(own).zip(q.par_chunks_exact(own)));
            let all: Vec<Sums> = rows.map(|(at, (p, q))| compare(p, q, sample.ids[at + 1] as usize)).collect();
            for row in all {
                sums.tokens += row.tokens;
                sums.kl += row.kl;
                sums.max_kl = sums.max_kl.max(row.max_kl);
                sums.agreements += row.agreements;
                sums.losses[0] += row.losses[0];
                sums.losses[1] += row.losses[1];
            }
        }
        let count = sums.tokens as f64;
        if sums.tokens == 0 {
            return Err(Error::argument("samples", "expected at least one token to predict, found none"));
        }
        if !(sums.kl.is_finite() && sums.losses.iter().all(|loss| loss.is_finite())) {
            return Err(Error::argument("result", "the probabilities of a model are not finite: it overflows"));
        }
        Ok(Self {
            tokens: sums.tokens,
            mean_kl: sums.kl / count,
            max_kl: sums.max_kl,
            top1_agreement: sums.agreements as f64 / count,
            source_perplexity: (sums.losses[0] / count).exp(),
            result_perplexity: (sums.losses[1] / count).exp(),
        })
    }
}

fn to_vec(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The sums of one token.
fn compare(p: &[f32], q: &[f32], target: usize) -> Sums {
    let (p_norm, q_norm) = (log_sum_exp(p), log_sum_exp(q));
    let mut kl = 0.0;
    for (p, q) in p.iter().zip(q) {
        let (p, q) = (f64::from(*p) - p_norm, f64::from(*q) - q_norm);
        kl += p.exp() * (p - q);
    }
    let loss = |logits: &[f32], norm: f64| norm - logits.get(target).copied().map_or(f64::NAN, f64::from);
    // rounding can make it slightly negative; NaN must not be replaced by 0
    let kl = if kl < 0.0 { 0.0 } else { kl };
    Sums {
        tokens: 1,
        kl,
        max_kl: kl,
        agreements: usize::from(largest(p) == largest(q)),
        losses: [loss(p, p_norm), loss(q, q_norm)],
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn largest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::compare;

    #[test]
    fn divergence_of_two_rows() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4)
        let (p, q) = ([2.0_f32.ln(), 0.0, 0.0], [0.0, 2.0_f32.ln(), 0.0]);
        let sums = compare(&p, &q, 0);
        assert!((sums.kl - 0.25 * 2.0_f64.ln()).abs() < 1e-6, "{sums:?}");
        assert_eq!(sums.agreements, 0);
        assert!((sums.losses[0] - 2.0_f64.ln()).abs() < 1e-6 && (sums.losses[1] - 4.0_f64.ln()).abs() < 1e-6);
        let same = compare(&p, &p, 1);
        assert!(same.kl < 1e-12 && same.agreements == 1);
        assert!(compare(&p, &[f32::NAN, 0.0, 0.0], 0).kl.is_nan());
    }
}
