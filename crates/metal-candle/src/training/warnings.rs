//! What a run should be warned of, and what can be told from its data before it starts.

use crate::data::Dataset;
use std::collections::HashSet;
use std::fmt;

/// Less than this share of trained tokens is warned of.
pub(super) const FEW_TRAINED_TOKENS: f64 = 0.05;
/// From this share on, rows that were cut are warned of.
pub(super) const MANY_CUT_ROWS: f64 = 0.05;
/// From this share on, held-out rows that are also trained on are warned of.
pub(super) const MANY_LEAKED_ROWS: f64 = 0.01;

/// Something in a run that its user should look at. The text says what was seen and what to try.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TrainingWarning {
    /// The loss of one step is far above those before.
    LossSpike {
        /// The loss, in nats a trained token.
        loss: f64,
        /// The median of the losses before.
        median: f64,
    },
    /// The gradients of one step are far larger than those before.
    GradientExplosion {
        /// The global norm before clipping.
        grad_norm: f64,
        /// The median of the norms before.
        median: f64,
        /// The norm that gradients are clipped to.
        max_grad_norm: Option<f64>,
    },
    /// The loss has risen instead of fallen, and stays there.
    LossRises {
        /// The loss it was at, in nats a trained token.
        from: f64,
        /// The step it was there.
        from_step: usize,
        /// The loss it is at.
        to: f64,
        /// The highest learning rate so far.
        learning_rate: f64,
        /// Whether these are losses of the held-out rows.
        is_held_out: bool,
    },
    /// The held-out loss rises while the training loss falls.
    Overfitting {
        /// The step with the lowest held-out loss.
        best_step: usize,
        /// The held-out loss there, in nats a trained token.
        best_loss: f64,
        /// The held-out loss now.
        loss: f64,
        /// Mean training loss before that step, since the evaluation before it.
        train_loss_then: f64,
        /// Mean training loss since the last evaluation.
        train_loss_now: f64,
    },
    /// Memory ran out in a step, which is made again with less at a time.
    OutOfMemory {
        /// Most tokens that are computed at once from now on; none where batches are computed as a whole.
        micro_batch_tokens: Option<usize>,
        /// Blocks that are computed anew in the backward pass from now on.
        checkpointed_blocks: usize,
        /// What was said.
        reason: String,
    },
    /// Hardly a token is trained.
    FewTrainedTokens {
        /// The tokens whose prediction is trained.
        trained_tokens: usize,
        /// All tokens.
        tokens: usize,
    },
    /// Many rows were cut at their end.
    CutRows {
        /// How many.
        cut: usize,
        /// Of how many.
        rows: usize,
        /// The tokens that were left of each.
        max_tokens: usize,
    },
    /// Held-out rows are also trained on.
    LeakedRows {
        /// How many.
        leaked: usize,
        /// Of how many.
        rows: usize,
    },
    /// The model does not know the marks of the chat template.
    UnknownTemplate {
        /// The marks.
        marks: Vec<String>,
        /// Mean loss on predicting them, in nats.
        loss: f64,
        /// The loss of a guess, the logarithm of the size of the vocabulary.
        chance: f64,
        /// Whether their embeddings are like those of tokens that were never trained.
        is_untrained: bool,
    },
}

