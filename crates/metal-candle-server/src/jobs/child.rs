//! Starts and stops the training process: `metal-candle train`, with half of the threads and low priority.
//!
//! Closing its standard input stops it: it writes a checkpoint and exits. The operating system closes the pipe if the server
//! is killed, so no signal is needed and a trainer outlives its server by at most a step.

use crate::config::JobsConfig;
use crate::error::without_paths;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a trainer may take to write its checkpoint before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_mins(1);
/// Longest duration of a plan.
const PLAN_TIMEOUT: Duration = Duration::from_mins(2);
/// The number of last bytes of the trainer's output that are searched for an error.
const MAX_LOG_BYTES: u64 = 8 << 10;
/// Longest error message of a job.
const MAX_ERROR_CHARS: usize = 1000;

/// A training process.
#[derive(Debug)]
pub(super) struct Trainer {
    child: Child,
    stdin: Option<ChildStdin>,
    asked: Option<Instant>,
    log: PathBuf,
}

/// The program with the environment of a job.
fn command(config: &JobsConfig) -> Command {
    let mut command = Command::new(&config.program);
    let threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&count| count > 0);
    let threads: usize = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    command.env("RAYON_NUM_THREADS", (threads / 2).max(1).to_string());
    // use the served weights, not newer ones
    command.env("HF_HUB_OFFLINE", "1");
    // Ctrl-C in the terminal must only reach the server, which then stops the job
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
}

impl Trainer {
    /// Starts `train` with these arguments; its output is written to a file in `folder`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn start(config: &JobsConfig, folder: &Path, arguments: &[OsString]) -> io::Result<Self> {
        let log = folder.join("trainer.log");
        let mut command = command(config);
        command.args(["train", "--as-job", "--json", "--quiet"]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, asked: None, log })
    }

    /// Requests the process to write a checkpoint and exit.
    pub(super) fn ask_to_stop(&mut self) {
        self.stdin = None;
        self.asked.get_or_insert_with(Instant::now);
    }

    /// Whether it was requested to stop.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// The exit status of the process; none while it runs.
    pub(super) fn ended(&mut self) -> Option<io::Result<ExitStatus>> {
        if self.asked.is_some_and(|asked| asked.elapsed() > STOP_TIMEOUT) {
            // the job will resume from an earlier checkpoint
            let _ = self.child.kill();
        }
        self.child.try_wait().transpose()
    }

    /// The error that the process printed, without paths.
    pub(super) fn error(&self) -> Option<String> {
        error_in(&tail(&self.log)?)
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        self.stdin = None;
    }
}

/// Runs `plan` with these arguments and returns its output.
///
/// # Errors
/// The settings or the data are invalid; the message contains no paths.
pub(super) fn plan(config: &JobsConfig, folder: &Path, arguments: &[OsString]) -> Result<serde_json::Value, String> {
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!("plan: {error}");
        "the plan failed; see the server's log for the cause".to_owned()
    };
    let (out, log) = (folder.join("plan.json"), folder.join("plan.log"));
    let mut command = command(config);
    command.args(["plan", "--json", "--quiet"]).args(arguments).stdin(Stdio::null());
    command.stdout(File::create(&out).map_err(|error| failed(&error))?);
    command.stderr(File::create(&log).map_err(|error| failed(&error))?);
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let started = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|error| failed(&error))? {
            Some(status) => break status,
            None if started.elapsed() > PLAN_TIMEOUT => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("the plan took longer than {} s", PLAN_TIMEOUT.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if !status.success() {
        return Err(tail(&log).and_then(|text| error_in(&text)).unwrap_or_else(|| failed(&status)));
    }
    let text = std::fs::read(&out).map_err(|error| failed(&error))?;
    serde_json::from_slice(&text).map_err(|error| failed(&error))
}

/// The end of a file.
fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The error message in the program's output.
fn error_in(log: &str) -> Option<String> {
    let (_, error) = log.rsplit_once("error: ")?;
    let error = error.split("\nhint: ").next().unwrap_or_default();
    let error: String = without_paths(error.trim()).chars().take(MAX_ERROR_CHARS).collect();
    Some(error).filter(|error| !error.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn paths_are_removed_from_errors_of_the_program() {
        let log =
            "warning: x\nerror: the dataset cannot be used:\n  /srv/jobs/a b/train.jsonl:3: not JSON\nhint: see /x\n";
        let expected = "the dataset cannot be used:\n  a b/train.jsonl:3: not JSON";
        assert_eq!(error_in(log).as_deref(), Some(expected));
        assert_eq!(error_in("note: all well\n"), None);
    }
}
