//! Runs the model on a dedicated thread: a fair queue of jobs, one scheduler, and a bounded channel per job.

mod handle;
mod job;
mod queue;
mod running;
mod worker;

pub(crate) use handle::Engine;
pub(crate) use job::{Answers, EngineLimits, Job, Update};
