//! Decodes sequences on devices with kernels for it.

use super::super::device_decoding::DeviceToken;
use super::super::sample_token::with_logits;
use super::{Scheduler, report};
use crate::error::Result;
use crate::ops::adapters::{Adapters, BatchUpdates};

/// Maximum number of logits of decoding sequences that a step with a prompt reads back from a device. With more logits, reading
/// and sampling takes longer than a separate pass.
const MAX_READ_LOGITS: usize = 1 << 19;

impl Scheduler {
    /// Decodes sequences on the device, if it has kernels for them and no prompt is pending; returns the indices of the other
    /// sequences.
    pub(super) fn decode(&mut self) -> Result<Vec<usize>> {
        let is_active = |&index: &usize| !self.running[index].is_paused();
        let all: Vec<usize> = (0..self.running.len()).filter(is_active).collect();
        if self.model.device().is_cpu() {
            return Ok(all);
        }
        // with a prompt in the step, one pass over the weights serves both, if only few logits are read back
        let (prompts, decoding): (Vec<usize>, Vec<usize>) =
            all.iter().partition(|&&index| self.running[index].num_waiting() > 1);
        if !prompts.is_empty() && decoding.len() * self.model.config().vocab_size <= MAX_READ_LOGITS {
            return Ok(all);
        }
        let has_row = |&index: &usize| self.running[index].decoding_row().is_some();
        let (mut left, mut rest): (Vec<usize>, Vec<usize>) = all.into_iter().partition(has_row);
        left.sort_by_key(|&index| self.running[index].adapter());
        let running = &self.running;
        self.device_decoding.retain(|held| running.iter().any(|sequence| sequence.adapter() == held));
        if self.decode_together(&left)? {
            left.clear();
        }
        while let Some(&first) = left.first() {
            let adapter = self.running[first].adapter();
            let count = left.iter().take_while(|&&index| self.running[index].adapter() == adapter).count();
            let later = left.split_off(count);
            if !self.decode_together(&left)? {
                rest.append(&mut left);
            }
            left = later;
        }
        rest.sort_unstable();
        Ok(rest)
    }

    /// Decodes sequences, sorted by adapter, on the device; returns false if it has no kernels.
    fn decode_together(&mut self, indices: &[usize]) -> Result<bool> {
        let rows: Vec<_> = indices.iter().filter_map(|&index| self.running[index].decoding_row()).collect();
        let of_sequence = self.adapter_indices(indices.iter().copied())?;
        let adapters = Adapters { sets: self.adapters.terms(), of_sequence: &of_sequence };
        let runs = adapters.rows(&(0..=indices.len()).collect::<Vec<_>>())?;
        let adapter = indices.first().and_then(|&index| self.running[index].adapter());
        let updates = match runs.as_slice() {
            [] => return Ok(true),
            [run] => BatchUpdates::Same(run.updates),
            runs => BatchUpdates::ByRows(runs),
        };
        let Some(cache) = self.slots.cache() else { return Ok(false) };
        let Some(tokens) = self.device_decoding.decode(&self.model, cache, (adapter, updates), &rows)? else {
            return Ok(false);
        };
        for (&index, token) in indices.iter().zip(tokens) {
            let sequence = &mut self.running[index];
            sequence.set_cached(sequence.num_cached() + 1, self.num_steps);
            cache.set_len(sequence.slot(), sequence.num_cached());
            let result = match token {
                DeviceToken::Sampled(decoded) => sequence.accept(decoded),
                DeviceToken::Broken(logits) => {
                    with_logits(&logits, |logits| sequence.advance(logits, &mut self.allowed, None))
                }
            };
            report(&mut self.events, sequence, result);
        }
        Ok(true)
    }
}
