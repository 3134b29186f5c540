//! Warns if a model was not trained on the special tokens of its chat template.

use super::warnings::TrainingWarning;
use crate::data::{Dataset, Sample, Tokenizer, batch_of};
use crate::error::Result;
use crate::models::Model;
use crate::ops::{LowRankUpdates, Weight};
use candle_core::DType;
use std::collections::{BTreeMap, BTreeSet};

/// A mark is unknown to the model if the loss of predicting it is at least this share of the loss of a random guess.
const UNKNOWN_LOSS: f64 = 0.8;
/// The same share for a mark whose embedding resembles those of unused tokens.
const UNTRAINED_LOSS: f64 = 0.25;
/// Embeddings with less than this share of the median norm were not trained.
const TINY_NORM: f32 = 0.01;
/// Embeddings with at least this cosine to [`MIN_ALIKE`] embeddings of unused tokens were not trained.
const ALIKE_COSINE: f32 = 0.95;
const MIN_ALIKE: usize = 3;
/// Maximum number of rows that are searched for marks, and of rows that the model computes: the shortest rows.
const SEARCHED_ROWS: usize = 256;
const MEASURED_ROWS: usize = 4;
/// Maximum number of tokens in a row that the model computes.
const MEASURED_TOKENS: usize = 512;
/// The number of embeddings that the median norm is taken of, and of embeddings of unused tokens.
const USUAL_ROWS: usize = 512;
const UNUSED_ROWS: usize = 64;

/// Measures whether the model knows the marks (special tokens such as `<|im_start|>`) in the rows of `dataset`, and
/// returns a warning if it does not.
///
/// A mark that is trained in some row is measured only where it is trained: the `<|im_end|>` of an answer, and not that of
/// a user's or system's turn, whose loss a model that was trained on answers alone never minimized.
///
/// The function runs a few short rows through the model. A model that was trained on the marks predicts at least one of
/// them: the start of the next turn, or the end of an answer. So it warns if the mean loss of every mark is at least 0.8
/// of the loss of a random guess, `ln vocab_size`.
///
/// Tokens that never occur in training end up with nearly equal embeddings, because the softmax pushes all of them the
/// same way, or with nearly zero ones, because of weight decay. So the function also warns if a mark has an embedding
/// below a hundredth of the median norm, or with a cosine of at least 0.95 to three tokens that no row contains, unless
/// the model predicts the mark well anyway.
///
/// Rows without marks, such as plain text, cause no warning.
///
/// # Errors
/// The device fails, or ids are outside the vocabulary.
pub fn template_warning(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    tokenizer: &Tokenizer,
    dataset: &Dataset,
) -> Result<Option<TrainingWarning>> {
    let losses = mark_losses(model, terms, tokenizer, dataset)?;
    if losses.is_empty() {
        return Ok(None);
    }
    let chance = (model.config().vocab_size as f64).ln();
    let marks: Vec<u32> = losses.keys().copied().collect();
    let untrained = untrained(model, tokenizer, &marks)?;
    let is_unknown = |share: f64, mark: u32| losses[&mark] >= share * chance;
    let bad: Vec<u32> = marks
        .iter()
        .zip(&untrained)
        .filter(|&(&mark, &is_untrained)| is_untrained && is_unknown(UNTRAINED_LOSS, mark))
        .map(|(&mark, _)| mark)
        .collect();
    let is_untrained = !bad.is_empty();
    let reported = if marks.iter().all(|&mark| is_unknown(UNKNOWN_LOSS, mark)) { marks } else { bad };
    if reported.is_empty() {
        return Ok(None);
    }
    let loss = reported.iter().map(|mark| losses[mark]).sum::<f64>() / reported.len() as f64;
    let marks = reported.iter().filter_map(|&mark| tokenizer.id_to_token(mark)).collect();
    Ok(Some(TrainingWarning::UnknownTemplate { marks, loss, chance, is_untrained }))
}

