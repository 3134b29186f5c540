//! Launches kernels, calls cuBLAS and records graphs on CUDA.
//!
//! All work runs in order on the stream of candle's device, so no events are needed to synchronize it.

mod compile;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod libraries;

pub use compile::{KernelStore, set_kernel_store};

use super::{Arg, Grid, Kernel, Source, Word};
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr, result, sys,
};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

const PRELUDE: &str = include_str!("../cuda/prelude.cu");

/// The maximum number of words of a kernel.
const MAX_WORDS: usize = 114;

/// The maximum number of buffers of a kernel.
const MAX_ARGS: usize = 26;

/// The words of a launch. A kernel reads the first words, up to the size of its structure.
#[derive(Clone, Copy)]
#[repr(C)]
struct Words([u32; MAX_WORDS]);

/// Compiled modules and functions, by ordinal of the device. All kernels of a source with the same constants share one module.
#[derive(Default)]
struct Compiled {
    modules: HashMap<(usize, Kernel), Arc<CudaModule>>,
    functions: HashMap<(usize, Kernel), Function>,
}

/// A loaded kernel.
#[derive(Clone)]
struct Function {
    function: CudaFunction,
    /// The maximum number of threads in a block; smaller than the device's maximum if the kernel needs many registers.
    max_threads: usize,
}

impl Function {
    fn new(function: CudaFunction) -> Result<Self> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let max_threads = function.get_attribute(attribute).map_err(candle_core::Error::wrap)?;
        Ok(Self { function, max_threads: usize::try_from(max_threads).unwrap_or(0) })
    }
}

/// The maximum number of threads in a block of `kernel` on this device.
pub(super) fn max_threads(device: &CudaDevice, kernel: &Kernel) -> Result<usize> {
    Ok(function(device, kernel)?.max_threads)
}

fn function(device: &CudaDevice, kernel: &Kernel) -> Result<Function> {
    static COMPILED: OnceLock<Mutex<Compiled>> = OnceLock::new();
    let stream = device.cuda_stream();
    let context = stream.context();
    let key = (context.ordinal(), kernel.clone());
    let compiled = || COMPILED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = compiled().functions.get(&key) {
        return Ok(function.clone());
    }
    let _lock = lock_out_recordings();
    let mut compiled = compiled();
    if let Some(function) = compiled.functions.get(&key) {
        return Ok(function.clone());
    }
    let of_module = (context.ordinal(), Kernel { name: "", ..kernel.clone() });
    let module = if let Some(module) = compiled.modules.get(&of_module) {
        Arc::clone(module)
    } else {
        let module = compile::module(context, &kernel.text(PRELUDE)?)?;
        compiled.modules.insert(of_module, Arc::clone(&module));
        module
    };
    let function = Function::new(module.load_function(kernel.name).map_err(candle_core::Error::wrap)?)?;
    compiled.functions.insert(key, function.clone());
    Ok(function)
}

/// The device address of a tensor's first element.
fn address(storage: &CudaStorage, layout: &Layout, stream: &CudaStream) -> Result<u64> {
    fn of<T: candle_core::cuda_backend::CudaDType>(storage: &CudaStorage, stream: &CudaStream) -> Result<u64> {
        // the guard would record an event, and event tracking is disabled
        Ok(storage.as_cuda_slice::<T>()?.device_ptr(stream).0)
    }
    let dtype = candle_core::backend::BackendStorage::dtype(storage);
    let start = match dtype {
        DType::U8 => of::<u8>(storage, stream)?,
        DType::U32 => of::<u32>(storage, stream)?,
        DType::F32 => of::<f32>(storage, stream)?,
        DType::F16 => of::<f16>(storage, stream)?,
        DType::BF16 => of::<bf16>(storage, stream)?,
        other => bail!("kernels do not support {}", other.as_str()),
    };
    Ok(start + (layout.start_offset() * dtype.size_in_bytes()) as u64)
}

/// The device address of a contiguous tensor's first element. It is valid as long as the tensor, or a clone of it, exists.
///
/// # Errors
/// The tensor is not on a CUDA device, or is not contiguous.
pub fn device_address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, tensor.device()) {
        (Storage::Cuda(storage), candle_core::Device::Cuda(device)) if layout.is_contiguous() => {
            address(storage, layout, &device.cuda_stream())
        }
        _ => bail!("expected a contiguous tensor on a CUDA device"),
    }
}

/// The stream and the cuBLAS handle of a recording.
#[derive(Clone)]
struct Recorder {
    stream: Arc<CudaStream>,
    products: Arc<Products>,
}

/// cuBLAS on the recording stream, with its own workspace, because a recording must not allocate.
struct Products {
    blas: CudaBlas,
    _workspace: CudaSlice<u8>,
}

