//! Threads that help the one that has work, and wait for the next piece in a short loop before they sleep: a model gives them
//! work every few microseconds, and waking a thread takes longer than that.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a thread without work stays awake.
const AWAKE: Duration = Duration::from_micros(100);
/// Rounds of waiting between two looks at the clock.
const ROUNDS: usize = 64;

/// The state of [`Shared`]: the number of the work, whether it may be joined, and how many threads have.
const NEXT: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;

/// What the thread that has work and its helpers share.
struct Shared {
    state: AtomicU64,
    /// Written by the thread that has work while the state is not open, read by those that have joined it.
    work: UnsafeCell<Option<Work>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Work {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}

// SAFETY: the work is written and read as its field says, and its task may be called by any thread.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

static SHARED: Shared = Shared {
    state: AtomicU64::new(0),
    work: UnsafeCell::new(None),
    next: AtomicUsize::new(0),
    panic: Mutex::new(None),
};

/// A thread that helps, and whether it sleeps.
struct Helper {
    thread: Thread,
    is_asleep: &'static AtomicBool,
}

/// The helpers: one less than the threads of rayon's global pool. Held by the thread that has work.
static HELPERS: OnceLock<Mutex<Vec<Helper>>> = OnceLock::new();

fn start() -> Mutex<Vec<Helper>> {
    let start = |number: usize| {
        let is_asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let builder = std::thread::Builder::new().name(format!("kernels-{number}"));
        // with fewer threads the work takes longer
        let started = builder.spawn(|| help(is_asleep)).ok()?;
        Some(Helper { thread: started.thread().clone(), is_asleep })
    };
    Mutex::new((1..rayon::current_num_threads()).filter_map(start).collect())
}

/// Calls `task` for each of `0..count` on this thread and its helpers; none is called if the helpers have other work.
pub(crate) fn share(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
    let Ok(helpers) = HELPERS.get_or_init(start).try_lock() else { return false };
    // SAFETY: the state is not open, so nobody reads; the task outlives the work, which ends below.
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
        // another process may have the core of a helper
        if rounds % (64 * ROUNDS) == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
    let there = SHARED.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(helpers);
    if let Some(panic) = here.err().or(there) {
        resume_unwind(panic);
    }
    true
}

/// Takes one task after the other.
fn work(task: &(dyn Fn(usize) + Sync), count: usize) {
    loop {
        let number = SHARED.next.fetch_add(1, Ordering::Relaxed);
        if number >= count {
            return;
        }
        task(number);
    }
}

/// What a helper does for the life of the process.
fn help(is_asleep: &AtomicBool) {
    let mut done = 0;
    loop {
        let state = wait(done, is_asleep);
        if SHARED.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        done = state & !(OPEN | JOINED);
        // SAFETY: this thread has joined, so the work is there until it leaves.
        let Work { task, count } = unsafe { (*SHARED.work.get()).unwrap_unchecked() };
        // SAFETY: as above.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(unsafe { &*task }, count))) {
            // the tasks that nobody has begun are left out
            SHARED.next.store(count, Ordering::Relaxed);
            *SHARED.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        SHARED.state.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A state with work that may be joined and is not that of number `done`.
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
            // work that came before it could be known that this thread sleeps
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

    /// Work for all threads, again if the helpers work for another test.
    fn share_until_done(count: usize, task: &(dyn Fn(usize) + Sync)) {
        while !share(count, task) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn every_task_is_done_once() {
        for count in (1..200).chain([1000, 10_000]) {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            share_until_done(count, &|number| {
                done[number].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            // now and then the helpers fall asleep
            if count % 50 == 0 {
                std::thread::sleep(3 * AWAKE);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_next_work_is_done() {
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
    fn work_within_work_is_left_to_the_caller() {
        let shared = AtomicUsize::new(0);
        share_until_done(4, &|_| {
            shared.fetch_add(usize::from(share(2, &|_| ())), Ordering::Relaxed);
        });
        assert_eq!(shared.load(Ordering::Relaxed), 0);
    }
}
