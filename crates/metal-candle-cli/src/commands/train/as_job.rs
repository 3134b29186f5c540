//! Runs `train` as a job of a server: with lower priority, and until the server exits.

use crate::interrupt;
use std::io::Read;

/// The increase of the nice value of a job. On two cores, a job beside eight streams then has 0.4 of its speed alone; with 10
/// it has 0.1, and the streams are as fast.
#[cfg(unix)]
const NICENESS: i32 = 2;

/// Lowers the priority of this process, and treats the end of standard input like Ctrl-C: the server closes it to stop
/// the job, and the operating system closes it if the server is killed.
pub(super) fn start() {
    // without permission, the priority does not change
    #[cfg(unix)]
    let _ = rustix::process::nice(NICENESS);
    std::thread::spawn(|| {
        let mut input = std::io::stdin().lock();
        let mut block = [0; 256];
        while input.read(&mut block).is_ok_and(|count| count > 0) {}
        if !interrupt::is_asked() {
            interrupt::press();
        }
    });
}
