//! The lock of a run folder, which shows whether a process is training the run.

use crate::error::UserError;
use crate::run_record::RunRecord;
use anyhow::Result;
use metal_candle::Error;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name of the lock's file in a run folder.
pub(crate) const LOCK: &str = "run.lock";

/// The lock of the process that trains a run. The operating system releases it when the process ends, even if it is killed.
#[derive(Debug)]
pub(crate) struct RunLock {
    _file: File,
}

/// Whether a process is training a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    Running,
    NotRunning,
    /// The file system has no locks.
    Unknown,
}

/// How long to wait for a process that holds the lock only to inspect the run.
const PATIENCE: Duration = Duration::from_millis(500);

impl RunLock {
    fn path(folder: &Path) -> PathBuf {
        folder.join(LOCK)
    }

    /// Takes the lock of the run in `folder`; an error if another process trains the run.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let path = Self::path(folder);
        let failed = |source| Error::Write { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let mut waited = Duration::ZERO;
        loop {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) if waited < PATIENCE => {
                    let pause = Duration::from_millis(50);
                    std::thread::sleep(pause);
                    waited += pause;
                }
                Err(TryLockError::WouldBlock) => {
                    let record = RunRecord::read(folder).ok().flatten();
                    let process = record.map_or_else(String::new, |record| format!(" (process {})", record.pid));
                    let path = folder.display();
                    return Err(UserError::new(format!("`{path}` is being trained by another process{process}"))
                        .with_hint("wait for it, or stop it with Ctrl-C; `metal-candle runs` shows its status")
                        .into());
                }
                // a file system without locks cannot detect a second process
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(Self { _file: file }),
            }
        }
    }

    /// Whether some process holds the lock of the run in `folder`.
    pub(crate) fn is_held(folder: &Path) -> Liveness {
        let Ok(file) = File::open(Self::path(folder)) else { return Liveness::NotRunning };
        match file.try_lock_shared() {
            Ok(()) => Liveness::NotRunning,
            Err(TryLockError::WouldBlock) => Liveness::Running,
            Err(TryLockError::Error(_)) => Liveness::Unknown,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Liveness, RunLock};

    #[test]
    fn a_run_has_one_trainer() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        assert_eq!(RunLock::is_held(run), Liveness::NotRunning);
        let lock = RunLock::take(run).unwrap();
        assert_eq!(RunLock::is_held(run), Liveness::Running);
        let refused = RunLock::take(run).unwrap_err();
        assert!(refused.to_string().contains("is being trained by another process"), "{refused}");
        drop(lock);
        assert_eq!(RunLock::is_held(run), Liveness::NotRunning);
        RunLock::take(run).unwrap();
    }
}
