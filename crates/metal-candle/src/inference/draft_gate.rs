//! Stops drafting on a device while steps with drafts are slower: verifying drafts reads logits back, which may take far
//! longer than a step without drafts.

use std::time::{Duration, Instant};

/// Drafting stops for this multiple of the time it has lost, so that trying again costs at most 2 %.
const STOP_FACTOR: f64 = 50.0;
/// Maximum gain, in seconds, that later losses are offset against.
const MAX_GAIN: f64 = 0.05;
/// The number of steps without drafts that are timed before drafting, and again after [`REFRESH`] steps with drafts.
const FEWEST_PLAIN: u32 = 3;
const REFRESH: u32 = 64;
/// Batch sizes are grouped by powers of two.
const NUM_SIZES: usize = 16;

/// The time of steps without drafts for one group of batch sizes.
#[derive(Debug, Clone, Copy, Default)]
struct Plain {
    seconds_per_token: f64,
    /// The number of steps, and of steps with drafts since the last one.
    steps: u32,
    drafted_steps: u32,
}

/// Compares steps with and without drafts.
#[derive(Debug, Default)]
pub(super) struct DraftGate {
    plain: [Plain; NUM_SIZES],
    /// The seconds lost by drafting; negative for a gain.
    lost: f64,
    stopped_until: Option<Instant>,
}

impl DraftGate {
    fn plain(&mut self, num_sequences: usize) -> &mut Plain {
        &mut self.plain[(num_sequences.max(1).ilog2() as usize).min(NUM_SIZES - 1)]
    }

    /// Whether the next step of `num_sequences` sequences may verify drafts.
    pub(super) fn is_open(&mut self, num_sequences: usize, now: Instant) -> bool {
        let plain = self.plain(num_sequences);
        let is_known = plain.steps >= FEWEST_PLAIN && plain.drafted_steps < REFRESH;
        is_known && self.stopped_until.is_none_or(|until| now >= until)
    }

    /// Records a step in which every sequence was decoding.
    pub(super) fn record(
        &mut self,
        had_drafts: bool,
        num_sequences: usize,
        tokens: usize,
        took: Duration,
        now: Instant,
    ) {
        let (seconds, tokens) = (took.as_secs_f64(), tokens as f64);
        let plain = self.plain(num_sequences);
        if tokens < 1.0 {
            return;
        }
        if !had_drafts {
            let found = seconds / tokens;
            // the first step may compile or record kernels
            let weight = if plain.steps <= 1 { 1.0 } else { 0.25 };
            plain.seconds_per_token += weight * (found - plain.seconds_per_token);
            if plain.drafted_steps >= REFRESH {
                (plain.steps, plain.drafted_steps) = (1, 0);
            }
            plain.steps += 1;
            return;
        }
        plain.drafted_steps += 1;
        let lost = seconds - plain.seconds_per_token * tokens;
        self.lost = (self.lost + lost).max(-MAX_GAIN);
        if self.lost > 0.0 {
            self.stopped_until = Some(now + Duration::from_secs_f64(STOP_FACTOR * self.lost));
            self.lost = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Simulates two seconds of steps of one sequence, where a step with drafts takes `factor` times as long as a step without
    /// and returns three tokens. Returns milliseconds and tokens.
    fn run(factor: u32) -> (u64, u64) {
        let (mut gate, mut now) = (DraftGate::default(), Instant::now());
        let (start, mut tokens) = (now, 0);
        while now - start < Duration::from_secs(2) {
            let is_drafted = gate.is_open(1, now);
            let (took, count) = if is_drafted { (factor * MILLISECOND, 3) } else { (MILLISECOND, 1) };
            now += took;
            tokens += count;
            gate.record(is_drafted, 1, count as usize, took, now);
        }
        ((now - start).as_millis() as u64, tokens)
    }

    #[test]
    fn slow_drafts_cost_little_and_fast_drafts_continue() {
        for factor in [4, 20, 60] {
            let (milliseconds, tokens) = run(factor);
            assert!(
                tokens as f64 > 0.95 * milliseconds as f64,
                "{tokens} tokens in {milliseconds} ms, factor {factor}"
            );
        }
        let (milliseconds, tokens) = run(1);
        assert!(tokens as f64 > 2.7 * milliseconds as f64, "{tokens} tokens in {milliseconds} ms");
    }

    #[test]
    fn drafting_starts_after_steps_without_drafts_are_timed() {
        let (mut gate, now) = (DraftGate::default(), Instant::now());
        for _ in 0..FEWEST_PLAIN {
            assert!(!gate.is_open(4, now));
            gate.record(false, 4, 4, MILLISECOND, now);
        }
        assert!(gate.is_open(4, now) && gate.is_open(7, now) && !gate.is_open(8, now));
    }
}
