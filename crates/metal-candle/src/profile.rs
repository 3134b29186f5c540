//! Records nested spans of operations, as a table and as a trace for a browser.
//!
//! ```
//! use metal_candle::profile;
//!
//! profile::start();
//! // train or generate here
//! let profile = profile::stop();
//! println!("{}", profile.table());
//! assert!(profile.chrome_trace().starts_with('{'));
//! ```

use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The kind of work in a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Matrix products.
    Gemm,
    /// Attention, with the products inside it.
    Attention,
    /// Elementwise work: norms, activations, rotations, losses.
    Elementwise,
    /// The optimizer and the gradients it reads.
    Optimizer,
    /// A group of other spans.
    Group,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::Attention => "attention",
            Self::Elementwise => "elementwise",
            Self::Optimizer => "optimizer",
            Self::Group => "other",
        }
    }
}

/// A recorded span.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Event {
    name: &'static str,
    kind: Kind,
    thread: u64,
    start: Duration,
    end: Duration,
}

impl Event {
    fn time(&self) -> Duration {
        self.end.saturating_sub(self.start)
    }
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());
static ORIGIN: OnceLock<Instant> = OnceLock::new();

fn now() -> Duration {
    ORIGIN.get_or_init(Instant::now).elapsed()
}

/// Discards earlier spans and starts recording. There is one recording per process.
pub fn start() {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    now();
    IS_ON.store(true, Ordering::Relaxed);
}

/// Stops recording and returns the profile.
pub fn stop() -> Profile {
    IS_ON.store(false, Ordering::Relaxed);
    let events = std::mem::take(&mut *EVENTS.lock().unwrap_or_else(PoisonError::into_inner));
    Profile { events }
}

/// Starts a span that ends when the returned value is dropped.
pub(crate) fn span(name: &'static str, kind: Kind) -> Span {
    Span(IS_ON.load(Ordering::Relaxed).then(|| (name, kind, now())))
}

pub(crate) struct Span(Option<(&'static str, Kind, Duration)>);

impl Drop for Span {
    fn drop(&mut self) {
        static THREADS: AtomicU64 = AtomicU64::new(1);
        thread_local!(static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed));
        if let Some((name, kind, start)) = self.0.take() {
            let event = Event { name, kind, thread: THREAD.with(|thread| *thread), start, end: now() };
            EVENTS.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        }
    }
}

/// The recorded spans.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    events: Vec<Event>,
}

/// The time of one operation, without nested spans.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The operation, after its groups: `backward/down_proj`.
    pub path: String,
    /// What kind of work it is.
    pub kind: Kind,
    /// The number of calls.
    pub calls: usize,
    /// The time without nested spans.
    pub time: Duration,
}

impl Profile {
    /// Adds the spans of another profile.
    pub fn append(&mut self, mut other: Self) {
        self.events.append(&mut other.events);
    }

    /// All operations, by descending time.
    pub fn rows(&self) -> Vec<Row> {
        let mut events: Vec<&Event> = self.events.iter().collect();
        // sort spans before their nested spans
        events.sort_by_key(|event| (event.thread, event.start, std::cmp::Reverse(event.end)));
        let mut rows: HashMap<(String, Kind), (usize, Duration)> = HashMap::new();
        let mut open: Vec<(&Event, String, Duration)> = Vec::new();
        let mut close = |event: &Event, path: String, inside: Duration| {
            let row = rows.entry((path, event.kind)).or_default();
            row.0 += 1;
            row.1 += event.time().saturating_sub(inside);
        };
        for event in events {
            while let Some((last, ..)) = open.last()
                && (last.thread != event.thread || last.end <= event.start)
            {
                if let Some((last, path, inside)) = open.pop() {
                    close(last, path, inside);
                }
            }
            let path = match open.last_mut() {
                Some((_, path, inside)) => {
                    *inside += event.time();
                    format!("{path}/{}", event.name)
                }
                None => event.name.to_owned(),
            };
            open.push((event, path, Duration::ZERO));
        }
        while let Some((last, path, inside)) = open.pop() {
            close(last, path, inside);
        }
        let row = |((path, kind), (calls, time))| Row { path, kind, calls, time };
        let mut rows: Vec<Row> = rows.into_iter().map(row).collect();
        rows.sort_by(|left, right| right.time.cmp(&left.time).then_with(|| left.path.cmp(&right.path)));
        rows
    }

