//! Kernels of Metal and CUDA, from one source.
//!
//! `src/metal/*.metal` holds the kernels in the Metal shading language, written with a few macros for what CUDA spells in
//! another way. `prelude.metal` and `../cuda/prelude.cu` define these macros. A kernel is compiled when it is first
//! used, for the type of its elements and for its constants (`newLibraryWithSource`, NVRTC), so no build needs a toolchain.
//!
//! A kernel takes buffers, then one structure of 4-byte words. It writes what it is given as [`Arg::Out`]; such tensors
//! must not share memory with what another thread reads.

#[cfg(feature = "cuda")]
pub mod cuda;
mod kernel;
#[cfg(feature = "metal")]
mod metal;

pub use kernel::{Arg, Formats, Grid, Kernel, Source, Word};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

/// Gives `kernel` to the device of its first buffer, behind what that was given before.
///
/// # Errors
/// The kernel cannot be compiled, a tensor is not contiguous or on another device, or the device fails.
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
            bail!("kernel `{}`: there are no kernels for {:?}", kernel.name, other.location())
        }
    }
}

/// The most threads that a group of `kernel` can have on the device of `like`. It is compiled if it has not been yet.
///
/// # Errors
/// The kernel cannot be compiled, or there are no kernels for the device.
pub fn max_threads(kernel: &Kernel, like: &Tensor) -> Result<usize> {
    match like.device() {
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::max_threads(device, kernel),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::max_threads(device, kernel),
        other => bail!("kernel `{}`: there are no kernels for {:?}", kernel.name, other.location()),
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

/// A tensor whose elements are not set. They hold any bits until a kernel writes them.
///
/// # Errors
/// The device has no memory left.
pub fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every bit pattern is a value of the numeric types of candle
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// Words that the CPU writes and reads often, all zero.
///
/// # Errors
/// The device has no memory left.
pub fn words(count: usize, device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "metal")]
        Device::Metal(device) => metal::words(count, device),
        other => Tensor::zeros(count, DType::U32, other),
    }
}

/// Writes words made by [`words`]; the device must have done what it was given.
///
/// # Errors
/// The number of words is another, or the device fails.
pub fn write_words(to: &Tensor, words: &[u32]) -> Result<()> {
    if to.dims() != [words.len()] {
        bail!("{} words for {:?}", words.len(), to.dims());
    }
    match to.device() {
        #[cfg(feature = "metal")]
        Device::Metal(_) => metal::write_words(to, words),
        device => to.slice_set(&Tensor::from_slice(words, words.len(), device)?, 0, 0),
    }
}

/// Waits until the device has done what it was given, and reads words made by [`words`].
///
/// # Errors
/// Something the device was given has failed.
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
