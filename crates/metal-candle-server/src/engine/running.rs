//! Decides which jobs start, and which running jobs are preempted for them.

use super::job::{Stops, Update};
use metal_candle::inference::SequenceId;
use std::cmp::Reverse;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// How long a reader may not read before its slots can be preempted.
const MAX_IDLE: Duration = Duration::from_secs(1);
/// How long an owner waits before it preempts slots of an owner with more.
const MAX_WAIT: Duration = Duration::from_millis(500);
/// How long free slots are reserved for a job that needs more of them.
const MAX_RESERVED: Duration = Duration::from_secs(10);

/// A started job.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) updates: Sender<Update>,
    pub(super) stops: Stops,
    pub(super) owner: usize,
    /// Maximum number of sequences of this owner that run at the same time.
    pub(super) owner_limit: usize,
    /// The sequence of each sample, until it ends.
    pub(super) sequences: Vec<Option<SequenceId>>,
    pub(super) submitted: Instant,
    pub(super) started: Instant,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Instant,
    /// When its reader stopped reading.
    pub(super) paused: Option<Instant>,
    /// The free capacity of its channel at the last check.
    pub(super) capacity: usize,
    /// When it was preempted.
    pub(super) preempted: Option<Instant>,
    /// The total time of earlier preemptions.
    pub(super) waited: Duration,
}

impl Running {
    /// The sequences that have not ended.
    pub(super) fn open(&self) -> impl Iterator<Item = SequenceId> {
        self.sequences.iter().copied().flatten()
    }

    pub(super) fn num_open(&self) -> usize {
        self.open().count()
    }

    /// How long it has had slots, or has waited to get them back.
    pub(super) fn age(&self, now: Instant) -> Duration {
        self.preempted.map_or_else(|| (now - self.started).saturating_sub(self.waited), |since| now - since)
    }

    /// The number of its slots.
    fn num_slots(&self) -> usize {
        if self.preempted.is_some() { 0 } else { self.num_open() }
    }
}

/// The number of slots of all jobs.
pub(super) fn num_taken(jobs: &[Running]) -> usize {
    jobs.iter().map(Running::num_slots).sum()
}

/// The number of slots of an owner's jobs.
pub(super) fn num_held(jobs: &[Running], owner: usize) -> usize {
    jobs.iter().filter(|job| job.owner == owner).map(Running::num_slots).sum()
}

/// A job that is waiting for slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) owner: usize,
    /// The number of slots that it needs.
    pub(super) count: usize,
    pub(super) since: Instant,
    /// Its index, if it has been preempted.
    pub(super) preempted: Option<usize>,
}

/// The first waiting job of each owner, in starting order: owners with few slots first, then round robin after the owner that
/// was served last. `queued` has the first queued job of each owner; preempted jobs come before them.
pub(super) fn in_turn(jobs: &[Running], queued: Vec<Waiting>, last: usize) -> Vec<Waiting> {
    let may_resume = |job: &Running| {
        let is_waiting = job.preempted.is_some() && job.paused.is_none();
        is_waiting && num_held(jobs, job.owner) + job.num_open() <= job.owner_limit
    };
    let preempted = jobs.iter().enumerate().filter(|(_, job)| may_resume(job)).filter_map(|(index, job)| {
        Some(Waiting { owner: job.owner, count: job.num_open(), since: job.preempted?, preempted: Some(index) })
    });
    let mut first: Vec<Waiting> = preempted.chain(queued).collect();
    first.sort_by_key(|waiting| (waiting.owner, waiting.preempted.is_none(), waiting.since));
    first.dedup_by_key(|waiting| waiting.owner);
    let turn = |owner: usize| owner.wrapping_sub(last.wrapping_add(1));
    first.sort_by_key(|waiting| (num_held(jobs, waiting.owner), turn(waiting.owner)));
    first
}

/// The job to start next, and the indices of the running jobs to preempt for it; `None` if all jobs have to wait.
pub(super) fn next_start(
    jobs: &[Running],
    waiting: &[Waiting],
    free: usize,
    now: Instant,
) -> Option<(Waiting, Vec<usize>)> {
    for &next in waiting {
        if next.count <= free {
            return Some((next, Vec::new()));
        }
        if let Some(chosen) = to_preempt(jobs, next, free, now) {
            return Some((next, chosen));
        }
        // later jobs must not take the slots that this job waits for
        if (MAX_WAIT..MAX_RESERVED).contains(&(now - next.since)) {
            return None;
        }
    }
    None
}

