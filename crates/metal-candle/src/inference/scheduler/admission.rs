//! Assigns slots to waiting sequences and releases those of preempted ones.

use super::Scheduler;
use crate::error::{Error, Result};
use crate::inference::request::SequenceId;
use crate::inference::sequence::Sequence;
use crate::inference::slots::{Slots, num_common};
use std::collections::VecDeque;

impl Scheduler {
    /// Pauses a running sequence and takes its slot for others. Once it is resumed by [`Scheduler::set_paused`] and gets a slot,
    /// its text is computed again, as far as no slot holds it; on the CPU this changes no bit of what follows.
    ///
    /// Samples whose prompt is not yet computed leave together, and wait until the first of them is resumed. A sequence that waits
    /// is only paused.
    ///
    /// # Errors
    /// The sequence is neither waiting nor running.
    pub fn preempt(&mut self, sequence: SequenceId) -> Result<()> {
        if let Some(index) = self.running.iter_mut().position(|found| found.find_mut(sequence).is_some()) {
            let mut preempted = self.running.remove(index);
            for sample in preempted.samples_mut() {
                self.slots.release(sample.slot(), None);
                sample.set_paused(true);
            }
            self.slots.release(preempted.slot(), preempted.prefix());
            preempted.set_cached(0, self.num_steps);
            preempted.set_paused(true);
            self.waiting.push_back(preempted);
        }
        self.set_paused(sequence, true)
    }

    /// Assigns slots to waiting sequences.
    pub(super) fn start_waiting(&mut self) -> Result<()> {
        let max = self.config.max_sequences;
        let fits = |slots: &Slots, next: &Sequence| slots.num_taken() + next.num_sequences() <= max;
        let next = |waiting: &VecDeque<Sequence>| waiting.iter().position(Sequence::may_start);
        if !next(&self.waiting).is_some_and(|next| fits(&self.slots, &self.waiting[next])) {
            return Ok(());
        }
        let needed = (self.slots.num_taken() + self.num_waiting()).min(max);
        let is_empty = self.slots.num_bytes() == 0;
        // doubling keeps the copies of a growing cache few
        let grown = if needed > self.slots.len() { needed.max(2 * self.slots.len()).min(max) } else { needed };
        let room = self.waiting.iter().map(Sequence::first_room).max().unwrap_or(0);
        self.grow(grown, if is_empty { room } else { 0 })?;
        // a prompt that has been fed in this step comes after those that have not
        let step = self.num_steps.saturating_sub(1);
        while let Some(next) = next(&self.waiting).filter(|&next| fits(&self.slots, &self.waiting[next])) {
            let Some(mut sequence) = self.waiting.remove(next) else { break };
            let (slot, reused) = self.take_slot(&sequence).ok_or(Error::Stopped)?;
            sequence.start(slot, reused, step);
            for sample in sequence.samples_mut() {
                sample.start(self.slots.take().ok_or(Error::Stopped)?, 0, step);
            }
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Takes a slot for a sequence; returns it and the number of first tokens that it holds, at most all but the last, whose
    /// logits are needed.
    fn take_slot(&mut self, sequence: &Sequence) -> Option<(usize, usize)> {
        // keys that depend on the length of their text are of no use to other texts
        let sharing = sequence.sharing().filter(|_| self.model.rotary_limit().is_none());
        let Some(sharing) = sharing else { return Some((self.slots.take()?, 0)) };
        let ids = &sequence.ids()[..sequence.ids().len() - 1];
        let holders = self.running.iter().filter(|other| other.sharing() == Some(sharing));
        let busy = holders.map(|other| (other.slot(), num_common(&other.ids()[..other.num_cached()], ids)));
        self.slots.take_with_prefix(ids, sharing, busy.max_by_key(|&(_, count)| count))
    }
}