impl TrainingWarning {
    /// A short name of the kind of warning, the same for all warnings of it.
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
                "the loss jumped to {loss:.3}, it was about {median:.3}: look at the rows of this step; \
                 if it happens again, lower the learning rate or clip the gradients more"
            ),
            Self::GradientExplosion { grad_norm, median, max_grad_norm } => {
                write!(f, "the gradient norm jumped to {grad_norm:.3}, it was about {median:.3}: ")?;
                match max_grad_norm {
                    Some(norm) => write!(f, "it is clipped to {norm}; if the loss suffers, lower the learning rate"),
                    None => write!(f, "clip the gradients (a largest norm of 1 is usual) or lower the learning rate"),
                }
            }
            Self::LossRises { from, from_step, to, learning_rate, is_held_out } => {
                let what = if *is_held_out { "validation loss" } else { "loss" };
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
                write!(f, "{reason}; the step is made again with ")?;
                if let Some(tokens) = micro_batch_tokens {
                    write!(f, "at most {tokens} tokens at once and ")?;
                }
                write!(f, "{checkpointed_blocks} blocks computed anew in the backward pass")
            }
            Self::FewTrainedTokens { trained_tokens, tokens } => write!(
                f,
                "only {trained_tokens} of {tokens} tokens are trained ({:.1} %), most are masked: see whether the \
                 answers are where they should be (`data check` shows it), or train prompts too",
                100.0 * *trained_tokens as f64 / (*tokens).max(1) as f64
            ),
            Self::CutRows { cut, rows, max_tokens } => write!(
                f,
                "{cut} of {rows} rows were cut at {max_tokens} tokens, and what was cut off, often the answer's end, \
                 is not learned: allow longer rows or split them"
            ),
            Self::LeakedRows { leaked, rows } => write!(
                f,
                "{leaked} of {rows} validation rows are also trained on: the validation loss looks better than it is; \
                 remove duplicates before splitting"
            ),
            Self::UnknownTemplate { marks, loss, chance, is_untrained } => {
                let marks = marks.join("`, `");
                write!(f, "the model does not seem to know its chat template: it predicts `{marks}` with a loss of ")?;
                write!(f, "{loss:.1}, a guess has {chance:.1}")?;
                if *is_untrained {
                    write!(f, ", and their embeddings are like those of unused tokens")?;
                }
                write!(
                    f,
                    "; start from the instruct model, or train the embeddings and the head too, or expect to need \
                     more data"
                )
            }
        }
    }
}

/// A number with so many digits: `0.003`, `7e-5`.
fn short(value: f64, digits: usize) -> String {
    let rounded: f64 = format!("{value:.*e}", digits.saturating_sub(1)).parse().unwrap_or(value);
    if (1e-3..1e6).contains(&rounded) { format!("{rounded}") } else { format!("{rounded:e}") }
}

/// What the datasets alone tell: hardly a token trained, or held-out rows that are also trained on.
///
/// Rows are the same if all their tokens are. The shares from which on there is a warning: less than 5 % of tokens
/// trained, 1 % of held-out rows leaked.
pub fn dataset_warnings(train: &Dataset, held_out: Option<&Dataset>) -> Vec<TrainingWarning> {
    let mut warnings = Vec::new();
    let tokens: usize = train.samples.iter().map(|sample| sample.ids.len()).sum();
    let trained_tokens: usize = train.samples.iter().map(crate::data::Sample::num_trained).sum();
    if tokens > 0 && (trained_tokens as f64) < FEW_TRAINED_TOKENS * tokens as f64 {
        warnings.push(TrainingWarning::FewTrainedTokens { trained_tokens, tokens });
    }
    if let Some(held_out) = held_out.filter(|rows| !rows.is_empty()) {
        let known: HashSet<&[u32]> = train.samples.iter().map(|sample| sample.ids.as_slice()).collect();
        let leaked = held_out.samples.iter().filter(|sample| known.contains(sample.ids.as_slice())).count();
        if leaked > 0 && leaked as f64 >= MANY_LEAKED_ROWS * held_out.len() as f64 {
            warnings.push(TrainingWarning::LeakedRows { leaked, rows: held_out.len() });
        }
    }
    warnings
}

/// A warning if 5 % of the rows or more are exactly `max_tokens` long, when longer rows are cut to that length.
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
        let (train, held_out) = (rows(50, 20, 10), rows(200, 20, 10));
        let leaked = [TrainingWarning::LeakedRows { leaked: 50, rows: 200 }];
        assert_eq!(dataset_warnings(&train, Some(&held_out)), leaked);
        // 1 of 101 rows is less than a hundredth
        let few = Dataset::from_samples(held_out.samples[49..150].to_vec());
        assert_eq!(dataset_warnings(&train, Some(&few)), []);
        let cut = TrainingWarning::CutRows { cut: 50, rows: 50, max_tokens: 20 };
        assert_eq!(cut_rows_warning(&train, 20), Some(cut));
        assert_eq!(cut_rows_warning(&train, 21), None);
    }
}
