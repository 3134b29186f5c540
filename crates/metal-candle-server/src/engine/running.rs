//! The jobs that have started, and which of them give up their slots to others.

use super::job::{Stops, Update};
use metal_candle::inference::SequenceId;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// For how long a reader takes nothing before others may have its slots.
const MAX_IDLE: Duration = Duration::from_secs(1);
/// For how long an owner waits before it gets slots of an owner that has more.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// A job that has started.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) updates: Sender<Update>,
    pub(super) stops: Stops,
    pub(super) owner: usize,
    /// Most sequences of this owner that run at a time.
    pub(super) owner_limit: usize,
    /// The sequence of each sample, until it ends.
    pub(super) sequences: Vec<Option<SequenceId>>,
    pub(super) submitted: Instant,
    pub(super) started: Instant,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Instant,
    /// Since when its reader has taken nothing.
    pub(super) paused: Option<Instant>,
    /// Since when it has given up its slots.
    pub(super) preempted: Option<Instant>,
}

impl Running {
    /// The sequences that have not ended.
    pub(super) fn open(&self) -> impl Iterator<Item = SequenceId> {
        self.sequences.iter().copied().flatten()
    }

    pub(super) fn num_open(&self) -> usize {
        self.open().count()
    }

    /// Number of slots that it has.
    fn num_slots(&self) -> usize {
        if self.preempted.is_some() { 0 } else { self.num_open() }
    }
}

/// Number of slots that the jobs have.
pub(super) fn num_taken(jobs: &[Running]) -> usize {
    jobs.iter().map(Running::num_slots).sum()
}

/// Number of slots that the jobs of an owner have.
pub(super) fn num_held(jobs: &[Running], owner: usize) -> usize {
    jobs.iter().filter(|job| job.owner == owner).map(Running::num_slots).sum()
}

/// The preempted job that should go on next: of the owner with the fewest slots the one that has waited longest.
pub(super) fn next_preempted(jobs: &[Running]) -> Option<usize> {
    let may_go_on =
        |job: &Running| job.paused.is_none() && num_held(jobs, job.owner) + job.num_open() <= job.owner_limit;
    let waiting = jobs.iter().enumerate().filter(|(_, job)| job.preempted.is_some() && may_go_on(job));
    waiting.min_by_key(|(_, job)| (num_held(jobs, job.owner), job.preempted)).map(|(index, _)| index)
}

