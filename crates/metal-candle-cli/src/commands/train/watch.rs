//! Watching a run: the progress bar, the record, and Ctrl-C.

use super::recorder::Recorder;
use crate::interrupt;
use crate::output::{Output, Progress, Unit};
use metal_candle::Error;
use metal_candle::training::TrainingEvent;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Seconds between two drawings of the picture during a run.
const PICTURE_INTERVAL: Duration = Duration::from_secs(20);

/// Follows a run.
#[derive(Debug)]
pub(super) struct Watch {
    output: Output,
    progress: Option<Progress>,
    pub(super) recorder: Recorder,
    title: String,
    /// Where the picture goes.
    picture: PathBuf,
    last_picture: Instant,
    mean_loss: Option<f64>,
    mean_speed: Option<f64>,
    valid_loss: Option<f64>,
    /// What kept events from being written; the run stops then.
    pub(super) failure: Option<Error>,
}

impl Watch {
    pub(super) fn new(output: Output, recorder: Recorder, title: String, picture: PathBuf) -> Self {
        Self {
            output,
            progress: None,
            recorder,
            title,
            picture,
            last_picture: Instant::now(),
            mean_loss: None,
            mean_speed: None,
            valid_loss: None,
            failure: None,
        }
    }

    pub(super) fn event(&mut self, event: &TrainingEvent) -> ControlFlow<()> {
        if let Err(error) = self.record(event) {
            self.failure = Some(error);
            return super::flow(true);
        }
        match event {
            TrainingEvent::Started { step, total_steps, .. } => {
                let mut progress = self.output.progress(*total_steps as u64, "training", Unit::Steps);
                progress.start(*step as u64);
                self.progress = Some(progress);
            }
            TrainingEvent::Step { step, loss, tokens_per_second, .. } => {
                interrupt::listen();
                let mean = |mean: Option<f64>, value: f64| Some(mean.map_or(value, |mean| 0.9 * mean + 0.1 * value));
                self.mean_loss = mean(self.mean_loss, *loss);
                self.mean_speed = mean(self.mean_speed, *tokens_per_second);
                self.show(*step);
            }
            TrainingEvent::Evaluated { step, loss, .. } => {
                self.valid_loss = Some(*loss);
                self.show(*step);
            }
            TrainingEvent::Finished { .. } => self.close(),
            _ => {}
        }
        super::flow(interrupt::is_asked())
    }

    /// Takes the bar away, also when the run failed.
    pub(super) fn close(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }

    fn record(&mut self, event: &TrainingEvent) -> Result<(), Error> {
        self.recorder.note(event)?;
        if matches!(event, TrainingEvent::Evaluated { .. }) && self.last_picture.elapsed() > PICTURE_INTERVAL {
            self.last_picture = Instant::now();
            self.draw()?;
        }
        Ok(())
    }

    pub(super) fn draw(&self) -> Result<(), Error> {
        self.recorder.draw(&self.picture, &self.title)
    }

    fn show(&mut self, step: usize) {
        let Some(progress) = &mut self.progress else { return };
        let mut message = String::new();
        if let (Some(loss), Some(speed)) = (self.mean_loss, self.mean_speed) {
            message = format!("loss {loss:.3}  {speed:.0} tokens/s");
        }
        if let Some(loss) = self.valid_loss {
            message = format!("{message}{}held-out {loss:.3}", if message.is_empty() { "" } else { "  " });
        }
        progress.set(step as u64, &message);
    }
}
