//! [`Device`]: opens the CPU, Metal or a CUDA GPU, and reports its memory.

use crate::error::{Error, Result};
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

/// A device: the CPU, the Metal device or a CUDA device.
///
/// `Device` is a small copyable handle. candle treats two handles of one GPU as different devices, so
/// each accelerator is opened once per process and shared from then on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Cpu,
    /// The ordinal of the device.
    Cuda(u8),
    Metal,
}

/// Maximum number of CUDA devices in a machine.
const MAX_CUDA: usize = 64;

static CUDA: [OnceLock<std::result::Result<candle_core::Device, String>>; MAX_CUDA] =
    [const { OnceLock::new() }; MAX_CUDA];
static METAL: OnceLock<std::result::Result<candle_core::Device, String>> = OnceLock::new();

impl Device {
    /// The CPU.
    pub const CPU: Self = Self(Kind::Cpu);

    /// The best available device: Metal, else CUDA, else the CPU.
    ///
    /// `ordinal` is the ordinal of the CUDA device, from 0. [`Device::accelerator`] reports why there is no accelerator.
    pub fn new_with_fallback(ordinal: usize) -> Self {
        Self::accelerator(ordinal).unwrap_or(Self::CPU)
    }

    /// The Metal device, else the CUDA device `ordinal`.
    ///
    /// # Errors
    /// Neither is available; the message contains the reason for each backend that the build supports.
    pub fn accelerator(ordinal: usize) -> Result<Self> {
        let metal = match Self::metal() {
            Err(error) if cfg!(feature = "cuda") => error,
            other => return other,
        };
        Self::cuda(ordinal).map_err(|cuda| match (metal, cuda) {
            (Error::Device(metal), Error::Device(cuda)) if cfg!(feature = "metal") => {
                Error::Device(format!("{metal}; {cuda}"))
            }
            (_, cuda) => cuda,
        })
    }

    /// The Metal device.
    ///
    /// # Errors
    /// The build lacks the feature `metal`, or there is no Metal device.
    pub fn metal() -> Result<Self> {
        let opened = METAL.get_or_init(open_metal);
        opened.as_ref().map(|_| Self(Kind::Metal)).map_err(|e| Error::Device(e.clone()))
    }

