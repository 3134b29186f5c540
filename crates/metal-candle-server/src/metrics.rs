//! Collects counters and histograms, and prints them in the text format of Prometheus (version 0.0.4).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of time buckets, in seconds.
const SECONDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];
/// Upper bounds of count buckets.
const COUNTS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];
/// Why sequences end.
const REASONS: [&str; 7] = ["end_of_text", "stop_string", "max_tokens", "length", "cancelled", "timeout", "error"];
/// Why requests are refused.
const REJECTIONS: [&str; 3] = ["queue_full", "rate_limit", "unauthorized"];

/// A monotonic counter.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram with fixed buckets.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    buckets: Vec<Counter>,
    /// The sum of all values, in millionths.
    sum: Counter,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: (0..=bounds.len()).map(|_| Counter::default()).collect(), sum: Counter::default() }
    }

    pub(crate) fn observe(&self, time: Duration) {
        self.add(time.as_secs_f64(), u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    pub(crate) fn observe_count(&self, count: u64) {
        self.add(count as f64, count.saturating_mul(1_000_000));
    }

    fn add(&self, value: f64, millionths: u64) {
        let index = self.bounds.partition_point(|bound| *bound < value);
        self.buckets[index].add(1);
        self.sum.add(millionths);
    }

    fn write(&self, text: &mut String, name: &str) {
        let mut total = 0;
        let bounds = self.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let _ = writeln!(text, "# TYPE {name} histogram");
        for (bound, bucket) in bounds.zip(&self.buckets) {
            total += bucket.get();
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        let _ = writeln!(text, "{name}_sum {}\n{name}_count {total}", self.sum.get() as f64 / 1e6);
    }
}

/// All metrics of a server.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) prefix_queries: Counter,
    pub(crate) prefix_hits: Counter,
    /// Those of `prefix_hits` that were read from files.
    pub(crate) prefix_disk_hits: Counter,
    pub(crate) slow_reader_pauses: Counter,
    pub(crate) preemptions: Counter,
    pub(crate) adapter_swaps: Counter,
    pub(crate) queue_seconds: Histogram,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) request_seconds: Histogram,
    pub(crate) step_seconds: Histogram,
    pub(crate) batch_rows: Histogram,
    finished: [Counter; REASONS.len()],
    rejected: [Counter; REJECTIONS.len()],
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            prefix_disk_hits: Counter::default(),
            slow_reader_pauses: Counter::default(),
            preemptions: Counter::default(),
            adapter_swaps: Counter::default(),
            queue_seconds: Histogram::new(&SECONDS),
            time_to_first_token: Histogram::new(&SECONDS),
            inter_token: Histogram::new(&SECONDS),
            request_seconds: Histogram::new(&SECONDS),
            step_seconds: Histogram::new(&SECONDS),
            batch_rows: Histogram::new(&COUNTS),
            finished: std::array::from_fn(|_| Counter::default()),
            rejected: std::array::from_fn(|_| Counter::default()),
        }
    }
}

impl Metrics {
    /// Counts the end of a sequence.
    pub(crate) fn finish(&self, reason: &str) {
        if let Some(index) = REASONS.iter().position(|name| *name == reason) {
            self.finished[index].add(1);
        }
    }

    /// Counts a request that was refused.
    pub(crate) fn reject(&self, reason: &str) {
        if let Some(index) = REJECTIONS.iter().position(|name| *name == reason) {
            self.rejected[index].add(1);
        }
    }

    /// The metrics as text; `gauges` are names and values.
    pub(crate) fn text(&self, gauges: &[(&str, f64)]) -> String {
        let mut text = String::new();
        let mut last = "";
        for (name, value) in gauges {
            // gauges that differ only in labels are one family
            let family = name.split('{').next().unwrap_or(name);
            if family != last {
                let _ = writeln!(text, "# TYPE metal_candle_{family} gauge");
            }
            last = family;
            let _ = writeln!(text, "metal_candle_{name} {value}");
        }
        let counters = [
            ("prompt_tokens_total", &self.prompt_tokens),
            ("generated_tokens_total", &self.generated_tokens),
            ("prefix_cache_queries_total", &self.prefix_queries),
            ("prefix_cache_hits_total", &self.prefix_hits),
            ("prefix_cache_disk_hits_total", &self.prefix_disk_hits),
            ("slow_reader_pauses_total", &self.slow_reader_pauses),
            ("preemptions_total", &self.preemptions),
            ("adapter_swaps_total", &self.adapter_swaps),
        ];
        for (name, counter) in counters {
            let _ = writeln!(text, "# TYPE metal_candle_{name} counter\nmetal_candle_{name} {}", counter.get());
        }
        let labelled = [
            ("requests_total", "finish_reason", REASONS.as_slice(), self.finished.as_slice()),
            ("rejections_total", "reason", &REJECTIONS, &self.rejected),
        ];
        for (name, label, values, counters) in labelled {
            let _ = writeln!(text, "# TYPE metal_candle_{name} counter");
            for (value, counter) in values.iter().zip(counters) {
                let _ = writeln!(text, "metal_candle_{name}{{{label}=\"{value}\"}} {}", counter.get());
            }
        }
        let histograms = [
            ("queue_seconds", &self.queue_seconds),
            ("time_to_first_token_seconds", &self.time_to_first_token),
            ("inter_token_seconds", &self.inter_token),
            ("request_seconds", &self.request_seconds),
            ("step_seconds", &self.step_seconds),
            ("batch_rows", &self.batch_rows),
        ];
        for (name, histogram) in histograms {
            histogram.write(&mut text, &format!("metal_candle_{name}"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_their_buckets() {
        let metrics = Metrics::default();
        metrics.queue_seconds.observe(Duration::from_millis(1));
        metrics.queue_seconds.observe(Duration::from_secs(500));
        metrics.finish("length");
        let gauges = [("requests_running", 3.0), ("slots{state=\"used\"}", 1.0), ("slots{state=\"free\"}", 2.0)];
        let text = metrics.text(&gauges);
        let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut families = types.clone();
        families.dedup();
        assert!(types == families && types.iter().all(|line| !line.contains('{')), "{types:?}");
        for line in [
            "metal_candle_requests_running 3",
            "metal_candle_queue_seconds_bucket{le=\"0.001\"} 1",
            "metal_candle_queue_seconds_bucket{le=\"120\"} 1",
            "metal_candle_queue_seconds_bucket{le=\"+Inf\"} 2",
            "metal_candle_queue_seconds_sum 500.001",
            "metal_candle_requests_total{finish_reason=\"length\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
