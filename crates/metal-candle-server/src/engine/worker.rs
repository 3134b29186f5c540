//! The thread that owns the scheduler: admits jobs, runs steps, and delivers pieces without ever waiting for a reader.

use super::job::{EngineLimits, Job, Stops, Update};
use super::queue::Queue;
use super::running::{Running, Waiting, in_turn, next_start, num_held, num_taken};
use crate::adapters::Adapter;
use crate::error::ApiError;
use crate::metrics::Metrics;
use metal_candle::inference::{AdapterId, Event, Request, Scheduler, SequenceId};
use metal_candle::models::Model;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

/// Time between two checks of paused sequences when the engine is idle.
const POLL: Duration = Duration::from_millis(5);
/// Maximum number of pieces that a step adds to a sequence: one per drafted token, and one more. A step in progress may add the
/// same number again.
const MAX_PIECES: usize = 16;
/// This number of failed steps within `FAILURE_WINDOW` stops the server: the failure is permanent.
const MAX_FAILURES: usize = 3;
const FAILURE_WINDOW: Duration = Duration::from_mins(1);

/// State that routes read.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) metrics: Arc<Metrics>,
    /// The number of submitted sequences without a slot.
    pub(super) waiting: AtomicUsize,
    pub(super) running: AtomicUsize,
    /// The number of preempted sequences.
    pub(super) preempted: AtomicUsize,
    pub(super) is_draining: AtomicBool,
    pub(super) is_stopped: AtomicBool,
}

impl Shared {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            waiting: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            preempted: AtomicUsize::new(0),
            is_draining: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
        }
    }
}

/// A computation with the model.
pub(super) struct Calculation(pub(super) Box<dyn FnOnce(&Model) + Send>);

impl std::fmt::Debug for Calculation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Calculation")
    }
}

#[derive(Debug)]
pub(super) enum Command {
    Start(Box<Task>),
    /// A computation with the model, between two steps.
    Run(Calculation),
    Wake,
}

/// A job and the channel to its reader.
#[derive(Debug)]
pub(super) struct Task {
    job: Job,
    updates: Sender<Update>,
    stops: Stops,
    submitted: Instant,
}

impl Task {
    pub(super) fn new(job: Job, updates: Sender<Update>, stops: Stops, submitted: Instant) -> Self {
        Self { job, updates, stops, submitted }
    }
}

/// Runs until the engine is stopped or every handle of it is dropped.
pub(super) fn run<F>(
    scheduler: Scheduler,
    new_scheduler: F,
    commands: &Receiver<Command>,
    shared: &Shared,
    limits: EngineLimits,
) where
    F: Fn() -> metal_candle::Result<Scheduler>,
{
    let mut worker = Worker {
        scheduler,
        shared,
        limits,
        queue: Queue::default(),
        last_owner: usize::MAX,
        running: Vec::new(),
        adapters: HashMap::new(),
        failures: Vec::new(),
        calculations: VecDeque::new(),
        has_stepped: false,
    };
    worker.run(commands, &new_scheduler);
    worker.scheduler.save_prefixes();
}

struct Worker<'a> {
    scheduler: Scheduler,
    shared: &'a Shared,
    limits: EngineLimits,
    queue: Queue<Task>,
    /// The owner of the last started job.
    last_owner: usize,
    running: Vec<Running>,
    /// The scheduler's id of each adapter generation.
    adapters: HashMap<u64, (AdapterId, Arc<Adapter>)>,
    failures: Vec<Instant>,
    calculations: VecDeque<Calculation>,
    /// Whether the last iteration computed something, so that the next need not wait.
    has_stepped: bool,
}

