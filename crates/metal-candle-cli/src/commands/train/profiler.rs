//! Profiles the first steps of a run.

use crate::output::Output;
use crate::run_folder::RunFolder;
use metal_candle::Result;
use metal_candle::models::write_atomically;
use metal_candle::profile::{self, Profile};
use metal_candle::training::TrainingEvent;
use std::path::PathBuf;

/// Maximum number of recorded steps: each step needs some hundred kilobytes in the file.
pub(super) const MAX_STEPS: usize = 20;

/// Records steps, without the evaluations and checkpoints between them.
#[derive(Debug)]
pub(super) struct Profiler {
    path: PathBuf,
    steps: usize,
    recorded: Profile,
    is_over: bool,
}

impl Profiler {
    pub(super) fn new(run: &RunFolder) -> Self {
        Self { path: run.profile(), steps: 0, recorded: Profile::default(), is_over: false }
    }

    pub(super) fn event(&mut self, event: &TrainingEvent) {
        if self.is_over {
            return;
        }
        let found = profile::stop();
        if matches!(event, TrainingEvent::Step { .. }) {
            self.recorded.append(found);
            self.steps += 1;
        }
        self.is_over = self.steps == MAX_STEPS || matches!(event, TrainingEvent::Finished { .. });
        if !self.is_over {
            profile::start();
        }
    }

    /// Stops recording and writes a trace; none if no step was recorded.
    pub(super) fn write(mut self) -> Result<Option<Profiled>> {
        if !self.is_over {
            profile::stop();
            self.is_over = true;
        }
        if self.steps == 0 {
            return Ok(None);
        }
        write_atomically(&self.path, |file| file.write_all(self.recorded.chrome_trace().as_bytes()))?;
        Ok(Some(Profiled { path: self.path, steps: self.steps, table: self.recorded.table() }))
    }
}

/// A written profile.
#[derive(Debug)]
pub(super) struct Profiled {
    pub(super) path: PathBuf,
    steps: usize,
    table: String,
}

impl Profiled {
    pub(super) fn print(&self, output: Output) {
        let steps =
            if self.steps == 1 { "the first step".to_owned() } else { format!("the first {} steps", self.steps) };
        output.note(format_args!("\ntime of {steps}, without nested operations:\n{}", self.table));
        output.note(format_args!("profile         {} (for chrome://tracing or ui.perfetto.dev)", self.path.display()));
    }
}
