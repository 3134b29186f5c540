//! The folder of a training run.

use crate::output::UserError;
use crate::settings::TrainSettings;
use anyhow::Result;
use metal_candle::Error;
use metal_candle::models::write_atomically;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where runs go that are not given a folder.
const RUNS: &str = "runs";

/// The folder of a run.
#[derive(Debug, Clone)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// A new folder at `path`, or the next free one of `runs/001`, `runs/002`, ...
    pub(crate) fn create(path: Option<&Path>) -> Result<Self> {
        let make = |path: &Path| std::fs::create_dir_all(path).map_err(|e| write_error(path, e));
        if let Some(path) = path {
            if !is_free(path)? {
                return Err(UserError::new(format!("`{}` is not empty", path.display()))
                    .with_hint("continue that run with --resume, or name another folder with --output")
                    .into());
            }
            make(path)?;
            return Ok(Self { path: path.to_path_buf() });
        }
        make(Path::new(RUNS))?;
        let mut number = 1;
        loop {
            let path = Path::new(RUNS).join(format!("{number:03}"));
            // of two runs started at once each gets its own
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(write_error(&path, error).into()),
            }
        }
    }

    /// The folder of an earlier run, and its settings.
    pub(crate) fn open(path: &Path) -> Result<(Self, TrainSettings)> {
        let run = Self { path: path.to_path_buf() };
        let settings = TrainSettings::read(&run.config())?;
        Ok((run, settings))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The trained adapter, as PEFT writes it.
    pub(crate) fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// The trained model, when all weights are trained.
    pub(crate) fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// The picture of the loss.
    pub(crate) fn picture(&self) -> PathBuf {
        self.path.join("loss.svg")
    }

    fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// One line a step and evaluation, which the trainer writes.
    pub(crate) fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    pub(crate) fn write_settings(&self, settings: &TrainSettings) -> Result<()> {
        let text = settings.to_toml()?;
        Ok(write_atomically(self.config(), |file| file.write_all(text.as_bytes()))?)
    }
}

/// Whether nothing is at `path` but, at most, an empty folder.
pub(crate) fn is_free(path: &Path) -> metal_candle::Result<bool> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(false),
        Err(source) => Err(Error::Read { path: path.to_path_buf(), source }),
    }
}

fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::Write { path: path.to_path_buf(), source }
}
