//! Reads a run folder, complete or not, and summarizes the run.

use crate::model_source::NANO;
use crate::plot::Curves;
use crate::run_lock::{Liveness, RunLock};
use crate::run_record::{Outcome, RunRecord, seconds_since_epoch};
use metal_candle::files::{BoundedLines, MAX_METRICS_LINE_BYTES, MAX_SIDE_FILE_BYTES, read_text};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The last training loss is the mean of this many steps; a single step is too noisy.
const LAST_STEPS: usize = 10;
/// Without file locks, a run that wrote something in the last seconds counts as running.
const FRESH_SECONDS: u64 = 120;
/// A run folder contains at least one of these.
const FILES: [&str; 4] = ["config.toml", "run.json", "metrics.jsonl", "checkpoints"];

/// The status of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    Running,
    Done,
    Stopped,
    Failed,
    /// Its process exited without writing a final status.
    Killed,
    /// The folder has no status.
    Unknown,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Unknown => "unknown",
        }
    }
}

/// A summary of a run folder.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// Its folder, as passed to other commands.
    pub(super) name: String,
    pub(super) state: State,
    pub(super) record: RunRecord,
    pub(super) curves: Curves,
    pub(super) steps: usize,
    pub(super) tokens: u64,
    /// Problems with the folder.
    pub(super) problems: Vec<String>,
}

/// Whether a folder contains files of a run.
pub(super) fn is_run(folder: &Path) -> bool {
    FILES.iter().any(|name| folder.join(name).exists())
}

/// A line of `metrics.jsonl`. Numbers that are not finite are `null`.
#[derive(Debug, Deserialize)]
struct Row {
    event: String,
    step: usize,
    loss: Option<f64>,
    learning_rate: Option<f64>,
    grad_norm: Option<f64>,
    #[serde(default)]
    tokens: u64,
}

impl Run {
    pub(super) fn read(folder: &Path) -> Self {
        let mut run = Self {
            name: folder.display().to_string(),
            state: State::Unknown,
            record: RunRecord::default(),
            curves: Curves::default(),
            steps: 0,
            tokens: 0,
            problems: Vec::new(),
        };
        if !is_run(folder) {
            run.problems.push("not a run: it contains none of the files of a run folder".into());
            return run;
        }
        // check the lock first: a run that ends while its files are read is then reported as running, not as killed
        let liveness = RunLock::is_held(folder);
        let record = RunRecord::read(folder).unwrap_or_else(|problem| {
            run.problems.push(problem);
            None
        });
        let has_record = record.is_some();
        run.record = record.unwrap_or_default();
        if run.record.settings.is_empty() {
            run.read_config(&folder.join("config.toml"));
        }
        run.read_metrics(&folder.join("metrics.jsonl"), liveness == Liveness::Running);
        run.state = match (liveness, has_record, run.record.outcome) {
            (Liveness::Running, ..) => State::Running,
            (_, false, _) => State::Unknown,
            (_, true, Outcome::Done) => State::Done,
            (_, true, Outcome::Stopped) => State::Stopped,
            (_, true, Outcome::Failed) => State::Failed,
            (Liveness::NotRunning, true, Outcome::Running) => State::Killed,
            (Liveness::Unknown, true, Outcome::Running) => {
                let is_fresh = seconds_since_epoch().saturating_sub(run.record.updated) < FRESH_SECONDS;
                if is_fresh { State::Running } else { State::Killed }
            }
        };
        if run.record.started == 0 {
            run.record.started = modified(&folder.join("config.toml")).or_else(|| modified(folder)).unwrap_or(0);
        }
        if let Some(error) = run.record.error.clone() {
            run.problems.push(error);
        }
        run
    }

    /// Reads the settings file of a run without a record.
    fn read_config(&mut self, path: &Path) {
        let text = match read_text(path, MAX_SIDE_FILE_BYTES) {
            Ok(text) => text,
            Err(error) => return self.problems.push(format!("config.toml: {error}")),
        };
        match text.parse::<toml::Table>().map(|table| serde_json::to_value(&table)) {
            Ok(Ok(Value::Object(settings))) => self.record.settings = settings,
            _ => self.problems.push("config.toml: not valid TOML".into()),
        }
        let settings = &self.record.settings;
        let text_of = |key: &str| settings.get(key).and_then(Value::as_str).map(str::to_owned);
        let (model, data) = (text_of("model"), text_of("data"));
        self.record.model = model.unwrap_or_else(|| NANO.into());
        self.record.data = data.unwrap_or_else(|| "its sample data".into());
        if let Some(steps) = self.record.settings.get("steps").and_then(Value::as_u64) {
            self.record.total_steps = steps as usize;
        }
    }

