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
#[cfg(feature = "metal")]
mod metal;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

/// What both preludes are followed by.
#[cfg(any(feature = "cuda", feature = "metal"))]
const COMMON: &str = include_str!("../metal/common.metal");

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// RMSNorm and its gradients.
    Norm,
    /// Rotation, activation, bias, residual, dropout and copies.
    Elementwise,
    /// What is between the products of a block, with low-rank terms.
    Fused,
    /// Products, several to a launch, on Metal devices.
    Product,
    /// Attention over a ragged batch, over a cache, and its gradients.
    Attention,
    /// A decoder block for few tokens, the head and the embedding.
    Decode,
    /// Cross-entropy of logits.
    CrossEntropy,
    /// Optimizer steps over flat buffers, and norms.
    Optimizer,
    /// The choice of a token.
    Sampling,
    /// Attention on the tensor cores of CUDA devices.
    TensorCoreAttention,
}

impl Source {
    /// The text without its prelude.
    pub fn text(self) -> &'static str {
        match self {
            Self::Norm => include_str!("../metal/norm.metal"),
            Self::Elementwise => include_str!("../metal/elementwise.metal"),
            Self::Fused => include_str!("../metal/fused.metal"),
            Self::Product => include_str!("../metal/product.metal"),
            Self::Attention => include_str!("../metal/attention.metal"),
            Self::Decode => include_str!("../metal/decode.metal"),
            Self::CrossEntropy => include_str!("../metal/cross_entropy.metal"),
            Self::Optimizer => include_str!("../metal/optimizer.metal"),
            Self::Sampling => include_str!("../metal/sampling.metal"),
            Self::TensorCoreAttention => include_str!("../cuda/attention.cu"),
        }
    }
}

#[cfg(feature = "cuda")]
impl Source {
    /// The most threads of a block that its kernels are launched with, where that is known before they are compiled. The
    /// compiler then gives a thread no more registers than such a block can have.
    fn known_threads(self) -> Option<usize> {
        match self {
            Self::Decode => None,
            Self::Norm | Self::CrossEntropy | Self::Sampling => Some(512),
            _ => Some(256),
        }
    }
}

/// A kernel for one type of elements.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The file it is in.
    pub source: Source,
    /// Its name there.
    pub name: &'static str,
    /// The type called `T` in the source: f32, f16 or bf16.
    pub element: DType,
    /// Macros defined before the source.
    pub constants: Vec<(&'static str, u32)>,
}

impl Kernel {
    /// A kernel without constants.
    pub fn new(source: Source, name: &'static str, element: DType) -> Self {
        Self { source, name, element, constants: Vec::new() }
    }

    /// The same with a constant.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: usize) -> Self {
        self.constants.push((name, value as u32));
        self
    }

    /// The whole text to compile after `prelude`.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    fn text(&self, prelude: &str) -> Result<String> {
        use std::fmt::Write;
        let element = match self.element {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            other => bail!("kernels take f32, f16 and bf16, found {}", other.as_str()),
        };
        let mut text = format!("#define ELEMENT {element}\n");
        if self.source == Source::TensorCoreAttention {
            let _ =
                writeln!(text, "#define T_F16 {}\n#define T_BF16 {}", u8::from(element == 1), u8::from(element == 2));
        }
        #[cfg(feature = "cuda")]
        if let Some(threads) = self.source.known_threads() {
            let _ = writeln!(text, "#define BLOCK_THREADS {threads}");
        }
        for (name, value) in &self.constants {
            // writing to a string does not fail
            let _ = writeln!(text, "#define {name} {value}");
        }
        // the one that is for CUDA alone is written without the preludes
        let before = if self.source == Source::TensorCoreAttention { ["", ""] } else { [prelude, COMMON] };
        Ok(text + before[0] + before[1] + self.source.text())
    }
}

/// A buffer a kernel is given.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// It is read. The tensor is contiguous.
    In(&'a Tensor),
    /// It is written, or changed in place. The tensor is contiguous.
    Out(&'a Tensor),
    /// Nothing; the kernel does not touch it.
    None,
}

impl Arg<'_> {
    fn tensor(&self) -> Option<&Tensor> {
        match self {
            Self::In(tensor) | Self::Out(tensor) => Some(tensor),
            Self::None => None,
        }
    }
}

/// A word of the structure that a kernel takes.
#[derive(Debug, Clone, Copy)]
pub struct Word(pub u32);

impl From<usize> for Word {
    fn from(value: usize) -> Self {
        Self(value as u32)
    }
}

impl From<u32> for Word {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl From<f32> for Word {
    fn from(value: f32) -> Self {
        Self(value.to_bits())
    }
}

impl From<bool> for Word {
    fn from(value: bool) -> Self {
        Self(u32::from(value))
    }
}

/// Threadgroups (blocks) of a launch, and threads of each.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Groups in each direction.
    pub groups: [usize; 3],
    /// Threads of a group: a multiple of 32.
    pub threads: usize,
    /// Dynamic shared memory of a group in bytes; CUDA only.
    pub shared_bytes: usize,
}

impl Grid {
    /// Groups in a row.
    pub fn row(groups: usize, threads: usize) -> Self {
        Self { groups: [groups, 1, 1], threads, shared_bytes: 0 }
    }

    /// Groups in two directions.
    pub fn plane(groups: (usize, usize), threads: usize) -> Self {
        Self { groups: [groups.0, groups.1, 1], threads, shared_bytes: 0 }
    }

    /// Enough groups of 256 threads for so many threads.
    pub fn elements(count: usize) -> Self {
        Self::row(count.div_ceil(256), 256)
    }
}

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
