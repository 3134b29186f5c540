//! Loads CUDA's libraries when one of their functions is first called. A program with CUDA support therefore also starts on a
//! machine without a driver, and uses the CPU there.
//!
//! cudarc declares the functions and links to the libraries, because candle selects dynamic linking. This module defines the
//! functions that the program uses: each definition jumps to an address that is looked up on the first call. The linker
//! prefers these definitions and then does not record that the program needs the library (`readelf -d` lists the required
//! libraries). If a function is missing in the list, the program needs its library at startup; nothing else changes. NCCL, and
//! all libraries on other systems and processors, are needed at startup too.

use candle_core::cuda_backend::cudarc::driver::sys::CUDA_VERSION;
use libloading::os::unix::Library;
use std::arch::global_asm;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A library of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Driver,
    Blas,
    Random,
    Compiler,
    Runtime,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Driver, Self::Blas, Self::Random, Self::Compiler, Self::Runtime];

    fn file(self) -> String {
        let major = CUDA_VERSION / 1000;
        match self {
            Self::Driver => "libcuda.so.1".into(),
            Self::Random => "libcurand.so.10".into(),
            Self::Blas => format!("libcublas.so.{major}"),
            Self::Compiler => format!("libnvrtc.so.{major}"),
            Self::Runtime => format!("libcudart.so.{major}"),
        }
    }

    fn open(self) -> &'static Result<Library, String> {
        static OPENED: [OnceLock<Result<Library, String>>; Kind::ALL.len()] =
            [const { OnceLock::new() }; Kind::ALL.len()];
        OPENED[self as usize].get_or_init(|| {
            let file = self.file();
            // SAFETY: the libraries of CUDA may be loaded at any time
            unsafe { Library::open(Some(&file), libloading::os::unix::RTLD_NOW) }.map_err(|error| {
                let reason = std::error::Error::source(&error).map(ToString::to_string);
                reason.filter(|reason| reason.contains(&file)).unwrap_or_else(|| format!("{file}: {error}"))
            })
        })
    }

    /// The status that a function of a missing library returns.
    fn failure(self) -> c_int {
        match self {
            // CUDA_ERROR_SHARED_OBJECT_INIT_FAILED
            Self::Driver => 303,
            // CUBLAS_STATUS_NOT_INITIALIZED
            Self::Blas => 1,
            // CURAND_STATUS_INITIALIZATION_FAILED
            Self::Random => 203,
            // NVRTC_ERROR_INTERNAL_ERROR
            Self::Compiler => 11,
            // cudaErrorSharedObjectInitFailed
            Self::Runtime => 303,
        }
    }
}

/// Why CUDA cannot be used: the first library that cannot be loaded.
pub(super) fn missing_library() -> Option<String> {
    Kind::ALL.into_iter().find_map(|kind| {
        let error = kind.open().as_ref().err()?;
        Some(match kind {
            Kind::Driver => format!("the NVIDIA driver is not installed: {error}"),
            _ => format!(
                "CUDA {}'s libraries are not installed, or their folder is not in LD_LIBRARY_PATH: {error}",
                CUDA_VERSION / 1000
            ),
        })
    })
}

/// The first function that was called and that its library lacks.
static MISSING_FUNCTION: OnceLock<(&CStr, Kind)> = OnceLock::new();

/// A message about the first called function that an installed library lacks. Calls of the function fail.
pub(super) fn missing_function() -> Option<String> {
    let (name, kind) = MISSING_FUNCTION.get()?;
    let what = if *kind == Kind::Driver { "a newer NVIDIA driver" } else { "newer CUDA libraries" };
    Some(format!("`{}` has no function `{}`: install {what}", kind.file(), name.to_string_lossy()))
}

/// Defines the functions by their names, and the table of their addresses.
macro_rules! functions {
    ($($kind:ident: $($name:literal)*;)*) => {
        const NUM_FUNCTIONS: usize = [$($($name),*),*].len();

        /// The functions, in the order of their entries.
        static FUNCTIONS: [(&CStr, Kind); NUM_FUNCTIONS] = [$($((
            match CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            },
            Kind::$kind,
        ),)*)*];

        global_asm!(
            ".pushsection .data.metal_candle_cuda,\"aw\",@progbits",
            ".balign 8",
            ".globl metal_candle_cuda_entries",
            ".hidden metal_candle_cuda_entries",
            "metal_candle_cuda_entries:",
            ".popsection",
            ".pushsection .text",
            $($(concat!(
                ".balign 16\n",
                ".globl ", $name, "\n",
                ".hidden ", $name, "\n",
                ".type ", $name, ",@function\n",
                $name, ":\n",
                "jmp qword ptr [rip + .Lentry_", $name, "]\n",
                ".Lfirst_", $name, ":\n",
                "lea r11, [rip + .Lentry_", $name, "]\n",
                "jmp metal_candle_cuda_look_up\n",
                ".pushsection .data.metal_candle_cuda\n",
                ".Lentry_", $name, ":\n",
                ".quad .Lfirst_", $name, "\n",
                ".popsection",
            ),)*)*
            ".popsection",
        );
    };
}

