//! Assigns slots to waiting sequences, and preempts running sequences.

use super::Scheduler;
use crate::error::{Error, Result};
use crate::inference::prefix_folder::num_common;
use crate::inference::request::SequenceId;
use crate::inference::sequence::Sequence;
use crate::inference::slots::Slots;
use std::collections::VecDeque;

impl Scheduler {
    /// Pauses a running sequence and frees its slot for others. After it is resumed with [`Scheduler::set_paused`] and gets a
    /// slot, its text is recomputed unless it is still cached; on the CPU this does not change the following tokens.
    ///
    /// Samples whose prompt has not been computed are preempted together, until the first of them is resumed. A waiting sequence
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
        // doubling limits the number of copies of a growing cache
        let grown = if needed > self.slots.len() { needed.max(2 * self.slots.len()).min(max) } else { needed };
        let capacity = self.waiting.iter().map(Sequence::first_capacity).max().unwrap_or(0);
        self.grow(grown, if is_empty { capacity } else { 0 })?;
        // a prompt that was computed in this step comes after the others
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

    /// Takes a slot for a sequence; returns the slot and the number of first tokens that it contains, at most all except the last
    /// token, whose logits are required.
    fn take_slot(&mut self, sequence: &Sequence) -> Option<(usize, usize)> {
        // keys that depend on the length of their text cannot be reused for other texts
        let sharing = sequence.sharing().filter(|_| self.model.rotary_limit().is_none());
        let Some(sharing) = sharing else { return Some((self.slots.take()?, 0)) };
        let ids = &sequence.ids()[..sequence.ids().len() - 1];
        let holders = self.running.iter().filter(|other| other.sharing() == Some(sharing));
        let busy = holders.map(|other| (other.slot(), num_common(&other.ids()[..other.num_cached()], ids)));
        self.slots.take_with_prefix(ids, sharing, busy.max_by_key(|&(_, count)| count))
    }
}
