//! Handles the events of a run: updates the progress bar or dashboard and the record, and stops on Ctrl-C.

use super::dashboard::{Dashboard, View};
use super::profiler::Profiler;
use super::recorder::Recorder;
use crate::interrupt;
use crate::memory::Gauge;
use crate::output::{Output, Progress, Unit, bytes, short};
use metal_candle::Error;
use metal_candle::training::TrainingEvent;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time between two updates of the chart during a run.
const PICTURE_INTERVAL: Duration = Duration::from_secs(20);

/// Time between two updates of the dashboard's curves.
const CURVES_INTERVAL: Duration = Duration::from_millis(200);

/// The event handler of a run.
#[derive(Debug)]
pub(super) struct Watch {
    output: Output,
    progress: Option<Progress>,
    /// The initial contents of the dashboard, if one is requested.
    view: Option<View>,
    dashboard: Option<Dashboard>,
    pub(super) recorder: Recorder,
    /// The profiler, if requested.
    pub(super) profiler: Option<Profiler>,
    title: String,
    /// The path of the chart.
    picture: PathBuf,
    last_picture: Instant,
    /// When the curves of the dashboard were last updated; copying long curves takes time.
    last_curves: Option<Instant>,
    memory: Gauge,
    mean_loss: Option<f64>,
    mean_speed: Option<f64>,
    valid_loss: Option<f64>,
    /// The error of a failed write, which stops the run.
    pub(super) failure: Option<Error>,
}

impl Watch {
    pub(super) fn new(output: Output, recorder: Recorder, title: String, picture: PathBuf) -> Self {
        Self {
            output,
            progress: None,
            view: None,
            dashboard: None,
            recorder,
            profiler: None,
            title,
            picture,
            last_picture: Instant::now(),
            last_curves: None,
            memory: Gauge::default(),
            mean_loss: None,
            mean_speed: None,
            valid_loss: None,
            failure: None,
        }
    }

    /// Shows a dashboard, with a prompt and the model's answer.
    pub(super) fn with_dashboard(mut self, sample: Option<(String, String)>) -> Self {
        self.view = Some(View { title: self.title.clone(), sample, ..View::default() });
        self
    }

    /// Profiles the first steps.
    pub(super) fn with_profiler(mut self, profiler: Profiler) -> Self {
        self.profiler = Some(profiler);
        self
    }

    pub(super) fn event(&mut self, event: &TrainingEvent) -> ControlFlow<()> {
        if let Some(profiler) = &mut self.profiler {
            profiler.event(event);
        }
        if let Err(error) = self.record(event) {
            self.failure = Some(error);
            return flow(true);
        }
        match event {
            TrainingEvent::Started { step, total_steps, .. } => self.open(*step, *total_steps),
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
            TrainingEvent::Warning { step, warning } => {
                let when = if *step == 0 { String::new() } else { format!("step {step}: ") };
                let text = format!("{when}{warning}");
                match (&self.dashboard, &self.progress) {
                    (Some(dashboard), _) => dashboard.update(|view| view.warnings.push(text)),
                    (None, Some(progress)) => progress.warn(text),
                    (None, None) => Output::warn(text),
                }
            }
            TrainingEvent::Finished { .. } => self.close(),
            _ => {}
        }
        flow(interrupt::is_asked())
    }

    fn open(&mut self, step: usize, total_steps: usize) {
        if let Some(mut view) = self.view.take() {
            (view.first_step, view.total_steps) = (step, total_steps);
            match Dashboard::open(view) {
                Ok(dashboard) => {
                    // in the dashboard, Ctrl-C is a key
                    interrupt::listen();
                    self.dashboard = Some(dashboard);
                    return;
                }
                Err(error) => Output::warn(format_args!("cannot show the dashboard: {error}")),
            }
        }
        let mut progress = self.output.progress(total_steps as u64, "training", Unit::Steps);
        progress.start(step as u64);
        self.progress = Some(progress);
    }

    /// Removes the bar or dashboard, also if the run failed.
    pub(super) fn close(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
        if let Some(dashboard) = self.dashboard.take() {
            for warning in dashboard.close().warnings {
                Output::warn(warning);
            }
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
        let memory = self.memory.bytes();
        if let Some(dashboard) = &self.dashboard {
            let curves = self.recorder.curves();
            let is_due = self.last_curves.is_none_or(|last| last.elapsed() > CURVES_INTERVAL);
            dashboard.update(|view| {
                (view.step, view.memory, view.tokens_per_second) = (step, memory, self.mean_speed);
                if is_due {
                    view.curves.clone_from(curves);
                }
            });
            if is_due {
                self.last_curves = Some(Instant::now());
            }
        }
        let Some(progress) = &mut self.progress else { return };
        progress.set(step as u64, &message(self.mean_loss, self.valid_loss, self.mean_speed, memory));
    }
}

/// The text next to the bar: at most 50 columns for losses below 100.
fn message(loss: Option<f64>, valid_loss: Option<f64>, speed: Option<f64>, memory: Option<u64>) -> String {
    let parts = [
        loss.map(|loss| format!("loss {loss:.3}")),
        valid_loss.map(|loss| format!("valid {loss:.3}")),
        speed.map(|speed| format!("{} tokens/s", short(speed))),
        memory.map(bytes),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// Stops the run if `stop` is set.
fn flow(stop: bool) -> ControlFlow<()> {
    if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

#[cfg(test)]
mod tests {
    use super::message;

    #[test]
    fn the_message_leaves_space_for_a_bar() {
        let text = message(Some(12.3456), Some(11.987), Some(10_864.0), Some(193_700_000));
        assert_eq!(text, "loss 12.346  valid 11.987  10.9k tokens/s  193.7 MB");
        assert!(text.len() <= 54, "{}", text.len());
        assert_eq!(message(None, Some(2.0), None, None), "valid 2.000");
    }
}
