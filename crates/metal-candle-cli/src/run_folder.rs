//! Creates and opens the folders of training runs.

use crate::error::UserError;
use crate::run_lock::{LOCK, Liveness, RunLock};
use crate::settings::TrainSettings;
use anyhow::Result;
use metal_candle::Error;
use metal_candle::files::{remove_stale_temporaries, write_atomically};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The default parent folder of runs.
const RUNS: &str = "runs";

/// The settings file of a run.
const CONFIG: &str = "config.toml";

/// The file of a chat template in a run or adapter folder.
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The folder of a run.
#[derive(Debug, Clone)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Creates a folder at `path`, or the next free one of `runs/001`, `runs/002`, ...
    pub(crate) fn create(path: Option<&Path>) -> Result<Self> {
        let make = |path: &Path| std::fs::create_dir_all(path).map_err(|e| write_error(path, e));
        if let Some(path) = path {
            check_new_run(path)?;
            make(path)?;
            return Ok(Self { path: path.to_path_buf() });
        }
        make(Path::new(RUNS))?;
        let mut number = 1;
        loop {
            let path = Path::new(RUNS).join(format!("{number:03}"));
            // two runs started at the same time get different folders
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(write_error(&path, error).into()),
            }
        }
    }

    /// Opens the folder of an earlier run and reads its settings.
    pub(crate) fn open(path: &Path) -> Result<(Self, TrainSettings)> {
        let run = Self { path: path.to_path_buf() };
        let is_run = |path: &Path| path.join(CONFIG).is_file();
        if !is_run(path) {
            let error = UserError::new(format!("`{}` is not a run folder: it contains no `{CONFIG}`", path.display()));
            // `runs/001/checkpoints/step-000010` and `runs/001/adapter`
            if is_unfinished_start(path) {
                let start =
                    format!("start it again with `--output {}`: it was killed before its first file", path.display());
                return Err(error.with_hint(start).into());
            }
            return Err(match path.ancestors().skip(1).take(2).find(|parent| is_run(parent)) {
                Some(parent) => error.with_hint(format!("`--resume {}` is one", parent.display())),
                None => error,
            }
            .into());
        }
        let mut settings = TrainSettings::read(&run.config())?;
        if settings.chat_template.is_some() && run.chat_template().is_file() {
            settings.chat_template = Some(std::path::absolute(run.chat_template()).unwrap_or(run.chat_template()));
        }
        Ok((run, settings))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The trained adapter, in PEFT's format.
    pub(crate) fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// The adapter's model, if its initialization rounded the weights.
    pub(crate) fn base(&self) -> PathBuf {
        self.path.join("base")
    }

    /// The trained model, if all weights are trained.
    pub(crate) fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// The chart of the loss.
    pub(crate) fn picture(&self) -> PathBuf {
        self.path.join("loss.svg")
    }

    /// The profile of the first steps, as a trace.
    pub(crate) fn profile(&self) -> PathBuf {
        self.path.join("profile.json")
    }

    /// A copy of the `--chat-template` of the run.
    pub(crate) fn chat_template(&self) -> PathBuf {
        self.path.join(CHAT_TEMPLATE)
    }

    /// Removes the temporary files of killed processes; the caller holds the lock of the run.
    pub(crate) fn remove_stale_temporaries(&self) -> Result<()> {
        for folder in [self.path.clone(), self.adapter(), self.base(), self.model()] {
            remove_stale_temporaries(folder)?;
        }
        Ok(())
    }

    /// Removes a folder whose first file could not be written.
    pub(crate) fn abandon(&self) {
        if is_unfinished_start(&self.path) {
            // the first error is the one to report
            let _ = self.remove_stale_temporaries();
            let _ = std::fs::remove_file(self.path.join(LOCK));
            let _ = std::fs::remove_dir(&self.path);
        }
    }

    fn config(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// One line per step and evaluation, written by the trainer.
    pub(crate) fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// Writes the `given` settings, and the other settings of `complete` as comments.
    pub(crate) fn write_settings(&self, given: &TrainSettings, complete: &TrainSettings) -> Result<()> {
        let text = given.to_toml(complete)?;
        Ok(write_atomically(self.config(), |file| file.write_all(text.as_bytes()))?)
    }
}

/// The chat template of a run and its variables.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RecordedTemplate {
    /// The file of the template, if it differs from the model's own.
    pub(crate) chat_template: Option<PathBuf>,
    /// The variables, in the format of `--template-var`.
    pub(crate) template_var: Vec<String>,
}

