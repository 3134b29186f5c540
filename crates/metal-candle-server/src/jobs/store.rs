//! Stores the jobs of a server: clients create, read and change them, and use the adapters they train.

use super::events::{Event, EventFile};
use super::record::{self, JobError, JobRecord, JobState, adapter_name};
use super::run::Run;
use super::settings::{JobSettings, Serving};
use crate::adapters::{Adapters, Replaces};
use crate::config::JobsConfig;
use crate::error::ApiError;
use crate::files::{FileRecord, FileStats, FileStatus, Files};
use crate::ids::{new_id, unix_time};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Maximum number of waiting jobs.
const MAX_WAITING: usize = 16;
/// Maximum number of jobs that are stored.
const MAX_JOBS: usize = 1000;
/// The prefix of plan folders.
const PLAN: &str = ".plan-";
/// The folder with the files of a job.
const DATA: &str = "data";

/// A request for a job.
#[derive(Debug, Clone)]
pub(crate) struct NewJob {
    pub(crate) training_file: String,
    pub(crate) validation_file: Option<String>,
    pub(crate) suffix: Option<String>,
    pub(crate) seed: u64,
    pub(crate) settings: JobSettings,
    pub(crate) metadata: Option<Map<String, Value>>,
}

/// The progress of a running job.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    pub(crate) step: u64,
    pub(crate) total_steps: u64,
    /// The first step that this process observed, and when.
    pub(crate) first: Option<(u64, Instant)>,
    /// The step of the checkpoint that is served under the job's name.
    pub(crate) served_step: Option<u64>,
}

/// The jobs of all clients. Each job is visible only to the key that created it.
#[derive(Debug)]
pub(crate) struct Jobs {
    pub(super) config: JobsConfig,
    folder: PathBuf,
    /// The name of the base model.
    model: String,
    files: Arc<Files>,
    pub(super) adapters: Arc<Adapters>,
    state: Mutex<State>,
    changed: Condvar,
    /// Locked while the server runs, because two servers would run the same jobs.
    _lock: File,
}

#[derive(Debug, Default)]
struct State {
    by_id: BTreeMap<String, JobRecord>,
    live: BTreeMap<String, Live>,
    is_stopping: bool,
}

