//! Writes, checks, lists and removes the checkpoints of a run. A checkpoint is written completely or not at all.

use crate::error::{Error, Result};
use crate::files::{JsonObject, create_folder, remove_stale_temporaries, sync_folder, write_atomically};
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The file that is written last.
const STATE_FILE: &str = "state.json";
/// The prefix of folders that are being written or removed.
const TEMPORARY: &str = ".tmp-";

/// The `checkpoints` of a run folder.
#[derive(Debug)]
pub(super) struct Checkpoints {
    folder: PathBuf,
}

/// A checkpoint whose files match their checksums.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) state: JsonObject,
}

impl Checkpoints {
    /// Creates the folder, and removes the temporary folders of an interrupted run.
    pub(super) fn open(run_folder: &Path) -> Result<Self> {
        let folder = run_folder.join("checkpoints");
        create_folder(&folder)?;
        remove_stale_temporaries(&folder)?;
        for name in names(&folder)? {
            if name.starts_with(TEMPORARY) {
                let path = folder.join(name);
                fs::remove_dir_all(&path).map_err(|source| Error::write(&path, source))?;
            }
        }
        Ok(Self { folder })
    }

    /// The checkpoints of a folder that another process writes; it may not exist yet.
    pub(super) fn of_other(run_folder: &Path) -> Self {
        Self { folder: run_folder.join("checkpoints") }
    }

    pub(super) fn path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    /// The steps that have a checkpoint, in order.
    pub(super) fn steps(&self) -> Result<Vec<usize>> {
        let mut steps: Vec<usize> =
            names(&self.folder)?.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes the checkpoint of `step`: `write` fills the folder, `state` comes last with the checksums of all files.
    pub(super) fn save(
        &self,
        step: usize,
        mut state: Map<String, Value>,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(step);
        if self.load(step).is_ok() {
            // the same step of the same run, written before it was interrupted
            return Ok(path);
        }
        let temporary = self.folder.join(format!("{TEMPORARY}step-{step:06}"));
        let failed = |source| Error::write(&path, source);
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(failed)?;
        }
        fs::create_dir_all(&temporary).map_err(failed)?;
        let saved = fill(&temporary, &mut state, write).and_then(|()| {
            if path.exists() {
                self.remove(step)?;
            }
            fs::rename(&temporary, &path).and_then(|()| sync_folder(&self.folder)).map_err(failed)
        });
        if saved.is_err() {
            // the first error is the one to report
            drop(fs::remove_dir_all(&temporary));
        }
        saved.map(|()| path)
    }

    /// Checks the files of the checkpoint of `step` and returns it.
    pub(super) fn load(&self, step: usize) -> Result<Checkpoint> {
        let path = self.path(step);
        let state = JsonObject::read(&path.join(STATE_FILE))?;
        let files = state.object("files")?.ok_or_else(|| state.missing("files", "an object"))?;
        for (name, expected) in files.map() {
            let file = path.join(name);
            let found = checksum(&file)?;
            if found != *expected {
                return Err(Error::format(file, format!("expected the checksum {expected}, found {found}")));
            }
        }
        Ok(Checkpoint { path, state })
    }

    /// The newest checkpoint that is undamaged; none if there is no checkpoint at all.
    pub(super) fn newest(&self) -> Result<Option<Checkpoint>> {
        let mut first_error = None;
        for step in self.steps()?.into_iter().rev() {
            match self.load(step) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => {
                    tracing::warn!("skipping a damaged checkpoint: {error}");
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(None), Err)
    }

    /// Removes all checkpoints except the newest `kept` and the one of the step `best`.
    pub(super) fn prune(&self, kept: usize, best: Option<usize>) -> Result<()> {
        let steps = self.steps()?;
        for &step in &steps[..steps.len().saturating_sub(kept)] {
            if best != Some(step) {
                self.remove(step)?;
            }
        }
        Ok(())
    }

    fn remove(&self, step: usize) -> Result<()> {
        let path = self.path(step);
        let doomed = self.folder.join(format!("{TEMPORARY}removed-{step:06}"));
        fs::rename(&path, &doomed)
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(|source| Error::write(&path, source))
    }
}

/// Writes the files of a checkpoint into `folder`, the state with their checksums last.
fn fill(folder: &Path, state: &mut Map<String, Value>, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    write(folder)?;
    let mut files = names(folder)?;
    files.sort();
    let mut sums = Map::new();
    for name in files {
        sums.insert(name.clone(), checksum(&folder.join(&name))?);
    }
    state.insert("files".into(), Value::Object(sums));
    let text = serde_json::to_vec_pretty(&state).map_err(|error| Error::format(folder, error))?;
    write_atomically(folder.join(STATE_FILE), |file| file.write_all(&text))
}

fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(|source| Error::read(folder, source))?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

fn checksum(path: &Path) -> Result<Value> {
    let map = metal_candle_kernels::map_file(path).map_err(|source| Error::read(path, source))?;
    Ok(json!({"bytes": map.len(), "crc32c": format!("{:08x}", crc32c::crc32c(&map))}))
}