    fn read_metrics(&mut self, path: &Path, is_running: bool) {
        let mut lines = match BoundedLines::open(path, MAX_METRICS_LINE_BYTES) {
            Ok(lines) => lines,
            // the run was stopped before its first evaluation
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return self.problems.push("no metrics.jsonl: no step was completed".into());
            }
            Err(error) => return self.problems.push(format!("metrics.jsonl: {error}")),
        };
        let (mut number, mut bad, mut first_bad) = (0, 0, 0);
        loop {
            let line = match lines.next_line() {
                Ok(None) => break,
                Ok(Some(line)) => line,
                Err(error) => {
                    self.problems.push(format!("metrics.jsonl: {error}"));
                    break;
                }
            };
            number += 1;
            match serde_json::from_slice::<Row>(line) {
                Ok(row) => self.add(&row),
                // the line is just being written
                Err(_) if is_running && !line.ends_with(b"\n") => {}
                Err(_) => {
                    bad += 1;
                    if bad == 1 {
                        first_bad = number;
                    }
                }
            }
        }
        if bad > 0 {
            let lines = if bad == 1 { "a line".into() } else { format!("{bad} lines") };
            self.problems.push(format!("metrics.jsonl: cannot read {lines}, the first is line {first_bad}"));
        }
    }

    fn add(&mut self, row: &Row) {
        let step = row.step as f64;
        let value = |value: Option<f64>| (step, value.unwrap_or(f64::NAN));
        if row.event == "evaluation" {
            self.curves.valid.push(value(row.loss));
            return;
        }
        self.steps = self.steps.max(row.step);
        self.tokens += row.tokens;
        self.curves.train.push(value(row.loss));
        self.curves.learning_rate.push(value(row.learning_rate));
        self.curves.grad_norm.push(value(row.grad_norm));
    }

    /// Mean loss of the last ten steps.
    pub(super) fn train_loss(&self) -> Option<f64> {
        let losses = &self.curves.train[self.curves.train.len().saturating_sub(LAST_STEPS)..];
        (!losses.is_empty()).then(|| losses.iter().map(|point| point.1).sum::<f64>() / losses.len() as f64)
    }

    /// The first, the best and the last validation loss, each with its step.
    pub(super) fn valid_losses(&self) -> Option<[(f64, f64); 3]> {
        let valid = &self.curves.valid;
        let best = valid.iter().copied().filter(|point| point.1.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
        let (first, last) = (*valid.first()?, *valid.last()?);
        Some([first, best.unwrap_or(first), last])
    }

    /// The value of a setting, if known.
    pub(super) fn setting(&self, key: &str) -> Option<&Value> {
        self.record.settings.get(key)
    }

    /// A short description of the training method.
    pub(super) fn method(&self) -> String {
        let is_set = |key: &str| self.setting(key) == Some(&Value::Bool(true));
        if is_set("from_scratch") {
            return "from scratch".into();
        }
        if is_set("full") {
            return "all weights".into();
        }
        if let Some(adapter) = self.setting("adapter").and_then(Value::as_str) {
            return format!("adapter {adapter}");
        }
        let number = |key: &str| self.setting(key).map(plain);
        let mut parts: Vec<String> = [("rank", number("rank")), ("alpha", number("alpha"))]
            .into_iter()
            .filter_map(|(name, value)| Some(format!("{name} {}", value?)))
            .collect();
        parts.extend(self.setting("target_modules").map(plain));
        parts.extend(self.setting("layers").map(|layers| format!("layers {}", plain(layers))));
        let variants = self.record.settings.iter().filter(|(_, value)| **value == Value::Bool(true));
        parts.extend(variants.filter_map(|(key, _)| key.strip_prefix("use_").map(str::to_owned)));
        parts.join(" ")
    }

    /// The whole summary as JSON.
    pub(super) fn as_json(&self) -> Value {
        let valid_losses = self.valid_losses();
        let loss = |index: usize| valid_losses.map(|points| finite(points[index].1));
        let record = &self.record;
        let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        json!({
            "run": self.name,
            "state": self.state.name(),
            "model": known(&record.model),
            "data": known(&record.data),
            "device": known(&record.device),
            "method": self.method(),
            "num_trainable_parameters": record.num_trainable_parameters,
            "steps": self.steps,
            "total_steps": record.total_steps,
            "tokens": self.tokens,
            "train_loss": self.train_loss().map(finite),
            "final_loss": self.curves.train.last().map(|point| finite(point.1)),
            "valid_loss_first": loss(0),
            "valid_loss_best": loss(1),
            "best_step": valid_losses.map(|points| points[1].0 as u64),
            "valid_loss_last": loss(2),
            "tokens_per_second": record.tokens_per_second,
            "seconds": record.seconds,
            "started": record.started,
            "peak_memory_bytes": record.peak_memory_bytes,
            "warnings": record.warnings,
            "problems": self.problems,
            "settings": record.settings,
        })
    }
}

/// A number for JSON, which has no NaN or infinity.
fn finite(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { Value::Null }
}

/// A value without quotes and brackets.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(","),
        Value::Number(number) => number.as_f64().map_or_else(|| number.to_string(), short_number),
        other => other.to_string(),
    }
}