impl Jobs {
    /// Opens the jobs in a folder.
    ///
    /// # Errors
    /// The folder cannot be read or written, or another server uses it.
    pub(super) fn open(
        config: JobsConfig,
        model: String,
        lock: File,
        files: Arc<Files>,
        adapters: Arc<Adapters>,
    ) -> metal_candle::Result<Self> {
        let folder = config.folder.join("jobs");
        metal_candle::files::create_folder(&folder)?;
        let mut state = State::default();
        let read_error = |source| metal_candle::Error::Read { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(read_error)? {
            let path = entry.map_err(read_error)?.path();
            match JobRecord::read(&path) {
                Some(record) => {
                    state.by_id.insert(record.id.clone(), record);
                }
                None if is_remnant(&path) => {
                    let _ = std::fs::remove_dir_all(&path);
                }
                None => tracing::warn!("`{}` contains no readable job and is ignored", path.display()),
            }
        }
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Ok(Self { config, folder, model, files, adapters, state, changed, _lock: lock })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of a job.
    pub(super) fn job_folder(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// The run folder of a job.
    pub(crate) fn run(&self, id: &str) -> Run {
        Run::new(self.job_folder(id).join("run"))
    }

    /// The events of a job.
    pub(crate) fn events(&self, id: &str) -> EventFile {
        EventFile::in_folder(&self.job_folder(id))
    }

    /// A job of this owner.
    pub(crate) fn get(&self, owner: &str, id: &str) -> Option<JobRecord> {
        self.state().by_id.get(id).filter(|record| record.owner == owner).cloned()
    }

    /// The jobs of an owner, newest first.
    pub(crate) fn list(&self, owner: &str) -> Vec<JobRecord> {
        let mut list: Vec<JobRecord> =
            self.state().by_id.values().filter(|record| record.owner == owner).cloned().collect();
        list.sort_by(|a, b| (b.created, &b.id).cmp(&(a.created, &a.id)));
        list
    }

    /// The progress of a running job.
    pub(crate) fn live(&self, id: &str) -> Option<Live> {
        self.state().live.get(id).cloned()
    }

    pub(super) fn set_live(&self, id: &str, live: Option<Live>) {
        let mut state = self.state();
        match live {
            Some(live) => state.live.insert(id.to_owned(), live),
            None => state.live.remove(id),
        };
    }

    /// A file that a job can train on.
    fn usable_file(&self, owner: &str, id: &str, param: &str) -> Result<FileRecord, ApiError> {
        let Some(file) = self.files.get(owner, id) else {
            return Err(ApiError::field(param, format!("`{param}`: there is no such file")));
        };
        if file.status == FileStatus::Error {
            let details = file.details.unwrap_or_default();
            let message = format!("`{param}`: the file cannot be used: {details}");
            return Err(ApiError::field(param, message).with_code("invalid_training_file"));
        }
        Ok(file)
    }

    /// Statistics of the training file; `None` until all files of a job are checked.
    fn stats(&self, owner: &str, new: (&str, Option<&str>)) -> Result<Option<FileStats>, ApiError> {
        let training = self.usable_file(owner, new.0, "training_file")?;
        let validation = new.1.map(|id| self.usable_file(owner, id, "validation_file")).transpose()?;
        let is_checked = |file: &FileRecord| file.status == FileStatus::Processed;
        Ok((is_checked(&training) && validation.as_ref().is_none_or(is_checked)).then_some(training.stats))
    }

    /// Links the files of a job into a data folder for `train`. They remain if the client deletes its files.
    fn link_data(&self, folder: &Path, new: &NewJob) -> Result<PathBuf, ApiError> {
        let data = folder.join(DATA);
        std::fs::create_dir_all(&data).map_err(ApiError::server)?;
        let files = [("train.jsonl", Some(&new.training_file)), ("valid.jsonl", new.validation_file.as_ref())];
        for (name, id) in files.into_iter().filter_map(|(name, id)| Some((name, id?))) {
            let (from, to) = (self.files.path(id), data.join(name));
            // the file system may not support links
            let linked = std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(&from, &to).map(drop));
            linked.map_err(ApiError::server)?;
        }
        Ok(data)
    }

    /// Queues a job.
    ///
    /// # Errors
    /// A file is not usable, or too many jobs wait.
    pub(crate) fn create(&self, owner: &str, new: NewJob) -> Result<JobRecord, ApiError> {
        let stats = self.stats(owner, (&new.training_file, new.validation_file.as_deref()))?;
        Self::check_queue(&self.state())?;
        let id = new_id(record::ID);
        let folder = self.job_folder(&id);
        let record = JobRecord {
            adapter: adapter_name(&self.model, owner, new.suffix.as_deref(), &id),
            id: id.clone(),
            owner: owner.to_owned(),
            model: self.model.clone(),
            created: unix_time(),
            finished: None,
            state: JobState::Queued,
            is_paused: false,
            is_cancelled: false,
            training_file: new.training_file.clone(),
            validation_file: new.validation_file.clone(),
            suffix: new.suffix.clone(),
            seed: new.seed,
            settings: new.settings.clone(),
            metadata: new.metadata.clone(),
            stats,
            trained_tokens: None,
            error: None,
        };
        let stored = self.link_data(&folder, &new).and_then(|_| {
            self.events(&id).append(&[Event::info(format!("Created fine-tuning job: {id}"), Value::Null)]);
            let mut state = self.state();
            Self::check_queue(&state)?;
            record.write(&folder).map_err(ApiError::server)?;
            state.by_id.insert(id.clone(), record.clone());
            Ok(())
        });
        if let Err(error) = stored {
            let _ = std::fs::remove_dir_all(&folder);
            return Err(error);
        }
        self.changed.notify_all();
        Ok(record)
    }

    fn check_queue(state: &State) -> Result<(), ApiError> {
        if state.is_stopping {
            return Err(ApiError::unavailable("draining", "the server is shutting down"));
        }
        let num_waiting = state.by_id.values().filter(|record| record.state == JobState::Queued).count();
        if num_waiting >= MAX_WAITING {
            let message = format!("expected at most {MAX_WAITING} waiting jobs; cancel one, or try again later");
            return Err(ApiError::rate_limit(message, Duration::from_mins(1)));
        }
        if state.by_id.len() >= MAX_JOBS {
            let folder = "the job folder";
            return Err(ApiError::conflict(format!("{folder} contains {MAX_JOBS} jobs; remove old ones from it")));
        }
        Ok(())
    }

    /// Estimates the memory and time of a job.
    ///
    /// # Errors
    /// A file is not usable or not checked yet, or the settings do not fit.
    pub(crate) fn plan(&self, owner: &str, new: &NewJob) -> Result<Value, ApiError> {
        let Some(stats) = self.stats(owner, (&new.training_file, new.validation_file.as_deref()))? else {
            return Err(ApiError::unavailable("loading", "the files are still being checked"));
        };
        let folder = tempfile::Builder::new().prefix(PLAN).tempdir_in(&self.folder).map_err(ApiError::server)?;
        let data = self.link_data(folder.path(), new)?;
        let arguments = self.settings_arguments(&data, new.seed, &new.settings, &stats);
        super::child::plan(&self.config, folder.path(), &arguments).map_err(ApiError::invalid)
    }

    /// The arguments of `train` and `plan`: the served model, the data, and numbers.
    fn settings_arguments(&self, data: &Path, seed: u64, settings: &JobSettings, stats: &FileStats) -> Vec<OsString> {
        let mut arguments = self.config.model_flags.clone();
        arguments.extend(["--data".into(), data.into()]);
        arguments.extend(settings.flags(seed, self.config.learning_rate, stats).into_iter().map(OsString::from));
        arguments
    }

    /// The arguments of `train` that start a job.
    pub(super) fn start_arguments(&self, record: &JobRecord) -> Vec<OsString> {
        let data = self.job_folder(&record.id).join("data");
        let stats = record.stats.clone().unwrap_or_default();
        let mut arguments = self.settings_arguments(&data, record.seed, &record.settings, &stats);
        arguments.extend(["--output".into(), self.run(&record.id).path().into()]);
        arguments
    }

    /// Changes a record, and writes it.
    pub(super) fn update(&self, id: &str, change: impl FnOnce(&mut JobRecord)) -> Option<JobRecord> {
        let mut state = self.state();
        let record = state.by_id.get_mut(id)?;
        change(record);
        if let Err(error) = record.write(&self.job_folder(id)) {
            tracing::error!("job `{id}`: {error}");
        }
        if record.state.has_ended() {
            // the run folder contains everything else that is needed
            let _ = std::fs::remove_dir_all(self.job_folder(id).join(DATA));
        }
        Some(record.clone())
    }

    /// Marks a job as running; false if the client has stopped it in the meantime.
    pub(super) fn start(&self, id: &str) -> bool {
        let started = self.update(id, |record| {
            if !record.is_cancelled && !record.is_paused && !record.state.has_ended() {
                record.state = JobState::Running;
            }
        });
        started.is_some_and(|record| record.state == JobState::Running)
    }

    /// Changes a job of this owner that has not ended.
    fn change(
        &self,
        owner: &str,
        id: &str,
        verb: &str,
        change: impl FnOnce(&mut JobRecord),
    ) -> Result<JobRecord, ApiError> {
        let record = self.get(owner, id).ok_or_else(|| no_such_job(id))?;
        let mut before = record.state;
        let changed = self.update(id, |record| {
            before = record.state;
            if !before.has_ended() {
                change(record);
            }
        });
        if before.has_ended() {
            return Err(ApiError::conflict(format!("a job with the status `{}` cannot be {verb}", before.name())));
        }
        self.changed.notify_all();
        changed.ok_or_else(|| no_such_job(id))
    }

    /// Cancels a job. A running job writes a checkpoint first.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub(crate) fn cancel(&self, owner: &str, id: &str) -> Result<JobRecord, ApiError> {
        let record = self.change(owner, id, "cancelled", |record| {
            record.is_cancelled = true;
            if record.state == JobState::Queued {
                record.end(JobState::Cancelled, None);
            }
        })?;
        if record.state == JobState::Cancelled {
            self.events(id).append(&[Event::info("The job was cancelled", Value::Null)]);
        }
        Ok(record)
    }

    /// Pauses a job until [`Self::resume`]. A running job writes a checkpoint first.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub(crate) fn pause(&self, owner: &str, id: &str) -> Result<JobRecord, ApiError> {
        let record = self.change(owner, id, "paused", |record| record.is_paused = true)?;
        self.events(id).append(&[Event::info("The job is paused", Value::Null)]);
        Ok(record)
    }

