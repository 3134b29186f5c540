//! The warnings of training runs, and the checks of datasets before a run.

use crate::data::Dataset;
use std::collections::HashSet;
use std::fmt;

/// A smaller share of trained tokens causes a warning.
pub(super) const FEW_TRAINED_TOKENS: f64 = 0.05;
/// This share of truncated rows causes a warning.
pub(super) const MANY_CUT_ROWS: f64 = 0.05;
/// This share of validation rows that are also training rows causes a warning.
pub(super) const MANY_LEAKED_ROWS: f64 = 0.01;

/// A problem of a run that its user should check. The text describes it and suggests what to try.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TrainingWarning {
    /// The loss of one step is far above the previous losses.
    LossSpike {
        /// The loss, in nats per trained token.
        loss: f64,
        /// The median of the previous losses.
        median: f64,
    },
    /// The gradients of one step are far larger than the previous ones.
    GradientExplosion {
        /// The global norm before clipping.
        grad_norm: f64,
        /// The median of the previous norms.
        median: f64,
        /// The norm that gradients are clipped to.
        max_grad_norm: Option<f64>,
    },
    /// The loss has risen and stays high.
    LossRises {
        /// The earlier loss, in nats per trained token.
        from: f64,
        /// The step of the earlier loss.
        from_step: usize,
        /// The current loss.
        to: f64,
        /// The highest learning rate so far.
        learning_rate: f64,
        /// Whether these are validation losses.
        is_validation: bool,
    },
    /// The validation loss rises while the training loss falls.
    Overfitting {
        /// The step with the lowest validation loss.
        best_step: usize,
        /// The lowest validation loss, in nats per trained token.
        best_loss: f64,
        /// The current validation loss.
        loss: f64,
        /// The mean training loss between the best evaluation and the previous one.
        train_loss_then: f64,
        /// The mean training loss since the last evaluation.
        train_loss_now: f64,
    },
    /// Memory ran out in a step. The step is repeated with a smaller micro-batch or more checkpointed blocks.
    OutOfMemory {
        /// Maximum number of tokens in a micro-batch from now on; none if batches are not split.
        micro_batch_tokens: Option<usize>,
        /// The number of blocks that are recomputed in the backward pass from now on.
        checkpointed_blocks: usize,
        /// The error.
        reason: String,
    },
    /// Few tokens are trained.
    FewTrainedTokens {
        /// The number of tokens whose prediction is trained.
        trained_tokens: usize,
        /// The number of tokens.
        tokens: usize,
    },
    /// Many rows were truncated.
    CutRows {
        /// The number of these rows.
        cut: usize,
        /// The number of all rows.
        rows: usize,
        /// Their length in tokens.
        max_tokens: usize,
    },
    /// Validation rows are also in the training data.
    LeakedRows {
        /// The number of these rows.
        leaked: usize,
        /// The number of all rows.
        rows: usize,
    },
    /// The model was not trained on the special tokens of the chat template.
    UnknownTemplate {
        /// The special tokens.
        marks: Vec<String>,
        /// The mean loss of predicting them, in nats.
        loss: f64,
        /// The loss of a random guess: the logarithm of the vocabulary size.
        chance: f64,
        /// Whether their embeddings look like those of tokens that were never trained.
        is_untrained: bool,
    },
}

impl TrainingWarning {
    /// A short name of the kind of warning.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LossSpike { .. } => "loss spike",
            Self::GradientExplosion { .. } => "gradient explosion",
            Self::LossRises { .. } => "loss rises",
            Self::Overfitting { .. } => "over-fitting",
            Self::OutOfMemory { .. } => "out of memory",
            Self::FewTrainedTokens { .. } => "few trained tokens",
            Self::CutRows { .. } => "cut rows",
            Self::LeakedRows { .. } => "leaked rows",
            Self::UnknownTemplate { .. } => "unknown template",
        }
    }
}

impl fmt::Display for TrainingWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LossSpike { loss, median } => write!(
                f,
                "the loss jumped from about {median:.3} to {loss:.3}: check the rows of this step; \
                 if it happens again, lower the learning rate or clip the gradients more"
            ),
            Self::GradientExplosion { grad_norm, median, max_grad_norm } => {
                write!(f, "the gradient norm jumped from about {median:.3} to {grad_norm:.3}: ")?;
                match max_grad_norm {
                    Some(norm) => write!(f, "it is clipped to {norm}; if the loss rises, lower the learning rate"),
                    None => write!(f, "clip the gradients (1 is a common maximum norm) or lower the learning rate"),
                }
            }
            Self::LossRises { from, from_step, to, learning_rate, is_validation } => {
                let what = if *is_validation { "validation loss" } else { "loss" };
                write!(
                    f,
                    "the {what} rose from {from:.3} at step {from_step} to {to:.3}: the learning rate of \
                     {} is probably too high; try {}, or a longer warm-up",
                    short(*learning_rate, 2),
                    short(learning_rate / 3.0, 1)
                )
            }
            Self::Overfitting { best_step, best_loss, loss, train_loss_then, train_loss_now } => write!(
                f,
                "over-fitting: the validation loss rose from {best_loss:.3} at step {best_step} to {loss:.3}, while the \
                 training loss fell from {train_loss_then:.3} to {train_loss_now:.3}; try fewer steps, more data, \
                 dropout, a lower rank, or early stopping"
            ),
            Self::OutOfMemory { micro_batch_tokens, checkpointed_blocks, reason } => {
                write!(f, "{reason}; repeating the step with ")?;
                if let Some(tokens) = micro_batch_tokens {
                    write!(f, "micro-batches of at most {tokens} tokens and ")?;
                }
                write!(f, "{checkpointed_blocks} checkpointed blocks")
            }
            Self::FewTrainedTokens { trained_tokens, tokens } => write!(
                f,
                "only {trained_tokens} of {tokens} tokens are trained ({:.1} %), the others are masked: check with `data check` \
                that the answers are trained, or train prompts too",
                100.0 * *trained_tokens as f64 / (*tokens).max(1) as f64
            ),
            Self::CutRows { cut, rows, max_tokens } => write!(
                f,
                "{cut} of {rows} rows were truncated to {max_tokens} tokens, often cutting off the end of the answer: \
                allow longer rows or split them"
            ),
            Self::LeakedRows { leaked, rows } => write!(
                f,
                "{leaked} of {rows} validation rows are also training rows, so the validation loss is too optimistic: \
                remove duplicates before splitting"
            ),
            Self::UnknownTemplate { marks, loss, chance, is_untrained } => {
                let marks = marks.join("`, `");
                write!(
                    f,
                    "the model was probably not trained on its chat template: it predicts `{marks}` with a loss of "
                )?;
                write!(f, "{loss:.1}, and a random guess has {chance:.1}")?;
                if *is_untrained {
                    write!(f, "; their embeddings look like those of unused tokens")?;
                }
                write!(f, "; start from the instruct model, or train the embeddings and the head too, or use more data")
            }
        }
    }
}

