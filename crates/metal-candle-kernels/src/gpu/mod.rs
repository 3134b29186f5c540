//! Compiles and launches the Metal and CUDA kernels, which share one source.
//!
//! `src/metal/*.metal` contains the kernels in the Metal shading language. Macros replace the syntax that differs in CUDA;
//! `metal/prelude.metal` and `cuda/prelude.cu` define them. A kernel is compiled when it is first used, for its element type and
//! constants (`newLibraryWithSource`, NVRTC), so a build needs no GPU toolchain.
//!
//! The arguments of a kernel are buffers, then one structure of 4-byte words. A kernel writes to the [`Arg::Out`] tensors; these
//! must not share memory with tensors that another thread reads.

#[cfg(feature = "cuda")]
pub mod cuda;
mod kernel;
#[cfg(feature = "metal")]
mod metal;

pub use kernel::{Arg, Formats, Grid, Kernel, Source, Word};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

/// Launches `kernel` on the device of its first buffer, after all work that was submitted to the device before.
///
/// # Errors
/// The kernel cannot be compiled, a tensor is not contiguous or is on a different device, or the device fails.
pub fn launch(kernel: &Kernel, grid: Grid, args: &[Arg], words: &[Word]) -> Result<()> {
    let Some(first) = args.iter().find_map(Arg::tensor) else { bail!("kernel `{}` has no buffer", kernel.name) };
    if grid.groups.contains(&0) {
        return Ok(());
    }
    for tensor in args.iter().filter_map(Arg::tensor) {
        if !tensor.is_contiguous() {
            bail!("kernel `{}`: a tensor with strides {:?} is not contiguous", kernel.name, tensor.stride());
        }
    }
    match first.device() {
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::launch(device, kernel, grid, args, words),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::launch(device, kernel, grid, args, words),
        other => {
            let _ = words;
            bail!("kernel `{}` is not implemented for {:?}", kernel.name, other.location())
        }
    }
}

/// The maximum number of threads in a group of `kernel` on the device of `like`. Compiles the kernel if it has not been
/// compiled.
///
/// # Errors
/// The kernel cannot be compiled, or there are no kernels for the device.
pub fn max_threads(kernel: &Kernel, like: &Tensor) -> Result<usize> {
    match like.device() {
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::max_threads(device, kernel),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::max_threads(device, kernel),
        other => bail!("kernel `{}` is not implemented for {:?}", kernel.name, other.location()),
    }
}

/// Whether there are kernels for the device and the type of this tensor.
pub fn has_kernels(tensor: &Tensor) -> bool {
    let is_known = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
    let is_on_device = match tensor.device() {
        Device::Cpu => false,
        Device::Metal(_) => cfg!(feature = "metal"),
        Device::Cuda(_) => cfg!(feature = "cuda"),
    };
    is_known && is_on_device
}

/// An uninitialized tensor: its elements have arbitrary values until a kernel writes them.
///
/// # Errors
/// The device is out of memory.
pub fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every bit pattern is a valid value of candle's numeric types
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// A tensor of zeros for words that the CPU reads and writes often.
///
/// # Errors
/// The device is out of memory.
pub fn words(count: usize, device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::words(count, device),
        other => Tensor::zeros(count, DType::U32, other),
    }
}

/// Overwrites a tensor from [`words`]. The device must have completed all submitted work.
///
/// # Errors
/// `words` and the tensor have different lengths, or the device fails.
pub fn write_words(to: &Tensor, words: &[u32]) -> Result<()> {
    if to.dims() != [words.len()] {
        bail!("expected {:?} words, found {}", to.dims(), words.len());
    }
    match to.device() {
        #[cfg(feature = "metal")]
        Device::Metal(_) => metal::write_words(to, words),
        device => to.slice_set(&Tensor::from_slice(words, words.len(), device)?, 0, 0),
    }
}

/// Waits until the device has completed all submitted work, and reads a tensor from [`words`].
///
/// # Errors
/// Submitted work has failed.
pub fn read_words(from: &Tensor) -> Result<Vec<u32>> {
    match from.device() {
        #[cfg(feature = "metal")]
        Device::Metal(device) => {
            device.wait_until_completed()?;
            metal::read_words(from)
        }
        _ => from.to_vec1(),
    }
}