/// Formats a number for people: `16`, `0.05`, `3e-4`.
pub(super) fn short_number(value: f64) -> String {
    // rounding removes digits of binary fractions, as in 0.00030000000000000003
    let rounded = format!("{value:.6e}").parse().unwrap_or(value);
    if rounded == 0.0 || (1e-2..1e9).contains(&rounded.abs()) { format!("{rounded}") } else { format!("{rounded:e}") }
}

/// The names and values of settings that differ between runs.
pub(super) fn different_settings(runs: &[Run]) -> Vec<(String, Vec<Option<Value>>)> {
    let mut keys: Vec<&String> = runs.iter().flat_map(|run| run.record.settings.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let values = |key: &String| runs.iter().map(|run| run.record.settings.get(key).cloned()).collect::<Vec<_>>();
    let all = keys.into_iter().map(|key| (key.clone(), values(key)));
    all.filter(|(_, values)| values.windows(2).any(|pair| pair[0] != pair[1])).collect()
}

/// Finds run folders: `folders` and their children. A missing folder is an error.
pub(super) fn find(folders: &[PathBuf]) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in folders {
        if is_run(folder) {
            found.push(folder.clone());
            continue;
        }
        let mut inside = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                inside.push(path);
            }
        }
        inside.sort();
        found.extend(inside);
    }
    Ok(found)
}

fn modified(path: &Path) -> Option<u64> {
    let time = std::fs::metadata(path).ok()?.modified().ok()?;
    time.duration_since(UNIX_EPOCH).ok().map(|time| time.as_secs())
}

/// `2026-11-22 09:30`, in UTC.
pub(super) fn date(seconds: u64) -> String {
    let (minutes, days) = (seconds / 60 % 1440, seconds / 86_400);
    // the Gregorian calendar repeats after 146,097 days; years start in March here, so that a leap day is the last of a year
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    format!("{:04}-{month:02}-{day_of_month:02} {:02}:{:02}", year + 400 * era, minutes / 60, minutes % 60)
}

/// The value of a setting for a table column.
pub(super) fn setting_text(settings: &Map<String, Value>, key: &str) -> String {
    settings.get(key).map_or_else(|| "-".to_owned(), plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Run, State, date, find, plain, short_number};
    use crate::run_record::{Outcome, RunRecord};
    use serde_json::json;
    use std::path::Path;

    fn write(folder: &Path, name: &str, text: &str) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join(name), text).unwrap();
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, wanted) in [
            (0, "1970-01-01 00:00"),
            (951_782_400, "2000-02-29 00:00"),
            (1_709_210_096, "2024-02-29 12:34"),
            (1_795_388_399, "2026-11-22 22:59"),
            (4_102_444_799, "2099-12-31 23:59"),
        ] {
            assert_eq!(date(seconds), wanted);
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [16.0, 0.05, 3e-4, 0.000_300_000_000_000_000_03, 0.0].map(short_number),
            ["16", "0.05", "3e-4", "3e-4", "0"]
        );
        assert_eq!(plain(&json!(["q_proj", "v_proj"])), "q_proj,v_proj");
    }

    #[test]
    fn damaged_files_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("empty")).unwrap();
        let empty = Run::read(&path("empty"));
        assert!(empty.state == State::Unknown && empty.problems[0].starts_with("not a run"), "{empty:?}");

        write(
            &path("garbage"),
            "metrics.jsonl",
            "\u{0}\u{1}{\n[]\n{\"event\":\"step\",\"step\":2,\"loss\":null}\n{\"ev",
        );
        write(&path("garbage"), "config.toml", "= 5");
        write(&path("garbage"), "run.json", "[]");
        let garbage = Run::read(&path("garbage"));
        assert_eq!((garbage.state, garbage.steps), (State::Unknown, 2));
        let text = garbage.problems.join("; ");
        for part in ["run.json: ", "config.toml: not valid TOML", "cannot read 3 lines, the first is line 1"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(garbage.train_loss().is_some_and(f64::is_nan));
        assert_eq!(garbage.as_json()["train_loss"], json!(null));

        write(&path("bare"), "config.toml", "steps = 9\nmodel = \"m\"\n");
        let bare = Run::read(&path("bare"));
        assert_eq!((bare.record.total_steps, bare.record.model.as_str()), (9, "m"));
        assert!(bare.valid_losses().is_none() && bare.problems == ["no metrics.jsonl: no step was completed"]);
        let found = find(&[folder.path().to_path_buf()]).unwrap();
        assert_eq!(found, ["bare", "empty", "garbage"].map(path));
        assert_eq!(find(&[path("bare")]).unwrap(), [path("bare")]);
        assert!(find(&[path("missing")]).is_err());
    }

    #[test]
    fn the_record_and_the_lock_determine_the_status() {
        let folder = tempfile::tempdir().unwrap();
        for (outcome, state) in [
            (Outcome::Done, State::Done),
            (Outcome::Stopped, State::Stopped),
            (Outcome::Failed, State::Failed),
            // no process holds the lock
            (Outcome::Running, State::Killed),
        ] {
            RunRecord { outcome, ..RunRecord::default() }.write(folder.path()).unwrap();
            assert_eq!(Run::read(folder.path()).state, state);
        }
    }
}
