//! The thread that runs jobs one after another: starts the trainer, watches its run folder, serves its checkpoints and
//! records the result.

use super::child::Trainer;
use super::events::{Event, EventFile};
use super::record::{JobError, JobRecord, JobState};
use super::run::{Outcome, Row, Run};
use super::settings::Serving;
use super::store::{CHECKPOINT, Jobs, Live};
use crate::adapters::Replaces;
use crate::error::without_paths;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// Time between two checks of the run folder.
const TICK: Duration = Duration::from_millis(100);
/// Time between two checks of the queue.
const IDLE: Duration = Duration::from_millis(500);
/// Maximum number of adapters of earlier jobs that are loaded when the server starts; others are loaded on first use.
const MAX_LOADED: usize = 16;
/// Attempts to load a checkpoint, which the trainer may be removing.
const MAX_ATTEMPTS: usize = 3;

/// Runs jobs until the server stops.
pub(super) fn run(jobs: &Jobs) {
    for name in jobs.finished_adapters().into_iter().take(MAX_LOADED) {
        if let Err(error) = jobs.load(&name) {
            tracing::warn!("adapter `{name}`: {}", error.message);
        }
    }
    let mut current: Option<Following> = None;
    loop {
        let is_stopping = jobs.is_stopping();
        if let Some(following) = &mut current {
            if is_stopping || jobs.is_asked_to_stop(&following.record.id) {
                following.trainer.ask_to_stop();
            }
            let ended = following.trainer.ended();
            following.follow(jobs);
            match ended {
                None => jobs.wait(TICK),
                Some(status) => {
                    if let Some(following) = current.take() {
                        following.conclude(jobs, status);
                    }
                }
            }
        } else if is_stopping {
            return;
        } else {
            match jobs.next() {
                None => jobs.wait(IDLE),
                Some(record) => {
                    current = start(jobs, &record);
                    if current.is_none() {
                        jobs.wait(TICK);
                    }
                }
            }
        }
    }
}

/// Starts or resumes a job. `None` if it ended at once, or if the trainer of an earlier server still runs.
fn start(jobs: &Jobs, record: &JobRecord) -> Option<Following> {
    let (id, run) = (&record.id, jobs.run(&record.id));
    if run.is_locked() {
        return None;
    }
    let events = jobs.events(id);
    if record.is_cancelled {
        end(jobs, &events, id, JobState::Cancelled, None);
        return None;
    }
    if record.is_paused {
        jobs.update(id, |record| record.state = JobState::Queued);
        return None;
    }
    let is_done = run.record().is_some_and(|found| found.outcome == Outcome::Done) && run.adapter().is_dir();
    if is_done {
        Journal::new(record, &run, &events).follow(jobs);
        succeed(jobs, record, &run, &events);
        return None;
    }
    let resumes = run.is_started();
    let arguments = if resumes {
        vec!["--resume".into(), OsString::from(run.path())]
    } else {
        // left by a trainer that was killed before its first file
        let _ = std::fs::remove_dir_all(run.path());
        jobs.start_arguments(record)
    };
    if !jobs.start(id) {
        return None;
    }
    let started = Trainer::start(&jobs.config, &jobs.job_folder(id), &arguments);
    let trainer = match started {
        Ok(trainer) => trainer,
        Err(error) => {
            tracing::error!("job `{id}`: cannot start the trainer: {error}");
            let message = "the trainer could not be started; see the server's log for the cause";
            end(jobs, &events, id, JobState::Failed, Some(("start_failed", message.into())));
            return None;
        }
    };
    let mut news = Vec::new();
    if !resumes && let (Some(rows), Some(stats)) = (record.settings.batch_size(), &record.stats) {
        let tokens = record.settings.batch_tokens(stats).unwrap_or_default();
        let message = format!("Batches are limited by tokens: batch_size {rows} means at most {tokens} tokens");
        news.push(Event::info(message, json!({"batch_tokens": tokens})));
    }
    let message = if resumes { "Fine-tuning job resumed" } else { "Fine-tuning job started" };
    news.push(Event::info(message, Value::Null));
    events.append(&news);
    let mut journal = Journal::new(record, &run, &events);
    journal.last_checkpoint = run.checkpoints().last().copied();
    Some(Following { record: record.clone(), run, journal, trainer })
}