impl Worker<'_> {
    fn run(&mut self, commands: &Receiver<Command>, new_scheduler: &dyn Fn() -> metal_candle::Result<Scheduler>) {
        while self.receive(commands) {
            if self.shared.is_stopped.load(Ordering::Relaxed) {
                self.end_all(&ApiError::unavailable("draining", "the server is shutting down"));
                return;
            }
            self.end_abandoned();
            self.end_stopped();
            self.admit();
            self.forget_adapters();
            self.resume_readers();
            self.has_stepped = self.scheduler.has_work();
            if self.has_stepped {
                self.step(new_scheduler);
            }
            // one computation between two steps
            if let Some(calculation) = self.calculations.pop_front() {
                self.calculate(calculation);
            }
            self.shared.running.store(self.scheduler.num_running(), Ordering::Relaxed);
            let preempted = self.running.iter().filter(|task| task.preempted.is_some());
            self.shared.preempted.store(preempted.map(Running::num_open).sum(), Ordering::Relaxed);
        }
    }

    /// Receives commands of routes; waits if there is nothing to compute. Returns whether the engine continues.
    fn receive(&mut self, commands: &Receiver<Command>) -> bool {
        if !self.has_stepped && self.calculations.is_empty() {
            let is_empty = self.running.is_empty() && self.queue.is_empty();
            // waiting and paused jobs must be checked again
            let first = if is_empty {
                commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                commands.recv_timeout(POLL)
            };
            match first {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return !self.running.is_empty(),
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn calculate(&self, Calculation(calculate): Calculation) {
        let model = self.scheduler.model();
        // the caller notices that there is no result
        if catch_unwind(AssertUnwindSafe(|| calculate(model))).is_err() {
            tracing::error!("a computation panicked");
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Start(task) => self.queue.push(task.job.owner, *task),
            Command::Run(calculation) => self.calculations.push_back(calculation),
            Command::Wake => {}
        }
    }

    /// Ends jobs without a reader and jobs that have taken too long.
    fn end_abandoned(&mut self) {
        let (now, limits) = (Instant::now(), self.limits);
        let is_late = |task: &Task| now - task.submitted > limits.queue_timeout;
        for task in self.queue.extract(|task| task.updates.is_closed() || is_late(task)) {
            self.shared.waiting.fetch_sub(task.job.num_samples, Ordering::Relaxed);
            let seconds = limits.queue_timeout.as_secs();
            let message = format!("the request waited {seconds} s for a slot");
            let _ = task.updates.try_send(Update::Failed(ApiError::unavailable("timeout", message)));
        }
        for index in (0..self.running.len()).rev() {
            let task = &self.running[index];
            let stalled = task.paused.is_some_and(|since| now - since > limits.stall_timeout);
            let is_over = task.age(now) > limits.request_timeout;
            if !(task.updates.is_closed() || stalled || is_over) {
                continue;
            }
            let task = self.running.swap_remove(index);
            self.cancel(&task);
            let reason = if task.updates.is_closed() { "cancelled" } else { "timeout" };
            self.shared.metrics.finish(reason);
            let message = if stalled {
                format!("the client did not read for {} s", limits.stall_timeout.as_secs())
            } else if task.preempted.is_some() {
                format!("the request waited {} s for a slot", limits.request_timeout.as_secs())
            } else {
                format!("the request took longer than {} s", limits.request_timeout.as_secs())
            };
            let _ = task.updates.try_send(Update::Failed(ApiError::unavailable("timeout", message)));
        }
    }

    /// Ends the samples that their readers have stopped.
    fn end_stopped(&mut self) {
        for index in (0..self.running.len()).rev() {
            let task = &mut self.running[index];
            for sample in task.stops.take() {
                let Some(sequence) = task.sequences.get_mut(sample).and_then(Option::take) else { continue };
                // it may have ended in the last step
                let Ok(finish) = self.scheduler.cancel(sequence) else { continue };
                self.shared.metrics.finish(finish.reason.name());
                let _ = task.updates.try_send(Update::Stopped(sample, finish));
            }
            if task.open().next().is_none() {
                self.running.swap_remove(index);
            }
        }
    }

    fn cancel(&mut self, task: &Running) {
        for sequence in task.open() {
            // it may have ended in the last step
            let _ = self.scheduler.cancel(sequence);
        }
    }

    /// Assigns slots to waiting jobs, preempting running jobs if necessary.
    fn admit(&mut self) {
        loop {
            let may_start =
                |task: &&Task| num_held(&self.running, task.job.owner) + task.job.num_samples <= task.job.max_running;
            let queued = self.queue.heads().filter(may_start).map(|task| Waiting {
                owner: task.job.owner,
                count: task.job.num_samples,
                since: task.submitted,
                preempted: None,
            });
            let waiting = in_turn(&self.running, queued.collect(), self.last_owner);
            if waiting.is_empty() {
                return;
            }
            let (now, free) = (Instant::now(), self.limits.slots - num_taken(&self.running));
            let Some((next, chosen)) = next_start(&self.running, &waiting, free, now) else { return };
            for index in chosen {
                self.preempt(index, now);
            }
            self.last_owner = next.owner;
            if let Some(index) = next.preempted {
                self.resume(index, now);
            } else if let Some(task) = self.queue.pop(next.owner) {
                self.shared.waiting.fetch_sub(task.job.num_samples, Ordering::Relaxed);
                self.start(task);
            }
        }
    }

    /// Preempts a running job.
    fn preempt(&mut self, index: usize, now: Instant) {
        let task = &mut self.running[index];
        task.preempted = Some(now);
        self.shared.metrics.preemptions.add(1);
        for sequence in task.open() {
            // it may have ended in the last step
            let _ = self.scheduler.preempt(sequence);
        }
    }

    /// Resumes a preempted job.
    fn resume(&mut self, index: usize, now: Instant) {
        let task = &mut self.running[index];
        if let Some(since) = task.preempted.take() {
            task.waited += now - since;
        }
        for sequence in task.open() {
            let _ = self.scheduler.set_paused(sequence, false);
        }
    }

    fn start(&mut self, task: Task) {
        let Task { job, updates, stops, submitted } = task;
        let now = Instant::now();
        self.shared.metrics.queue_seconds.observe(now - submitted);
        self.shared.metrics.prompt_tokens.add(job.prompt.len() as u64);
        let adapter = match job.adapter.map(|adapter| self.adapter_id(adapter)).transpose() {
            Ok(adapter) => adapter,
            Err(error) => {
                let _ = updates.try_send(Update::Failed(ApiError::server(error)));
                return;
            }
        };
        let request = Request {
            prompt: job.prompt,
            config: job.config,
            num_samples: job.num_samples,
            adapter,
            mask: job.mask,
            num_top_log_probabilities: job.num_top,
            prefix_key: Some(job.salt),
            speculation: job.speculation,
            prediction: job.prediction,
        };
        match self.scheduler.admit(request) {
            Ok(ids) => self.running.push(Running {
                updates,
                stops,
                owner: job.owner,
                owner_limit: job.max_running,
                sequences: ids.into_iter().map(Some).collect(),
                submitted,
                started: now,
                first_token: None,
                last_token: now,
                paused: None,
                capacity: 0,
                preempted: None,
                waited: Duration::ZERO,
            }),
            // routes check requests first; a remaining error is still the client's
            Err(error) => {
                let _ = updates.try_send(Update::Failed(ApiError::invalid(error.to_string())));
            }
        }
    }

    fn adapter_id(&mut self, adapter: Arc<Adapter>) -> metal_candle::Result<AdapterId> {
        if let Some((id, _)) = self.adapters.get(&adapter.generation) {
            return Ok(*id);
        }
        let id = self.scheduler.add_adapter(&adapter.terms)?;
        self.adapters.insert(adapter.generation, (id, adapter));
        Ok(id)
    }

    /// Frees unloaded and replaced adapter generations that no sequence uses.
    fn forget_adapters(&mut self) {
        let scheduler = &mut self.scheduler;
        self.adapters.retain(|_, (id, adapter)| !adapter.is_retired() || scheduler.remove_adapter(*id).is_err());
    }

    /// Resumes the sequences whose readers have caught up.
    fn resume_readers(&mut self) {
        let now = Instant::now();
        for task in self.running.iter_mut().filter(|task| task.paused.is_some()) {
            let capacity = task.updates.capacity();
            if capacity >= task.updates.max_capacity() / 2 {
                task.paused = None;
                // a preempted job waits for its turn
                for sequence in task.open().filter(|_| task.preempted.is_none()) {
                    let _ = self.scheduler.set_paused(sequence, false);
                }
            } else if capacity > task.capacity {
                task.paused = Some(now);
            }
            task.capacity = capacity;
        }
    }

    fn step(&mut self, new_scheduler: &dyn Fn() -> metal_candle::Result<Scheduler>) {
        let started = Instant::now();
        let rows = self.scheduler.num_running();
        let stepped = catch_unwind(AssertUnwindSafe(|| self.scheduler.step()));
        self.shared.metrics.step_seconds.observe(started.elapsed());
        self.shared.metrics.batch_rows.observe_count(rows as u64);
        self.shared.metrics.prefix_disk_hits.add(self.scheduler.take_num_stored_tokens() as u64);
        match stepped {
            Ok(Ok(events)) => self.deliver(events),
            Ok(Err(error)) => self.recover(&error.to_string(), new_scheduler),
            Err(_) => self.recover("a step panicked", new_scheduler),
        }
    }

    fn deliver(&mut self, events: Vec<Event>) {
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        for event in events {
            let found = self.running.iter().enumerate().find_map(|(index, task)| {
                task.sequences.iter().position(|id| *id == Some(event.sequence)).map(|sample| (index, sample))
            });
            let Some((index, sample)) = found else { continue };
            let task = &mut self.running[index];
            let piece = match event.result {
                Ok(piece) => piece,
                Err(error) => {
                    task.sequences[sample] = None;
                    metrics.finish("error");
                    let error = match error {
                        metal_candle::Error::Argument { .. } => ApiError::invalid(error.to_string()),
                        other => ApiError::server(other),
                    };
                    let _ = task.updates.try_send(Update::Failed(error));
                    let task = self.running.swap_remove(index);
                    self.cancel(&task);
                    continue;
                }
            };
            metrics.generated_tokens.add(1);
            match task.first_token {
                None => {
                    task.first_token = Some(now);
                    metrics.time_to_first_token.observe(now - task.submitted);
                }
                Some(_) => metrics.inter_token.observe(now - task.last_token),
            }
            task.last_token = now;
            let is_last = piece.finish.is_some();
            if let Some(finish) = &piece.finish {
                task.sequences[sample] = None;
                metrics.finish(finish.reason.name());
                if sample == 0 {
                    metrics.prefix_queries.add(finish.prompt_tokens as u64);
                    metrics.prefix_hits.add(finish.reused_tokens as u64);
                }
            }
            match task.updates.try_send(Update::Piece(sample, piece)) {
                // a closed channel is handled before the next step
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                // sequences are paused before their channel is full
                Err(TrySendError::Full(_)) => {
                    tracing::error!("a piece was lost because the channel of its reader was full");
                }
            }
            if is_last && task.open().next().is_none() {
                metrics.request_seconds.observe(now - task.submitted);
                self.running.swap_remove(index);
                continue;
            }
            // the pieces of the next step must fit
            if task.paused.is_none() && task.updates.capacity() <= MAX_PIECES * task.sequences.len() {
                (task.paused, task.capacity) = (Some(now), task.updates.capacity());
                metrics.slow_reader_pauses.add(1);
                let open: Vec<SequenceId> = task.open().collect();
                for sequence in open {
                    let _ = self.scheduler.set_paused(sequence, true);
                }
            }
        }
    }

    /// Recovers from a failed step: ends all running jobs and starts again with an empty cache.
    fn recover(&mut self, cause: &str, new_scheduler: &dyn Fn() -> metal_candle::Result<Scheduler>) {
        let error = ApiError::server(format!("a step failed: {cause}"));
        for task in self.running.drain(..) {
            self.shared.metrics.finish("error");
            let _ = task.updates.try_send(Update::Failed(error.clone()));
        }
        let now = Instant::now();
        self.failures.retain(|failure| now - *failure < FAILURE_WINDOW);
        self.failures.push(now);
        self.adapters.clear();
        // free the cache before allocating a new one
        self.scheduler = Scheduler::new(self.scheduler.model().clone());
        match new_scheduler() {
            Ok(scheduler) if self.failures.len() < MAX_FAILURES => self.scheduler = scheduler,
            _ => {
                tracing::error!("{} steps failed within a minute: stopping the server", self.failures.len());
                std::process::exit(2);
            }
        }
    }

    fn end_all(&mut self, error: &ApiError) {
        for task in self.queue.extract(|_| true) {
            let _ = task.updates.try_send(Update::Failed(error.clone()));
        }
        for task in std::mem::take(&mut self.running) {
            self.cancel(&task);
            let _ = task.updates.try_send(Update::Failed(error.clone()));
        }
    }
}
