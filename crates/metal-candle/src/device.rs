//! The device a model lives on.

use crate::error::{Error, Result};
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

/// A device: the CPU, or the one accelerator this process uses.
///
/// `Device` is a small copyable handle. candle treats two handles of one GPU as different devices, so
/// the accelerator is opened once a process and shared from then on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Cpu,
    Cuda,
    Metal,
}

static CUDA: OnceLock<std::result::Result<candle_core::Device, String>> = OnceLock::new();
static METAL: OnceLock<std::result::Result<candle_core::Device, String>> = OnceLock::new();

impl Device {
    /// The CPU.
    pub const CPU: Self = Self(Kind::Cpu);

    /// The best device there is: Metal, else CUDA, else the CPU.
    ///
    /// `ordinal` numbers the CUDA devices from 0; the first call decides for the process.
    pub fn new_with_fallback(ordinal: usize) -> Self {
        Self::metal().or_else(|_| Self::cuda(ordinal)).unwrap_or(Self::CPU)
    }

    /// The Metal device.
    ///
    /// # Errors
    /// The build lacks the feature `metal`, or there is no Metal device.
    pub fn metal() -> Result<Self> {
        let opened = METAL.get_or_init(open_metal);
        opened.as_ref().map(|_| Self(Kind::Metal)).map_err(|e| Error::Device(e.clone()))
    }

    /// The CUDA device `ordinal`; the first call decides for the process.
    ///
    /// # Errors
    /// The build lacks the feature `cuda`, or there is no such device.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let opened = CUDA.get_or_init(|| open_cuda(ordinal));
        opened.as_ref().map(|_| Self(Kind::Cuda)).map_err(|e| Error::Device(e.clone()))
    }

    /// candle's device.
    pub fn candle(&self) -> candle_core::Device {
        let opened = match self.0 {
            Kind::Cpu => None,
            Kind::Cuda => CUDA.get(),
            Kind::Metal => METAL.get(),
        };
        match opened {
            Some(Ok(device)) => device.clone(),
            _ => candle_core::Device::Cpu,
        }
    }

    /// Whether this is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.0 == Kind::Cpu
    }

    /// Whether this is a Metal device.
    pub fn is_metal(&self) -> bool {
        self.0 == Kind::Metal
    }

    /// Whether this is a CUDA device.
    pub fn is_cuda(&self) -> bool {
        self.0 == Kind::Cuda
    }

    /// `cpu`, `metal` or `cuda`.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Kind::Cpu => "cpu",
            Kind::Cuda => "cuda",
            Kind::Metal => "metal",
        }
    }

    /// The memory that can be used now, where the system tells: of the CPU on Linux, within the limit of a control group.
    pub fn memory(&self) -> Option<MemoryInUse> {
        match self.0 {
            Kind::Cpu => cpu_memory(),
            Kind::Metal => metal_memory(),
            Kind::Cuda => None,
        }
    }

    /// Runs one step or token: frees what Metal's framework leaves behind, and waits, so that a failed command is an error.
    pub(crate) fn step<R>(self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.is_cpu() {
            return work();
        }
        let result = pooled(work)?;
        self.synchronize()?;
        Ok(result)
    }

    /// Runs work that waits for the device itself: frees what Metal's framework leaves behind.
    #[allow(clippy::unused_self)]
    pub(crate) fn pooled<R>(self, work: impl FnOnce() -> R) -> R {
        pooled(work)
    }

    /// Waits until the device has done all it was given.
    ///
    /// # Errors
    /// A command given to the device earlier has failed.
    pub fn synchronize(&self) -> Result<()> {
        self.candle().synchronize().map_err(|e| Error::Device(e.to_string()))
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInUse {
    /// What this process uses.
    pub used: usize,
    /// What is left for it.
    pub free: usize,
}

fn cpu_memory() -> Option<MemoryInUse> {
    let used = kilobytes(Path::new("/proc/self/status"), "VmRSS:")?;
    let mut free = kilobytes(Path::new("/proc/meminfo"), "MemAvailable:")?;
    let number = |name: &str| -> Option<usize> {
        std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?.trim().parse().ok()
    };
    // no limit is the word `max`
    if let (Some(limit), Some(current)) = (number("memory.max"), number("memory.current")) {
        free = free.min(limit.saturating_sub(current));
    }
    Some(MemoryInUse { used, free })
}

/// The line of a file under `/proc` that begins with `key`, in bytes.
fn kilobytes(path: &Path, key: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Below what Metal recommends as a working set: at its limit the whole system suffers.
#[cfg(feature = "metal")]
fn metal_memory() -> Option<MemoryInUse> {
    use objc2_metal::MTLDevice;
    let devices = candle_metal_kernels::metal::Device::all();
    let device = devices.first()?;
    let used = device.as_ref().currentAllocatedSize();
    let limit = usize::try_from(device.as_ref().recommendedMaxWorkingSetSize()).ok()? / 10 * 8;
    Some(MemoryInUse { used, free: limit.saturating_sub(used) })
}

#[cfg(not(feature = "metal"))]
fn metal_memory() -> Option<MemoryInUse> {
    None
}

/// A device with a stream of its own, so that work can be recorded.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> std::result::Result<candle_core::Device, String> {
    let device = candle_core::CudaDevice::new_with_stream(ordinal).map_err(|e| e.to_string())?;
    metal_candle_kernels::gpu::cuda::prepare(&device).map_err(|e| e.to_string())?;
    Ok(candle_core::Device::Cuda(device))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> std::result::Result<candle_core::Device, String> {
    Err("this build has no CUDA support (feature `cuda`)".into())
}

#[cfg(feature = "metal")]
fn open_metal() -> std::result::Result<candle_core::Device, String> {
    use objc2_metal::MTLDevice;
    // candle panics on an empty device list (virtual machines, remote shells)
    let devices = candle_metal_kernels::metal::Device::all();
    let Some(device) = devices.first() else {
        return Err("there is no Metal device".into());
    };
    // candle dispatches concurrently, which gives wrong results on discrete GPUs
    if !device.as_ref().hasUnifiedMemory() {
        return Err("the Metal device has no unified memory".into());
    }
    candle_core::Device::new_metal(0).map_err(|e| e.to_string())
}

#[cfg(not(feature = "metal"))]
fn open_metal() -> std::result::Result<candle_core::Device, String> {
    Err("this build has no Metal support (feature `metal`)".into())
}

#[cfg(feature = "metal")]
fn pooled<R>(work: impl FnOnce() -> R) -> R {
    objc2::rc::autoreleasepool(|_| work())
}

#[cfg(not(feature = "metal"))]
fn pooled<R>(work: impl FnOnce() -> R) -> R {
    work()
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