/// The mean loss of each mark in the shortest rows that have marks within them.
fn mark_losses(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    tokenizer: &Tokenizer,
    dataset: &Dataset,
) -> Result<BTreeMap<u32, f64>> {
    let limit = MEASURED_TOKENS.min(model.config().max_sequence_length());
    let is_mark = |(index, &id): (usize, &u32)| index > 0 && tokenizer.is_special(id);
    let mut rows: Vec<Sample> = Vec::new();
    for sample in dataset.samples.iter().take(SEARCHED_ROWS) {
        let ids: Vec<u32> = sample.ids.iter().take(limit).copied().collect();
        // at least the end of a turn and the start of the next; no token predicts the first one
        if ids.iter().enumerate().filter(|&mark| is_mark(mark)).count() >= 2 {
            rows.push(Sample { ids, trained: sample.trained.clone(), source: None });
        }
    }
    rows.sort_by_key(|row| row.ids.len());
    rows.truncate(MEASURED_ROWS);
    if rows.is_empty() {
        return Ok(BTreeMap::new());
    }
    select_marks(&mut rows, is_mark);
    let (batch, targets) = batch_of(&rows.iter().collect::<Vec<_>>());
    let losses = model.loss(&batch, &targets, terms, 0.0)?;
    let mut sums: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for ((&id, &weight), &loss) in targets.ids.iter().zip(&targets.weights).zip(&losses.rows) {
        if weight > 0.0 {
            let sum = sums.entry(id).or_default();
            *sum = (sum.0 + f64::from(loss), sum.1 + 1);
        }
    }
    Ok(sums.into_iter().map(|(id, (sum, count))| (id, sum / count as f64)).collect())
}

/// Marks as trained the tokens that are measured: marks, and of those that are trained in some row only the trained ones.
fn select_marks(rows: &mut [Sample], is_mark: impl Fn((usize, &u32)) -> bool) {
    let tokens = rows.iter().flat_map(|row| row.ids.iter().enumerate().zip(&row.trained));
    let trained_marks: BTreeSet<u32> =
        tokens.filter(|&(token, &is_trained)| is_trained && is_mark(token)).map(|((_, &id), _)| id).collect();
    for Sample { ids, trained, .. } in rows {
        trained.truncate(ids.len());
        for (token, is_measured) in ids.iter().enumerate().zip(trained) {
            *is_measured = is_mark(token) && (*is_measured || !trained_marks.contains(token.1));
        }
    }
}

/// Returns for each mark whether its embedding looks untrained.
fn untrained(model: &Model, tokenizer: &Tokenizer, marks: &[u32]) -> Result<Vec<bool>> {
    let Some((_, embedding)) = model.parameters().iter().find(|(name, _)| name == "model.embed_tokens.weight") else {
        return Ok(vec![false; marks.len()]);
    };
    let vocab_size = embedding.dims2()?.0;
    let known = tokenizer.vocab_size().min(vocab_size);
    let unused: Vec<u32> = (known as u32..vocab_size as u32)
        .take(UNUSED_ROWS)
        .chain((0..known as u32).filter(|&id| tokenizer.is_special(id) && !marks.contains(&id)))
        .collect();
    let spread = (vocab_size / USUAL_ROWS).max(1);
    let usual: Vec<u32> = (0..vocab_size as u32).step_by(spread).collect();
    let mut norms: Vec<f32> = rows(embedding, &usual)?.iter().map(|row| norm(row)).collect();
    norms.sort_by(f32::total_cmp);
    let usual_norm = norms.get(norms.len() / 2).copied().unwrap_or(0.0);
    let unused = rows(embedding, &unused)?;
    let of_mark = |row: &Vec<f32>| {
        let alike = unused.iter().filter(|other| cosine(row, other) >= ALIKE_COSINE).count();
        norm(row) < TINY_NORM * usual_norm || alike >= MIN_ALIKE
    };
    Ok(rows(embedding, marks)?.iter().map(of_mark).collect())
}

fn rows(embedding: &Weight, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    Ok(embedding.rows(ids, DType::F32)?.to_vec2()?)
}

fn norm(row: &[f32]) -> f32 {
    row.iter().map(|value| value * value).sum::<f32>().sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let product: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
    product / (norm(a) * norm(b)).max(f32::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_that_are_trained_are_measured_only_there() {
        const START: u32 = 1;
        const END: u32 = 2;
        let row = |trained: [bool; 7]| {
            let ids = vec![START, 7, END, START, 8, END, 9];
            Sample { ids, trained: trained.to_vec(), source: None }
        };
        let (answer, nothing) = ([false, false, false, false, true, true, true], [false; 7]);
        let mut rows = [row(answer), row(nothing)];
        select_marks(&mut rows, |(index, &id)| index > 0 && id <= END);
        // the start of a turn is never trained, so each one is measured
        assert_eq!(rows[0].trained, [false, false, false, true, false, true, false]);
        assert_eq!(rows[1].trained, [false, false, false, true, false, false, false]);
        let mut rows = [row(nothing)];
        select_marks(&mut rows, |(index, &id)| index > 0 && id <= END);
        assert_eq!(rows[0].trained, [false, false, true, true, false, true, false]);
    }
}
