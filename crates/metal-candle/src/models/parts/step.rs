//! What parts share in a single-token step on a device with kernels: buffers that live as long as the batch, so that nothing is
//! allocated per token, and kernels compiled for the model's sizes.
//!
//! For few rows a part reads rows of weights; for many, on CUDA, its products are those of matrices.

use super::linear::LinearLayer;
use super::norm::NormLayer;
use crate::error::{Error, Result};
use crate::ops::gpu::{self, Arg, Kernel, Source};
use crate::ops::norm::NormKind;
use crate::ops::{LowRank, LowRankTerms};
use candle_core::{DType, Tensor};

/// Largest rank of a low-rank update.
pub(in crate::models) const MAX_RANK: usize = 64;

/// Rows of the LM head that a warp takes.
pub(in crate::models) const HEAD_ROWS: usize = 8;

/// Warps that share two rows of a linear layer.
const LINEAR_WARPS: usize = 4;

/// The size of a step, as far as kernels are compiled for it.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct StepShape {
    /// Tokens that a group takes together.
    pub(in crate::models) batch: usize,
    /// Whether linear layers run as matrix products.
    pub(in crate::models) is_wide: bool,
    pub(in crate::models) dtype: DType,
    pub(in crate::models) hidden: usize,
    pub(in crate::models) head_dim: usize,
    pub(in crate::models) is_cuda: bool,
}

impl StepShape {
    /// A kernel of `decode.metal`, compiled for these sizes.
    pub(in crate::models) fn kernel(&self, name: &'static str, threads: &Threads) -> Kernel {
        // more is a gain where a row is short and there are registers for it
        let is_narrow = self.hidden <= 1024 && self.dtype != DType::F32;
        // with matrix products no kernel depends on these two: one module serves all numbers of rows
        let (batch, hidden) = if self.is_wide { (1, 8) } else { (self.batch, self.hidden) };
        Kernel::new(Source::Decode, name, self.dtype)
            .with("BATCH", batch)
            .with("HIDDEN", hidden)
            .with("HEAD_DIM", self.head_dim)
            .with("DECODE_WARPS", threads.attention / 32)
            .with("PROJECTION_THREADS", threads.projections)
            .with("LINEAR_THREADS", threads.linear)
            .with("GATED_THREADS", threads.gated)
            .with("HEAD_THREADS", threads.head)
            .with("HEAD_ROWS", HEAD_ROWS)
            .with("AHEAD", if self.is_cuda && is_narrow { 5 } else { 1 })
    }
}

/// Threads of a group, by kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) struct Threads {
    pub(in crate::models) projections: usize,
    pub(in crate::models) attention: usize,
    pub(in crate::models) linear: usize,
    pub(in crate::models) gated: usize,
    pub(in crate::models) head: usize,
    pub(in crate::models) sample: usize,
}

