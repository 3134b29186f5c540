//! Fine-tuning jobs: a queue on disk, one trainer at a time in a process of its own, and its checkpoints served while it
//! trains.

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
use std::sync::Arc;
use std::thread::JoinHandle;
pub(crate) use store::{Jobs, NewJob, no_such_job};

/// Opens the jobs in a folder and starts the thread that runs them.
///
/// # Errors
/// The folder cannot be used, or the thread cannot be started.
pub(crate) fn start(
    config: JobsConfig,
    model: String,
    files: Arc<Files>,
    adapters: Arc<Adapters>,
) -> metal_candle::Result<(Arc<Jobs>, JoinHandle<()>)> {
    let jobs = Arc::new(Jobs::open(config, model, files, adapters)?);
    let of_thread = Arc::clone(&jobs);
    let thread = std::thread::Builder::new().name("jobs".into()).spawn(move || runner::run(&of_thread));
    let thread =
        thread.map_err(|error| metal_candle::Error::Device(format!("cannot start the thread of jobs: {error}")))?;
    Ok((jobs, thread))
}