    /// The CUDA device `ordinal`, from 0.
    ///
    /// # Errors
    /// The build lacks the feature `cuda`, or there is no such device.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let (Some(slot), Ok(number)) = (CUDA.get(ordinal), u8::try_from(ordinal)) else {
            return Err(Error::Device(format!("expected a CUDA device from 0 to {}, found {ordinal}", MAX_CUDA - 1)));
        };
        let opened = slot.get_or_init(|| open_cuda(ordinal));
        opened.as_ref().map(|_| Self(Kind::Cuda(number))).map_err(|e| Error::Device(e.clone()))
    }

    /// candle's device.
    pub fn candle(&self) -> candle_core::Device {
        let opened = match self.0 {
            Kind::Cpu => None,
            Kind::Cuda(ordinal) => CUDA[usize::from(ordinal)].get(),
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
        matches!(self.0, Kind::Cuda(_))
    }

    /// Whether the CPU multiplies bf16, which [`MatmulPrecision::Bf16`](crate::models::MatmulPrecision::Bf16) uses.
    pub fn multiplies_bf16() -> bool {
        metal_candle_kernels::multiplies_bf16()
    }

    /// The instruction sets that the CPU kernels use on this machine: for floats, for 8-bit integers, and the matrix unit if
    /// there is one. The environment variable `METAL_CANDLE_ISA` limits them to a level: `baseline`, `avx2`, `avx-vnni`,
    /// `avx512`, `avx512-vnni` or `amx`; on Arm `neon` or `dotprod`.
    ///
    /// # Errors
    /// The variable is not a level, or this machine does not support the level.
    pub fn cpu_levels() -> Result<Vec<&'static str>> {
        let named = |message| Error::Argument { name: metal_candle_kernels::ISA_VARIABLE.into(), message };
        metal_candle_kernels::levels().map_err(named)
    }

    /// `cpu`, `metal` or `cuda`.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Kind::Cpu => "cpu",
            Kind::Cuda(_) => "cuda",
            Kind::Metal => "metal",
        }
    }

    /// The ordinal of a CUDA device, from 0; 0 for other devices.
    pub fn ordinal(&self) -> usize {
        match self.0 {
            Kind::Cuda(ordinal) => usize::from(ordinal),
            Kind::Cpu | Kind::Metal => 0,
        }
    }

    /// The product name, such as `NVIDIA H100 80GB HBM3`, `Apple M3 Max` or the CPU's name; none if the system does not report
    /// it.
    pub fn description(&self) -> Option<String> {
        match self.0 {
            Kind::Cpu => cpu_name(),
            Kind::Metal => metal_name(),
            Kind::Cuda(_) => cuda_name(*self),
        }
    }

    /// The memory in use and free now; none if the system does not report it. For the CPU only on Linux, within the limit of
    /// the control group.
    pub fn memory(&self) -> Option<MemoryInUse> {
        match self.0 {
            Kind::Cpu => cpu_memory(),
            Kind::Metal => metal_memory(),
            Kind::Cuda(_) => cuda_memory(*self),
        }
    }

    /// The total memory, in bytes; none if the system does not report it. On Metal, the recommended working set.
    pub fn total_memory(&self) -> Option<usize> {
        match self.0 {
            Kind::Cpu => cpu_total_memory(),
            Kind::Metal => metal_working_set(),
            Kind::Cuda(_) => cuda_free_and_total(*self).map(|(_, total)| total),
        }
    }

    /// Resets [`Device::peak_memory`]. Only CUDA devices count it.
    pub fn reset_peak_memory(&self) {
        if self.is_cuda() {
            reset_cuda_peak(*self);
        }
    }

    /// The peak memory of this process on a CUDA device since [`Device::reset_peak_memory`], in bytes, including memory that
    /// is cached for reuse.
    pub fn peak_memory(&self) -> Option<usize> {
        if self.is_cuda() { cuda_peak(*self) } else { None }
    }

    /// The peak memory of this process, in bytes: on its CUDA devices if it uses any, else in RAM (Linux only).
    pub fn process_peak_memory() -> Option<u64> {
        of_process(cuda_peak, "VmHWM:")
    }

    /// The memory that this process uses now, in bytes: on its CUDA devices if it uses any, else in RAM (Linux only).
    pub fn process_memory() -> Option<u64> {
        of_process(cuda_held, "VmRSS:")
    }

    /// Runs one step or token. On Metal, drains the autorelease pool, waits so that failed commands are errors, and excludes
    /// other threads.
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

    /// Runs work that waits for the device itself. On Metal, drains the autorelease pool.
    #[allow(clippy::unused_self)]
    pub(crate) fn pooled<R>(self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        pooled(work)
    }

    /// Waits until the device has completed all commands.
    ///
    /// # Errors
    /// An earlier command failed.
    pub fn synchronize(&self) -> Result<()> {
        self.candle().synchronize().map_err(|e| Error::Device(e.to_string()))
    }
}

/// Sums memory over the CUDA devices that this process uses. Without any, reads it from `/proc/self/status`.
fn of_process(of_cuda: impl Fn(Device) -> Option<usize>, of_ram: &str) -> Option<u64> {
    let opened = (0..MAX_CUDA).filter(|&ordinal| matches!(CUDA[ordinal].get(), Some(Ok(_))));
    let of_devices: Vec<Option<usize>> = opened.map(|ordinal| of_cuda(Device(Kind::Cuda(ordinal as u8)))).collect();
    if of_devices.is_empty() {
        return kilobytes(Path::new("/proc/self/status"), of_ram).map(|bytes| bytes as u64);
    }
    let sum: Option<usize> = of_devices.into_iter().sum();
    sum.map(|bytes| bytes as u64)
}

/// The memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInUse {
    /// Memory used by this process; on CUDA, by all processes.
    pub used: usize,
    /// The part of it that holds pages of mapped files, such as weights; 0 on accelerators.
    pub mapped: usize,
    /// Free memory; on accelerators, less a margin.
    pub free: usize,
}

