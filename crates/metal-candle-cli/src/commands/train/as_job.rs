//! Runs `train` as a job of a server: with low priority, and until the server exits.

use crate::interrupt;
use std::io::Read;

/// The increase of the nice value of a job.
#[cfg(unix)]
const NICENESS: i32 = 10;

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
