//! Several devices: one process each, started by this one, which waits for them.
//!
//! Rank 0 talks with the user as a lone process does. The first process gives each rank a pipe as its standard input: a byte
//! in it means Ctrl-C, its end that the first process is gone.

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

/// How long the other processes may run after one has ended, to report and record the failure.
const GRACE: Duration = Duration::from_secs(10);

/// Time between two looks at the processes.
const PAUSE: Duration = Duration::from_millis(20);

/// Lines kept of what a rank but 0 says.
const MAX_LINES: usize = 20;

/// The group of this process, if it has one.
pub(crate) fn join() -> Result<Option<Group>> {
    if is_rank() {
        // a terminal tells all processes of Ctrl-C; the first one decides who is to know
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

/// Runs this command once a device and waits for all; returns if all is well, or ends as the process at fault did.
pub(crate) fn launch(num_devices: usize) -> Result<()> {
    let address = free_address().context("no port for the processes of the devices is free")?;
    let token = format!("{:016x}{:016x}", RandomState::new().hash_one(0), RandomState::new().hash_one(1));
    let threads = threads_of_one(num_devices).to_string();
    let mut ranks = Ranks(Vec::new());
    for rank in 0..num_devices {
        let mut command = Command::new(std::env::current_exe().context("the program does not find itself")?);
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
        let mut child = command.spawn().context("the process of a device cannot be started")?;
        let said = child.stderr.take().map(Said::listen);
        ranks.0.push(Rank { child, said, status: None });
    }
    // kept open: its end would tell the ranks that this process is gone
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

/// A free address of this machine.
fn free_address() -> std::io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// The threads of the CPU that each process gets.
fn threads_of_one(num_devices: usize) -> usize {
    let given = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&count| count > 0);
    let all = given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    (all / num_devices).max(1)
}

/// The processes.
struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    /// What it says, unless the user reads that.
    said: Option<Said>,
    status: Option<ExitStatus>,
}

impl Ranks {
    /// Waits until all have ended; when one has failed, or rank 0 is done, the rest must end soon.
    fn wait(&mut self) -> Result<()> {
        let mut deadline: Option<Instant> = None;
        loop {
            for (number, rank) in self.0.iter_mut().enumerate() {
                if rank.status.is_none() {
                    rank.status = rank.child.try_wait().context("the process of a device is lost")?;
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

    /// Ends those that are left.
    fn end(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.status.is_none()) {
            // it may have ended just now
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }

    /// The exit code of all together, after what is to be said of ranks that the user did not hear.
    fn verdict(&mut self) -> i32 {
        let count = self.0.len();
        let own_fault = |status: &ExitStatus| !status.success() && status.code() != Some(i32::from(OTHER_FAILED));
        match self.0[0].status {
            Some(status) if status.success() => return 0,
            // it has printed the error
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

/// The last lines that a process says.
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

    /// All of them, when the process has ended.
    fn text(self) -> String {
        // a thread that only reads does not panic
        let _ = self.listener.join();
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Most processes of a run.
const MAX_DEVICES: usize = 64;

/// Refuses what cannot be trained on more than one device.
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
            .with_hint("leave it out, or train on processes of the CPU with `--device cpu`")
            .into());
    }
    Ok(())
}
