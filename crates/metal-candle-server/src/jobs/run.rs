//! Reads a run folder while another process writes it.

use metal_candle::files::{BoundedLines, MAX_METRICS_LINE_BYTES, MAX_SIDE_FILE_BYTES, read_if_exists};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::{File, TryLockError};
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The status that a run recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    #[default]
    Running,
    Done,
    Stopped,
    Failed,
}

/// `run.json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RunRecord {
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<String>,
    pub(crate) total_steps: u64,
}

/// A line of `metrics.jsonl`: a step or an evaluation.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Row {
    pub(crate) event: String,
    pub(crate) step: u64,
    pub(crate) epoch: Option<u64>,
    pub(crate) loss: Option<f64>,
    pub(crate) learning_rate: Option<f64>,
    pub(crate) grad_norm: Option<f64>,
    pub(crate) tokens: u64,
    pub(crate) trained_tokens: u64,
}

impl Row {
    pub(crate) fn is_evaluation(&self) -> bool {
        self.event == "evaluation"
    }

    /// The row as the data of an event.
    pub(crate) fn data(&self) -> Value {
        if self.is_evaluation() {
            return json!({"step": self.step, "valid_loss": self.loss});
        }
        json!({
            "step": self.step, "epoch": self.epoch, "train_loss": self.loss, "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm, "tokens": self.tokens, "trained_tokens": self.trained_tokens,
        })
    }
}

/// The folder of a run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    folder: PathBuf,
}

impl Run {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// Whether the run has settings, so that it can be resumed.
    pub(crate) fn is_started(&self) -> bool {
        self.folder.join("config.toml").is_file()
    }

    /// Whether a process is training the run.
    pub(crate) fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.folder.join("run.lock")) else { return false };
        matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
    }

    /// The record of the run; none before the first step, or if it is unreadable.
    pub(crate) fn record(&self) -> Option<RunRecord> {
        let bytes = read_if_exists(self.folder.join("run.json"), MAX_SIDE_FILE_BYTES).ok()??;
        serde_json::from_slice(&bytes).ok()
    }

    /// Reads the complete rows of `metrics.jsonl` from a byte offset, and advances the offset. A file that became shorter is
    /// read from its start.
    pub(crate) fn rows(&self, offset: &mut u64) -> Vec<Row> {
        let Ok(mut file) = File::open(self.folder.join("metrics.jsonl")) else { return Vec::new() };
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        if length < *offset {
            *offset = 0;
        }
        if length == *offset || file.seek(SeekFrom::Start(*offset)).is_err() {
            return Vec::new();
        }
        let mut lines = BoundedLines::new(BufReader::new(file), MAX_METRICS_LINE_BYTES);
        let mut rows = Vec::new();
        while let Ok(Some(line)) = lines.next_line() {
            if !line.ends_with(b"\n") {
                break;
            }
            *offset += line.len() as u64;
            rows.extend(serde_json::from_slice::<Row>(line));
        }
        rows
    }

    /// The steps with a complete checkpoint, in order.
    pub(crate) fn checkpoints(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(self.folder.join("checkpoints")).into_iter().flatten().flatten();
        let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<u64> = entries.filter_map(|entry| step(entry.file_name().to_str()?)).collect();
        steps.sort_unstable();
        steps
    }

    /// The folder of a checkpoint.
    pub(crate) fn checkpoint(&self, step: u64) -> PathBuf {
        self.folder.join(format!("checkpoints/step-{step:06}"))
    }

    /// When a checkpoint was written, in seconds since 1970.
    pub(crate) fn checkpoint_time(&self, step: u64) -> Option<u64> {
        let modified = std::fs::metadata(self.checkpoint(step)).ok()?.modified().ok()?;
        Some(modified.duration_since(UNIX_EPOCH).ok()?.as_secs())
    }

    /// The folder of the trained adapter.
    pub(crate) fn adapter(&self) -> PathBuf {
        self.folder.join("adapter")
    }
}