/// A running job.
struct Following {
    record: JobRecord,
    run: Run,
    journal: Journal,
    trainer: Trainer,
}

impl Following {
    fn follow(&mut self, jobs: &Jobs) {
        self.journal.follow(jobs);
    }

    fn conclude(self, jobs: &Jobs, status: io::Result<ExitStatus>) {
        let (id, events) = (&self.record.id, jobs.events(&self.record.id));
        jobs.set_live(id, None);
        let found = self.run.record().unwrap_or_default();
        let is_success = status.as_ref().is_ok_and(ExitStatus::success);
        if is_success && found.outcome == Outcome::Done {
            return succeed(jobs, &self.record, &self.run, &events);
        }
        if is_success || self.trainer.is_asked() {
            let is_asked = self.trainer.is_asked();
            let is_stopping = jobs.is_stopping();
            let current = jobs.update(id, |record| {
                // a job that the server stops is still recorded as running, so that it resumes
                if !record.is_cancelled && is_asked && !is_stopping {
                    record.state = JobState::Queued;
                }
            });
            if !is_asked || current.is_some_and(|record| record.is_cancelled) {
                end(jobs, &events, id, JobState::Cancelled, None);
            }
            return;
        }
        let of_record = found.error.filter(|_| found.outcome == Outcome::Failed);
        let message = self.trainer.error().or_else(|| of_record.map(|error| without_paths(&error)));
        let killed = || match status {
            Ok(status) => format!("the trainer exited without a result: {status}"),
            Err(error) => format!("cannot wait for the trainer: {error}"),
        };
        let code = if message.is_some() { "training_failed" } else { "killed" };
        end(jobs, &events, id, JobState::Failed, Some((code, message.unwrap_or_else(killed))));
    }
}

/// Ends a job and adds an event.
fn end(jobs: &Jobs, events: &EventFile, id: &str, state: JobState, error: Option<(&str, String)>) {
    events.append(&[match &error {
        Some((_, message)) => Event::error(format!("The job failed: {message}")),
        None => Event::info(format!("The job was {}", state.name()), Value::Null),
    }]);
    let error = error.map(|(code, message)| JobError { code: code.into(), message, param: None });
    jobs.update(id, |record| record.end(state, error));
}

/// Serves the adapter of a completed job, and records its end.
fn succeed(jobs: &Jobs, record: &JobRecord, run: &Run, events: &EventFile) {
    jobs.set_live(&record.id, None);
    let mut news = Vec::new();
    if record.settings.serve != Serving::None {
        match jobs.adapters.load(&record.adapter, &run.adapter(), &record.id, Replaces::Any) {
            Ok(adapter) => {
                let data = json!({"fine_tuned_model": record.adapter, "generation": adapter.generation});
                news.push(Event::info(format!("New fine-tuned model created: {}", record.adapter), data));
            }
            Err(error) => news.push(Event::warning(format!("the model is not served: {}", error.message))),
        }
    }
    let trained_tokens = run.rows(&mut 0).iter().map(|row| row.trained_tokens).sum();
    news.push(Event::info("The job has successfully completed", Value::Null));
    events.append(&news);
    jobs.update(&record.id, |record| {
        record.trained_tokens = Some(trained_tokens);
        record.end(JobState::Succeeded, None);
    });
}

/// Converts the output of a trainer to events, and serves its checkpoints.
struct Journal {
    id: String,
    adapter: String,
    serving: Serving,
    run: Run,
    events: EventFile,
    /// The number of bytes of `metrics.jsonl` read so far.
    offset: u64,
    /// The last step and the last evaluation in the events. A resumed run repeats some of them.
    last: (Option<u64>, Option<u64>),
    valid_losses: BTreeMap<u64, f64>,
    last_checkpoint: Option<u64>,
    live: Live,
    /// The checkpoint that could not be loaded, and the number of attempts.
    failed: (u64, usize),
}

