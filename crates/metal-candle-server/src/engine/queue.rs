//! Queues waiting jobs by owner; first come, first served within an owner.

use std::collections::{BTreeMap, VecDeque};

/// The waiting jobs, by owner.
#[derive(Debug)]
pub(super) struct Queue<T> {
    owners: BTreeMap<usize, VecDeque<T>>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { owners: BTreeMap::new() }
    }
}

impl<T> Queue<T> {
    /// Adds a job after the others of its owner.
    pub(super) fn push(&mut self, owner: usize, job: T) {
        self.owners.entry(owner).or_default().push_back(job);
    }

    /// The first job of each owner.
    pub(super) fn heads(&self) -> impl Iterator<Item = &T> {
        self.owners.values().filter_map(VecDeque::front)
    }

    /// Removes and returns the first job of an owner.
    pub(super) fn pop(&mut self, owner: usize) -> Option<T> {
        let jobs = self.owners.get_mut(&owner)?;
        let job = jobs.pop_front();
        if jobs.is_empty() {
            self.owners.remove(&owner);
        }
        job
    }

    /// Removes and returns the jobs for which `is_over` returns true.
    pub(super) fn extract(&mut self, mut is_over: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut over = Vec::new();
        for jobs in self.owners.values_mut() {
            let (ended, left) = std::mem::take(jobs).into_iter().partition(|job| is_over(job));
            *jobs = left;
            over.extend::<VecDeque<T>>(ended);
        }
        self.owners.retain(|_, jobs| !jobs.is_empty());
        over
    }

    /// Whether no jobs wait.
    pub(super) fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_of_an_owner_keep_their_order() {
        let mut queue = Queue::default();
        for (owner, job) in [(0, "a1"), (0, "a2"), (7, "c1"), (3, "b1"), (3, "b2")] {
            queue.push(owner, job);
        }
        assert_eq!(queue.heads().copied().collect::<Vec<_>>(), ["a1", "b1", "c1"]);
        assert_eq!((queue.pop(0), queue.pop(0), queue.pop(0)), (Some("a1"), Some("a2"), None));
        assert_eq!(queue.extract(|job| *job == "b1"), ["b1"]);
        assert_eq!((queue.pop(7), queue.pop(3)), (Some("c1"), Some("b2")));
        assert!(queue.is_empty());
    }
}
