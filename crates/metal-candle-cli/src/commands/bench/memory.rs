//! Measures the peak memory of a measurement.

use metal_candle::Device;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two memory readings of an accelerator.
const INTERVAL: Duration = Duration::from_millis(10);

/// Watches the memory of a model's device.
#[derive(Debug)]
pub(super) enum PeakMemory {
    /// RAM of the process.
    Process,
    /// Memory of a Metal device, polled by a thread.
    Watched(Watcher),
    /// Memory of a CUDA device, which records the peak itself.
    Counted(Device),
    /// The device does not report its memory.
    Unknown,
}

/// A thread that polls the memory of a device.
#[derive(Debug)]
pub(super) struct Watcher {
    is_over: Arc<AtomicBool>,
    most: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl PeakMemory {
    /// Starts watching.
    pub(super) fn watch(device: Device) -> Self {
        if device.is_cpu() {
            crate::memory::forget_peak();
            return Self::Process;
        }
        if device.is_cuda() {
            device.reset_peak_memory();
            return Self::Counted(device);
        }
        if device.memory().is_none() { Self::Unknown } else { Self::Watched(Watcher::start(device)) }
    }

    /// The peak in bytes, if the system reports it.
    pub(super) fn peak_bytes(self) -> Option<u64> {
        match self {
            Self::Process => crate::memory::peak(),
            Self::Watched(watcher) => Some(watcher.most() as u64),
            Self::Counted(device) => {
                let peak = device.peak_memory();
                // release cached memory, which the other program may need
                device.reset_peak_memory();
                peak.map(|bytes| bytes as u64)
            }
            Self::Unknown => None,
        }
    }
}

impl Watcher {
    fn start(device: Device) -> Self {
        let (is_over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (over, highest) = (Arc::clone(&is_over), Arc::clone(&most));
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                if let Some(memory) = device.memory() {
                    highest.fetch_max(memory.used, Ordering::Relaxed);
                }
                std::thread::sleep(INTERVAL);
            }
        });
        Self { is_over, most, thread }
    }

    fn most(self) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        // the thread only reads and cannot fail
        let _ = self.thread.join();
        self.most.load(Ordering::Relaxed)
    }
}
