//! Prints the results of `bench` as a table or JSON.

use super::measure::Measured;
use super::work::Work;
use crate::output::{bytes, grouped};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// One measurement of this program, and optionally of another.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) work: Work,
    pub(super) ours: Measured,
    pub(super) theirs: Option<Measured>,
}

/// All results, with the model and the machine.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) device: &'static str,
    pub(super) device_name: Option<String>,
    pub(super) threads: usize,
    pub(super) model: String,
    pub(super) num_parameters: usize,
    pub(super) dtype: &'static str,
    /// The type of the KV cache, if `--kv-cache` was set.
    pub(super) kv_cache: Option<&'static str>,
    /// Whether products on the CPU round activations to bf16.
    pub(super) is_rounded: bool,
    pub(super) rows: Vec<Row>,
    /// Name and version of the other program.
    pub(super) peer: Option<String>,
}

impl Row {
    fn tokens_per_second(&self, measured: &Measured) -> f64 {
        self.work.tokens() as f64 / measured.median()
    }

    /// Our tokens per second divided by theirs.
    fn ratio(&self) -> Option<f64> {
        let ratio = self.tokens_per_second(&self.ours) / self.tokens_per_second(self.theirs.as_ref()?);
        ratio.is_finite().then_some(ratio)
    }

    fn measured_to_json(&self, measured: &Measured) -> Map<String, Value> {
        let finite = |number: f64| number.is_finite().then_some(number);
        let bound = |pick: fn(f64, f64) -> f64| measured.seconds.iter().copied().reduce(pick);
        let fields = [
            ("seconds", json!(finite(measured.median()))),
            ("tokens_per_second", json!(finite(self.tokens_per_second(measured)))),
            ("fastest_seconds", json!(bound(f64::min))),
            ("slowest_seconds", json!(bound(f64::max))),
            ("repeats", json!(measured.seconds.len())),
            ("peak_memory_bytes", json!(measured.peak_memory_bytes)),
            ("remark", json!(measured.remark)),
        ];
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn to_json(&self) -> Value {
        let mut map = Map::new();
        let mut request = self.work.request();
        let sizes = request.as_object_mut().map(std::mem::take).unwrap_or_default();
        map.insert("work".into(), json!(self.work.name()));
        map.insert("tokens".into(), json!(self.work.tokens()));
        for key in ["sequences", "length", "rank"] {
            if let Some(size) = sizes.get(key) {
                map.insert(key.into(), size.clone());
            }
        }
        map.extend(self.measured_to_json(&self.ours));
        if let Some(theirs) = &self.theirs {
            map.insert("peer".into(), Value::Object(self.measured_to_json(theirs)));
            map.insert("ratio".into(), json!(self.ratio()));
        }
        Value::Object(map)
    }
}

impl Report {
    pub(super) fn to_json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": self.device,
            "device_name": self.device_name,
            "threads": self.threads,
            "model": self.model,
            "num_parameters": self.num_parameters,
            "dtype": self.dtype,
            "kv_cache": self.kv_cache,
            "matmul_precision": if self.is_rounded { "bf16" } else { "f32" },
            "peer": self.peer,
            "rows": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        // writing to a string does not fail
        let mut line = |words: String| {
            let _ = writeln!(text, "{}", words.trim_end());
        };
        let name = self.device_name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
        line(format!(
            "metal-candle {} on {}{name}, {} CPU threads",
            env!("CARGO_PKG_VERSION"),
            self.device,
            self.threads
        ));
        let cache = self.kv_cache.map_or_else(String::new, |kind| format!(", KV cache {kind}"));
        let precision = if self.is_rounded { ", products in bf16" } else { "" };
        let parameters = grouped(self.num_parameters as u64);
        line(format!("{}: {parameters} parameters, {}{precision}{cache}", self.model, self.dtype));
        if let Some(peer) = &self.peer {
            line(format!("compared with {peer}, alternating; ratio: our tokens/s divided by theirs"));
        }
        line("medians; a decode step is one token of each sequence; in brackets, the number of timings".to_owned());
        line(String::new());
        let width = self.rows.iter().map(|row| row.work.title().len() + digits(&row.ours) + 3).max().unwrap_or(0);
        let titles = |ms: &str, speed: &str, memory: &str| format!("{ms:>11}{speed:>11}{memory:>11}");
        let mut head = format!("{:width$}{}", "", titles("ms", "tokens/s", "memory"));
        if self.peer.is_some() {
            head.push_str(&titles("their ms", "tokens/s", "memory"));
            head.push_str("   ratio");
        }
        line(head);
        let cells = |row: &Row, measured: &Measured| {
            let memory = measured.peak_memory_bytes.map_or_else(|| "-".to_owned(), bytes);
            match measured.median() {
                median if median.is_finite() => {
                    let speed = number(row.tokens_per_second(measured));
                    titles(&number(median * 1e3), &speed, &memory)
                }
                _ => titles("-", "-", &memory),
            }
        };
        for row in &self.rows {
            let title = format!("{} ({})", row.work.title(), row.ours.seconds.len());
            let mut words = format!("{title:width$}{}", cells(row, &row.ours));
            if let Some(theirs) = &row.theirs {
                let ratio = row.ratio().map_or_else(|| "       -".to_owned(), |ratio| format!("{ratio:>8.2}"));
                words.push_str(&cells(row, theirs));
                words.push_str(&ratio);
            }
            line(words);
        }
        for row in &self.rows {
            for measured in [Some(&row.ours), row.theirs.as_ref()].into_iter().flatten() {
                if let Some(remark) = &measured.remark {
                    line(format!("{}: {remark}", row.work.title()));
                }
            }
        }
        text
    }
}