    /// The share of the total time of each kind of work, in descending order.
    pub fn shares(&self) -> Vec<(Kind, f64)> {
        let rows = self.rows();
        let total: f64 = rows.iter().map(|row| row.time.as_secs_f64()).sum();
        let mut sums: HashMap<Kind, f64> = HashMap::new();
        for row in &rows {
            *sums.entry(row.kind).or_default() += row.time.as_secs_f64();
        }
        let mut shares: Vec<_> =
            sums.into_iter().map(|(kind, time)| (kind, time / total.max(f64::MIN_POSITIVE))).collect();
        shares.sort_by(|left, right| right.1.total_cmp(&left.1));
        shares
    }

    /// A table with one line per operation and one per kind of work.
    pub fn table(&self) -> String {
        let rows = self.rows();
        let total: f64 = rows.iter().map(|row| row.time.as_secs_f64()).sum();
        let width = rows.iter().map(|row| row.path.len()).max().unwrap_or(0).max("operation".len());
        let mut text = format!("{:width$}  {:>8}  {:>10}  {:>6}  kind\n", "operation", "calls", "ms", "share");
        // writing to a string does not fail
        for row in &rows {
            let time = row.time.as_secs_f64();
            let _ = writeln!(
                text,
                "{:width$}  {:>8}  {:>10.1}  {:>4.1} %  {}",
                row.path,
                row.calls,
                1e3 * time,
                100.0 * time / total.max(f64::MIN_POSITIVE),
                row.kind.name()
            );
        }
        for (kind, share) in self.shares() {
            let _ = writeln!(
                text,
                "{:width$}  {:>8}  {:>10.1}  {:>4.1} %",
                kind.name(),
                "",
                1e3 * total * share,
                100.0 * share
            );
        }
        text
    }

    /// The spans in the trace event format, which `chrome://tracing` and <https://ui.perfetto.dev> open.
    pub fn chrome_trace(&self) -> String {
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        let events: Vec<Value> = self
            .events
            .iter()
            .map(|event| {
                json!({
                    "name": event.name, "cat": event.kind.name(), "ph": "X", "pid": 1, "tid": event.thread,
                    "ts": micros(event.start), "dur": micros(event.time()),
                })
            })
            .collect();
        json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, Kind, Profile};
    use std::time::Duration;

    #[test]
    fn nested_time_is_not_counted_twice() {
        let event = |name, kind, start, end, thread| Event {
            name,
            kind,
            thread,
            start: Duration::from_millis(start),
            end: Duration::from_millis(end),
        };
        // ordered by their ends
        let profile = Profile {
            events: vec![
                event("product", Kind::Gemm, 1, 6, 1),
                event("product", Kind::Gemm, 6, 8, 1),
                event("layer", Kind::Group, 1, 9, 1),
                event("product", Kind::Gemm, 3, 5, 2),
                event("step", Kind::Group, 0, 10, 1),
            ],
        };
        let rows: Vec<_> = profile.rows().into_iter().map(|row| (row.path, row.calls, row.time.as_millis())).collect();
        let expected = [("step/layer/product", 2, 7), ("product", 1, 2), ("step", 1, 2), ("step/layer", 1, 1)];
        assert_eq!(rows, expected.map(|(path, calls, time)| (path.to_string(), calls, time)));
        let (kind, share) = profile.shares()[0];
        assert!(kind == Kind::Gemm && (share - 0.75).abs() < 1e-9, "{share}");
        assert!(profile.table().contains("step/layer/product"));
        assert!(profile.chrome_trace().contains("\"dur\":5000.0"));
    }
}
