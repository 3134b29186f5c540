//! Training as a job of a server: in the background, and for as long as the server lives.

use crate::interrupt;
use std::io::Read;

/// How much lower the priority of a job is.
#[cfg(unix)]
const NICENESS: i32 = 10;

/// Lowers the priority of this process, and does what Ctrl-C does when standard input ends: the server closes it to stop
/// the job, and the operating system does so when the server is killed.
pub(super) fn start() {
    // without the right to do so the priority stays as it is
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