/// The workspace size that NVIDIA recommends for cuBLAS on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

impl Products {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let blas = CudaBlas::new(Arc::clone(stream)).map_err(candle_core::Error::wrap)?;
        // SAFETY: only cuBLAS reads the workspace, after writing it
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.map_err(candle_core::Error::wrap)?;
        stream.synchronize().map_err(candle_core::Error::wrap)?;
        let address = workspace.device_ptr(stream).0;
        // SAFETY: the memory has this size and lives as long as the handle
        unsafe { blas::cublasSetWorkspace_v2(*blas.handle(), address as *mut _, WORKSPACE_BYTES) }
            .result()
            .map_err(candle_core::Error::wrap)?;
        Ok(Self { blas, _workspace: workspace })
    }
}

/// Excludes recordings of other threads until the guard is dropped. Creating and dropping cuBLAS handles and loading modules may
/// synchronize the device, which fails while a stream is captured and invalidates the capture. Returns `None` in the thread that
/// records.
fn lock_out_recordings() -> Option<MutexGuard<'static, ()>> {
    static LOCK: Mutex<()> = Mutex::new(());
    let is_recording = RECORDING.with_borrow(Option::is_some);
    (!is_recording).then(|| LOCK.lock().unwrap_or_else(PoisonError::into_inner))
}

thread_local! {
    /// The recorder of this thread's launches, while it records.
    static RECORDING: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

pub(super) fn launch(device: &CudaDevice, kernel: &Kernel, grid: Grid, args: &[Arg], words: &[Word]) -> Result<()> {
    let Function { function, max_threads } = function(device, kernel)?;
    if grid.threads > max_threads {
        bail!(
            "kernel `{}`: the device supports at most {max_threads} threads per block, found {}",
            kernel.name,
            grid.threads
        );
    }
    let stream = RECORDING.with_borrow(|recorder| recorder.as_ref().map(|recorder| Arc::clone(&recorder.stream)));
    let stream = stream.unwrap_or_else(|| device.cuda_stream());
    if args.len() > MAX_ARGS || words.len() > MAX_WORDS {
        bail!(
            "kernel `{}`: expected at most {MAX_ARGS} buffers and {MAX_WORDS} words, found {} and {}",
            kernel.name,
            args.len(),
            words.len()
        );
    }
    let guards: Vec<_> = args.iter().map(|arg| arg.tensor().map(Tensor::storage_and_layout)).collect();
    let mut addresses = [0u64; MAX_ARGS];
    for (address_of, guard) in addresses.iter_mut().zip(&guards) {
        match guard.as_ref().map(|(storage, layout)| (&**storage, layout)) {
            Some((Storage::Cuda(storage), layout)) => *address_of = address(storage, layout, &stream)?,
            None => {}
            Some(_) => bail!("kernel `{}`: a tensor is not on the CUDA device", kernel.name),
        }
    }
    let mut all = Words([0; MAX_WORDS]);
    for (to, word) in all.0.iter_mut().zip(words) {
        *to = word.0;
    }
    if grid.shared_bytes > 48 * 1024 {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, grid.shared_bytes as i32).map_err(candle_core::Error::wrap)?;
    }
    let mut parameters: Vec<*mut c_void> =
        addresses[..args.len()].iter_mut().map(|address| std::ptr::from_mut(address).cast()).collect();
    if !words.is_empty() {
        parameters.push(std::ptr::from_mut(&mut all).cast());
    }
    // SAFETY: the structure contains numbers and enumerations, for which zero is valid
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let [x, y, z] = grid.groups.map(|count| count as u32);
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: grid.threads as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes as u32,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(waits_for_input(kernel, &stream)?),
    };
    stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    // SAFETY: the kernel takes these buffers and words, and stays within the buffers for these words; the parameters are copied
    // before the call returns
    unsafe {
        sys::cuLaunchKernelEx(&raw const config, function.cu_function(), parameters.as_mut_ptr(), std::ptr::null_mut())
    }
    .result()
    .map_err(candle_core::Error::wrap)
}

/// Whether a kernel may start before the previous kernel has ended: it contains `WAIT_FOR_INPUT`, and the device supports it.
fn waits_for_input(kernel: &Kernel, stream: &CudaStream) -> Result<bool> {
    use Source::{BlockProduct, Decode, DecodeAttention, RowUpdates, Sampling};
    if !matches!(kernel.source, BlockProduct | Decode | DecodeAttention | RowUpdates | Sampling) {
        return Ok(false);
    }
    let (major, _) = stream.context().compute_capability().map_err(candle_core::Error::wrap)?;
    Ok(major >= 9)
}