functions! {
    Driver:
        "cuCtxDestroy_v2" "cuCtxEnablePeerAccess" "cuCtxGetCurrent" "cuCtxGetDevice" "cuCtxSetCurrent"
        "cuCtxSynchronize" "cuDeviceCanAccessPeer" "cuDeviceGet" "cuDeviceGetAttribute" "cuDeviceGetCount"
        "cuDeviceGetDefaultMemPool" "cuDeviceGetName" "cuDeviceGetUuid_v2" "cuDevicePrimaryCtxRelease_v2"
        "cuDevicePrimaryCtxRetain" "cuDeviceTotalMem_v2" "cuDriverGetVersion" "cuEventCreate"
        "cuEventDestroy_v2" "cuEventElapsedTime_v2" "cuEventQuery" "cuEventRecord" "cuEventSynchronize"
        "cuFuncGetAttribute" "cuFuncSetAttribute" "cuGetErrorName" "cuGetErrorString" "cuGraphDestroy"
        "cuGraphExecDestroy" "cuGraphInstantiateWithFlags" "cuGraphLaunch" "cuGraphUpload" "cuInit"
        "cuLaunchKernel" "cuLaunchKernelEx" "cuMemAllocAsync" "cuMemAlloc_v2" "cuMemFreeAsync" "cuMemFreeHost"
        "cuMemFree_v2" "cuMemGetInfo_v2" "cuMemHostAlloc" "cuMemPoolGetAttribute" "cuMemPoolSetAttribute"
        "cuMemPoolTrimTo" "cuMemcpyDtoDAsync_v2" "cuMemcpyDtoD_v2" "cuMemcpyDtoHAsync_v2" "cuMemcpyDtoH_v2"
        "cuMemcpyHtoDAsync_v2" "cuMemcpyHtoD_v2" "cuMemcpyPeerAsync" "cuMemsetD32Async" "cuMemsetD8Async"
        "cuModuleGetFunction" "cuModuleGetGlobal_v2" "cuModuleLoad" "cuModuleLoadData" "cuModuleLoadDataEx"
        "cuModuleUnload" "cuStreamBeginCapture_v2" "cuStreamCreate" "cuStreamDestroy_v2" "cuStreamEndCapture"
        "cuStreamGetCaptureInfo_v3" "cuStreamIsCapturing" "cuStreamQuery" "cuStreamSynchronize"
        "cuStreamWaitEvent";
    Blas:
        "cublasCreate_v2" "cublasDestroy_v2" "cublasDgemmStridedBatched" "cublasGemmEx"
        "cublasGemmStridedBatchedEx" "cublasSetStream_v2" "cublasSetWorkspace_v2";
    Random:
        "curandCreateGenerator" "curandDestroyGenerator" "curandGenerateLogNormal"
        "curandGenerateLogNormalDouble" "curandGenerateNormal" "curandGenerateNormalDouble"
        "curandGenerateUniform" "curandGenerateUniformDouble" "curandSetPseudoRandomGeneratorSeed"
        "curandSetStream";
    Compiler:
        "nvrtcCompileProgram" "nvrtcCreateProgram" "nvrtcDestroyProgram" "nvrtcGetCUBIN" "nvrtcGetCUBINSize"
        "nvrtcGetPTX" "nvrtcGetPTXSize" "nvrtcGetProgramLog" "nvrtcGetProgramLogSize" "nvrtcVersion";
    Runtime:
        "__cudaGetKernel" "__cudaLaunchKernel_ptsz" "__cudaPopCallConfiguration" "__cudaPushCallConfiguration"
        "__cudaRegisterFatBinary" "__cudaRegisterFatBinaryEnd" "__cudaRegisterFunction" "__cudaRegisterVar"
        "__cudaUnregisterFatBinary" "cudaDeviceGetAttribute" "cudaFree" "cudaFreeAsync_ptsz"
        "cudaFuncGetAttributes" "cudaFuncSetAttribute" "cudaGetDevice" "cudaGetDeviceCount" "cudaGetErrorName"
        "cudaGetErrorString" "cudaGetLastError" "cudaMalloc" "cudaMallocAsync_ptsz" "cudaMemsetAsync_ptsz"
        "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags" "cudaPeekAtLastError" "cudaSetDevice"
        "cudaStreamSynchronize_ptsz";
}

