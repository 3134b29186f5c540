//! What is noted of a run beside the trainer's own files: TensorBoard events and the picture.

use crate::plot::{self, Curves};
use crate::run_folder::RunFolder;
use crate::tensorboard::EventWriter;
use metal_candle::Result;
use metal_candle::training::TrainingEvent;
use serde_json::Value;
use std::path::Path;

/// Follows the events of a run.
#[derive(Debug)]
pub(super) struct Recorder {
    run: RunFolder,
    events: Option<EventWriter>,
    curves: Curves,
}

impl Recorder {
    pub(super) fn new(run: RunFolder) -> Self {
        Self { run, events: None, curves: Curves::default() }
    }

    /// The curves so far.
    pub(super) fn curves(&self) -> &Curves {
        &self.curves
    }

    pub(super) fn note(&mut self, event: &TrainingEvent) -> Result<()> {
        match event {
            TrainingEvent::Started { .. } => self.start(),
            TrainingEvent::Step { step, loss, learning_rate, grad_norm, tokens_per_second, .. } => self.step(
                *step,
                &[
                    (LOSS, *loss),
                    ("train/learning_rate", *learning_rate),
                    ("train/grad_norm", *grad_norm),
                    ("train/tokens_per_second", *tokens_per_second),
                ],
            ),
            TrainingEvent::Evaluated { step, loss, .. } => self.step(*step, &[(VALID_LOSS, *loss)]),
            _ => Ok(()),
        }
    }

    /// Takes up what `metrics.jsonl` holds of the run so far; the trainer has cut off later lines.
    fn start(&mut self) -> Result<()> {
        self.curves = Curves::default();
        self.events = Some(EventWriter::create(self.run.path())?);
        // without the file the run has just begun
        let text = std::fs::read_to_string(self.run.metrics()).unwrap_or_default();
        for line in text.lines() {
            let Ok(row) = serde_json::from_str::<Value>(line) else { continue };
            let Some(step) = row["step"].as_u64() else { continue };
            let number = |key: &str| row[key].as_f64();
            let values = if row["event"] == "evaluation" {
                vec![(VALID_LOSS, number("loss"))]
            } else {
                vec![
                    (LOSS, number("loss")),
                    ("train/learning_rate", number("learning_rate")),
                    ("train/grad_norm", number("grad_norm")),
                ]
            };
            let values: Vec<_> = values.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
            self.step(step as usize, &values)?;
        }
        Ok(())
    }

    fn step(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<()> {
        for &(tag, value) in values {
            let curve = match tag {
                LOSS => &mut self.curves.train,
                VALID_LOSS => &mut self.curves.valid,
                "train/learning_rate" => &mut self.curves.learning_rate,
                _ => continue,
            };
            curve.push((step as f64, value));
        }
        match &mut self.events {
            Some(events) => events.scalars(step as u64, values),
            None => Ok(()),
        }
    }

    /// Draws the curves so far.
    pub(super) fn draw(&self, path: &Path, title: &str) -> Result<()> {
        plot::draw(path, title, &self.curves)
    }
}

const LOSS: &str = "train/loss";
const VALID_LOSS: &str = "valid/loss";
