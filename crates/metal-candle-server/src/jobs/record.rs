//! Reads and writes `job.json` in a job's folder: the record of a fine-tuning job, from which a restarted server continues.

use super::settings::JobSettings;
use crate::files::FileStats;
use crate::ids::unix_time;
use metal_candle::files::{MAX_SIDE_FILE_BYTES, read_bounded, write_atomically};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The prefix of ids.
pub(crate) const ID: &str = "ftjob-";

/// The file in a job's folder.
pub(super) const FILE: &str = "job.json";

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum JobState {
    /// Waiting in the queue, for the check of its files, or for `resume`.
    Queued,
    /// Running, or was running when the server exited.
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub(crate) fn has_ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobError {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

/// The record of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobRecord {
    pub(crate) id: String,
    /// The name of the key that created it.
    pub(crate) owner: String,
    /// The base model.
    pub(crate) model: String,
    /// The name of the adapter that it trains.
    pub(crate) adapter: String,
    pub(crate) created: u64,
    pub(crate) finished: Option<u64>,
    pub(crate) state: JobState,
    /// Whether the client has paused it.
    pub(crate) is_paused: bool,
    /// Whether the client has cancelled it.
    pub(crate) is_cancelled: bool,
    pub(crate) training_file: String,
    pub(crate) validation_file: Option<String>,
    pub(crate) suffix: Option<String>,
    pub(crate) seed: u64,
    pub(crate) settings: JobSettings,
    pub(crate) metadata: Option<Map<String, Value>>,
    /// Statistics of the training file; none until it has been checked.
    pub(crate) stats: Option<FileStats>,
    pub(crate) trained_tokens: Option<u64>,
    pub(crate) error: Option<JobError>,
}

impl JobRecord {
    /// Reads the record in a job's folder; none if it is not readable.
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        let bytes = read_bounded(Self::path(folder), MAX_SIDE_FILE_BYTES).ok()?;
        let record: Self = serde_json::from_slice(&bytes).ok()?;
        let is_own = folder.file_name().is_some_and(|name| name == record.id.as_str()) && record.id.starts_with(ID);
        is_own.then_some(record)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The disk is full or not writable.
    pub(crate) fn write(&self, folder: &Path) -> metal_candle::Result<()> {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        write_atomically(Self::path(folder), |file| file.write_all(&text))
    }

    /// Sets the final state.
    pub(crate) fn end(&mut self, state: JobState, error: Option<JobError>) {
        (self.state, self.error, self.finished) = (state, error, Some(unix_time()));
    }

    fn path(folder: &Path) -> PathBuf {
        folder.join(FILE)
    }
}

/// The name of a job's adapter: `ft:{base}:{owner}:{suffix}:{job}`.
pub(crate) fn adapter_name(base: &str, owner: &str, suffix: Option<&str>, id: &str) -> String {
    let plain = |text: &str| -> String {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        text.chars().map(|c| if is_plain(c) { c } else { '-' }).take(64).collect()
    };
    let job = id.strip_prefix(ID).unwrap_or(id);
    format!("ft:{}:{}:{}:{job}", plain(base), plain(owner), plain(suffix.unwrap_or_default()))
}
