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

    /// The name its maker gave it, such as `NVIDIA H100 80GB HBM3`, `Apple M3 Max` or that of the CPU, where the system
    /// tells.
    pub fn description(&self) -> Option<String> {
        match self.0 {
            Kind::Cpu => cpu_name(),
            Kind::Metal => metal_name(),
            Kind::Cuda => cuda_name(),
        }
    }

    /// The memory that can be used now, where the system tells: of the CPU on Linux, within the limit of a control group.
    pub fn memory(&self) -> Option<MemoryInUse> {
        match self.0 {
            Kind::Cpu => cpu_memory(),
            Kind::Metal => metal_memory(),
            Kind::Cuda => cuda_memory(),
        }
    }

    /// All the memory there is, in bytes, where the system tells: on Metal what is recommended as a working set.
    pub fn total_memory(&self) -> Option<usize> {
        match self.0 {
            Kind::Cpu => cpu_total_memory(),
            Kind::Metal => metal_working_set(),
            Kind::Cuda => cuda_free_and_total().map(|(_, total)| total),
        }
    }

    /// Forgets the most memory that was in use until now, for [`Device::peak_memory`]. Only a CUDA device counts it.
    pub fn reset_peak_memory(&self) {
        if self.is_cuda() {
            reset_cuda_peak();
        }
    }

    /// The most memory that this process held on a CUDA device since [`Device::reset_peak_memory`], in bytes, with what is
    /// kept for the next tensors.
    pub fn peak_memory(&self) -> Option<usize> {
        if self.is_cuda() { cuda_peak() } else { None }
    }

    /// Runs one step or token: frees what Metal's framework leaves behind, and waits, so that a failed command is an error. On
    /// Metal one thread at a time does so.
    pub(crate) fn step<R>(self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.is_cpu() {
            return work();
        }
        pooled(|| {
            let result = work()?;
            self.synchronize()?;
            Ok(result)
        })
    }

    /// Runs work that waits for the device itself: frees what Metal's framework leaves behind.
    #[allow(clippy::unused_self)]
    pub(crate) fn pooled<R>(self, work: impl FnOnce() -> Result<R>) -> Result<R> {
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
    /// What this process uses; on CUDA what all processes use of the card.
    pub used: usize,
    /// What is left for it, less a margin on accelerators.
    pub free: usize,
}

fn cpu_memory() -> Option<MemoryInUse> {
    let used = kilobytes(Path::new("/proc/self/status"), "VmRSS:")?;
    let mut free = kilobytes(Path::new("/proc/meminfo"), "MemAvailable:")?;
    if let (Some(limit), Some(current)) = (control_group("memory.max"), control_group("memory.current")) {
        free = free.min(limit.saturating_sub(current));
    }
    Some(MemoryInUse { used, free })
}

fn cpu_total_memory() -> Option<usize> {
    let total = kilobytes(Path::new("/proc/meminfo"), "MemTotal:").or_else(|| system_value("hw.memsize")?.parse().ok());
    total.map(|total| control_group("memory.max").map_or(total, |limit| limit.min(total)))
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.trim_start().strip_prefix(':'));
    name.map(|name| name.trim().to_owned()).or_else(|| system_value("machdep.cpu.brand_string"))
}

/// A number of the control group; no limit is the word `max`.
fn control_group(name: &str) -> Option<usize> {
    std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?.trim().parse().ok()
}

/// A value of the kernel's state on macOS.
fn system_value(name: &str) -> Option<String> {
    if !cfg!(target_os = "macos") {
        return None;
    }
    let output = std::process::Command::new("sysctl").args(["-n", name]).output().ok()?;
    let value = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!value.is_empty()).then_some(value)
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
    let used = devices.first()?.as_ref().currentAllocatedSize();
    let limit = metal_working_set()? / 10 * 8;
    Some(MemoryInUse { used, free: limit.saturating_sub(used) })
}

#[cfg(feature = "metal")]
fn metal_working_set() -> Option<usize> {
    use objc2_metal::MTLDevice;
    let devices = candle_metal_kernels::metal::Device::all();
    usize::try_from(devices.first()?.as_ref().recommendedMaxWorkingSetSize()).ok()
}

#[cfg(feature = "metal")]
fn metal_name() -> Option<String> {
    use objc2_metal::MTLDevice;
    let devices = candle_metal_kernels::metal::Device::all();
    Some(devices.first()?.as_ref().name().to_string())
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

#[cfg(not(feature = "metal"))]
fn metal_working_set() -> Option<usize> {
    None
}

#[cfg(not(feature = "metal"))]
fn metal_name() -> Option<String> {
    None
}

/// Of the whole card, with a margin: other processes use it too, and memory in pieces cannot be used to the last byte.
fn cuda_memory() -> Option<MemoryInUse> {
    let (free, total) = cuda_free_and_total()?;
    Some(MemoryInUse { used: total.saturating_sub(free), free: free / 10 * 9 })
}

#[cfg(feature = "cuda")]
fn cuda_free_and_total() -> Option<(usize, usize)> {
    let Some(Ok(candle_core::Device::Cuda(device))) = CUDA.get() else { return None };
    device.cuda_stream().context().mem_get_info().ok()
}

#[cfg(feature = "cuda")]
fn cuda_name() -> Option<String> {
    let Some(Ok(candle_core::Device::Cuda(device))) = CUDA.get() else { return None };
    device.cuda_stream().context().name().ok()
}

#[cfg(feature = "cuda")]
fn reset_cuda_peak() {
    if let Some(Ok(candle_core::Device::Cuda(device))) = CUDA.get() {
        // who asks for the peak afterwards is told that of a longer time
        let _ = metal_candle_kernels::gpu::cuda::reset_peak_memory(device);
    }
}

#[cfg(feature = "cuda")]
fn cuda_peak() -> Option<usize> {
    let Some(Ok(candle_core::Device::Cuda(device))) = CUDA.get() else { return None };
    metal_candle_kernels::gpu::cuda::peak_memory(device).ok().flatten()
}

#[cfg(not(feature = "cuda"))]
fn reset_cuda_peak() {}

#[cfg(not(feature = "cuda"))]
fn cuda_peak() -> Option<usize> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda_free_and_total() -> Option<(usize, usize)> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda_name() -> Option<String> {
    None
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
fn pooled<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    objc2::rc::autoreleasepool(|_| alone(work))
}

/// Runs work while no other thread does. candle deals what several threads give it to several command buffers, with no fence from
/// one to another, even for a buffer that one thread has dropped and another takes. So as soon as there are two threads, work
/// begins when all that was given before is done.
#[cfg(feature = "metal")]
fn alone<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    use std::cell::Cell;
    use std::sync::{Mutex, PoisonError};
    use std::thread::{ThreadId, current};
    struct Users {
        first: Option<ThreadId>,
        are_many: bool,
    }
    static USERS: Mutex<Users> = Mutex::new(Users { first: None, are_many: false });
    thread_local! {
        static IS_ALONE: Cell<bool> = const { Cell::new(false) };
    }
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            IS_ALONE.set(false);
        }
    }
    if IS_ALONE.get() {
        return work();
    }
    let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
    IS_ALONE.set(true);
    let _leave = Leave;
    let me = current().id();
    users.are_many |= *users.first.get_or_insert(me) != me;
    if users.are_many {
        Device::metal()?.synchronize()?;
    }
    work()
}

#[cfg(not(feature = "metal"))]
fn pooled<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
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
