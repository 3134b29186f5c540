//! [`Engine`]: the handle through which routes use the engine.

use super::job::{Answers, EngineLimits, Job};
use super::worker::{Calculation, Command, Shared, Task, run};
use crate::error::ApiError;
use crate::metrics::Metrics;
use metal_candle::data::Tokenizer;
use metal_candle::inference::{PrefixStorage, Scheduler, SchedulerConfig};
use metal_candle::models::Model;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::oneshot;

/// Sends jobs to the thread that owns the model. Clones share the thread.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
    limits: EngineLimits,
}

impl Engine {
    /// Starts the thread and allocates its cache.
    ///
    /// # Errors
    /// The device cannot hold the cache, prefixes cannot be stored, or the thread cannot be started.
    pub(crate) fn start(
        model: &Model,
        tokenizer: &Tokenizer,
        draft_model: Option<&Model>,
        (config, storage): (SchedulerConfig, Option<&PrefixStorage>),
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> metal_candle::Result<(Self, JoinHandle<()>)> {
        let new_scheduler = {
            let (model, tokenizer, draft_model) = (model.clone(), tokenizer.clone(), draft_model.cloned());
            let storage = storage.cloned();
            move || -> metal_candle::Result<Scheduler> {
                let mut scheduler = Scheduler::with_config(model.clone(), config)?.with_tokenizer(tokenizer.clone());
                if let Some(draft_model) = &draft_model {
                    scheduler = scheduler.with_draft_model(draft_model.clone())?;
                }
                if let Some(storage) = &storage {
                    scheduler = scheduler.with_prefix_storage(storage)?;
                }
                scheduler.reserve(limits.slots, limits.context)?;
                Ok(scheduler)
            }
        };
        let scheduler = new_scheduler()?;
        let shared = Arc::new(Shared::new(metrics));
        // a full channel means that the engine cannot accept more
        let (commands, receiver) = sync_channel(limits.max_waiting + limits.slots);
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || run(scheduler, new_scheduler, &receiver, &of_thread, limits))
            .map_err(|error| metal_candle::Error::Device(format!("cannot start the engine's thread: {error}")))?;
        Ok((Self { commands, shared, limits }, thread))
    }

    /// The limits.
    pub(crate) fn limits(&self) -> &EngineLimits {
        &self.limits
    }

    /// Queues a job.
    ///
    /// # Errors
    /// The queue is full, or the engine is draining.
    pub(crate) fn submit(&self, job: Job) -> Result<Answers, ApiError> {
        if self.shared.is_draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("draining", "the server is shutting down"));
        }
        let count = job.num_samples;
        let waiting = self.shared.waiting.fetch_add(count, Ordering::Relaxed);
        let waiting = waiting + self.shared.preempted.load(Ordering::Relaxed);
        let full = || {
            self.shared.waiting.fetch_sub(count, Ordering::Relaxed);
            self.shared.metrics.reject("queue_full");
            let message = format!("the queue is full: {waiting} sequences wait for a slot");
            Err(ApiError::unavailable("queue_full", message))
        };
        let (running, slots) = (self.num_running(), self.limits.slots);
        if waiting + running + count > self.limits.max_waiting + slots {
            return full();
        }
        if count > slots {
            self.shared.waiting.fetch_sub(count, Ordering::Relaxed);
            return Err(ApiError::field("n", format!("`n`: expected at most {slots} choices, found {count}")));
        }
        let (updates, stops, answers) = Answers::channel(count);
        let task = Task::new(job, updates, stops, Instant::now());
        match self.commands.try_send(Command::Start(Box::new(task))) {
            Ok(()) => Ok(answers),
            Err(std::sync::mpsc::TrySendError::Full(_)) => full(),
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => Err(ApiError::server("the engine has stopped")),
        }
    }

    /// Runs a computation with the model on the engine's thread, between two steps.
    ///
    /// # Errors
    /// The queue is full, or the computation panicked.
    pub(crate) async fn run<T, F>(&self, compute: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce(&Model) -> T + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let calculate = Box::new(move |model: &Model| {
            if !sender.is_closed() {
                // the client may have disconnected
                let _ = sender.send(compute(model));
            }
        });
        if self.commands.try_send(Command::Run(Calculation(calculate))).is_err() {
            self.shared.metrics.reject("queue_full");
            return Err(ApiError::unavailable("queue_full", "the queue is full"));
        }
        receiver.await.map_err(ApiError::server)
    }

    /// The number of sequences that wait for a slot.
    pub(crate) fn num_waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed) + self.shared.preempted.load(Ordering::Relaxed)
    }

    /// The number of running sequences.
    pub(crate) fn num_running(&self) -> usize {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// Whether the engine refuses new jobs.
    pub(crate) fn is_draining(&self) -> bool {
        self.shared.is_draining.load(Ordering::Relaxed)
    }

    /// Refuses new jobs. Jobs in the queue and in slots continue.
    pub(crate) fn drain(&self) {
        self.shared.is_draining.store(true, Ordering::Relaxed);
    }

    /// Ends all jobs with an error, and stops the thread.
    pub(crate) fn stop(&self) {
        self.drain();
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        // wakes the thread; if the channel is full, it is awake already
        let _ = self.commands.try_send(Command::Wake);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::engine::Update;
    use crate::untrusted::tests::nano;
    use metal_candle::ModelLoader;
    use metal_candle::inference::{FinishReason, GenerationConfig, Speculation};

    #[tokio::test]
    async fn a_sample_that_its_reader_stops_ends_alone() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano");
        let model = ModelLoader::new().with_device(metal_candle::Device::CPU).load(folder).unwrap();
        let config = SchedulerConfig { max_sequences: 2, prefill_chunk: 64, step_tokens: 64, kv_cache: None };
        let minute = std::time::Duration::from_mins(1);
        let limits = EngineLimits {
            slots: 2,
            context: 512,
            cache_bytes: 0,
            max_waiting: 4,
            queue_timeout: minute,
            request_timeout: minute,
            stall_timeout: minute,
        };
        let (engine, _) = Engine::start(&model, &nano(), None, (config, None), limits, Arc::default()).unwrap();
        let job = Job {
            prompt: vec![40, 41],
            config: GenerationConfig::default().with_max_tokens(400).with_ignore_eos(true),
            num_samples: 2,
            adapter: None,
            mask: None,
            num_top: 0,
            speculation: Speculation::Off,
            prediction: Vec::new(),
            salt: 0,
            owner: 0,
            max_running: usize::MAX,
        };
        let mut answers = engine.submit(job).unwrap();
        let (mut counts, mut reasons) = ([0; 2], [None; 2]);
        while let Some(update) = answers.next().await {
            match update {
                Update::Piece(sample, piece) => {
                    counts[sample] += 1;
                    reasons[sample] = piece.finish.map(|finish| finish.reason);
                    if (sample, counts[sample]) == (1, 5) {
                        answers.stop(1);
                    }
                }
                Update::Stopped(sample, finish) => {
                    assert_eq!(finish.generated_tokens, counts[sample]);
                    reasons[sample] = Some(finish.reason);
                }
                Update::Failed(error) => panic!("{}", error.message),
            }
        }
        assert_eq!(reasons, [Some(FinishReason::MaxTokens), Some(FinishReason::Cancelled)]);
        assert!(counts[0] == 400 && (5..400).contains(&counts[1]), "{counts:?}");
    }
}
