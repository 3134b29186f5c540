//! Starts one process per device and waits for all of them.
//!
//! Rank 0 prints messages as a single process does. The launcher passes each rank a pipe as standard input: a byte means
//! Ctrl-C, and its end means that the launcher has exited.

use crate::error::UserError;
use crate::interrupt;
use crate::output::Output;
use crate::rank::{OTHER_FAILED, STARTED, device_number, is_rank};
use crate::values::DeviceKind;
use anyhow::{Context, Result};
use metal_candle::training::Group;
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio, exit};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the other processes may continue after one has ended, to report and record the failure.
const GRACE: Duration = Duration::from_secs(10);

/// Time between two checks of the processes.
const PAUSE: Duration = Duration::from_millis(20);

/// Maximum number of lines in the output of a rank other than 0.
const MAX_LINES: usize = 20;

/// The group of this process, if it has one.
pub(crate) fn join() -> Result<Option<Group>> {
    if is_rank() {
        // a terminal sends Ctrl-C to all processes; the launcher decides which ranks to notify
        interrupt::divert(|| {});
        let first = device_number() == 0;
        std::thread::spawn(move || {
            let mut byte = [0];
            while std::io::stdin().lock().read(&mut byte).is_ok_and(|count| count > 0) {
                if first {
                    interrupt::press();
                }
            }
            crate::screen::leave();
            exit(2);
        });
    }
    Ok(Group::from_environment()?)
}

/// Runs this command once per device and waits for all processes; exits with the code of a failed process.
pub(crate) fn launch(num_devices: usize) -> Result<()> {
    let address = free_address().context("there is no free port for the processes")?;
    let token = format!("{:016x}{:016x}", RandomState::new().hash_one(0), RandomState::new().hash_one(1));
    let threads = threads_of_one(num_devices).to_string();
    let mut ranks = Ranks(Vec::new());
    for rank in 0..num_devices {
        let mut command = Command::new(std::env::current_exe().context("cannot determine the path of this program")?);
        command
            .args(std::env::args_os().skip(1))
            .env(STARTED, "1")
            .env(Group::RANK, rank.to_string())
            .env(Group::NUM_RANKS, num_devices.to_string())
            .env(Group::ADDRESS, &address)
            .env(Group::TOKEN, &token)
            .env("RAYON_NUM_THREADS", &threads)
            .stdin(Stdio::piped());
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().context("cannot start the process of a device")?;
        let said = child.stderr.take().map(Said::listen);
        ranks.0.push(Rank { child, said, status: None });
    }
    // kept open: closing the pipes would signal that this process has exited
    let pipes: Vec<_> = ranks.0.iter_mut().map(|rank| rank.child.stdin.take()).collect();
    let pipes = Arc::new(Mutex::new(pipes));
    let held = Arc::clone(&pipes);
    interrupt::divert(move || {
        if let Some(Some(first)) = held.lock().unwrap_or_else(PoisonError::into_inner).first_mut() {
            // the process may have ended
            let _ = first.write_all(b"\n").and_then(|()| first.flush());
        }
    });
    ranks.wait()?;
    drop(pipes);
    match ranks.verdict() {
        0 => Ok(()),
        code => exit(code),
    }
}

/// A free loopback address.
fn free_address() -> std::io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// The number of CPU threads of each process.
fn threads_of_one(num_devices: usize) -> usize {
    let given = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&count| count > 0);
    let all = given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    (all / num_devices).max(1)
}

/// The processes.
struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    /// Its output, unless it is printed directly.
    said: Option<Said>,
    status: Option<ExitStatus>,
}

impl Ranks {
    /// Waits until all processes have ended. When one has failed or rank 0 is done, the others must end soon.
    fn wait(&mut self) -> Result<()> {
        let mut deadline: Option<Instant> = None;
        loop {
            for (number, rank) in self.0.iter_mut().enumerate() {
                if rank.status.is_none() {
                    rank.status = rank.child.try_wait().context("cannot wait for the process of a device")?;
                    if rank.status.is_some_and(|status| number == 0 || !status.success()) {
                        deadline.get_or_insert_with(|| Instant::now() + GRACE);
                    }
                }
            }
            if self.0.iter().all(|rank| rank.status.is_some()) {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                self.end();
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Kills the remaining processes.
    fn end(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.status.is_none()) {
            // the process may have just ended
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }

    /// Prints the output of failed ranks, and returns the exit code.
    fn verdict(&mut self) -> i32 {
        let count = self.0.len();
        let own_fault = |status: &ExitStatus| !status.success() && status.code() != Some(i32::from(OTHER_FAILED));
        match self.0[0].status {
            Some(status) if status.success() => return 0,
            // rank 0 has printed the error
            Some(status) if own_fault(&status) && status.code().is_some() => return status.code().unwrap_or(2),
            _ => {}
        }
        let mut code = 2;
        for (number, rank) in self.0.iter_mut().enumerate() {
            let Some(status) = rank.status.filter(own_fault) else { continue };
            let said = rank.said.take().map(Said::text).unwrap_or_default();
            let end = if said.is_empty() { "" } else { ":\n" };
            Output::warn(format_args!("device {number} of {count} ended first ({status}){end}{said}"));
            code = status.code().unwrap_or(code);
        }
        code
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.end();
    }
}

/// The last lines of the output of a process.
struct Said {
    lines: Arc<Mutex<VecDeque<String>>>,
    listener: JoinHandle<()>,
}

impl Said {
    fn listen(stream: ChildStderr) -> Self {
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let heard = Arc::clone(&lines);
        let listener = std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(std::io::Result::ok) {
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.push_back(line);
                if heard.len() > MAX_LINES {
                    heard.pop_front();
                }
            }
        });
        Self { lines, listener }
    }

    /// Returns the lines after the process has ended.
    fn text(self) -> String {
        // the thread only reads and does not panic
        let _ = self.listener.join();
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Maximum number of processes of a run.
const MAX_DEVICES: usize = 64;

/// Checks the number of devices.
pub(crate) fn check(num_devices: usize, device: Option<DeviceKind>) -> Result<()> {
    if !(1..=MAX_DEVICES).contains(&num_devices) {
        let message = format!("`--num-devices`: expected 1 to {MAX_DEVICES}, found {num_devices}");
        return Err(UserError::new(message).into());
    }
    let is_metal = match device {
        Some(DeviceKind::Metal) => true,
        None | Some(DeviceKind::Auto) => num_devices > 1 && metal_candle::Device::metal().is_ok(),
        Some(_) => false,
    };
    if num_devices > 1 && is_metal {
        return Err(UserError::new(format!("`--num-devices`: there is one Metal device, not {num_devices}"))
            .with_hint("remove it, or use CPU processes with `--device cpu`")
            .into());
    }
    Ok(())
}
