//! Runs the tasks of a kernel on the calling thread and on helper threads. Helpers spin briefly before they sleep, because a
//! model starts a kernel every few microseconds and waking a thread takes longer.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long an idle helper spins before it sleeps.
const AWAKE: Duration = Duration::from_micros(100);
/// Number of spins between two reads of the clock.
const ROUNDS: usize = 64;

/// The fields of [`Shared::state`]: the id of the job, whether helpers may join it, and how many have joined.
const NEXT: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;

/// The job that the calling thread and its helpers share.
struct Shared {
    state: AtomicU64,
    /// Written by the calling thread while the state is not open; read by helpers that have joined.
    work: UnsafeCell<Option<Work>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Work {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}

// SAFETY: `work` is accessed as its comment says, and its task is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

static SHARED: Shared = Shared {
    state: AtomicU64::new(0),
    work: UnsafeCell::new(None),
    next: AtomicUsize::new(0),
    panic: Mutex::new(None),
};

/// A helper thread, and whether it is asleep.
struct Helper {
    thread: Thread,
    is_asleep: &'static AtomicBool,
}

/// The helpers, one fewer than rayon's global pool has threads. Locked by the thread whose job runs.
static HELPERS: OnceLock<Mutex<Vec<Helper>>> = OnceLock::new();

fn start() -> Mutex<Vec<Helper>> {
    let start = |number: usize| {
        let is_asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let builder = std::thread::Builder::new().name(format!("kernels-{number}"));
        // a thread that cannot be started only reduces speed
        let started = builder.spawn(|| help(is_asleep)).ok()?;
        Some(Helper { thread: started.thread().clone(), is_asleep })
    };
    Mutex::new((1..rayon::current_num_threads()).filter_map(start).collect())
}

/// Calls `task` for each of `0..count` on this thread and the helpers, and returns `true`. Returns `false` without calling it if
/// the helpers are busy.
pub(crate) fn share(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
    let Ok(helpers) = HELPERS.get_or_init(start).try_lock() else { return false };
    // SAFETY: the state is not open, so no helper reads `work`. The job ends before this function returns, so the task outlives it.
    unsafe {
        let task = std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(task);
        *SHARED.work.get() = Some(Work { task, count });
    }
    SHARED.next.store(0, Ordering::Relaxed);
    let number = SHARED.state.load(Ordering::Relaxed) & !(OPEN | JOINED);
    SHARED.state.store((number + NEXT) | OPEN, Ordering::SeqCst);
    for helper in helpers.iter().take(count - 1) {
        if helper.is_asleep.swap(false, Ordering::SeqCst) {
            helper.thread.unpark();
        }
    }
    let here = catch_unwind(AssertUnwindSafe(|| work(task, count)));
    SHARED.state.fetch_and(!OPEN, Ordering::AcqRel);
    let mut rounds = 0;
    while SHARED.state.load(Ordering::Acquire) & JOINED != 0 {
        rounds += 1;
        // the helper may be waiting for a core
        if rounds % (64 * ROUNDS) == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
    let there = SHARED.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(helpers);
    if let Some(panic) = here.err().or(there) {
        resume_unwind(panic);
    }
    true
}

/// Runs tasks until none remain.
fn work(task: &(dyn Fn(usize) + Sync), count: usize) {
    loop {
        let number = SHARED.next.fetch_add(1, Ordering::Relaxed);
        if number >= count {
            return;
        }
        task(number);
    }
}

/// The loop of a helper, for the lifetime of the process.
fn help(is_asleep: &AtomicBool) {
    let mut done = 0;
    loop {
        let state = wait(done, is_asleep);
        if SHARED.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        done = state & !(OPEN | JOINED);
        // SAFETY: this thread has joined, so `work` is set and stays until this thread leaves.
        let Work { task, count } = unsafe { (*SHARED.work.get()).unwrap_unchecked() };
        // SAFETY: as above.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(unsafe { &*task }, count))) {
            // skips the tasks that have not started
            SHARED.next.store(count, Ordering::Relaxed);
            *SHARED.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        SHARED.state.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits for an open job other than `done` and returns its state.
fn wait(done: u64, is_asleep: &AtomicBool) -> u64 {
    let is_new = |state: u64| state & OPEN != 0 && state & !(OPEN | JOINED) != done;
    let mut since = Instant::now();
    loop {
        for _ in 0..ROUNDS {
            let state = SHARED.state.load(Ordering::Acquire);
            if is_new(state) {
                return state;
            }
            std::hint::spin_loop();
        }
        if since.elapsed() > AWAKE {
            is_asleep.store(true, Ordering::SeqCst);
            // a job may have been opened before the caller could see that this thread sleeps
            if !is_new(SHARED.state.load(Ordering::SeqCst)) {
                std::thread::park();
            }
            is_asleep.store(false, Ordering::SeqCst);
            since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Retries while the helpers run the job of another test.
    fn share_until_done(count: usize, task: &(dyn Fn(usize) + Sync)) {
        while !share(count, task) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn every_task_runs_once() {
        for count in (1..200).chain([1000, 10_000]) {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            share_until_done(count, &|number| {
                done[number].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            // long enough for the helpers to fall asleep
            if count % 50 == 0 {
                std::thread::sleep(3 * AWAKE);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_later_jobs_run() {
        for bad in [0, 7, 99] {
            let outcome = catch_unwind(|| {
                share_until_done(100, &|number| {
                    std::thread::sleep(Duration::from_micros(50));
                    assert!(number != bad, "number {bad}");
                });
            });
            assert!(outcome.is_err());
            let done = AtomicUsize::new(0);
            share_until_done(100, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 100);
        }
    }

    #[test]
    fn nested_jobs_run_on_the_calling_thread() {
        let shared = AtomicUsize::new(0);
        share_until_done(4, &|_| {
            shared.fetch_add(usize::from(share(2, &|_| ())), Ordering::Relaxed);
        });
        assert_eq!(shared.load(Ordering::Relaxed), 0);
    }
}