/// The number of CUDA devices of this machine.
///
/// # Errors
/// The driver cannot be used; the message contains the reason.
pub fn count_devices() -> std::result::Result<usize, String> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if let Some(message) = libraries::missing_library() {
        return Err(message);
    }
    let mut version = 0;
    // SAFETY: the function writes one number
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let (major, of_driver) = (sys::CUDA_VERSION / 1000, version.unsigned_abs());
    if status == sys::CUresult::CUDA_SUCCESS && of_driver / 1000 < major {
        return Err(format!(
            "this build needs CUDA {major}, and the NVIDIA driver supports CUDA {}.{}: install a newer driver",
            of_driver / 1000,
            of_driver % 1000 / 10
        ));
    }
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => {
            let text = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("the driver failed");
            Err(format!("CUDA cannot be used: {text} ({:?})", error.0))
        }
    }
}

/// A message about the first called function that an installed CUDA library lacks, if any; it explains failures of the device.
pub fn missing_function() -> Option<String> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    {
        libraries::missing_function()
    }
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    {
        None
    }
}

/// Opens a device with its own stream, which can be captured. Launches record no events, and freed memory stays in the process's
/// memory pool.
///
/// # Errors
/// The device fails.
pub fn open(ordinal: usize) -> Result<CudaDevice> {
    let _lock = lock_out_recordings();
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: all work of the process on this device is submitted to one stream
    unsafe { device.disable_event_tracking() };
    if let Some(pool) = memory_pool(&device)? {
        set_attribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
    }
    Ok(device)
}

/// The device's memory pool, if the driver supports pools.
fn memory_pool(device: &CudaDevice) -> Result<Option<sys::CUmemoryPool>> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(None);
    }
    // SAFETY: the device is open
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.map(Some).map_err(candle_core::Error::wrap)
}

fn set_attribute(pool: sys::CUmemoryPool, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<()> {
    // SAFETY: the pool belongs to an open device, and the attributes used here are 64-bit
    unsafe { sys::cuMemPoolSetAttribute(pool, attribute, std::ptr::from_mut(&mut value).cast()) }
        .result()
        .map_err(candle_core::Error::wrap)
}

/// Releases unused memory of the pool, and resets [`peak_memory`].
///
/// # Errors
/// The device fails.
pub fn reset_peak_memory(device: &CudaDevice) -> Result<()> {
    let Some(pool) = memory_pool(device)? else { return Ok(()) };
    device.cuda_stream().synchronize().map_err(candle_core::Error::wrap)?;
    // SAFETY: the pool belongs to an open device
    unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result().map_err(candle_core::Error::wrap)?;
    set_attribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, 0)
}

/// The current size of the memory pool in bytes, including unused memory; `None` if the driver has no pools.
///
/// # Errors
/// The device fails.
pub fn memory(device: &CudaDevice) -> Result<Option<usize>> {
    attribute(device, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
}

/// The maximum size of the memory pool in bytes, including unused memory; `None` if the driver has no pools.
///
/// # Errors
/// The device fails.
pub fn peak_memory(device: &CudaDevice) -> Result<Option<usize>> {
    attribute(device, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)
}

fn attribute(device: &CudaDevice, attribute: sys::CUmemPool_attribute) -> Result<Option<usize>> {
    let Some(pool) = memory_pool(device)? else { return Ok(None) };
    let mut value = 0u64;
    // SAFETY: as in `set_attribute`
    unsafe { sys::cuMemPoolGetAttribute(pool, attribute, std::ptr::from_mut(&mut value).cast()) }
        .result()
        .map_err(candle_core::Error::wrap)?;
    Ok(Some(value as usize))
}

/// A matrix of a product.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// A matrix whose rows are contiguous.
    pub tensor: &'a Tensor,
    /// Whether the product uses the transpose of the matrix.
    pub is_transposed: bool,
}

