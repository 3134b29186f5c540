//! Plans a step of a scheduler: the tokens to compute of each sequence.

use super::scheduler_config::SchedulerConfig;
use super::sequence::Sequence;

/// The tokens of a sequence to compute in a step: the tokens that the cache lacks up to `end`, and drafts after them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fed {
    /// The index of the sequence.
    pub(super) index: usize,
    /// The position after the last token to compute.
    pub(super) end: usize,
    /// The number of drafts to verify.
    pub(super) num_drafts: usize,
}

/// Plans decode steps first, then prompt chunks, longest waiting first.
///
/// `rotary_limit` is the length above which the rotation of a text depends on its length.
pub(super) fn plan(
    running: &[Sequence],
    indices: &[usize],
    config: &SchedulerConfig,
    rotary_limit: Option<usize>,
) -> Vec<Fed> {
    let (decoding, mut prompts): (Vec<usize>, Vec<usize>) =
        indices.iter().partition(|&&index| running[index].num_waiting() == 1);
    let mut left = config.step_tokens.saturating_sub(decoding.len());
    let mut fed = Vec::with_capacity(indices.len());
    for index in decoding {
        let num_drafts = running[index].draft().len().min(left);
        left -= num_drafts;
        fed.push(Fed { index, end: running[index].ids().len(), num_drafts });
    }
    prompts.sort_by_key(|&index| running[index].last_step());
    for (number, index) in prompts.into_iter().enumerate() {
        let (cached, len) = (running[index].num_cached(), running[index].ids().len());
        let is_long = rotary_limit.is_some_and(|limit| len > limit);
        let chunk = if is_long { len } else { config.prefill_chunk };
        let end = (cached / chunk + 1).saturating_mul(chunk).min(len);
        if end - cached <= left || number == 0 {
            left = left.saturating_sub(end - cached);
            fed.push(Fed { index, end, num_drafts: 0 });
        }
    }
    fed
}