/// Formats a number with `digits` significant digits: `0.003`, `7e-5`.
fn short(value: f64, digits: usize) -> String {
    let rounded: f64 = format!("{value:.*e}", digits.saturating_sub(1)).parse().unwrap_or(value);
    if (1e-3..1e6).contains(&rounded) { format!("{rounded}") } else { format!("{rounded:e}") }
}

/// Warns if less than 5 % of the tokens are trained, or if at least 1 % of the validation rows are also training rows.
///
/// Two rows are equal if all their tokens are.
pub fn dataset_warnings(train: &Dataset, valid: Option<&Dataset>) -> Vec<TrainingWarning> {
    let mut warnings = Vec::new();
    let tokens: usize = train.samples.iter().map(|sample| sample.ids.len()).sum();
    let trained_tokens: usize = train.samples.iter().map(crate::data::Sample::num_trained).sum();
    if tokens > 0 && (trained_tokens as f64) < FEW_TRAINED_TOKENS * tokens as f64 {
        warnings.push(TrainingWarning::FewTrainedTokens { trained_tokens, tokens });
    }
    if let Some(valid) = valid.filter(|rows| !rows.is_empty()) {
        let known: HashSet<&[u32]> = train.samples.iter().map(|sample| sample.ids.as_slice()).collect();
        let leaked = valid.samples.iter().filter(|sample| known.contains(sample.ids.as_slice())).count();
        if leaked > 0 && leaked as f64 >= MANY_LEAKED_ROWS * valid.len() as f64 {
            warnings.push(TrainingWarning::LeakedRows { leaked, rows: valid.len() });
        }
    }
    warnings
}

/// Warns if at least 5 % of the rows are exactly `max_tokens` long, for rows that were truncated to that length.
pub fn cut_rows_warning(dataset: &Dataset, max_tokens: usize) -> Option<TrainingWarning> {
    let cut = dataset.samples.iter().filter(|sample| sample.ids.len() == max_tokens).count();
    let rows = dataset.len();
    let are_many = cut > 0 && cut as f64 >= MANY_CUT_ROWS * rows as f64;
    are_many.then_some(TrainingWarning::CutRows { cut, rows, max_tokens })
}

#[cfg(test)]
mod tests {
    use super::{TrainingWarning, cut_rows_warning, dataset_warnings, short};
    use crate::data::{Dataset, Sample};

    fn rows(count: u32, length: usize, trained: usize) -> Dataset {
        let row = |number: u32| Sample {
            ids: (0..length as u32).map(|i| number * 100 + i).collect(),
            trained: (0..length).map(|i| i >= length - trained).collect(),
            source: None,
        };
        Dataset::from_samples((0..count).map(row).collect())
    }

    #[test]
    fn learning_rates_are_short() {
        assert_eq!([3e-3, 2e-4, 2e-4 / 3.0, 0.1 / 3.0].map(|rate| short(rate, 1)), ["0.003", "2e-4", "7e-5", "0.03"]);
        assert_eq!(short(2.53e-4, 2), "2.5e-4");
    }

    #[test]
    fn masks_are_counted() {
        assert_eq!(dataset_warnings(&rows(10, 100, 5), None), []);
        let warning = TrainingWarning::FewTrainedTokens { trained_tokens: 40, tokens: 1000 };
        assert_eq!(dataset_warnings(&rows(10, 100, 4), None), std::slice::from_ref(&warning));
        assert!(warning.to_string().contains("only 40 of 1000 tokens are trained (4.0 %)"), "{warning}");
        assert_eq!(dataset_warnings(&Dataset::default(), Some(&Dataset::default())), []);
    }

    #[test]
    fn leaked_and_cut_rows_are_counted() {
        let (train, valid) = (rows(50, 20, 10), rows(200, 20, 10));
        let leaked = [TrainingWarning::LeakedRows { leaked: 50, rows: 200 }];
        assert_eq!(dataset_warnings(&train, Some(&valid)), leaked);
        // 1 of 101 rows is less than a hundredth
        let few = Dataset::from_samples(valid.samples[49..150].to_vec());
        assert_eq!(dataset_warnings(&train, Some(&few)), []);
        let cut = TrainingWarning::CutRows { cut: 50, rows: 50, max_tokens: 20 };
        assert_eq!(cut_rows_warning(&train, 20), Some(cut));
        assert_eq!(cut_rows_warning(&train, 21), None);
    }
}
