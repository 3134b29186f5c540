//! The position of a run in its data and random sequences, as saved in checkpoints.

use crate::data::Random;
use crate::error::Result;
use crate::files::JsonObject;
use serde_json::{Value, json};

/// The version of the layout of `state.json`.
const FORMAT: usize = 1;

/// The state of a run besides parameters, optimizer state and settings.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Progress {
    /// Completed optimizer steps.
    pub(super) step: usize,
    /// Complete passes over the data.
    pub(super) epoch: usize,
    /// Completed steps of the current pass.
    pub(super) step_in_epoch: usize,
    /// The generator of the sample order, as of the start of the current pass.
    pub(super) order: Random,
    /// The generator of dropout seeds.
    pub(super) dropout: Random,
    pub(super) tokens: usize,
    pub(super) trained_tokens: usize,
    pub(super) num_evaluations: usize,
    /// Step and loss of the best evaluation.
    pub(super) best: Option<(usize, f64)>,
    pub(super) evaluations_since_best: usize,
}

impl Progress {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            step: 0,
            epoch: 0,
            step_in_epoch: 0,
            order: Random::new(random.next_u64()),
            dropout: Random::new(random.next_u64()),
            tokens: 0,
            trained_tokens: 0,
            num_evaluations: 0,
            best: None,
            evaluations_since_best: 0,
        }
    }

    /// Floats are stored as text, so that they are restored exactly.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "format": FORMAT,
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "order": self.order.state(),
            "dropout": self.dropout.state(),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "num_evaluations": self.num_evaluations,
            "best_step": self.best.map(|(step, _)| step),
            "best_loss": self.best.map(|(_, loss)| loss.to_string()),
            "evaluations_since_best": self.evaluations_since_best,
        })
    }

    pub(super) fn from_json(state: &JsonObject) -> Result<Self> {
        let format = state.required_size("format")?;
        if format != FORMAT {
            return Err(state.wrong("format", &format!("`{FORMAT}`"), &json!(format)));
        }
        let random = |key: &str| {
            let number = state.get(key).and_then(Value::as_u64);
            number.map(Random::from_state).ok_or_else(|| state.missing(key, "a whole number"))
        };
        let best_loss = match state.text("best_loss")? {
            None => None,
            Some(text) => {
                let loss = text.parse::<f64>();
                Some(loss.map_err(|_| state.wrong("best_loss", "a number as text", &json!(text)))?)
            }
        };
        Ok(Self {
            step: state.required_size("step")?,
            epoch: state.required_size("epoch")?,
            step_in_epoch: state.required_size("step_in_epoch")?,
            order: random("order")?,
            dropout: random("dropout")?,
            tokens: state.required_size("tokens")?,
            trained_tokens: state.required_size("trained_tokens")?,
            num_evaluations: state.required_size("num_evaluations")?,
            best: state.size("best_step")?.zip(best_loss),
            evaluations_since_best: state.required_size("evaluations_since_best")?,
        })
    }
}
