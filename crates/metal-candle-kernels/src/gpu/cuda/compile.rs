//! Compiles kernels with NVRTC to machine code of the device. The caller may set a store that caches the code between processes.

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaModule, sys as driver};
use candle_core::cuda_backend::cudarc::nvrtc::{Ptx, result, sys};
use candle_core::{Result, bail};
use std::ffi::{CStr, CString};
use std::sync::{Arc, OnceLock};

/// Caches machine code of kernels between processes.
pub trait KernelStore: Send + Sync {
    /// The code that was saved under exactly this key.
    fn load(&self, key: &str) -> Option<Vec<u8>>;

    /// Saves code under a key; a store that cannot save does nothing.
    fn save(&self, key: &str, code: &[u8]);
}

static STORE: OnceLock<Box<dyn KernelStore>> = OnceLock::new();

/// Sets the store of this process. Only the first call has an effect.
pub fn set_kernel_store(store: Box<dyn KernelStore>) {
    // a second store would contain the same code
    drop(STORE.set(store));
}

/// The module of a source text: from the store, or compiled and saved there.
pub(super) fn module(context: &Arc<CudaContext>, text: &str) -> Result<Arc<CudaModule>> {
    let (major, minor) = context.compute_capability().map_err(candle_core::Error::wrap)?;
    let options = [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()];
    let key = format!("{} {}\n{text}", versions()?, options.join(" "));
    let load = |code: &[u8]| context.load_module(Ptx::from_binary(code.to_vec()));
    if let Some(code) = STORE.get().and_then(|store| store.load(&key))
        && let Ok(module) = load(&code)
    {
        return Ok(module);
    }
    let code = compile(text, &options)?;
    let module = load(&code).map_err(candle_core::Error::wrap)?;
    if let Some(store) = STORE.get() {
        store.save(&key, &code);
    }
    Ok(module)
}

/// The versions of the compiler and of the driver.
fn versions() -> Result<String> {
    let (mut major, mut minor, mut of_driver) = (0, 0, 0);
    // SAFETY: the functions write one number to each pointer
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(failed)?;
    // SAFETY: as above
    unsafe { driver::cuDriverGetVersion(&raw mut of_driver) }.result().map_err(candle_core::Error::wrap)?;
    Ok(format!("NVRTC {major}.{minor} driver {of_driver}"))
}

fn failed(error: result::NvrtcError) -> candle_core::Error {
    candle_core::Error::Msg(format!("NvrtcError({:?})", error.0)).bt()
}

/// A program of NVRTC; it is destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is destroyed once; a failure leaks some memory
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn compile(text: &str, options: &[String]) -> Result<Vec<u8>> {
    let text = CString::new(text).map_err(candle_core::Error::wrap)?;
    let program = Program(result::create_program(&text, None).map_err(failed)?);
    // SAFETY: the program exists, as below
    if let Err(error) = unsafe { result::compile_program(program.0, options) } {
        // SAFETY: as above
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&byte| byte as u8).chain([0]).collect();
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        bail!("NvrtcError({:?})\n{log}", error.0);
    }
    let mut size = 0;
    // SAFETY: as above; the size is written
    unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) }.result().map_err(failed)?;
    let mut code = vec![0u8; size];
    // SAFETY: as above; the vector has the size that NVRTC returned
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }.result().map_err(failed)?;
    Ok(code)
}
