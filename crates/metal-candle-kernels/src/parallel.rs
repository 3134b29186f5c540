//! Sharing out work.

use crate::helpers::share;
use rayon::prelude::*;

/// A pointer that tasks may share; each must keep to its own part of what it points to.
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

    /// The slice from `start` on.
    ///
    /// # Safety
    /// `start` lies within the slice.
    pub(crate) unsafe fn from(self, start: usize) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { self.0.add(start) })
    }

    /// A part that other tasks may read, too.
    ///
    /// # Safety
    /// The part lies within the slice, no task writes to it meanwhile, and the slice outlives it.
    pub(crate) unsafe fn read<'a>(self, start: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(start), len) }
    }

    /// The part of the slice from `start` on, `len` long.
    ///
    /// # Safety
    /// The part lies within the slice, no other task touches it meanwhile, and the slice outlives it.
    pub(crate) unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// A vector that `write` makes on its threads: elements that are written first need no zeros, which one thread would write.
///
/// # Safety
/// `write` writes each of the `len` elements and reads none before.
pub(crate) unsafe fn written<T: Copy>(len: usize, write: impl FnOnce(Shared<T>)) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    write(Shared(values.as_mut_ptr()));
    // SAFETY: there is room for them, and the caller promises that they are written.
    unsafe { values.set_len(len) };
    values
}

/// Least work, in elements touched, that is worth another thread.
const MIN_WORK: usize = 16 * 1024;

/// Runs `task` for each of `0..count`, on all threads if `work` elements are enough for that.
pub(crate) fn for_each(count: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
    if count <= 1 || work < MIN_WORK || rayon::current_num_threads() == 1 {
        (0..count).for_each(task);
    // threads of a pool share with each other, and so do threads that have work at the same time
    } else if rayon::current_thread_index().is_some() || !share(count, &task) {
        (0..count).into_par_iter().for_each(task);
    }
}

/// Rows handed to a task at a time, so that a task touches some ten thousand elements.
pub(crate) fn rows_per_task(row: usize) -> usize {
    (MIN_WORK / row.max(1)).max(1)
}