fn digits(measured: &Measured) -> usize {
    measured.seconds.len().to_string().len()
}

/// At least three digits: `0.123`, `12.3`, `1,234`.
fn number(value: f64) -> String {
    match value {
        v if v < 1.0 => format!("{v:.3}"),
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => grouped(v.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::super::measure::Measured;
    use super::super::work::Work;
    use super::{Report, Row, number};

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.1234, 1.234, 12.34, 1234.4].map(number), ["0.123", "1.23", "12.3", "1,234"]);
    }

    #[test]
    fn the_table_shows_both_programs_and_their_ratio() {
        let of =
            |seconds: f64| Measured { seconds: vec![seconds; 3], peak_memory_bytes: Some(2_000_000_000), remark: None };
        let failed = Measured { remark: Some("out of memory".into()), ..Measured::default() };
        let work = Work::Prefill { length: 512, repeats: 3 };
        let report = Report {
            device: "cpu",
            device_name: Some("abacus".into()),
            threads: 2,
            model: "nano".into(),
            num_parameters: 7,
            dtype: "bf16",
            kv_cache: None,
            is_rounded: false,
            rows: vec![
                Row { work, ours: of(0.25), theirs: Some(of(0.5)) },
                Row { work, ours: of(0.25), theirs: Some(failed) },
            ],
            peer: Some("slide rule 1".into()),
        };
        let text = report.to_text();
        let words = |start: &str| -> Vec<Vec<&str>> {
            text.lines().filter(|line| line.starts_with(start)).map(|line| line.split_whitespace().collect()).collect()
        };
        let rows = words("prefill 512 (3)");
        assert_eq!(rows[0][3..], ["250", "2,048", "2.00", "GB", "500", "1,024", "2.00", "GB", "2.00"], "{text}");
        assert_eq!(rows[1][7..], ["-", "-", "-", "-"], "{text}");
        assert!(text.contains("prefill 512: out of memory") && text.contains("slide rule 1"), "{text}");
        let json = report.to_json();
        assert_eq!(json["rows"][0]["ratio"], 2.0);
        assert_eq!(json["rows"][1]["ratio"], serde_json::Value::Null);
    }
}
