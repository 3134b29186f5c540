//! `train`: fine-tunes a model with LoRA, or trains all weights.

mod answers;
mod as_job;
mod dashboard;
mod plan;
mod prepared;
mod profiler;
mod recorder;
mod report;
mod start;
mod watch;

use crate::error::UserError;
use crate::input::is_stream;
use crate::interrupt;
use crate::output::Output;
use crate::rank;
use crate::ranks;
use crate::run_folder::{RunFolder, check_new_run};
use crate::run_lock::RunLock;
use crate::run_record::Outcome;
use crate::settings::TrainSettings;
use answers::{Question, answer, show};
use anyhow::Result;
use clap::Args;
use metal_candle::Model;
use metal_candle::adapters::{LoRAAdapter, Start};
use metal_candle::data::Tokenizer;
use metal_candle::inference::Generator;
use metal_candle::training::{Group, LastLayers, StopReason, Trained, Trainer, TrainingMetrics};
pub(crate) use plan::PlanArguments;
use prepared::Prepared;
use profiler::{Profiled, Profiler};
use recorder::Recorder;
use report::{Report, Written};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use watch::Watch;

/// Flags of `train`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TrainArguments {
    /// Read settings from a TOML file whose keys are the names of these flags; flags override the file.
    #[arg(long, value_name = "FILE", conflicts_with = "resume", help_heading = "Run")]
    pub(crate) config: Option<PathBuf>,

    /// Continue the run in this folder from its last checkpoint, with its settings.
    #[arg(long, value_name = "RUN", help_heading = "Run")]
    pub(crate) resume: Option<PathBuf>,

    /// Train on this number of devices, with one process each: the first CUDA devices, or CPU processes that share the
    /// threads. Each process computes a shard of every batch; a run can resume with another number.
    #[arg(long, value_name = "COUNT", default_value_t = 1, help_heading = "Run")]
    pub(crate) num_devices: usize,

    /// Show a dashboard in the terminal: curves, speed, memory and warnings; `q` saves and stops.
    #[arg(long, help_heading = "Output")]
    pub(crate) tui: bool,

    /// Profile the first 20 steps: print a table at the end, and write a trace for ui.perfetto.dev or
    /// Chrome to profile.json in the run folder.
    #[arg(long, help_heading = "Output")]
    pub(crate) profile: bool,

    /// Train as a job of `serve`: with low priority, until standard input is closed.
    #[arg(long, hide = true)]
    pub(crate) as_job: bool,

    #[command(flatten)]
    pub(crate) settings: TrainSettings,
}

pub(crate) fn run(flags: &TrainArguments, output: Output) -> Result<()> {
    let started = Instant::now();
    if flags.as_job {
        as_job::start();
    }
    // the process that started a rank has checked its flags
    if !rank::is_rank() {
        if flags.tui {
            dashboard::check(output)?;
        }
        ranks::check(flags.num_devices, flags.settings.device)?;
        if flags.num_devices > 1 {
            return ranks::launch(flags.num_devices);
        }
    }
    let group = ranks::join()?;
    let output = if is_follower(group.as_ref()) { Output::new(false, true) } else { output };
    stop_at_once(flags.resume.as_deref(), output);
    let (resumed, settings) = settings(flags)?;
    if let (Some(path), None) = (&settings.output, &resumed) {
        check_new_run(path)?;
    }
    if let Some(data) = settings.data.as_ref().filter(|data| is_stream(data)) {
        let message = format!("`--data`: expected a file or folder, found a pipe or device: `{}`", data.display());
        let hint = "a resumed run reads its data again; write the rows to a file first";
        return Err(UserError::new(message).with_hint(hint).into());
    }
    let prepared = start::prepare(settings, resumed.as_ref(), output)?;
    match with_trainer(prepared, Execution { flags, resumed, output, group })? {
        Some(report) => report.print(output, started.elapsed().as_secs_f64()),
        None => Ok(()),
    }
}

/// Whether another process writes the files and prints messages.
fn is_follower(group: Option<&Group>) -> bool {
    group.is_some_and(|group| group.rank() > 0)
}

/// Prints the plan of a run.
pub(crate) fn plan(flags: &PlanArguments, output: Output) -> Result<()> {
    let settings = flags.settings.over_file(flags.config.as_deref())?;
    with_trainer(start::prepare(settings, None, output)?, Planning { flags, output })
}

/// An action with a trainer, generic over what it trains.
trait Job {
    type Result;

    fn run<T: Kept>(self, trainer: Trainer<T>, prepared: Prepared) -> Result<Self::Result>;
}

struct Execution<'a> {
    flags: &'a TrainArguments,
    resumed: Option<RunFolder>,
    output: Output,
    group: Option<Group>,
}

impl Job for Execution<'_> {
    /// None for a rank other than 0.
    type Result = Option<Report>;

    fn run<T: Kept>(self, trainer: Trainer<T>, prepared: Prepared) -> Result<Option<Report>> {
        execute(trainer, prepared, self)
    }
}

