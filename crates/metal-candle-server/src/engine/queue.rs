//! A queue that serves owners in turn: first come, first served within an owner, one job of each owner after the other.

use std::collections::{BTreeMap, VecDeque};

/// Jobs that wait, by owner.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    owners: BTreeMap<usize, VecDeque<T>>,
    /// The owner whose job was taken last.
    last: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { owners: BTreeMap::new(), last: usize::MAX }
    }
}

impl<T> FairQueue<T> {
    /// Adds a job behind those of the same owner.
    pub(super) fn push(&mut self, owner: usize, job: T) {
        self.owners.entry(owner).or_default().push_back(job);
    }

    /// The first job of the next owner in turn for which `may_start` holds. An owner whose first job may not start is passed
    /// over, so that its later jobs do not overtake it.
    pub(super) fn peek(&self, may_start: impl Fn(&T) -> bool) -> Option<&T> {
        self.next(may_start).map(|(_, job)| job)
    }

    fn next(&self, may_start: impl Fn(&T) -> bool) -> Option<(usize, &T)> {
        let after = self.last.wrapping_add(1);
        let (behind, ahead) = (self.owners.range(..after), self.owners.range(after..));
        let mut first = ahead.chain(behind).filter_map(|(&owner, jobs)| Some((owner, jobs.front()?)));
        first.find(|(_, job)| may_start(job))
    }

    /// Takes the job that [`FairQueue::peek`] finds.
    pub(super) fn pop(&mut self, may_start: impl Fn(&T) -> bool) -> Option<T> {
        let (owner, _) = self.next(may_start)?;
        let jobs = self.owners.get_mut(&owner)?;
        let job = jobs.pop_front();
        if jobs.is_empty() {
            self.owners.remove(&owner);
        }
        self.last = owner;
        job
    }

    /// Removes and returns the jobs for which `is_over` holds.
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

    /// Whether no job waits.
    pub(super) fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_take_turns() {
        let mut queue = FairQueue::default();
        for job in ["a1", "a2", "a3"] {
            queue.push(0, job);
        }
        queue.push(7, "c1");
        queue.push(3, "b1");
        queue.push(3, "b2");
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(|_| true)).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        queue.push(1, "x1");
        queue.push(1, "x2");
        queue.push(2, "y1");
        // nothing overtakes within an owner
        assert_eq!(queue.pop(|job| *job != "x1"), Some("y1"));
        assert_eq!(queue.pop(|job| *job != "x1"), None);
        assert_eq!(queue.extract(|job| *job == "x1"), ["x1"]);
        assert_eq!(queue.pop(|_| true), Some("x2"));
        assert!(queue.is_empty());
    }
}
