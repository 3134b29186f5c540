//! Measures other programs through a small Python program.

use super::measure::Measured;
use super::work::Work;
use crate::error::UserError;
use anyhow::{Context, Result};
use clap::ValueEnum;
use metal_candle::Device;
use metal_candle::files::BoundedLines;
use serde_json::{Value, json};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The Python program; it reads requests from standard input and writes answers to standard output.
const PROGRAM: &str = include_str!("peer.py");

/// Maximum size of an answer, in bytes.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Maximum number of bytes that are read from the other program's standard error.
const MAX_STDERR_BYTES: u64 = 64 << 10;
/// Maximum number of characters that are shown of the other program's standard error.
const MAX_SHOWN: usize = 400;

/// The programs to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PeerKind {
    /// mlx-lm, on Apple's GPU, the CPU or CUDA.
    MlxLm,
    /// transformers and PEFT on torch.
    Transformers,
}

impl PeerKind {
    /// The name on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::MlxLm => "mlx-lm",
            Self::Transformers => "transformers",
        }
    }

    /// The packages to install with pip.
    fn packages(self, device: Device) -> &'static str {
        match self {
            Self::MlxLm if device.is_cuda() => "'mlx[cuda]' mlx-lm",
            // on Linux, the core of mlx is a separate package
            Self::MlxLm if cfg!(target_os = "linux") => "'mlx[cpu]' mlx-lm",
            Self::MlxLm => "mlx-lm",
            Self::Transformers => "torch transformers peft",
        }
    }
}

/// A running Python process that measures on request.
#[derive(Debug)]
pub(super) struct Peer {
    /// Its name and version.
    pub(super) name: String,
    kind: PeerKind,
    process: Child,
    requests: Option<ChildStdin>,
    answers: BoundedLines<BufReader<ChildStdout>>,
    /// Its standard error.
    said: tempfile::NamedTempFile,
}

impl Peer {
    /// Starts the process; no model is loaded yet. `is_best` is only for transformers.
    pub(super) fn start(kind: PeerKind, is_best: bool, python: &str, device: Device) -> Result<Self> {
        let said =
            tempfile::NamedTempFile::new().context("cannot create a file for the output of the other program")?;
        let name = format!("{}{}", kind.name(), if is_best { "-best" } else { "" });
        let started = Command::new(python)
            .args(["-c", PROGRAM, &name, device.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(said.reopen().context("cannot create a file for the output of the other program")?)
            .spawn();
        let mut process = started.map_err(|error| {
            UserError::new(format!("cannot run `{python}`: {error}"))
                .with_hint(format!("set --python to a Python that has {}", kind.name()))
        })?;
        let (requests, answers) = (process.stdin.take(), process.stdout.take());
        let answers = BufReader::new(answers.context("the other program has no output")?);
        let answers = BoundedLines::new(answers, MAX_ANSWER_BYTES);
        let mut peer = Self { name: String::new(), kind, process, requests, answers, said };
        let greeting = peer.answer()?;
        if let Some(missing) = greeting["missing"].as_str() {
            let message = format!("`{python}` has no {}: {missing}", kind.name());
            let hint = format!("{python} -m pip install {}, or --python PROGRAM that has it", kind.packages(device));
            return Err(UserError::new(message).with_hint(hint).into());
        }
        greeting["name"].as_str().unwrap_or(kind.name()).clone_into(&mut peer.name);
        Ok(peer)
    }

    /// Loads the model in a folder.
    pub(super) fn load(&mut self, folder: &Path, dtype: &str) -> Result<()> {
        let folder = folder.to_str().context("the path of the model is not UTF-8")?;
        let answer = self.ask(&json!({"work": "load", "folder": folder, "dtype": dtype}))?;
        match answer["error"].as_str() {
            None => Ok(()),
            Some(error) => Err(UserError::new(format!("{} cannot load the model: {error}", self.name)).into()),
        }
    }

    /// Measures `work`; a failure, even a crash, becomes a remark.
    pub(super) fn measure(&mut self, work: Work) -> Measured {
        let answer = match self.ask(&work.request()) {
            Ok(answer) => answer,
            Err(error) => return Measured::failed(error.to_string()),
        };
        if let Some(error) = answer["error"].as_str() {
            return Measured::failed(format!("{}: {error}", self.name));
        }
        let seconds = answer["seconds"].as_array().map(Vec::as_slice).unwrap_or_default();
        Measured {
            seconds: seconds.iter().filter_map(Value::as_f64).collect(),
            peak_memory_bytes: answer["peak_memory_bytes"].as_u64(),
            remark: None,
        }
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        // if the program has ended, its answer will be missing
        if let Some(requests) = &mut self.requests {
            let _ = writeln!(requests, "{request}").and_then(|()| requests.flush());
        }
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let line = self.answers.next_line().context("cannot read the answer of the other program")?.unwrap_or_default();
        serde_json::from_slice(line).map_err(|_| {
            let said = self.last_said().unwrap_or_default();
            let last: Vec<&str> = said.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
            let last = last.into_iter().rev().collect::<Vec<_>>().join("; ");
            let begin = last.char_indices().rev().nth(MAX_SHOWN).map_or(0, |(index, _)| index);
            UserError::new(format!("{} ended without an answer: {}", self.kind.name(), &last[begin..])).into()
        })
    }
}

impl Peer {
    /// The last part of the other program's standard error.
    fn last_said(&self) -> std::io::Result<String> {
        let mut file = self.said.reopen()?;
        let start = file.metadata()?.len().saturating_sub(MAX_STDERR_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(MAX_STDERR_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // closing its input ends the program, unless it hangs
        drop(self.requests.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
