//! Splits work among threads.

use crate::helpers::share;
use rayon::prelude::*;

/// A pointer that tasks may share; each task must access only its own part of the memory.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: the tasks that share it write to disjoint parts, as each use states.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub(crate) fn pointer(self) -> *mut T {
        self.0
    }

    /// The slice starting at `start`.
    ///
    /// # Safety
    /// `start` is within the slice.
    pub(crate) unsafe fn from(self, start: usize) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { self.0.add(start) })
    }

    /// A part that other tasks may also read.
    ///
    /// # Safety
    /// The part is within the slice, no task writes to it at the same time, and the slice outlives it.
    pub(crate) unsafe fn read<'a>(self, start: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(start), len) }
    }

    /// The part `start..start + len` of the slice.
    ///
    /// # Safety
    /// The part is within the slice, no other task accesses it at the same time, and the slice outlives it.
    pub(crate) unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// Creates a vector that `write` initializes on its threads, which avoids zeroing it on one thread.
///
/// # Safety
/// `write` writes each of the `len` elements and reads none before.
pub(crate) unsafe fn written<T: Copy>(len: usize, write: impl FnOnce(Shared<T>)) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    write(Shared(values.as_mut_ptr()));
    // SAFETY: the capacity is sufficient, and the caller promises that the elements are written.
    unsafe { values.set_len(len) };
    values
}

/// Minimum work for which a second thread is worthwhile, in accessed elements.
const MIN_WORK: usize = 16 * 1024;

/// Runs `task` for each of `0..count`, on all threads if `work` elements are enough.
pub(crate) fn for_each(count: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
    if count <= 1 || work < MIN_WORK || rayon::current_num_threads() == 1 {
        (0..count).for_each(task);
    // inside a rayon pool, or if the helpers are busy, use rayon
    } else if rayon::current_thread_index().is_some() || !share(count, &task) {
        (0..count).into_par_iter().for_each(task);
    }
}

/// The number of rows of a task, such that a task accesses about ten thousand elements.
pub(crate) fn rows_per_task(row: usize) -> usize {
    (MIN_WORK / row.max(1)).max(1)
}