/// `C = alpha A B + beta C`, accumulated in f32.
///
/// # Shapes
/// `a: [m, k]` or its transpose, `b: [k, n]` or its transpose, with the same type; `c: [m, n]`, with this type or f32.
///
/// # Errors
/// Shapes do not match, the rows of a matrix are not contiguous, a matrix is not on a CUDA device, or the device fails.
pub fn product(c: &Tensor, a: Operand, b: Operand, alpha: f32, beta: f32) -> Result<()> {
    let (m, n) = c.dims2()?;
    let sides = |operand: Operand| -> Result<(usize, usize)> {
        let (rows, columns) = operand.tensor.dims2()?;
        Ok(if operand.is_transposed { (columns, rows) } else { (rows, columns) })
    };
    let ((am, k), (bk, bn)) = (sides(a)?, sides(b)?);
    if (am, bk, bn) != (m, k, n) {
        bail!("a product of {:?} and {:?} cannot have the shape {:?}", (am, k), (bk, bn), (m, n));
    }
    // elements from one row to the next
    let stride = |tensor: &Tensor| -> Result<i32> {
        match *tensor.stride() {
            _ if tensor.is_contiguous() => Ok(tensor.dim(1)? as i32),
            [stride, 1] => Ok(stride as i32),
            _ => bail!("the rows of a matrix of a product are not contiguous"),
        }
    };
    let (stride_a, stride_b, stride_c) = (stride(a.tensor)?, stride(b.tensor)?, stride(c)?);
    let candle_core::Device::Cuda(device) = c.device() else { bail!("a product is not on a CUDA device") };
    let recorder = RECORDING.with_borrow(Clone::clone);
    let stream = recorder.as_ref().map_or_else(|| device.cuda_stream(), |recorder| Arc::clone(&recorder.stream));
    let address_of = |tensor: &Tensor| -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => address(storage, layout, &stream),
            _ => bail!("a matrix of a product is not on the CUDA device"),
        }
    };
    let (address_a, address_b, address_c) = (address_of(a.tensor)?, address_of(b.tensor)?, address_of(c)?);
    let dtype = |tensor: &Tensor| match tensor.dtype() {
        DType::F32 => Ok(blas::cudaDataType_t::CUDA_R_32F),
        DType::F16 => Ok(blas::cudaDataType_t::CUDA_R_16F),
        DType::BF16 => Ok(blas::cudaDataType_t::CUDA_R_16BF),
        other => bail!("products support f32, f16 and bf16, found {}", other.as_str()),
    };
    let (type_a, type_b, type_c) = (dtype(a.tensor)?, dtype(b.tensor)?, dtype(c)?);
    let operation = |is_transposed| {
        if is_transposed { blas::cublasOperation_t::CUBLAS_OP_T } else { blas::cublasOperation_t::CUBLAS_OP_N }
    };
    let default_blas = device.cublas_handle();
    stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    let handle = recorder.as_ref().map_or(*default_blas.handle(), |recorder| *recorder.products.blas.handle());
    // cuBLAS is column-major, and a row-major matrix is a column-major transpose: compute C^T = B^T A^T
    // SAFETY: the addresses point to matrices of these sizes on the device of the handle
    let status = unsafe {
        blas::cublasGemmEx(
            handle,
            operation(b.is_transposed),
            operation(a.is_transposed),
            n as i32,
            m as i32,
            k as i32,
            std::ptr::from_ref(&alpha).cast(),
            address_b as *const _,
            type_b,
            stride_b,
            address_a as *const _,
            type_a,
            stride_a,
            std::ptr::from_ref(&beta).cast(),
            address_c as *mut _,
            type_c,
            stride_c,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    };
    status.result().map_err(candle_core::Error::wrap)
}

/// A recorded sequence of kernels and products that can be replayed.
pub struct Graph {
    recorded: CudaGraph,
    stream: Arc<CudaStream>,
    products: Option<Arc<Products>>,
}

// SAFETY: the graph has one owner, and is only used through a mutable reference
unsafe impl Send for Graph {}
// SAFETY: a shared reference cannot access the graph
unsafe impl Sync for Graph {}

impl Graph {
    /// Records the kernels that `work` starts with [`launch`](super::launch) and its [`product`]s, without running them. `work`
    /// must not use the device in other ways. Work of other threads is not recorded.
    ///
    /// # Errors
    /// `work` fails, or an operation of it cannot be recorded.
    pub fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let _lock = lock_out_recordings();
        let stream = device.cuda_stream();
        let recorder = stream.context().new_stream().map_err(candle_core::Error::wrap)?;
        let products = Arc::new(Products::new(&recorder)?);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        recorder.begin_capture(mode).map_err(candle_core::Error::wrap)?;
        RECORDING.set(Some(Recorder { stream: Arc::clone(&recorder), products: Arc::clone(&products) }));
        let work_result = work();
        RECORDING.set(None);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = recorder.end_capture(flags);
        work_result?;
        match graph.map_err(candle_core::Error::wrap)? {
            Some(recorded) => Ok(Self { recorded, stream, products: Some(products) }),
            None => bail!("the recorded graph is empty"),
        }
    }

    /// Runs the recorded work, after all work that was submitted to the device before.
    ///
    /// # Errors
    /// The device fails.
    pub fn replay(&mut self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        // SAFETY: `self` owns the graph, and the owner of the graph keeps its buffers alive
        unsafe { result::graph::launch(self.recorded.cu_graph_exec(), self.stream.cu_stream()) }
            .map_err(candle_core::Error::wrap)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _lock = lock_out_recordings();
        drop(self.products.take());
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph(device {})", self.stream.context().ordinal())
    }
}
