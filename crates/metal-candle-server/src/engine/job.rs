//! What the engine computes and what it sends back.

use crate::adapters::Adapter;
use crate::error::ApiError;
use metal_candle::inference::{Finish, GenerationConfig, Piece, Speculation, TokenMask};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Pieces that a reader may be behind before its sequence is paused, for each sample.
const MAX_BEHIND: usize = 64;

/// Limits of the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineLimits {
    /// Most sequences that run at a time.
    pub(crate) slots: usize,
    /// Most tokens of prompt and answer.
    pub(crate) context: usize,
    /// Bytes of the cache, which is reserved at the start.
    pub(crate) cache_bytes: usize,
    /// Most sequences that wait.
    pub(crate) max_waiting: usize,
    /// Longest wait for a slot.
    pub(crate) queue_timeout: Duration,
    /// Longest time of a job from its start.
    pub(crate) request_timeout: Duration,
    /// Longest time for which a reader may take nothing.
    pub(crate) stall_timeout: Duration,
}

/// A prompt to continue for one client.
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
    /// Jobs with the same salt share prefixes.
    pub(crate) salt: u64,
    /// The key whose turn it is in the queue.
    pub(crate) owner: usize,
    /// Most sequences of this owner that run at a time.
    pub(crate) max_running: usize,
}

/// What happened to a job.
#[derive(Debug)]
pub(crate) enum Update {
    /// The next piece of a sample.
    Piece(usize, Piece),
    /// The end of a sample by [`Answers::stop`].
    Stopped(usize, Finish),
    /// The job failed; there is no further update.
    Failed(ApiError),
}

/// The updates of a job. Dropping it cancels the job.
#[derive(Debug)]
pub(crate) struct Answers {
    receiver: mpsc::Receiver<Update>,
    stops: Stops,
}

/// The samples that their reader has enough of.
#[derive(Debug, Clone, Default)]
pub(super) struct Stops(Arc<Mutex<Vec<usize>>>);

impl Stops {
    fn samples(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The samples since the last call.
    pub(super) fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.samples())
    }
}

impl Answers {
    /// A channel for the updates of `num_samples` samples.
    pub(super) fn channel(num_samples: usize) -> (mpsc::Sender<Update>, Stops, Self) {
        let (sender, receiver) = mpsc::channel(MAX_BEHIND * num_samples.max(1));
        let stops = Stops::default();
        (sender, stops.clone(), Self { receiver, stops })
    }

    /// Ends a sample after the step that is under way. Its last update is [`Update::Stopped`], unless it ends by itself.
    pub(crate) fn stop(&self, sample: usize) {
        self.stops.samples().push(sample);
    }

    /// The next update; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.receiver.recv().await
    }

    /// The next update if there is one already.
    pub(crate) fn try_next(&mut self) -> Option<Update> {
        self.receiver.try_recv().ok()
    }
}
