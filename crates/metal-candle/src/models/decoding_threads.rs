//! The number of threads in a group for each kernel of a decoding step: the most that the device can run.

use super::Model;
use crate::error::{Error, Result};
use crate::ops::gpu::{self, Kernel, Source};
use candle_core::DType;

/// Rows of the LM head that a warp takes.
pub(super) const HEAD_ROWS: usize = 8;

/// Warps that share two rows of a linear layer.
const LINEAR_WARPS: usize = 4;

/// The size of a step, as far as kernels are compiled for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepShape {
    /// Tokens that a group takes together.
    pub(super) batch: usize,
    /// Whether linear layers run as matrix products.
    pub(super) is_wide: bool,
}

/// Threads of a group, by kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Threads {
    pub(super) projections: usize,
    pub(super) attention: usize,
    pub(super) linear: usize,
    pub(super) gated: usize,
    pub(super) head: usize,
    pub(super) sample: usize,
}

impl Threads {
    /// Rows of a linear layer that a group takes.
    pub(super) fn linear_rows(&self) -> usize {
        2 * self.linear / 32 / LINEAR_WARPS
    }

    /// Logits that a group of the LM head computes.
    pub(super) fn head_part(&self) -> usize {
        self.head / 32 * HEAD_ROWS
    }

    /// The kernels that are compiled for their number of threads, with that number and the fewest threads they work with.
    fn compiled(&mut self, is_wide: bool) -> Vec<(&'static str, &mut usize, usize)> {
        let mut kernels = vec![("decode_attention", &mut self.attention, 32)];
        if !is_wide {
            kernels.extend([
                ("decode_projections", &mut self.projections, 32),
                ("decode_linear", &mut self.linear, 32 * LINEAR_WARPS),
                ("decode_gated", &mut self.gated, 32),
                ("decode_head", &mut self.head, 32),
            ]);
        }
        kernels
    }
}

impl Model {
    /// Asks the device how many threads it can run of each kernel, and halves the usual number until it can.
    ///
    /// # Errors
    /// A kernel cannot be compiled, or the device runs too few threads of one.
    pub(super) fn decoding_threads(&self, shape: StepShape) -> Result<Threads> {
        let like = self.inner.embedding.dense()?;
        let most = if self.device().is_metal() { 256 } else { 512 };
        // long f32 keys fill the registers of a larger group; what is not tried need not be compiled
        let is_large = self.activation_dtype() == DType::F32 && self.config().head_dim > 32;
        let mut threads = Threads {
            projections: 128,
            attention: if is_large { most.min(256) } else { most },
            linear: most,
            gated: 256,
            head: 256,
            sample: gpu::threads(&Kernel::new(Source::Sampling, "sample", DType::F32), like, most)?,
        };
        loop {
            let tried = threads;
            for (name, count, least) in threads.compiled(shape.is_wide) {
                let allowed = gpu::max_threads(&self.decoding_kernel(name, shape, &tried), like)?;
                while *count > allowed {
                    *count /= 2;
                    if *count < least {
                        let message = format!("`{name}` needs {least} threads, and the device runs {allowed} of it");
                        return Err(Error::Device(message));
                    }
                }
            }
            if threads == tried {
                return Ok(threads);
            }
        }
    }

    /// A kernel of `decode.metal`, compiled for this model.
    pub(super) fn decoding_kernel(&self, name: &'static str, shape: StepShape, threads: &Threads) -> Kernel {
        let config = self.config();
        // more is a gain where a row is short and there are registers for it
        let is_narrow = config.hidden_size <= 1024 && self.activation_dtype() != DType::F32;
        // with matrix products no kernel depends on these two: one module serves all numbers of rows
        let (batch, hidden) = if shape.is_wide { (1, 8) } else { (shape.batch, config.hidden_size) };
        Kernel::new(Source::Decode, name, self.activation_dtype())
            .with("BATCH", batch)
            .with("HIDDEN", hidden)
            .with("HEAD_DIM", config.head_dim)
            .with("DECODE_WARPS", threads.attention / 32)
            .with("PROJECTION_THREADS", threads.projections)
            .with("LINEAR_THREADS", threads.linear)
            .with("GATED_THREADS", threads.gated)
            .with("HEAD_THREADS", threads.head)
            .with("HEAD_ROWS", HEAD_ROWS)
            .with("AHEAD", if self.device().is_cuda() && is_narrow { 5 } else { 1 })
    }
}