impl Threads {
    /// Asks the device of `like` how many threads it can run of each kernel, and halves the usual number until it can.
    ///
    /// # Errors
    /// A kernel cannot be compiled, or the device runs too few threads of one.
    pub(in crate::models) fn new(shape: &StepShape, like: &Tensor) -> Result<Self> {
        let most = if shape.is_cuda { 512 } else { 256 };
        // long f32 keys fill the registers of a larger group; what is not tried need not be compiled
        let is_large = shape.dtype == DType::F32 && shape.head_dim > 32;
        let mut threads = Self {
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
                let allowed = gpu::max_threads(&shape.kernel(name, &tried), like)?;
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

    /// Rows of a linear layer that a group takes.
    pub(in crate::models) fn linear_rows(&self) -> usize {
        2 * self.linear / 32 / LINEAR_WARPS
    }

    /// Logits that a group of the LM head computes.
    pub(in crate::models) fn head_part(&self) -> usize {
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

/// The buffers of a step.
#[derive(Debug)]
pub(in crate::models) struct Step {
    pub(in crate::models) rows: usize,
    pub(in crate::models) max_seq_len: usize,
    pub(in crate::models) shape: StepShape,
    pub(in crate::models) threads: Threads,
    /// Ids, positions, slots and states of generators.
    pub(in crate::models) state: Tensor,
    /// The residual stream: `[rows, hidden]`.
    pub(in crate::models) x: Tensor,
    pub(in crate::models) q: Tensor,
    pub(in crate::models) attention: Tensor,
    pub(in crate::models) activation: Tensor,
    /// Cosines and sines of all positions, by rotary table.
    pub(in crate::models) rotary: Vec<(Tensor, Tensor)>,
    pub(in crate::models) wide: Option<Wide>,
}

/// The buffers that products of matrices need beside those.
#[derive(Debug)]
pub(in crate::models) struct Wide {
    pub(in crate::models) normed: Tensor,
    pub(in crate::models) k: Tensor,
    pub(in crate::models) v: Tensor,
    pub(in crate::models) gate: Tensor,
    pub(in crate::models) up: Tensor,
    /// Of low-rank updates: `rows * MAX_RANK` elements.
    pub(in crate::models) z: Tensor,
}

impl Step {
    pub(in crate::models) fn kernel(&self, name: &'static str) -> Kernel {
        self.shape.kernel(name, &self.threads)
    }

    /// The number of groups that share out the rows.
    pub(in crate::models) fn chunks(&self) -> usize {
        self.rows.div_ceil(self.shape.batch)
    }

    /// A linear layer whose result is added to the stream.
    pub(in crate::models) fn add_linear(
        &self,
        layer: &LinearLayer,
        x: &Tensor,
        terms: Option<&LowRankTerms>,
    ) -> Result<()> {
        let (a, b, rank, scale) = term_args(term_of(layer, terms));
        let args = [Arg::In(x), Arg::In(layer.linear.weight.dense()?), a, b, Arg::Out(&self.x)];
        let (input, output) = (layer.in_features, layer.out_features);
        let words = [self.rows.into(), input.into(), output.into(), rank.into(), scale.into()];
        let groups = output.div_ceil(self.threads.linear_rows()) * self.chunks();
        gpu::launch(&self.kernel("decode_linear"), gpu::Grid::row(groups, self.threads.linear), &args, &words)
    }

    /// `y = x W^T + beta y`, and the layer's low-rank update, by products of matrices.
    pub(in crate::models) fn multiply(
        &self,
        layer: &LinearLayer,
        x: &Tensor,
        (y, beta): (&Tensor, f32),
        terms: Option<&LowRankTerms>,
    ) -> Result<()> {
        multiply(layer.linear.weight.dense()?, term_of(layer, terms), x, (y, beta), self.wide()?)
    }

    pub(in crate::models) fn wide(&self) -> Result<&Wide> {
        self.wide.as_ref().ok_or_else(super::pass::missing)
    }
}

/// `y = x W^T + beta y`, and a low-rank update, by products of matrices.
pub(in crate::models) fn multiply(
    weight: &Tensor,
    term: Option<&LowRank>,
    x: &Tensor,
    (y, beta): (&Tensor, f32),
    wide: &Wide,
) -> Result<()> {
    gpu::product(y, (x, false), (weight, true), 1.0, beta)?;
    let Some(term) = term else { return Ok(()) };
    let (rows, rank) = (x.dim(0)?, term.a.dim(0)?);
    let z = wide.z.narrow(0, 0, rows * rank)?.reshape((rows, rank))?;
    gpu::product(&z, (x, false), (&term.a, true), term.scale, 0.0)?;
    gpu::product(y, (&z, false), (&term.b, true), 1.0, 1.0)
}

fn term_of<'a>(layer: &LinearLayer, terms: Option<&'a LowRankTerms>) -> Option<&'a LowRank> {
    terms.and_then(|terms| terms.get(layer.slot.id))
}

/// A and B of a low-rank update, its rank and its scale.
type TermArgs<'a> = (Arg<'a>, Arg<'a>, usize, f32);

pub(in crate::models) fn term_args(term: Option<&LowRank>) -> TermArgs<'_> {
    match term {
        Some(term) => (Arg::In(&term.a), Arg::In(&term.b), term.a.dims()[0], term.scale),
        None => (Arg::None, Arg::None, 0, 0.0),
    }
}

/// The same for the update of a layer.
pub(in crate::models) fn layer_args<'a>(layer: &LinearLayer, terms: Option<&'a LowRankTerms>) -> TermArgs<'a> {
    term_args(term_of(layer, terms))
}

/// Whether kernels that read eight elements at once take the layer's weight.
pub(in crate::models) fn fits(layer: &LinearLayer, dtype: DType) -> bool {
    let fits = |weight: &Tensor| weight.dtype() == dtype && weight.layout().start_offset().is_multiple_of(8);
    layer.linear.weight.dense().is_ok_and(fits)
}

/// Whether the kernels that apply a norm on the way take this one.
pub(in crate::models) fn is_plain_norm(norm: &NormLayer) -> bool {
    norm.norm.kind == NormKind::Rms { offset: 0.0 } && norm.norm.weight.is_some() && norm.norm.bias.is_none()
}