fn cpu_memory() -> Option<MemoryInUse> {
    let status = Path::new("/proc/self/status");
    let (used, mapped) = (kilobytes(status, "VmRSS:")?, kilobytes(status, "RssFile:")?);
    let mut free = kilobytes(Path::new("/proc/meminfo"), "MemAvailable:")?;
    if let (Some(limit), Some(current)) = (control_group("memory.max"), control_group("memory.current")) {
        free = free.min(limit.saturating_sub(current));
    }
    Some(MemoryInUse { used, mapped, free })
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

/// A value of the control group; none if it is `max` (no limit).
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

/// The value of `key` in a file under `/proc`, in bytes.
fn kilobytes(path: &Path, key: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Memory below Metal's recommended working set: at that limit, the whole system becomes slow.
#[cfg(feature = "metal")]
fn metal_memory() -> Option<MemoryInUse> {
    use objc2_metal::MTLDevice;
    let devices = candle_metal_kernels::metal::Device::all();
    let used = devices.first()?.as_ref().currentAllocatedSize();
    let limit = metal_working_set()? / 10 * 8;
    Some(MemoryInUse { used, mapped: 0, free: limit.saturating_sub(used) })
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

/// Opens a device with its own stream, because work on the default stream cannot be captured.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> std::result::Result<candle_core::Device, String> {
    let count = metal_candle_kernels::gpu::cuda::count_devices()?;
    if ordinal >= count {
        return Err(match count {
            0 => "there is no CUDA device".into(),
            1 => format!("there is no CUDA device {ordinal}: this machine has only device 0"),
            _ => format!("there is no CUDA device {ordinal}: this machine has devices 0 to {}", count - 1),
        });
    }
    if let Some(folder) = crate::files::KernelFolder::of_user() {
        metal_candle_kernels::gpu::cuda::set_kernel_store(Box::new(folder));
    }
    let failed = |e: candle_core::Error| format!("CUDA device {ordinal} cannot be used: {}", Error::from(e));
    metal_candle_kernels::gpu::cuda::open(ordinal).map(candle_core::Device::Cuda).map_err(failed)
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

/// Memory of the whole GPU, less a margin: other processes use it, too, and fragmented memory cannot be used completely.
fn cuda_memory(device: Device) -> Option<MemoryInUse> {
    let (free, total) = cuda_free_and_total(device)?;
    Some(MemoryInUse { used: total.saturating_sub(free), mapped: 0, free: free / 10 * 9 })
}

#[cfg(feature = "cuda")]
fn cuda_free_and_total(device: Device) -> Option<(usize, usize)> {
    let candle_core::Device::Cuda(device) = device.candle() else { return None };
    device.cuda_stream().context().mem_get_info().ok()
}

#[cfg(feature = "cuda")]
fn cuda_name(device: Device) -> Option<String> {
    let candle_core::Device::Cuda(device) = device.candle() else { return None };
    device.cuda_stream().context().name().ok()
}

#[cfg(feature = "cuda")]
fn reset_cuda_peak(device: Device) {
    if let candle_core::Device::Cuda(device) = device.candle() {
        // if this fails, the reported peak covers a longer time
        let _ = metal_candle_kernels::gpu::cuda::reset_peak_memory(&device);
    }
}

#[cfg(feature = "cuda")]
fn cuda_peak(device: Device) -> Option<usize> {
    let candle_core::Device::Cuda(device) = device.candle() else { return None };
    metal_candle_kernels::gpu::cuda::peak_memory(&device).ok().flatten()
}

#[cfg(feature = "cuda")]
fn cuda_held(device: Device) -> Option<usize> {
    let candle_core::Device::Cuda(device) = device.candle() else { return None };
    metal_candle_kernels::gpu::cuda::memory(&device).ok().flatten()
}

#[cfg(not(feature = "cuda"))]
fn reset_cuda_peak(_: Device) {}

#[cfg(not(feature = "cuda"))]
fn cuda_peak(_: Device) -> Option<usize> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda_held(_: Device) -> Option<usize> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda_free_and_total(_: Device) -> Option<(usize, usize)> {
    None
}

#[cfg(not(feature = "cuda"))]
fn cuda_name(_: Device) -> Option<String> {
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
    // candle dispatches concurrently, which returns wrong results on discrete GPUs
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

/// Runs work while no other thread does. candle distributes the work of several threads over several command buffers without
/// fences between them, even for a buffer that one thread drops and another reuses. So with two or more threads, work waits
/// until all earlier commands are complete.
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
        fmt::Display::fmt(self, f)
    }
}

/// `cpu`, `metal`, `cuda`, or `cuda:1` for other than the first CUDA device.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Cuda(ordinal) if ordinal > 0 => write!(f, "cuda:{ordinal}"),
            _ => f.write_str(self.name()),
        }
    }
}