struct Planning<'a> {
    flags: &'a PlanArguments,
    output: Output,
}

impl Job for Planning<'_> {
    type Result = ();

    fn run<T: Kept>(self, trainer: Trainer<T>, mut prepared: Prepared) -> Result<()> {
        let (trainer, _) = prepared.schedule(trainer)?;
        trainer.check()?;
        plan::print(trainer, &prepared, self.flags, self.output)
    }
}

/// Runs a job with the trainer that the settings describe.
fn with_trainer<J: Job>(prepared: Prepared, job: J) -> Result<J::Result> {
    let config = prepared.training_config();
    if let Some(adapter) = prepared.adapter.clone() {
        let mut trainer = Trainer::new(adapter, config)?;
        if let Some(ratio) = prepared.settings.lora_plus_ratio {
            trainer = trainer.with_lora_plus_ratio(ratio);
        }
        job.run(trainer, prepared)
    } else if let Some(count) = prepared.settings.train_last_layers {
        let layers = LastLayers::new(&prepared.model, count)?;
        job.run(Trainer::of(layers, config)?, prepared)
    } else {
        job.run(Trainer::full(prepared.model.clone(), config)?, prepared)
    }
}

/// From now on, Ctrl-C exits at once with the status of a stopped run, and prints how to resume, if possible. Before the
/// first completed step there is nothing to save.
fn stop_at_once(run: Option<&Path>, output: Output) {
    let run = run.map(|path| path.to_string_lossy().into_owned());
    interrupt::end_with(move || {
        if output.json {
            // standard output may be closed
            let _ = Output::print_json(&json!({ "run": run, "stop_reason": "stopped" }));
        }
        output.note("stopped before the first step was completed");
        if let Some(run) = &run {
            output.note(format_args!("resume with     metal-candle train --resume {run}{}", rank::flag()));
        }
    });
}

/// The run to resume, if any, and the settings from the file and the flags.
fn settings(flags: &TrainArguments) -> Result<(Option<RunFolder>, TrainSettings)> {
    if let Some(path) = &flags.resume {
        let (run, settings) = RunFolder::open(path)?;
        let kept: Vec<_> = flags.settings.given()?.into_iter().filter(|name| !FREE.contains(&name.as_str())).collect();
        if !kept.is_empty() {
            return Err(UserError::new(format!("a resumed run keeps its settings: remove `{}`", kept.join("`, `")))
                .with_hint(format!("to start a new run from these settings: --config {}/config.toml", path.display()))
                .into());
        }
        return Ok((Some(run), flags.settings.over(&settings)?));
    }
    Ok((None, flags.settings.over_file(flags.config.as_deref())?))
}

/// Settings that may change when a run resumes.
const FREE: [&str; 2] = ["--device", "--test-samples"];

/// What this command can train and save.
trait Kept: Trained {
    /// Writes it to the folder where other commands find it; returns the folder.
    fn keep(&self, run: &RunFolder, prepared: &Prepared) -> Result<PathBuf>;

    fn generator(&self) -> metal_candle::Result<Generator> {
        let generator = Generator::new(self.run_model().clone());
        Ok(match self.run_terms()? {
            Some(terms) => generator.with_adapter(terms),
            None => generator,
        })
    }
}

impl Kept for LoRAAdapter {
    fn keep(&self, run: &RunFolder, prepared: &Prepared) -> Result<PathBuf> {
        if let Start::Loftq { .. } = prepared.settings.start()? {
            start::save_full(self.model(), &run.base(), prepared)?;
            let base = std::path::absolute(run.base()).unwrap_or_else(|_| run.base());
            self.with_base_model(base.to_string_lossy()).save(run.adapter())?;
        } else {
            self.save(run.adapter())?;
        }
        prepared.write_template(&run.adapter())?;
        Ok(run.adapter())
    }
}

impl Kept for Model {
    fn keep(&self, run: &RunFolder, prepared: &Prepared) -> Result<PathBuf> {
        start::save_full(self, &run.model(), prepared)?;
        Ok(run.model())
    }
}

impl Kept for LastLayers {
    fn keep(&self, run: &RunFolder, prepared: &Prepared) -> Result<PathBuf> {
        self.model().keep(run, prepared)
    }
}

/// The best state of a run, or the last state if there was no evaluation.
fn state<T: Trained>(trainer: &Trainer<T>) -> T {
    trainer.best().unwrap_or_else(|| trainer.latest())
}

