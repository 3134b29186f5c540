//! Runs fine-tuning jobs: a queue on disk, one training process at a time, whose checkpoints are served during training.

mod child;
mod events;
mod form;
mod record;
mod run;
mod runner;
mod settings;
mod store;

use crate::adapters::Adapters;
use crate::config::JobsConfig;
use crate::files::Files;
pub(crate) use events::{Event, Page};
pub(crate) use form::{checkpoint_objects, job_object};
pub(crate) use settings::JobSettings;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
pub(crate) use store::{Jobs, NewJob, no_such_job};

/// Locks a folder of files and jobs against other servers until the returned value is dropped.
///
/// # Errors
/// Another server uses the folder, or it cannot be written.
pub(crate) fn lock_folder(folder: &Path) -> metal_candle::Result<File> {
    metal_candle::files::create_folder(folder)?;
    let path = folder.join("server.lock");
    let lock = File::create(&path).map_err(|source| metal_candle::Error::Write { path, source })?;
    if matches!(lock.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
        let message = format!("another server uses the folder `{}`", folder.display());
        return Err(metal_candle::Error::Argument { name: "jobs".into(), message });
    }
    Ok(lock)
}

/// Opens the jobs in a folder and starts the thread that runs them.
///
/// # Errors
/// The folder cannot be used, or the thread cannot be started.
pub(crate) fn start(
    config: JobsConfig,
    model: String,
    lock: File,
    files: Arc<Files>,
    adapters: Arc<Adapters>,
) -> metal_candle::Result<(Arc<Jobs>, JoinHandle<()>)> {
    let jobs = Arc::new(Jobs::open(config, model, lock, files, adapters)?);
    let of_thread = Arc::clone(&jobs);
    let thread = std::thread::Builder::new().name("jobs".into()).spawn(move || runner::run(&of_thread));
    let thread =
        thread.map_err(|error| metal_candle::Error::Device(format!("cannot start the thread for jobs: {error}")))?;
    Ok((jobs, thread))
}
