//! Compiles and launches kernels on Metal.

use super::{Arg, Grid, Kernel, Word};
use candle_core::op::BackpropOp;
use candle_core::{DType, MetalDevice, MetalStorage, Result, Storage, Tensor, bail};
use candle_metal_kernels::metal::{ComputePipeline, Library};
use objc2_metal::{MTLCompileOptions, MTLSize};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const PRELUDE: &str = include_str!("../metal/prelude.metal");

/// Compiled libraries and pipelines. A process has one Metal device.
#[derive(Default)]
struct Compiled {
    libraries: HashMap<Kernel, Library>,
    pipelines: HashMap<Kernel, ComputePipeline>,
}

fn compiled() -> MutexGuard<'static, Compiled> {
    static COMPILED: OnceLock<Mutex<Compiled>> = OnceLock::new();
    COMPILED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn pipeline(device: &MetalDevice, kernel: &Kernel) -> Result<ComputePipeline> {
    let mut compiled = compiled();
    if let Some(pipeline) = compiled.pipelines.get(kernel) {
        return Ok(pipeline.clone());
    }
    let metal = device.metal_device();
    // all kernels of a source with the same constants share one library
    let key = Kernel { name: "", ..kernel.clone() };
    let library = if let Some(library) = compiled.libraries.get(&key) {
        library.clone()
    } else {
        let options = MTLCompileOptions::new();
        // fast math assumes that there are no NaN and infinities
        #[allow(deprecated)]
        options.setFastMathEnabled(false);
        let text = kernel.text(PRELUDE)?;
        let library = metal.new_library_with_source(&text, Some(&options)).map_err(candle_core::Error::wrap)?;
        compiled.libraries.insert(key, library.clone());
        library
    };
    let function = library.get_function(kernel.name, None).map_err(candle_core::Error::wrap)?;
    let pipeline = metal.new_compute_pipeline_state_with_function(&function).map_err(candle_core::Error::wrap)?;
    compiled.pipelines.insert(kernel.clone(), pipeline.clone());
    Ok(pipeline)
}

/// The maximum number of threads in a threadgroup of `kernel` on this device.
pub(super) fn max_threads(device: &MetalDevice, kernel: &Kernel) -> Result<usize> {
    Ok(pipeline(device, kernel)?.max_total_threads_per_threadgroup())
}

pub(super) fn launch(device: &MetalDevice, kernel: &Kernel, grid: Grid, args: &[Arg], words: &[Word]) -> Result<()> {
    let pipeline = pipeline(device, kernel)?;
    let max_threads = pipeline.max_total_threads_per_threadgroup();
    if grid.threads > max_threads {
        bail!(
            "kernel `{}`: the device supports at most {max_threads} threads per group, found {}",
            kernel.name,
            grid.threads
        );
    }
    let guards: Vec<_> = args.iter().map(|arg| arg.tensor().map(Tensor::storage_and_layout)).collect();
    let mut buffers = Vec::with_capacity(args.len());
    for guard in &guards {
        buffers.push(match guard.as_ref().map(|(storage, layout)| (&**storage, layout)) {
            Some((Storage::Metal(storage), layout)) => {
                let size = candle_core::backend::BackendStorage::dtype(storage).size_in_bytes();
                Some((storage.buffer(), layout.start_offset() * size))
            }
            None => None,
            Some(_) => bail!("kernel `{}`: a tensor is not on the Metal device", kernel.name),
        });
    }
    // every index needs a buffer; a missing one is replaced with an output, which adds no dependency between kernels
    let any = args.iter().zip(&buffers).find(|(arg, _)| matches!(arg, Arg::Out(_)));
    let any = any.and_then(|(_, buffer)| buffer.map(|(buffer, _)| buffer));
    let guard = device.command_encoder()?;
    let encoder = guard.as_ref();
    encoder.set_compute_pipeline_state(&pipeline);
    for (index, (arg, buffer)) in args.iter().zip(&buffers).enumerate() {
        match (arg, buffer) {
            (Arg::Out(_), Some((buffer, offset))) => encoder.set_output_buffer(index, Some(buffer), *offset),
            (_, Some((buffer, offset))) => encoder.set_input_buffer(index, Some(buffer), *offset),
            (_, None) => encoder.set_input_buffer(index, any, 0),
        }
    }
    let words: Vec<u32> = words.iter().map(|word| word.0).collect();
    if !words.is_empty() {
        encoder.set_bytes_directly(args.len(), 4 * words.len(), words.as_ptr().cast());
    }
    let [width, height, depth] = grid.groups;
    encoder
        .dispatch_thread_groups(MTLSize { width, height, depth }, MTLSize { width: grid.threads, height: 1, depth: 1 });
    Ok(())
}

/// Zeros in memory that the CPU can access.
pub(super) fn words(count: usize, device: &MetalDevice) -> Result<Tensor> {
    let buffer = device.new_buffer_with_data(&vec![0u32; count])?;
    let storage = MetalStorage::new(buffer, device.clone(), count, DType::U32);
    Ok(Tensor::from_storage(Storage::Metal(storage), count, BackpropOp::none(), false))
}

/// The first word of a tensor in memory that the CPU can access.
fn contents(tensor: &Tensor) -> Result<*mut u32> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Metal(storage) = &*storage else { bail!("the words are not on the Metal device") };
    let first = storage.buffer().contents();
    if first.is_null() || tensor.dtype() != DType::U32 || layout.start_offset() != 0 {
        bail!("the words are in memory that the CPU cannot access");
    }
    Ok(first.cast())
}

pub(super) fn write_words(to: &Tensor, words: &[u32]) -> Result<()> {
    let first = contents(to)?;
    // SAFETY: the buffer has at least the tensor's number of words, which the caller has checked
    unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), first, words.len()) };
    Ok(())
}

pub(super) fn read_words(from: &Tensor) -> Result<Vec<u32>> {
    let first = contents(from)?;
    // SAFETY: the buffer has at least the tensor's number of words, and the device has completed its work
    Ok(unsafe { std::slice::from_raw_parts(first, from.elem_count()) }.to_vec())
}
