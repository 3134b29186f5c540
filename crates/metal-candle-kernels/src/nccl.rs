//! Sums tensors over the GPUs of several processes with NCCL.

use cudarc::driver::{CudaSlice, CudaStream};
use cudarc::nccl::result::NcclError;
use cudarc::nccl::{Comm, Id, ReduceOp};
use std::ffi::c_char;
use std::sync::Arc;

/// Creates the id of a communicator, which one process sends to all others.
///
/// # Errors
/// NCCL fails; the error describes how.
pub fn communicator_id() -> Result<Vec<u8>, String> {
    let id = Id::new().map_err(|error| describe(&error))?;
    Ok(id.internal().iter().map(|&byte| byte as u8).collect())
}

/// This process's member of a communicator.
pub struct Communicator(Comm);

// SAFETY: NCCL allows a communicator to be used by any thread, one at a time; `CudaStream` is `Send` itself. The pointer is
// owned by this value alone.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Creates member `rank` of `num_ranks`, which sums on `stream`. All members pass the same `id`. Waits for the others.
    ///
    /// # Errors
    /// NCCL or the device fails, or `id` is not an id; the error describes how.
    pub fn new(stream: Arc<CudaStream>, rank: usize, num_ranks: usize, id: &[u8]) -> Result<Self, String> {
        let bytes: [u8; 128] = id.try_into().map_err(|_| "the communicator id is invalid".to_owned())?;
        if rank >= num_ranks || i32::try_from(num_ranks).is_err() {
            return Err(format!("there is no rank {rank} of {num_ranks}"));
        }
        // the communicator belongs to the current device
        stream.context().bind_to_thread().map_err(|error| error.to_string())?;
        let id = Id::uninit(bytes.map(|byte| byte as c_char));
        Comm::from_rank(stream, rank, num_ranks, id).map(Self).map_err(|error| describe(&error))
    }

    /// Sums `values` over all members in place, asynchronously on the stream.
    ///
    /// # Errors
    /// NCCL or the device fails; the error describes how.
    pub fn all_reduce(&self, values: &mut CudaSlice<f32>) -> Result<(), String> {
        self.0.context().bind_to_thread().map_err(|error| error.to_string())?;
        self.0.all_reduce_in_place(values, &ReduceOp::Sum).map(|_| ()).map_err(|error| describe(&error))
    }
}

/// The name of NCCL's result.
fn describe(error: &NcclError) -> String {
    format!("{:?}", error.0)
}