/// The jobs that should give up their slots so that `count` become free for `owner`, who has waited since `since`; `None` if
/// it has to go on waiting. Jobs whose readers take nothing come first, then the youngest jobs of the owner with the most
/// slots, as long as it keeps at least as many as `owner` has then.
pub(super) fn to_preempt(
    jobs: &[Running],
    (owner, count): (usize, usize),
    since: Instant,
    now: Instant,
) -> Option<Vec<usize>> {
    let mut freed = 0;
    let mut chosen = Vec::new();
    let mut choose = |index: usize| {
        freed += jobs[index].num_slots();
        chosen.push(index);
        freed >= count
    };
    let mut has_slots: Vec<usize> = (0..jobs.len()).filter(|&index| jobs[index].num_slots() > 0).collect();
    let is_idle = |index: &usize| jobs[*index].paused.is_some_and(|paused| now - paused >= MAX_IDLE);
    let mut idle: Vec<usize> = has_slots.extract_if(.., |index| is_idle(index)).collect();
    idle.sort_by_key(|&index| jobs[index].paused);
    if idle.into_iter().any(&mut choose) {
        return Some(chosen);
    }
    if now - since < MAX_WAIT {
        return None;
    }
    let largest = has_slots.iter().map(|&index| jobs[index].owner).max_by_key(|&owner| num_held(jobs, owner))?;
    let mut left = num_held(jobs, largest);
    let wanted = num_held(jobs, owner) + count;
    has_slots.retain(|&index| jobs[index].owner == largest && largest != owner);
    has_slots.sort_by_key(|&index| std::cmp::Reverse(jobs[index].started));
    let is_enough = has_slots.into_iter().any(|index| {
        let slots = jobs[index].num_slots();
        if left < wanted + slots {
            return false;
        }
        left -= slots;
        choose(index)
    });
    is_enough.then_some(chosen)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::job::Answers;
    use super::*;
    use metal_candle::ModelLoader;
    use metal_candle::inference::{GenerationConfig, Request, Scheduler};

    /// Some sequences.
    fn sequences(count: usize) -> Vec<Option<SequenceId>> {
        let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano");
        let mut scheduler = Scheduler::new(ModelLoader::new().load(nano).unwrap());
        let request = Request::new([1], GenerationConfig::default()).with_num_samples(count);
        scheduler.admit(request).unwrap().into_iter().map(Some).collect()
    }

    /// A job of `owner` with `count` sequences that started so many seconds after `start`.
    fn job(start: Instant, owner: usize, count: usize, seconds: u64) -> Running {
        let (updates, stops, _) = Answers::channel(count);
        let started = start + Duration::from_secs(seconds);
        Running {
            updates,
            stops,
            owner,
            owner_limit: 8,
            sequences: sequences(count),
            submitted: started,
            started,
            first_token: None,
            last_token: started,
            paused: None,
            preempted: None,
        }
    }

    #[test]
    fn an_owner_with_many_slots_gives_some_to_one_with_few() {
        let start = Instant::now();
        let now = start + Duration::from_mins(1);
        let mut jobs: Vec<_> = (0..4).map(|number| job(start, 1, 1, number)).collect();
        let ask = |jobs: &[Running], owner, count| to_preempt(jobs, (owner, count), start, now);
        // the youngest
        assert_eq!(ask(&jobs, 2, 1), Some(vec![3]));
        assert_eq!(ask(&jobs, 2, 2), Some(vec![3, 2]));
        // it would have more than the other then
        assert_eq!(ask(&jobs, 2, 3), None);
        assert_eq!(ask(&jobs, 1, 1), None);
        assert_eq!(to_preempt(&jobs, (2, 1), start + Duration::from_millis(59_900), now), None);
        jobs[3].preempted = Some(now);
        jobs.push(job(start, 2, 1, 5));
        assert_eq!((num_taken(&jobs), num_held(&jobs, 1), num_held(&jobs, 2)), (4, 3, 1));
        assert_eq!(ask(&jobs, 2, 1), Some(vec![2]));
        jobs[2].preempted = Some(start);
        jobs.push(job(start, 2, 1, 6));
        assert_eq!(ask(&jobs, 2, 1), None);
        // the one that has waited longer
        assert_eq!(next_preempted(&jobs), Some(2));
        jobs[2].paused = Some(now);
        assert_eq!(next_preempted(&jobs), Some(3));
        jobs[3].owner_limit = 2;
        assert_eq!(next_preempted(&jobs), None);
    }

    #[test]
    fn readers_that_take_nothing_give_up_their_slots_first() {
        let start = Instant::now();
        let now = start + Duration::from_mins(1);
        let mut jobs = vec![job(start, 1, 1, 0), job(start, 1, 2, 1), job(start, 1, 1, 2)];
        (jobs[0].paused, jobs[1].paused) = (Some(start + Duration::from_secs(50)), Some(start));
        // also for others of the same owner, and at once
        assert_eq!(to_preempt(&jobs, (1, 1), now, now), Some(vec![1]));
        assert_eq!(to_preempt(&jobs, (1, 3), now, now), Some(vec![1, 0]));
        assert_eq!(to_preempt(&jobs, (1, 4), start, now), None);
        jobs[1].paused = Some(now);
        assert_eq!(to_preempt(&jobs, (1, 2), now, now), None);
        jobs[0].preempted = Some(now);
        assert_eq!(to_preempt(&jobs, (1, 1), now, now), None);
    }
}