impl Journal {
    fn new(record: &JobRecord, run: &Run, events: &EventFile) -> Self {
        Self {
            id: record.id.clone(),
            adapter: record.adapter.clone(),
            serving: record.settings.serve,
            run: run.clone(),
            last: events.last_metrics(),
            events: events.clone(),
            offset: 0,
            valid_losses: BTreeMap::new(),
            last_checkpoint: None,
            live: Live::default(),
            failed: (0, 0),
        }
    }

    fn follow(&mut self, jobs: &Jobs) {
        let mut news = Vec::new();
        if self.live.total_steps == 0 {
            self.live.total_steps = self.run.record().map_or(0, |record| record.total_steps);
        }
        for row in self.run.rows(&mut self.offset) {
            self.note(&row, &mut news);
        }
        let steps = self.run.checkpoints();
        for &step in steps.iter().filter(|step| self.last_checkpoint.is_none_or(|last| **step > last)) {
            let name = format!("{}{CHECKPOINT}{step}", self.adapter);
            let data = json!({"step": step, "fine_tuned_model_checkpoint": name});
            news.push(Event::info(format!("Checkpoint created at step {step}"), data));
        }
        self.last_checkpoint = self.last_checkpoint.max(steps.last().copied());
        self.serve(jobs, &steps, &mut news);
        self.events.append(&news);
        jobs.set_live(&self.id, Some(self.live.clone()));
    }

    fn note(&mut self, row: &Row, news: &mut Vec<Event>) {
        let total = self.live.total_steps;
        let number = row.loss.map_or_else(|| "not finite".to_owned(), |loss| format!("{loss:.4}"));
        let (last, kind) = if row.is_evaluation() {
            self.valid_losses.extend(row.loss.map(|loss| (row.step, loss)));
            (&mut self.last.1, "validation")
        } else {
            self.live.step = row.step;
            self.live.first.get_or_insert_with(|| (row.step, Instant::now()));
            (&mut self.last.0, "training")
        };
        if last.is_none_or(|last| row.step > last) {
            *last = Some(row.step);
            news.push(Event::metrics(format!("Step {}/{total}: {kind} loss={number}", row.step), row.data()));
        }
    }

    /// Serves the checkpoint selected by the job's settings under the name of the job.
    fn serve(&mut self, jobs: &Jobs, steps: &[u64], news: &mut Vec<Event>) {
        let step = match self.serving {
            Serving::None => None,
            Serving::Latest => steps.last().copied(),
            Serving::Best => {
                let losses = steps.iter().filter_map(|step| Some((*step, *self.valid_losses.get(step)?)));
                losses.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(step, _)| step)
            }
        };
        let Some(step) = step.filter(|step| self.live.served_step != Some(*step)) else { return };
        if self.failed == (step, MAX_ATTEMPTS) {
            return;
        }
        let path = self.run.checkpoint(step);
        match load(jobs, &self.adapter, &path, &self.id) {
            Ok(generation) => {
                self.live.served_step = Some(step);
                let data = json!({"step": step, "model": self.adapter, "generation": generation});
                news.push(Event::info(format!("Step {step} is served as {}", self.adapter), data));
            }
            Err(message) => {
                let attempts = if self.failed.0 == step { self.failed.1 } else { 0 };
                self.failed = (step, attempts + 1);
                if self.failed.1 == MAX_ATTEMPTS && path.is_dir() {
                    news.push(Event::warning(format!("step {step} is not served: {message}")));
                }
            }
        }
    }
}

fn load(jobs: &Jobs, name: &str, path: &Path, id: &str) -> Result<u64, String> {
    let loaded = jobs.adapters.load(name, path, id, Replaces::Any);
    loaded.map(|adapter| adapter.generation).map_err(|error| error.message)
}