fn execute<T: Kept>(trainer: Trainer<T>, mut prepared: Prepared, execution: Execution) -> Result<Option<Report>> {
    let Execution { flags, resumed, output, group } = execution;
    prepared.num_devices = group.as_ref().map_or(1, Group::num_ranks);
    let rows = report::rows(&prepared.data);
    let to_show = prepared.to_show();
    let (trainer, total_steps) = prepared.schedule(trainer)?;
    let interval = prepared.settings.eval_interval.unwrap_or(0);
    trainer.check()?;
    let (trainer, fitted) = prepared.fit(trainer)?;
    let trainer = match &group {
        Some(group) => trainer.with_group(group.clone()),
        None => trainer,
    };
    if is_follower(group.as_ref()) {
        help(trainer, &prepared, resumed.as_ref())?;
        return Ok(None);
    }
    prepared.note_choice(&fitted.plan);
    // all checks are done; files are written from here on
    let resumes = resumed.is_some();
    let run = match resumed {
        Some(run) => run,
        None => RunFolder::create(prepared.settings.output.as_deref())?,
    };
    let _lock = RunLock::take(run.path())?;
    prepared.settings.output = None;
    prepared.given.output = None;
    prepared.write_template(run.path())?;
    run.remove_stale_temporaries()?;
    run.write_settings(&prepared.given, &prepared.settings).inspect_err(|_| run.abandon())?;
    stop_at_once(Some(run.path()), output);
    report::summary(&prepared, &rows, &run, total_steps, output);
    fitted.note(output);

    let questions = prepared.questions();
    let before = state(&trainer);
    let written_before = write(&before, &prepared.tokenizer, &questions, to_show.as_ref())?;
    report::sample_before(&prepared.tokenizer, to_show.as_ref(), &written_before, output)?;

    let title = format!("{} on {}", prepared.source.name, prepared.data_name);
    let recorder = Recorder::new(run.clone(), prepared.record()?);
    let mut watch = Watch::new(output, recorder, title, run.picture());
    if flags.tui {
        let asked = to_show.as_ref().map(|question| question.prompt_text(&prepared.tokenizer)).transpose()?;
        watch = watch.with_dashboard(asked.zip(written_before.sample.clone()));
    }
    if flags.profile {
        watch = watch.with_profiler(Profiler::new(&run));
    }
    let watch = Arc::new(Mutex::new(watch));
    let trainer = prepared.warnings(resumes)?.into_iter().fold(trainer, Trainer::with_warning);
    let shared = Arc::clone(&watch);
    let trainer = trainer
        .with_run_folder(run.path())
        .with_save_interval(prepared.settings.save_interval.unwrap_or(interval.max(1)))
        .with_resume(resumes)
        .with_callback(move |event| shared.lock().unwrap_or_else(PoisonError::into_inner).event(event));
    let outcome = trainer.train(&prepared.data.train);
    interrupt::listen();
    let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
    watch.close();
    let profiled = watch.profiler.take().map(Profiler::write);
    let metrics: TrainingMetrics = outcome.inspect_err(|error| {
        // the chart and the record help to find the cause; the error is more important than a failure to write them
        let _ = watch.draw();
        let _ = watch.recorder.end(Outcome::Failed, Some(error.to_string()));
    })?;
    watch.draw()?;
    if let Some(failure) = watch.failure.take() {
        return Err(failure.into());
    }
    let profiled: Option<Profiled> = profiled.transpose()?.flatten();

    let after = state(&trainer);
    let kept = after.keep(&run, &prepared)?;
    let outcome = match metrics.stop_reason {
        StopReason::Callback => Outcome::Stopped,
        _ => Outcome::Done,
    };
    watch.recorder.end(outcome, None)?;
    let written_after = match metrics.stop_reason {
        StopReason::Callback => Written::default(),
        _ => write(&after, &prepared.tokenizer, &questions, to_show.as_ref())?,
    };
    Ok(Some(Report {
        run,
        kept,
        is_full: prepared.adapter.is_none(),
        model: prepared.source.name.clone(),
        quantize: prepared.settings.quantize,
        metrics,
        total_steps,
        valid: watch.recorder.curves().valid.clone(),
        num_questions: questions.len(),
        before: written_before,
        after: written_after,
        example: to_show.and_then(|question| question.asked()),
        profiled,
    }))
}

/// Trains as a rank other than 0, which reads the checkpoint of a resumed run and writes nothing.
fn help<T: Kept>(trainer: Trainer<T>, prepared: &Prepared, resumed: Option<&RunFolder>) -> Result<()> {
    let trainer = match resumed {
        Some(run) => trainer.with_run_folder(run.path()).with_resume(true),
        None => trainer,
    };
    trainer.train(&prepared.data.train)?;
    Ok(())
}

/// Generates answers with the current state.
fn write<T: Kept>(
    state: &T,
    tokenizer: &Tokenizer,
    questions: &[Question],
    to_show: Option<&Question>,
) -> Result<Written> {
    let mut generator = state.generator()?.with_tokenizer(tokenizer.clone());
    let sample = to_show.map(|question| show(&mut generator, question)).transpose()?;
    let answers = answer(&mut generator, tokenizer, questions)?;
    Ok(Written { sample, num_right: answers.iter().filter(|answer| answer.is_right).count() })
}