global_asm!(
    ".pushsection .text",
    ".balign 16",
    ".globl metal_candle_cuda_look_up",
    ".hidden metal_candle_cuda_look_up",
    "metal_candle_cuda_look_up:",
    // the address of the entry, then all registers that may hold arguments; 208 bytes with the caller's return address, so
    // the stack is aligned to 16 bytes for the call
    "push r11",
    "push rdi",
    "push rsi",
    "push rdx",
    "push rcx",
    "push r8",
    "push r9",
    "push rax",
    "sub rsp, 136",
    "movups [rsp], xmm0",
    "movups [rsp + 16], xmm1",
    "movups [rsp + 32], xmm2",
    "movups [rsp + 48], xmm3",
    "movups [rsp + 64], xmm4",
    "movups [rsp + 80], xmm5",
    "movups [rsp + 96], xmm6",
    "movups [rsp + 112], xmm7",
    "mov rdi, r11",
    "call {look_up}",
    "mov r11, rax",
    "movups xmm0, [rsp]",
    "movups xmm1, [rsp + 16]",
    "movups xmm2, [rsp + 32]",
    "movups xmm3, [rsp + 48]",
    "movups xmm4, [rsp + 64]",
    "movups xmm5, [rsp + 80]",
    "movups xmm6, [rsp + 96]",
    "movups xmm7, [rsp + 112]",
    "add rsp, 136",
    "pop rax",
    "pop r9",
    "pop r8",
    "pop rcx",
    "pop rdx",
    "pop rsi",
    "pop rdi",
    "add rsp, 8",
    "jmp r11",
    ".popsection",
    look_up = sym look_up,
);

unsafe extern "C" {
    /// One entry for each of [`FUNCTIONS`], in their order.
    #[link_name = "metal_candle_cuda_entries"]
    static ENTRIES: [AtomicPtr<c_void>; NUM_FUNCTIONS];
}

/// Writes the address of a function to its entry and returns it.
extern "C" fn look_up(entry: *const AtomicPtr<c_void>) -> *mut c_void {
    // SAFETY: the assembly passes the address of an entry, and both are in one array
    let index = unsafe { entry.offset_from((&raw const ENTRIES).cast::<AtomicPtr<c_void>>()) } as usize;
    let (name, kind) = FUNCTIONS[index];
    let address = kind.open().as_ref().ok().and_then(|library| {
        // SAFETY: only the address is taken; the callers know the function's type
        let symbol = unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) };
        let address = symbol.ok().map(|symbol| symbol.as_raw_ptr()).filter(|address| !address.is_null());
        if address.is_none() {
            // the first one explains the failures that follow
            let _ = MISSING_FUNCTION.set((name, kind));
        }
        address
    });
    let address = address.unwrap_or_else(|| stand_in(name, kind));
    // SAFETY: as above
    unsafe { &*entry }.store(address, Ordering::Release);
    address
}

/// The function to call when a library or one of its functions is missing: it ignores its arguments and returns a failure.
fn stand_in(name: &CStr, kind: Kind) -> *mut c_void {
    extern "C" fn text() -> *const c_char {
        c"a library of CUDA is not installed".as_ptr()
    }
    // the constructors of candle's compiled kernels pass the handle of `__cudaRegisterFatBinary` to stand-ins only
    if [c"cudaGetErrorString", c"cudaGetErrorName", c"__cudaRegisterFatBinary"].contains(&name) {
        return text as *mut c_void;
    }
    extern "C" fn driver() -> c_int {
        Kind::Driver.failure()
    }
    extern "C" fn blas() -> c_int {
        Kind::Blas.failure()
    }
    extern "C" fn random() -> c_int {
        Kind::Random.failure()
    }
    extern "C" fn compiler() -> c_int {
        Kind::Compiler.failure()
    }
    extern "C" fn runtime() -> c_int {
        Kind::Runtime.failure()
    }
    match kind {
        Kind::Driver => driver as *mut c_void,
        Kind::Blas => blas as *mut c_void,
        Kind::Random => random as *mut c_void,
        Kind::Compiler => compiler as *mut c_void,
        Kind::Runtime => runtime as *mut c_void,
    }
}
