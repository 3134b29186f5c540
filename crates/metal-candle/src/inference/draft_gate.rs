//! Stops drafting on a device while steps with drafts are slower: a pass that checks drafts reads logits back, which may take far
//! longer than a step without drafts.

use std::time::{Duration, Instant};

/// Drafts are stopped for this many times what they have lost, so that trying again costs at most 2 %.
const STOP_FACTOR: f64 = 50.0;
/// Seconds of gain that losses are set off against.
const MAX_GAIN: f64 = 0.05;
/// Steps without drafts that are timed before drafts are tried, and again after [`REFRESH`] steps with drafts.
const FEWEST_PLAIN: u32 = 3;
const REFRESH: u32 = 64;
/// Batch sizes are grouped by powers of two.
const NUM_SIZES: usize = 16;

/// The time of steps without drafts for one group of batch sizes.
#[derive(Debug, Clone, Copy, Default)]
struct Plain {
    seconds_per_token: f64,
    /// Number of steps, and of steps with drafts since the last of them.
    steps: u32,
    drafted_steps: u32,
}

/// Compares steps with and without drafts.
#[derive(Debug, Default)]
pub(super) struct DraftGate {
    plain: [Plain; NUM_SIZES],
    /// Seconds that drafts have lost; negative for a gain.
    lost: f64,
    stopped_until: Option<Instant>,
}

impl DraftGate {
    fn plain(&mut self, num_sequences: usize) -> &mut Plain {
        &mut self.plain[(num_sequences.max(1).ilog2() as usize).min(NUM_SIZES - 1)]
    }

    /// Whether the next step of `num_sequences` sequences may check drafts.
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

    /// The milliseconds and tokens of steps of one sequence for two seconds, where a step with drafts takes `factor` times as long
    /// as one without and returns three tokens.
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
    fn drafts_that_lose_cost_little_and_those_that_win_are_kept() {
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
    fn nothing_is_drafted_before_the_time_without_is_known() {
        let (mut gate, now) = (DraftGate::default(), Instant::now());
        for _ in 0..FEWEST_PLAIN {
            assert!(!gate.is_open(4, now));
            gate.record(false, 4, 4, MILLISECOND, now);
        }
        assert!(gate.is_open(4, now) && gate.is_open(7, now) && !gate.is_open(8, now));
    }
}
