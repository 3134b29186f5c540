//! Writes `metrics.jsonl`: one line per step or evaluation, without times, so that equal runs write equal bytes.

use super::report::{EvaluationMetrics, StepMetrics};
use crate::error::{Error, Result};
use crate::files::{BoundedLines, MAX_METRICS_LINE_BYTES, open_to_append};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file for appending and truncates it after `step`; without a `step` it becomes empty.
    pub(super) fn open(path: &Path, step: Option<usize>) -> Result<Self> {
        let mut file = open_to_append(path)?;
        let kept = match step {
            None => 0,
            Some(step) => bytes_up_to(&file, step).map_err(|source| Error::read(path, source))?,
        };
        file.set_len(kept)
            .and_then(|()| file.seek(SeekFrom::Start(kept)))
            .map_err(|source| Error::write(path, source))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    pub(super) fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.append(&json!({
            "event": "step", "step": step.step, "epoch": step.epoch, "loss": step.loss,
            "learning_rate": step.learning_rate, "grad_norm": step.grad_norm, "tokens": step.tokens,
            "trained_tokens": step.trained_tokens,
        }))
    }

    pub(super) fn evaluation(&mut self, evaluation: &EvaluationMetrics) -> Result<()> {
        self.append(&json!({"event": "evaluation", "step": evaluation.step, "loss": evaluation.loss}))
    }

    /// Flushes the lines to disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::write(&self.path, source))
    }

    fn append(&mut self, line: &Value) -> Result<()> {
        let mut text = line.to_string();
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|source| Error::write(&self.path, source))
    }
}

/// The length of the leading complete lines of `step` and earlier steps.
fn bytes_up_to(file: &File, step: usize) -> std::io::Result<u64> {
    let mut lines = BoundedLines::new(BufReader::new(file), MAX_METRICS_LINE_BYTES);
    let mut kept = 0;
    while let Some(line) = lines.next_line()? {
        let found = serde_json::from_slice::<Value>(line).ok().and_then(|line| line.get("step")?.as_u64());
        if !line.ends_with(b"\n") || found.is_none_or(|found| found > step as u64) {
            break;
        }
        kept += line.len() as u64;
    }
    Ok(kept)
}
