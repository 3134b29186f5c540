//! Reads and writes `run.json`: the settings and the status of a run, for other processes.

use metal_candle::Error;
use metal_candle::files::{MAX_SIDE_FILE_BYTES, read_if_exists, write_atomically};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum number of recorded warnings.
const MAX_WARNINGS: usize = 50;

/// The status that a run recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It is running, or was when the record was last written.
    #[default]
    Running,
    /// All steps were completed, or early stopping ended the run.
    Done,
    /// It was stopped and can be resumed.
    Stopped,
    /// An error ended it.
    Failed,
}

/// The record of a run. It contains the times and speeds, because `metrics.jsonl` must be reproducible.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RunRecord {
    pub(crate) outcome: Outcome,
    /// The error, if it failed.
    pub(crate) error: Option<String>,
    pub(crate) model: String,
    pub(crate) data: String,
    pub(crate) device: String,
    pub(crate) num_trainable_parameters: usize,
    pub(crate) total_steps: usize,
    /// When it was first started and when this was written, in seconds since 1970 (UTC).
    pub(crate) started: u64,
    pub(crate) updated: u64,
    /// Seconds of training, of all continuations together.
    pub(crate) seconds: f64,
    /// The speed of the last continuation.
    pub(crate) tokens_per_second: Option<f64>,
    pub(crate) peak_memory_bytes: Option<u64>,
    /// The process that wrote this.
    pub(crate) pid: u32,
    pub(crate) warnings: Vec<RecordedWarning>,
    /// All settings, including derived ones.
    pub(crate) settings: Map<String, Value>,
}

/// A warning and its step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RecordedWarning {
    pub(crate) step: usize,
    pub(crate) kind: String,
    pub(crate) text: String,
}

impl RunRecord {
    /// The file of a run folder.
    pub(crate) fn path(folder: &Path) -> PathBuf {
        folder.join("run.json")
    }

    /// Reads the record of a run; none if there is none.
    pub(crate) fn read(folder: &Path) -> std::result::Result<Option<Self>, String> {
        match read_if_exists(Self::path(folder), MAX_SIDE_FILE_BYTES) {
            Ok(Some(bytes)) => {
                // serde would also accept an array for a struct
                let object = serde_json::from_slice::<Map<String, Value>>(&bytes);
                let record = object.and_then(|object| serde_json::from_value(Value::Object(object)));
                record.map(Some).map_err(|error| format!("run.json: {error}"))
            }
            Ok(None) => Ok(None),
            Err(error) => Err(format!("run.json: {error}")),
        }
    }

    /// Writes the record; concurrent readers see the old file or the new one.
    pub(crate) fn write(&mut self, folder: &Path) -> metal_candle::Result<()> {
        (self.updated, self.pid) = (seconds_since_epoch(), std::process::id());
        let path = Self::path(folder);
        let failed = |source| Error::Write { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        write_atomically(&path, |file| file.write_all(&text))
    }

    /// Adds a warning, unless there are too many already or a continuation repeats one.
    pub(crate) fn warn(&mut self, warning: RecordedWarning) {
        if self.warnings.len() < MAX_WARNINGS && !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

/// Now.
pub(crate) fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Outcome, RecordedWarning, RunRecord};

    #[test]
    fn records_are_read_back_and_damage_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(RunRecord::read(folder.path()), Ok(None));
        let mut record = RunRecord { outcome: Outcome::Stopped, model: "a \"b\"".into(), ..RunRecord::default() };
        let warning = RecordedWarning { step: 3, kind: "k".into(), text: "t".into() };
        record.warn(warning.clone());
        record.warn(warning);
        assert_eq!(record.warnings.len(), 1);
        record.write(folder.path()).unwrap();
        assert_eq!(RunRecord::read(folder.path()), Ok(Some(record)));
        std::fs::write(RunRecord::path(folder.path()), "{\"outcome\": \"do").unwrap();
        assert!(RunRecord::read(folder.path()).unwrap_err().starts_with("run.json: "));
    }
}
