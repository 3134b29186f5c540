//! Launches the kernels of Metal and CUDA on tensors.

use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use metal_candle_kernels::gpu;
pub(crate) use metal_candle_kernels::gpu::{Arg, Formats, Grid, Kernel, Source, Word};

/// The thread group size of kernels that process one row per group.
pub(super) const ROW_THREADS: usize = 256;

/// Whether this project has GPU kernels for the tensor, instead of those of candle or the CPU.
pub(crate) fn has_kernels(tensor: &Tensor) -> bool {
    gpu::has_kernels(tensor)
}

/// Launches a kernel on the device of its arguments.
pub(crate) fn launch(kernel: &Kernel, grid: Grid, args: &[Arg], words: &[Word]) -> Result<()> {
    Ok(gpu::launch(kernel, grid, args, words)?)
}

/// The maximum thread group size of `kernel` on the device of `like`.
pub(crate) fn max_threads(kernel: &Kernel, like: &Tensor) -> Result<usize> {
    Ok(gpu::max_threads(kernel, like)?)
}

/// The thread group size for a kernel that works with any number of warps: `most`, halved until the device supports it.
pub(crate) fn threads(kernel: &Kernel, like: &Tensor, most: usize) -> Result<usize> {
    let allowed = max_threads(kernel, like)?;
    let mut threads = most;
    while threads > allowed && threads > 32 {
        threads /= 2;
    }
    Ok(threads)
}

/// An uninitialized tensor with the dtype and device of `like`.
pub(crate) fn empty(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::empty(shape, like.dtype(), like.device())?)
}

/// An uninitialized tensor.
pub(crate) fn empty_of(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(gpu::empty(shape, dtype, device)?)
}

/// An uninitialized f32 tensor on the device of `like`.
pub(crate) fn empty_f32(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::empty(shape, DType::F32, like.device())?)
}

/// Whether [`product`] supports the tensor.
pub(crate) fn has_products(tensor: &Tensor) -> bool {
    cfg!(feature = "cuda") && tensor.device().is_cuda() && gpu::has_kernels(tensor)
}

/// `y = scale A B + beta y`; the flag of a matrix means its transpose.
#[cfg(feature = "cuda")]
pub(crate) fn product(y: &Tensor, a: (&Tensor, bool), b: (&Tensor, bool), scale: f32, beta: f32) -> Result<()> {
    let operand = |(tensor, is_transposed)| gpu::cuda::Operand { tensor, is_transposed };
    Ok(gpu::cuda::product(y, operand(a), operand(b), scale, beta)?)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn product(_: &Tensor, _: (&Tensor, bool), _: (&Tensor, bool), _: f32, _: f32) -> Result<()> {
    Err(crate::error::Error::Bug("a build without CUDA called a CUDA matrix product".into()))
}

/// The address of a contiguous tensor on a CUDA device.
#[cfg(feature = "cuda")]
pub(super) fn device_address(tensor: &Tensor) -> Result<u64> {
    Ok(gpu::cuda::device_address(tensor)?)
}

#[cfg(not(feature = "cuda"))]
pub(super) fn device_address(_: &Tensor) -> Result<u64> {
    Err(crate::error::Error::Bug("a build without CUDA used a device address".into()))
}

/// Whether each tensor starts at a multiple of four elements.
pub(super) fn are_aligned_to_four(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.layout().start_offset().is_multiple_of(4))
}

/// Whether each tensor argument starts at a multiple of eight elements.
pub(super) fn are_aligned_to_eight(args: &[Arg]) -> bool {
    args.iter().all(|arg| match arg {
        Arg::In(tensor) | Arg::Out(tensor) => tensor.layout().start_offset().is_multiple_of(8),
        Arg::None => true,
    })
}

/// Whether kernels can load eight elements of the tensor at once.
pub(crate) fn supports_vector_loads(tensor: &Tensor, dtype: DType) -> bool {
    tensor.dtype() == dtype && tensor.is_contiguous() && tensor.layout().start_offset().is_multiple_of(8)
}

/// Zeroed words on the device of `like`, in memory that the CPU reads and writes often.
pub(crate) fn words(count: usize, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::words(count, like.device())?)
}

/// Writes words allocated by [`words`]. The device must have finished its work on them.
pub(crate) fn write_words(to: &Tensor, words: &[u32]) -> Result<()> {
    Ok(gpu::write_words(to, words)?)
}

/// Waits for the device and reads words allocated by [`words`].
pub(crate) fn read_words(from: &Tensor) -> Result<Vec<u32>> {
    Ok(gpu::read_words(from)?)
}

/// Recorded launches that can be replayed: a CUDA graph.
#[derive(Debug)]
pub(crate) struct Recording {
    #[cfg(feature = "cuda")]
    graph: gpu::cuda::Graph,
}

impl Recording {
    /// Replays the launches.
    #[cfg(feature = "cuda")]
    pub(crate) fn replay(&mut self) -> Result<()> {
        Ok(self.graph.replay()?)
    }

    #[cfg(not(feature = "cuda"))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    pub(crate) fn replay(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Records the launches of `work` on the device of `like` without running them; returns `None` if the device cannot
/// record. `work` must not allocate and must have run once before.
#[cfg(feature = "cuda")]
pub(crate) fn record(like: &Tensor, work: impl FnOnce() -> Result<()>) -> Result<Option<Recording>> {
    let candle_core::Device::Cuda(device) = like.device() else { return Ok(None) };
    let work = || work().map_err(candle_core::Error::wrap);
    Ok(Some(Recording { graph: gpu::cuda::Graph::record(device, work)? }))
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::unnecessary_wraps)]
pub(crate) fn record(_: &Tensor, _: impl FnOnce() -> Result<()>) -> Result<Option<Recording>> {
    Ok(None)
}

/// Launches a kernel of `elementwise.metal` that processes four elements per thread; its first words are `count` and
/// `is_aligned`.
pub(crate) fn by_four(name: &'static str, tensors: &[&Tensor], args: &[Arg], more: &[Word]) -> Result<()> {
    by_four_of(&Kernel::new(Source::Elementwise, name, tensors[0].dtype()), tensors, args, more)
}

/// [`by_four`] for a kernel with constants.
pub(super) fn by_four_of(kernel: &Kernel, tensors: &[&Tensor], args: &[Arg], more: &[Word]) -> Result<()> {
    let count = tensors[0].elem_count();
    let mut words: Vec<Word> = vec![count.into(), are_aligned_to_four(tensors).into()];
    words.extend(more);
    launch(kernel, Grid::elements(count.div_ceil(4)), args, &words)
}

/// Launches a kernel of `elementwise.metal` that processes one element per thread; its first words are `count` and
/// `width`.
pub(super) fn by_row(name: &'static str, y: &Tensor, args: &[Arg]) -> Result<()> {
    let (count, width) = (y.elem_count(), y.dim(1)?);
    let kernel = Kernel::new(Source::Elementwise, name, y.dtype());
    launch(&kernel, Grid::elements(count), args, &[count.into(), width.into()])
}