/// The template recorded for `path`: a run folder, or `adapter`, `model` or a checkpoint in one. An adapter folder outside a
/// run may contain its own template.
pub(crate) fn recorded_template(path: &Path) -> Result<RecordedTemplate> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let is_run = |folder: &&Path| folder.join(CONFIG).is_file() && folder.join("metrics.jsonl").is_file();
    let run = path.ancestors().take(3).find(is_run);
    let Some(run) = run else {
        let file = path.join(CHAT_TEMPLATE);
        let is_adapter = path.join("adapter_config.json").is_file() && file.is_file();
        return Ok(RecordedTemplate { chat_template: is_adapter.then_some(file), ..RecordedTemplate::default() });
    };
    let (run, settings) = RunFolder::open(run)?;
    let chat_template = Some(run.chat_template()).filter(|file| file.is_file());
    Ok(RecordedTemplate { chat_template, template_var: settings.template_var.unwrap_or_default() })
}

/// Checks that a folder for a new run is free, or contains only the remains of a run that was killed before its settings were
/// written.
pub(crate) fn check_new_run(path: &Path) -> Result<()> {
    if is_unfinished_start(path) && RunLock::is_held(path) != Liveness::Running {
        return Ok(());
    }
    check_free(path, "continue the run with --resume, or choose another folder with --output")
}

/// Whether a folder contains only the lock of a run and temporary files of its settings.
fn is_unfinished_start(path: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    let is_of_start = |name: &str| name == LOCK || name.starts_with(".config.toml.");
    let names: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    !names.is_empty() && names.iter().all(|name| is_of_start(name))
}

/// The hint about a folder that is not free.
pub(crate) const FREE_HINT: &str = "choose a new folder with --output; nothing is overwritten";

/// Checks that `path` does not exist or is an empty folder.
pub(crate) fn check_free(path: &Path, hint: &str) -> Result<()> {
    if let Some(file) = path.ancestors().find(|part| part.is_file()) {
        return Err(UserError::new(format!("`{}` is a file: expected a folder to write to", file.display())).into());
    }
    match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(UserError::new(format!("`{}` is not empty", path.display())).with_hint(hint).into()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Read { path: path.to_path_buf(), source }.into()),
    }
}

/// Fills a free folder (see [`check_free`]). On failure, removes the written files and the created folders.
pub(crate) fn fill_folder(path: &Path, hint: &str, fill: impl FnOnce() -> Result<()>) -> Result<()> {
    check_free(path, hint)?;
    let missing: Vec<&Path> = path.ancestors().take_while(|part| part.symlink_metadata().is_err()).collect();
    fill().inspect_err(|_| {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_folder { std::fs::remove_dir_all(entry.path()) } else { std::fs::remove_file(entry.path()) };
        }
        for folder in missing {
            let _ = std::fs::remove_dir(folder);
        }
    })
}

fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::Write { path: path.to_path_buf(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    #[test]
    fn a_failed_fill_restores_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("a/b");
        let fill = |is_whole: bool| {
            super::fill_folder(&folder, "", || {
                std::fs::create_dir_all(folder.join("c")).unwrap();
                std::fs::write(folder.join("file"), "x").unwrap();
                if is_whole { Ok(()) } else { Err(anyhow::anyhow!("full")) }
            })
        };
        assert!(fill(false).is_err() && !outer.path().join("a").exists());
        fill(true).unwrap();
        assert!(fill(false).is_err() && folder.join("file").exists());
    }
}
