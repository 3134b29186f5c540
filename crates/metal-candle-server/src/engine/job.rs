//! The jobs of the engine, and the channel of their updates.

use crate::adapters::Adapter;
use crate::error::ApiError;
use metal_candle::inference::{Finish, GenerationConfig, Piece, Speculation, TokenMask};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Maximum number of unread pieces per sample. The sequence is paused when its reader is this far behind.
const MAX_BEHIND: usize = 64;

/// The limits of the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineLimits {
    /// Maximum number of sequences that run at the same time.
    pub(crate) slots: usize,
    /// Maximum number of tokens in the prompt and the answer.
    pub(crate) context: usize,
    /// The size of the KV cache, which is allocated at the start.
    pub(crate) cache_bytes: usize,
    /// Maximum number of waiting sequences.
    pub(crate) max_waiting: usize,
    /// Longest wait for a slot.
    pub(crate) queue_timeout: Duration,
    /// Longest duration of a job.
    pub(crate) request_timeout: Duration,
    /// Longest time for which a reader may not read.
    pub(crate) stall_timeout: Duration,
}

/// A prompt of one client, to be answered one or more times.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    pub(crate) config: GenerationConfig,
    pub(crate) num_samples: usize,
    pub(crate) adapter: Option<Arc<Adapter>>,
    pub(crate) mask: Option<Box<dyn TokenMask>>,
    pub(crate) num_top: usize,
    pub(crate) speculation: Speculation,
    /// The text that the client expects.
    pub(crate) prediction: Vec<u32>,
    /// The prefix cache salt: jobs with equal salts share prefixes.
    pub(crate) salt: u128,
    /// The index of the key that the job belongs to.
    pub(crate) owner: usize,
    /// Maximum number of sequences of this owner that run at the same time.
    pub(crate) max_running: usize,
}

/// An update of a job.
#[derive(Debug)]
pub(crate) enum Update {
    /// The next piece of a sample.
    Piece(usize, Piece),
    /// A sample was ended by [`Answers::stop`].
    Stopped(usize, Finish),
    /// The job failed; this is the last update.
    Failed(ApiError),
}

/// The updates of a job. Dropping it cancels the job.
#[derive(Debug)]
pub(crate) struct Answers {
    receiver: mpsc::Receiver<Update>,
    stops: Stops,
}

/// The samples that their reader has stopped.
#[derive(Debug, Clone, Default)]
pub(super) struct Stops(Arc<Mutex<Vec<usize>>>);

impl Stops {
    fn samples(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the samples stopped since the last call.
    pub(super) fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.samples())
    }
}

impl Answers {
    /// Creates a channel for the updates of `num_samples` samples.
    pub(super) fn channel(num_samples: usize) -> (mpsc::Sender<Update>, Stops, Self) {
        let (sender, receiver) = mpsc::channel(MAX_BEHIND * num_samples.max(1));
        let stops = Stops::default();
        (sender, stops.clone(), Self { receiver, stops })
    }

    /// Ends a sample after the current step. Its last update is [`Update::Stopped`], unless it ends by itself.
    pub(crate) fn stop(&self, sample: usize) {
        self.stops.samples().push(sample);
    }

    /// The next update; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.receiver.recv().await
    }

    /// The next update, if it is available now.
    pub(crate) fn try_next(&mut self) -> Option<Update> {
        self.receiver.try_recv().ok()
    }
}
