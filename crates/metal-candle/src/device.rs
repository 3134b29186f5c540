//! The device a model lives on.

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
    /// With its ordinal.
    Cuda(u8),
    Metal,
}

/// The most CUDA devices of a machine.
const MAX_CUDA: usize = 64;

static CUDA: [OnceLock<std::result::Result<candle_core::Device, String>>; MAX_CUDA] =
    [const { OnceLock::new() }; MAX_CUDA];
static METAL: OnceLock<std::result::Result<candle_core::Device, String>> = OnceLock::new();

impl Device {
    /// The CPU.
    pub const CPU: Self = Self(Kind::Cpu);

    /// The best device there is: Metal, else CUDA, else the CPU.
    ///
    /// `ordinal` numbers the CUDA devices from 0. [`Device::accelerator`] also reports why there is none.
    pub fn new_with_fallback(ordinal: usize) -> Self {
        Self::accelerator(ordinal).unwrap_or(Self::CPU)
    }

    /// The Metal device, else the CUDA device `ordinal`.
    ///
    /// # Errors
    /// Neither can be used; the message says why for each that the build supports.
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

    /// The CUDA device `ordinal`, numbered from 0.
    ///
    /// # Errors
    /// The build lacks the feature `cuda`, or there is no such device.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let (Some(slot), Ok(number)) = (CUDA.get(ordinal), u8::try_from(ordinal)) else {
            return Err(Error::Device(format!("CUDA devices have the numbers 0 to {}, found {ordinal}", MAX_CUDA - 1)));
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

    /// The instruction set that the CPU kernels use on this machine, the instructions for 8-bit integers, and the matrix unit if
    /// there is one. The environment variable `METAL_CANDLE_ISA` limits them to a level: `baseline`, `avx2`, `avx-vnni`, `avx512`,
    /// `avx512-vnni` or `amx`, on Arm `neon` or `dotprod`.
    ///
    /// # Errors
    /// The variable is not a level, or is a level that this machine does not have.
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

    /// The number of a CUDA device, from 0; 0 for other devices.
    pub fn ordinal(&self) -> usize {
        match self.0 {
            Kind::Cuda(ordinal) => usize::from(ordinal),
            Kind::Cpu | Kind::Metal => 0,
        }
    }

    /// The name its maker gave it, such as `NVIDIA H100 80GB HBM3`, `Apple M3 Max` or that of the CPU, where the system
    /// tells.
    pub fn description(&self) -> Option<String> {
        match self.0 {
            Kind::Cpu => cpu_name(),
            Kind::Metal => metal_name(),
            Kind::Cuda(_) => cuda_name(*self),
        }
    }

    /// The memory that can be used now, where the system tells: of the CPU on Linux, within the limit of a control group.
    pub fn memory(&self) -> Option<MemoryInUse> {
        match self.0 {
            Kind::Cpu => cpu_memory(),
            Kind::Metal => metal_memory(),
            Kind::Cuda(_) => cuda_memory(*self),
        }
    }

    /// All the memory there is, in bytes, where the system tells: on Metal what is recommended as a working set.
    pub fn total_memory(&self) -> Option<usize> {
        match self.0 {
            Kind::Cpu => cpu_total_memory(),
            Kind::Metal => metal_working_set(),
            Kind::Cuda(_) => cuda_free_and_total(*self).map(|(_, total)| total),
        }
    }

    /// Forgets the most memory that was in use until now, for [`Device::peak_memory`]. Only a CUDA device counts it.
    pub fn reset_peak_memory(&self) {
        if self.is_cuda() {
            reset_cuda_peak(*self);
        }
    }

    /// The most memory that this process held on a CUDA device since [`Device::reset_peak_memory`], in bytes, with what is
    /// kept for the next tensors.
    pub fn peak_memory(&self) -> Option<usize> {
        if self.is_cuda() { cuda_peak(*self) } else { None }
    }

    /// The most memory this process has held so far, in bytes: on its CUDA devices if it uses any, else in RAM, where the
    /// system reports it (Linux).
    pub fn process_peak_memory() -> Option<u64> {
        of_process(cuda_peak, "VmHWM:")
    }

    /// The memory this process holds now, in bytes: on its CUDA devices if it uses any, else in RAM, where the system reports
    /// it (Linux).
    pub fn process_memory() -> Option<u64> {
        of_process(cuda_held, "VmRSS:")
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

/// Sums a number of bytes over the CUDA devices that this process uses. Without any, reads it from `/proc/self/status`.
fn of_process(of_cuda: impl Fn(Device) -> Option<usize>, of_ram: &str) -> Option<u64> {
    let opened = (0..MAX_CUDA).filter(|&ordinal| matches!(CUDA[ordinal].get(), Some(Ok(_))));
    let of_devices: Vec<Option<usize>> = opened.map(|ordinal| of_cuda(Device(Kind::Cuda(ordinal as u8)))).collect();
    if of_devices.is_empty() {
        return kilobytes(Path::new("/proc/self/status"), of_ram).map(|bytes| bytes as u64);
    }
    let sum: Option<usize> = of_devices.into_iter().sum();
    sum.map(|bytes| bytes as u64)
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
    let count = metal_candle_kernels::gpu::cuda::count_devices()?;
    if ordinal >= count {
        return Err(match count {
            0 => "there is no CUDA device".into(),
            1 => format!("there is no CUDA device {ordinal}: this machine has one, number 0"),
            _ => format!("there is no CUDA device {ordinal}: this machine has {count}, numbers 0 to {}", count - 1),
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

/// Of the whole card, with a margin: other processes use it too, and memory in pieces cannot be used to the last byte.
fn cuda_memory(device: Device) -> Option<MemoryInUse> {
    let (free, total) = cuda_free_and_total(device)?;
    Some(MemoryInUse { used: total.saturating_sub(free), free: free / 10 * 9 })
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
        // who asks for the peak afterwards is told that of a longer time
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
        fmt::Display::fmt(self, f)
    }
}

/// `cpu`, `metal`, `cuda`, or `cuda:1` where it is not the first.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Cuda(ordinal) if ordinal > 0 => write!(f, "cuda:{ordinal}"),
            _ => f.write_str(self.name()),
        }
    }
}
