//! Launches of the kernels of Metal and CUDA on tensors.

use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use metal_candle_kernels::gpu;
pub(crate) use metal_candle_kernels::gpu::{Arg, Formats, Grid, Kernel, Source, Word};

/// Threads of a group that takes a row.
pub(super) const ROW_THREADS: usize = 256;

/// Whether kernels of this project's own run on it, rather than those of the CPU or candle's.
pub(crate) fn has_kernels(tensor: &Tensor) -> bool {
    gpu::has_kernels(tensor)
}

/// Gives a kernel to the device.
pub(crate) fn launch(kernel: &Kernel, grid: Grid, args: &[Arg], words: &[Word]) -> Result<()> {
    Ok(gpu::launch(kernel, grid, args, words)?)
}

/// The most threads that a group of `kernel` can have on the device of `like`.
pub(crate) fn max_threads(kernel: &Kernel, like: &Tensor) -> Result<usize> {
    Ok(gpu::max_threads(kernel, like)?)
}

/// Threads of a group for a kernel that can be run with any number of warps: `most`, or the next smaller power of two that
/// the device can run.
pub(crate) fn threads(kernel: &Kernel, like: &Tensor, most: usize) -> Result<usize> {
    let allowed = max_threads(kernel, like)?;
    let mut threads = most;
    while threads > allowed && threads > 32 {
        threads /= 2;
    }
    Ok(threads)
}

/// A tensor of the type and device of `like`, whose elements a kernel has yet to write.
pub(crate) fn empty(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::empty(shape, like.dtype(), like.device())?)
}

/// A tensor whose elements a kernel has yet to write.
pub(crate) fn empty_of(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(gpu::empty(shape, dtype, device)?)
}

/// The same in f32.
pub(crate) fn empty_f32(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::empty(shape, DType::F32, like.device())?)
}

/// Whether products of this type run by [`product`].
pub(crate) fn has_products(tensor: &Tensor) -> bool {
    cfg!(feature = "cuda") && tensor.device().is_cuda() && gpu::has_kernels(tensor)
}

/// `y = scale A B + beta y`; each matrix with whether its transpose is meant.
#[cfg(feature = "cuda")]
pub(crate) fn product(y: &Tensor, a: (&Tensor, bool), b: (&Tensor, bool), scale: f32, beta: f32) -> Result<()> {
    let operand = |(tensor, is_transposed)| gpu::cuda::Operand { tensor, is_transposed };
    Ok(gpu::cuda::product(y, operand(a), operand(b), scale, beta)?)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn product(_: &Tensor, _: (&Tensor, bool), _: (&Tensor, bool), _: f32, _: f32) -> Result<()> {
    Err(crate::error::Error::Bug("a CUDA matrix product was called in a build without CUDA".into()))
}

/// Whether the first element of each lies at a multiple of four.
pub(super) fn are_aligned(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.layout().start_offset().is_multiple_of(4))
}

/// Whether what a kernel is given begins at a multiple of eight elements.
pub(super) fn begin_at_eights(args: &[Arg]) -> bool {
    args.iter().all(|arg| match arg {
        Arg::In(tensor) | Arg::Out(tensor) => tensor.layout().start_offset().is_multiple_of(8),
        Arg::None => true,
    })
}

/// Whether kernels that read eight elements at once take the tensor.
pub(crate) fn is_read_by_eights(tensor: &Tensor, dtype: DType) -> bool {
    tensor.dtype() == dtype && tensor.is_contiguous() && tensor.layout().start_offset().is_multiple_of(8)
}

/// Words that the CPU writes and reads often, all zero, on the device of `like`.
pub(crate) fn words(count: usize, like: &Tensor) -> Result<Tensor> {
    Ok(gpu::words(count, like.device())?)
}

/// Writes words made by [`words`]; the device must have done what it was given.
pub(crate) fn write_words(to: &Tensor, words: &[u32]) -> Result<()> {
    Ok(gpu::write_words(to, words)?)
}

/// Waits for the device and reads words made by [`words`].
pub(crate) fn read_words(from: &Tensor) -> Result<Vec<u32>> {
    Ok(gpu::read_words(from)?)
}

/// Work that was recorded once and can be done again: a CUDA graph.
#[derive(Debug)]
pub(crate) struct Recording {
    #[cfg(feature = "cuda")]
    graph: gpu::cuda::Graph,
}

impl Recording {
    /// Does the work again.
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

/// Records what `work` gives to the device of `like`, without doing it; nothing where that is not possible. `work` must not
/// allocate and must have been done before.
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

/// Launches a kernel of `elementwise.metal` that takes four elements a thread and the words `count` and `is_aligned` first.
pub(crate) fn by_four(name: &'static str, tensors: &[&Tensor], args: &[Arg], more: &[Word]) -> Result<()> {
    by_four_of(&Kernel::new(Source::Elementwise, name, tensors[0].dtype()), tensors, args, more)
}

/// The same for a kernel with constants.
pub(super) fn by_four_of(kernel: &Kernel, tensors: &[&Tensor], args: &[Arg], more: &[Word]) -> Result<()> {
    let count = tensors[0].elem_count();
    let mut words: Vec<Word> = vec![count.into(), are_aligned(tensors).into()];
    words.extend(more);
    launch(kernel, Grid::elements(count.div_ceil(4)), args, &words)
}

/// Launches a kernel of `elementwise.metal` that takes an element a thread and the words `count` and `width` first.
pub(super) fn by_row(name: &'static str, y: &Tensor, args: &[Arg]) -> Result<()> {
    let (count, width) = (y.elem_count(), y.dim(1)?);
    let kernel = Kernel::new(Source::Elementwise, name, y.dtype());
    launch(&kernel, Grid::elements(count), args, &[count.into(), width.into()])
}