/// The jobs to preempt for a job that lacks slots: jobs whose readers do not read, then, if the job has waited long, the
/// youngest jobs of the owners with the most slots. Each of these owners keeps at least the number of slots that the owner of
/// the job will have. `None` if these are not enough.
fn to_preempt(jobs: &[Running], next: Waiting, free: usize, now: Instant) -> Option<Vec<usize>> {
    let (mut freed, mut chosen) = (free, Vec::new());
    let (mut idle, mut busy): (Vec<usize>, Vec<usize>) = (0..jobs.len())
        .filter(|&index| jobs[index].num_slots() > 0)
        .partition(|&index| jobs[index].paused.is_some_and(|since| now - since >= MAX_IDLE));
    idle.sort_by_key(|&index| jobs[index].paused);
    let mut choose = |index: usize| {
        freed += jobs[index].num_slots();
        chosen.push(index);
        freed >= next.count
    };
    if idle.into_iter().any(&mut choose) {
        return Some(chosen);
    }
    if now - next.since < MAX_WAIT {
        return None;
    }
    let target = num_held(jobs, next.owner) + next.count;
    busy.retain(|&index| jobs[index].owner != next.owner);
    let held = |index: &usize| (num_held(jobs, jobs[*index].owner), jobs[*index].owner);
    busy.sort_by_key(|index| Reverse((held(index), jobs[*index].started)));
    let is_enough = busy.chunk_by(|left, right| jobs[*left].owner == jobs[*right].owner).any(|of_owner| {
        let mut left = held(&of_owner[0]).0;
        of_owner.iter().any(|&index| {
            let slots = jobs[index].num_slots();
            let is_chosen = left >= target + slots;
            left -= if is_chosen { slots } else { 0 };
            is_chosen && choose(index)
        })
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

    /// A job of `owner` with `count` sequences that started `seconds` after `start`.
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
            capacity: 0,
            preempted: None,
            waited: Duration::ZERO,
        }
    }

    fn queued(owner: usize, count: usize, since: Instant) -> Waiting {
        Waiting { owner, count, since, preempted: None }
    }

    #[test]
    fn owners_with_many_slots_are_preempted_for_an_owner_with_few() {
        let start = Instant::now();
        let now = start + Duration::from_mins(1);
        let mut jobs: Vec<_> = (0..4).map(|number| job(start, 1, 1, number)).collect();
        let ask = |jobs: &[Running], owner, count, free| to_preempt(jobs, queued(owner, count, start), free, now);
        // the youngest
        assert_eq!(ask(&jobs, 2, 1, 0), Some(vec![3]));
        assert_eq!(ask(&jobs, 2, 2, 0), Some(vec![3, 2]));
        // it would then have more than the other owner, even with the free slots
        assert_eq!(ask(&jobs, 2, 3, 0), None);
        assert_eq!(ask(&jobs, 2, 4, 2), None);
        assert_eq!(ask(&jobs, 1, 1, 0), None);
        let late = start + Duration::from_millis(59_900);
        assert_eq!(to_preempt(&jobs, queued(2, 1, late), 0, now), None);
        // the job of the owner with the most slots is too large to preempt, the job of the next owner is not
        jobs.push(job(start, 3, 5, 9));
        assert_eq!(ask(&jobs, 2, 1, 0), Some(vec![3]));
        // two give
        jobs.extend((0..4).map(|number| job(start, 4, 1, number)));
        assert_eq!(ask(&jobs, 2, 2, 0), Some(vec![8, 7]));
        assert_eq!(ask(&jobs, 2, 3, 1), Some(vec![8, 3]));
        assert_eq!(ask(&jobs, 2, 4, 1), None);
    }

    #[test]
    fn owners_take_turns_and_preempted_jobs_come_first() {
        let start = Instant::now();
        let now = start + Duration::from_mins(1);
        let mut jobs: Vec<_> = (0..4).map(|number| job(start, 1, 1, number)).collect();
        // an owner with slots whose turn it is does not block an owner without slots
        let waiting = in_turn(&jobs, vec![queued(1, 1, start), queued(2, 1, start)], 0);
        assert_eq!(next_start(&jobs, &waiting, 0, now), Some((queued(2, 1, start), vec![3])));
        // round robin after the last
        let owners = |last| in_turn(&[], [1, 2, 3].map(|owner| queued(owner, 1, start)).to_vec(), last);
        assert_eq!(owners(2).iter().map(|waiting| waiting.owner).collect::<Vec<_>>(), [3, 1, 2]);
        // a preempted job comes before queued ones of its owner, the oldest first
        jobs[3].preempted = Some(now);
        jobs[2].preempted = Some(start);
        let first = |jobs: &[Running]| in_turn(jobs, vec![queued(1, 1, start)], 0)[0].preempted;
        assert_eq!(first(&jobs), Some(2));
        jobs[2].paused = Some(now);
        assert_eq!(first(&jobs), Some(3));
        jobs[3].owner_limit = 2;
        assert_eq!(first(&jobs), None);
        assert_eq!((num_taken(&jobs), num_held(&jobs, 1), num_held(&jobs, 2)), (2, 2, 0));
    }

    #[test]
    fn free_slots_are_reserved_for_a_large_job_for_a_while() {
        let start = Instant::now();
        let jobs = [job(start, 1, 1, 0)];
        let next = |seconds: f32| {
            let now = start + Duration::from_secs_f32(seconds);
            let waiting = [queued(2, 4, start), queued(3, 1, start)];
            next_start(&jobs, &waiting, 3, now).map(|(next, _)| next.owner)
        };
        assert_eq!((next(0.1), next(5.0), next(11.0)), (Some(3), None, Some(3)));
    }

    #[test]
    fn jobs_of_idle_readers_are_preempted_first() {
        let start = Instant::now();
        let now = start + Duration::from_mins(1);
        let mut jobs = vec![job(start, 1, 1, 0), job(start, 1, 2, 1), job(start, 1, 1, 2)];
        (jobs[0].paused, jobs[1].paused) = (Some(start + Duration::from_secs(50)), Some(start));
        let ask = |jobs: &[Running], count, since| to_preempt(jobs, queued(1, count, since), 0, now);
        // also for jobs of the same owner, and at once
        assert_eq!(ask(&jobs, 1, now), Some(vec![1]));
        assert_eq!(ask(&jobs, 3, now), Some(vec![1, 0]));
        assert_eq!(ask(&jobs, 4, start), None);
        jobs[1].paused = Some(now);
        assert_eq!(ask(&jobs, 2, now), None);
        jobs[0].preempted = Some(now);
        assert_eq!(ask(&jobs, 1, now), None);
    }
}
