//! Writes the files of a run besides the trainer's own: its record, TensorBoard events and the chart.

use crate::memory;
use crate::plot::{self, Curves};
use crate::run_folder::RunFolder;
use crate::run_record::{Outcome, RecordedWarning, RunRecord};
use crate::tensorboard::EventWriter;
use metal_candle::Result;
use metal_candle::files::{BoundedLines, MAX_METRICS_LINE_BYTES};
use metal_candle::training::TrainingEvent;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time between two writings of the record during a run.
const RECORD_INTERVAL: Duration = Duration::from_secs(5);

/// Follows the events of a run.
#[derive(Debug)]
pub(super) struct Recorder {
    run: RunFolder,
    events: Option<EventWriter>,
    curves: Curves,
    record: RunRecord,
    /// When this process started, and the time of the run before it.
    started: Instant,
    seconds_before: f64,
    recorded: Instant,
    /// The tokens of this process's steps, and their time.
    tokens: f64,
    step_seconds: f64,
}

impl Recorder {
    /// Creates a recorder of the run that `record` describes; continues the record of an earlier process.
    pub(super) fn new(run: RunFolder, mut record: RunRecord) -> Self {
        let earlier = RunRecord::read(run.path()).ok().flatten().unwrap_or_default();
        if earlier.started > 0 {
            record.started = earlier.started;
        }
        record.warnings = earlier.warnings;
        // they stay as they were if no step follows
        record.tokens_per_second = earlier.tokens_per_second;
        let now = Instant::now();
        Self {
            run,
            events: None,
            curves: Curves::default(),
            record,
            started: now,
            seconds_before: earlier.seconds,
            recorded: now,
            tokens: 0.0,
            step_seconds: 0.0,
        }
    }

    /// Writes the status of the run.
    pub(super) fn record(&mut self) -> Result<()> {
        self.recorded = Instant::now();
        let record = &mut self.record;
        record.seconds = self.seconds_before + self.started.elapsed().as_secs_f64();
        record.peak_memory_bytes = memory::peak().max(record.peak_memory_bytes);
        if self.step_seconds > 0.0 {
            record.tokens_per_second = Some(self.tokens / self.step_seconds);
        }
        record.write(self.run.path())
    }

    /// Writes the final status of the run.
    pub(super) fn end(&mut self, outcome: Outcome, error: Option<String>) -> Result<()> {
        (self.record.outcome, self.record.error) = (outcome, error);
        self.record()
    }

    /// The curves so far.
    pub(super) fn curves(&self) -> &Curves {
        &self.curves
    }

    pub(super) fn note(&mut self, event: &TrainingEvent) -> Result<()> {
        match event {
            TrainingEvent::Started { total_steps, num_trainable_parameters, .. } => {
                self.record.total_steps = *total_steps;
                self.record.num_trainable_parameters = *num_trainable_parameters;
                self.start()
            }
            TrainingEvent::Step { step, loss, learning_rate, grad_norm, tokens, tokens_per_second, .. } => {
                self.tokens += *tokens as f64;
                self.step_seconds += *tokens as f64 / tokens_per_second.max(f64::MIN_POSITIVE);
                if self.recorded.elapsed() > RECORD_INTERVAL {
                    self.record()?;
                }
                self.step(
                    *step,
                    &[
                        (LOSS, *loss),
                        ("train/learning_rate", *learning_rate),
                        ("train/grad_norm", *grad_norm),
                        ("train/tokens_per_second", *tokens_per_second),
                    ],
                )
            }
            TrainingEvent::Warning { step, warning } => {
                let (kind, text) = (warning.kind().to_owned(), warning.to_string());
                self.record.warn(RecordedWarning { step: *step, kind, text });
                self.record()
            }
            TrainingEvent::Evaluated { step, loss, .. } => self.step(*step, &[(VALID_LOSS, *loss)]),
            _ => Ok(()),
        }
    }

    /// Reads the curves from `metrics.jsonl`, which the trainer has truncated to the step to resume from.
    fn start(&mut self) -> Result<()> {
        self.record()?;
        self.curves = Curves::default();
        self.events = Some(EventWriter::create(self.run.path())?);
        // a new run has no file yet
        let Ok(mut lines) = BoundedLines::open(self.run.metrics(), MAX_METRICS_LINE_BYTES) else { return Ok(()) };
        while let Ok(Some(line)) = lines.next_line() {
            let Ok(row) = serde_json::from_slice::<Value>(line) else { continue };
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
                "train/grad_norm" => &mut self.curves.grad_norm,
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