    /// Queues a paused job again.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub(crate) fn resume(&self, owner: &str, id: &str) -> Result<JobRecord, ApiError> {
        let record = self.change(owner, id, "resumed", |record| record.is_paused = false)?;
        self.events(id).append(&[Event::info("The job is no longer paused", Value::Null)]);
        Ok(record)
    }

    /// The next job to run: an interrupted one, else the oldest waiting one.
    pub(super) fn next(&self) -> Option<JobRecord> {
        self.check_files();
        let state = self.state();
        let is_ready = |record: &&JobRecord| match record.state {
            JobState::Running => true,
            JobState::Queued => !record.is_paused && record.stats.is_some(),
            _ => false,
        };
        let ready = state.by_id.values().filter(is_ready);
        ready.min_by_key(|record| (record.state != JobState::Running, record.created, &record.id)).cloned()
    }

    /// Updates jobs whose files have been checked.
    fn check_files(&self) {
        for record in self.unchecked() {
            match self.stats(&record.owner, (&record.training_file, record.validation_file.as_deref())) {
                Ok(None) => {}
                Ok(Some(stats)) => {
                    self.update(&record.id, |record| record.stats = Some(stats));
                    let event = Event::info("Files validated, moving job to queued state", Value::Null);
                    self.events(&record.id).append(&[event]);
                }
                Err(error) => {
                    self.events(&record.id).append(&[Event::error(error.message.clone())]);
                    let code = error.code.unwrap_or("invalid_training_file").to_owned();
                    let error = JobError { code, message: error.message, param: error.param };
                    self.update(&record.id, |record| record.end(JobState::Failed, Some(error)));
                }
            }
        }
    }

    fn unchecked(&self) -> Vec<JobRecord> {
        let is_unchecked = |record: &&JobRecord| record.state == JobState::Queued && record.stats.is_none();
        self.state().by_id.values().filter(is_unchecked).cloned().collect()
    }

    /// Waits for a change, for at most `time`.
    pub(super) fn wait(&self, time: Duration) {
        // files are checked by another thread
        let time = if self.unchecked().is_empty() { time } else { time.min(Duration::from_millis(100)) };
        let state = self.state();
        if !state.is_stopping {
            drop(self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner));
        } else if time < Duration::from_secs(1) {
            drop(state);
            std::thread::sleep(time);
        }
    }

    /// Stops the running job, which resumes when a server is started with the same folder.
    pub(crate) fn stop(&self) {
        self.state().is_stopping = true;
        self.changed.notify_all();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.state().is_stopping
    }

    /// Whether the client has requested a job to stop.
    pub(super) fn is_asked_to_stop(&self, id: &str) -> bool {
        self.state().by_id.get(id).is_none_or(|record| record.is_cancelled || record.is_paused)
    }

    /// The adapter folder for the name of a job or of one of its checkpoints.
    fn source(&self, name: &str) -> Option<(PathBuf, String)> {
        let (adapter, step) = match name.rsplit_once(CHECKPOINT) {
            // each checkpoint has exactly one name
            Some((adapter, step)) => {
                (adapter, Some(step.parse::<u64>().ok().filter(|number| number.to_string() == step)?))
            }
            None => (name, None),
        };
        let record = self.state().by_id.values().find(|record| record.adapter == adapter).cloned()?;
        let run = self.run(&record.id);
        let path = match step {
            Some(step) => run.checkpoint(step),
            None if record.state == JobState::Succeeded => run.adapter(),
            None if record.settings.serve == Serving::None => return None,
            None => run.checkpoint(*run.checkpoints().last()?),
        };
        path.is_dir().then_some((path, record.id))
    }

    /// Whether a name belongs to an adapter of a job that is not loaded.
    pub(crate) fn can_load(&self, name: &str) -> bool {
        name.starts_with("ft:") && self.adapters.get(name).is_none() && self.source(name).is_some()
    }

    /// Loads the adapter of a job or of one of its checkpoints.
    ///
    /// # Errors
    /// There are too many adapters, or it cannot be read.
    pub(crate) fn load(&self, name: &str) -> Result<(), ApiError> {
        let Some((path, id)) = self.source(name) else { return Ok(()) };
        match self.adapters.load(name, &path, &id, Replaces::Nothing) {
            // another request has loaded it
            Err(_) if self.adapters.get(name).is_some() => Ok(()),
            loaded => loaded.map(drop),
        }
    }

    /// The adapter names of succeeded jobs that should be served, newest first.
    pub(super) fn finished_adapters(&self) -> Vec<String> {
        let is_served =
            |record: &&JobRecord| record.state == JobState::Succeeded && record.settings.serve != Serving::None;
        let mut records: Vec<JobRecord> = self.state().by_id.values().filter(is_served).cloned().collect();
        records.sort_by_key(|record| std::cmp::Reverse(record.finished));
        records.into_iter().map(|record| record.adapter).collect()
    }
}

/// Whether a folder belongs to a plan, or to a job that was being created when the server was killed.
fn is_remnant(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_unmade = name.starts_with(record::ID) && !path.join(record::FILE).exists();
    path.is_dir() && (name.starts_with(PLAN) || is_unmade)
}

/// The separator between the name of a job's adapter and the step of a checkpoint.
pub(crate) const CHECKPOINT: &str = ":ckpt-step-";

/// 404: no such job of this client.
pub(crate) fn no_such_job(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::not_found(format!("there is no fine-tuning job `{id}`"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_remnants_of_a_killed_server_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, with_record: bool| {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).unwrap();
            if with_record {
                std::fs::write(path.join(record::FILE), "{\"of a later version\": 1}").unwrap();
            }
            is_remnant(&path)
        };
        assert!(make(".plan-x", false) && make("ftjob-unmade", false));
        assert!(!make("ftjob-unreadable", true) && !make("photographs", false));
    }
}
