//! Measures the loss of a model on a dataset.

use super::distributed::Group;
use super::samples::{check_dataset, count_tokens, shorten, source_of};
use crate::data::{Dataset, PackingLimits, Random, batch_of, pack};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::ops::LowRankUpdates;

/// The loss of a model on a dataset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Sum over all trained tokens, in nats.
    pub total_loss: f64,
    /// Number of trained tokens.
    pub trained_tokens: usize,
}

impl Evaluation {
    /// Mean in nats per trained token.
    pub fn loss(&self) -> f64 {
        self.total_loss / self.trained_tokens.max(1) as f64
    }

    /// `exp` of the mean loss.
    pub fn perplexity(&self) -> f64 {
        super::perplexity(self.loss())
    }
}

/// The loss over the trained tokens of a dataset, each token with the same weight.
///
/// Samples are packed into batches of up to `batch_tokens` tokens.
///
/// # Errors
/// Samples cannot be used (all of them are listed), `batch_tokens` is 0, or the loss is not finite (its rows are named).
pub fn evaluate(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    dataset: &Dataset,
    batch_tokens: usize,
) -> Result<Evaluation> {
    evaluate_in(None, model, terms, dataset, batch_tokens)
}

/// Like [`evaluate`], shared by all ranks of a group. The losses of batches are summed in one order, for any number
/// of ranks.
pub(super) fn evaluate_in(
    group: Option<&Group>,
    model: &Model,
    terms: Option<&LowRankUpdates>,
    dataset: &Dataset,
    batch_tokens: usize,
) -> Result<Evaluation> {
    check_dataset(dataset, model.config().vocab_size)?;
    let batches = pack(&dataset.lengths(), PackingLimits::tokens(batch_tokens), &mut Random::new(0))?;
    let (rank, num_ranks) = group.map_or((0, 1), |group| (group.rank(), group.num_ranks()));
    let mut sums = vec![0.0; batches.len()];
    for (sum, indices) in sums.iter_mut().zip(&batches).skip(rank).step_by(num_ranks) {
        let samples: Vec<_> = indices.iter().map(|&index| &dataset.samples[index]).collect();
        let (batch, targets) = batch_of(&samples);
        let losses = model.loss(&batch, &targets, terms, 0.0)?;
        *sum = losses.rows.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    }
    if let Some(group) = group {
        let all = group.gather_numbers(&sums)?;
        for (number, sum) in sums.iter_mut().enumerate() {
            *sum = all[number % num_ranks].get(number).copied().unwrap_or(f64::NAN);
        }
    }
    if let Some((_, indices)) = sums.iter().zip(&batches).find(|(sum, _)| !sum.is_finite()) {
        return Err(non_finite(model, terms, dataset, indices)?);
    }
    Ok(Evaluation { total_loss: sums.iter().sum(), trained_tokens: count_tokens(dataset, batches.iter().flatten()).1 })
}

/// The error for a batch whose loss is not finite; measures each sample alone to name the rows at fault.
fn non_finite(model: &Model, terms: Option<&LowRankUpdates>, dataset: &Dataset, indices: &[usize]) -> Result<Error> {
    let (mut total, mut rows) = (0.0, Vec::new());
    let mut indices = indices.to_vec();
    indices.sort_unstable();
    for &index in &indices {
        let (batch, targets) = batch_of(&[&dataset.samples[index]]);
        let losses = model.loss(&batch, &targets, terms, 0.0)?;
        let loss: f64 = losses.rows.iter().map(|&loss| f64::from(loss)).sum();
        if !loss.is_finite() {
            total += loss;
            rows.push(source_of(dataset, index));
        }
    }
    if rows.is_empty() {
        // each sample is finite, only the sum of the batch overflows
        (total, rows) = (f64::NAN, indices.iter().map(|&index| source_of(dataset, index)).collect());
    }
    Ok(Error::NonFiniteEvaluation { loss: total, rows: shorten(rows) })
}
