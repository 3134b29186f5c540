//! Reports the memory of this process.

use std::process::Command;
use std::time::{Duration, Instant};

/// The most memory the process has held, in bytes: on its CUDA devices if it uses any, else in RAM (Linux).
pub(crate) fn peak() -> Option<u64> {
    metal_candle::Device::process_peak_memory()
}

/// Resets the peak to the current use, if the operating system supports it (Linux).
pub(crate) fn forget_peak() {
    // otherwise the peak is that of the whole process so far
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn kilobytes(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Reports the memory in use, and queries the system at intervals only.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    last: Option<(Instant, Option<u64>)>,
}

impl Gauge {
    /// The memory the process holds, in bytes: on its CUDA devices if it uses any, else in RAM, if the operating system
    /// reports it.
    pub(crate) fn bytes(&mut self) -> Option<u64> {
        // running `ps` takes milliseconds, unlike reading a file of /proc
        let interval = if cfg!(target_os = "linux") { Duration::from_millis(200) } else { Duration::from_secs(10) };
        match self.last {
            Some((when, bytes)) if when.elapsed() < interval => bytes,
            _ => {
                let bytes = metal_candle::Device::process_memory().or_else(of_ps);
                self.last = Some((Instant::now(), bytes));
                bytes
            }
        }
    }
}

/// Memory by `ps`, for systems without `/proc` such as macOS.
fn of_ps() -> Option<u64> {
    if !cfg!(unix) {
        return None;
    }
    let output = Command::new("ps").args(["-o", "rss=", "-p", &std::process::id().to_string()]).output().ok()?;
    kilobytes(std::str::from_utf8(&output.stdout).ok()?)
}

#[cfg(test)]
mod tests {
    use super::{Gauge, kilobytes};

    #[test]
    fn memory_is_reported() {
        assert_eq!(kilobytes(" 12 "), Some(12_288));
        assert_eq!(kilobytes(""), None);
        if cfg!(unix) {
            let bytes = Gauge::default().bytes();
            assert!(bytes.is_some_and(|bytes| bytes > 1 << 20), "{bytes:?}");
        }
    }
}
