//! The state that parts share in a decode step on a device with kernels: buffers that are allocated once per batch, so
//! that no token allocates, and kernels compiled for the model's sizes.
//!
//! Few rows use matrix-vector kernels. Many rows, on CUDA, use matrix products.

use super::linear::LinearLayer;
use super::norm::NormLayer;
use super::pass::missing;
use super::sublayer::Sublayer;
use crate::error::{Error, Result};
use crate::models::registry::LinearId;
use crate::ops::gpu::{self, Arg, Formats, Grid, Kernel, Source, Word};
use crate::ops::linear::Linear;
use crate::ops::norm::NormKind;
use crate::ops::row_updates::RowUpdates;
use crate::ops::{LowRank, LowRankUpdates, Weight};
use candle_core::{DType, Tensor};

/// The maximum rank of a low-rank update.
pub(in crate::models) const MAX_RANK: usize = 64;

/// LM head rows per warp.
pub(in crate::models) const HEAD_ROWS: usize = 8;

/// The thread group size of kernels with one element per thread.
pub(in crate::models) const ROW_THREADS: usize = 128;

/// The maximum number of parts that the keys of a sequence are split into.
const MAX_PARTS: usize = 16;

/// The minimum number of keys per part, times the heads per thread group.
const MIN_KEYS: usize = 1024;

/// The number of warps of a thread group with several heads, and the limit of its shared memory.
const MANY_HEADS_WARPS: usize = 8;
const MAX_SHARED_BYTES: usize = 24 * 1024;

/// The smallest configuration that attention can run with.
const MIN_THREADS: AttentionThreads = AttentionThreads { heads: 1, key_warps: 2 };

/// The number of warps that share two rows of a linear layer.
const LINEAR_WARPS: usize = 4;

/// The sizes of a step that kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct StepShape {
    /// Tokens that a thread group processes together.
    pub(in crate::models) batch: usize,
    /// Whether linear layers use matrix products.
    pub(in crate::models) uses_matmul: bool,
    pub(in crate::models) dtype: DType,
    pub(in crate::models) hidden: usize,
    /// Query heads, key/value heads, and the width of one.
    pub(in crate::models) heads: [usize; 3],
    /// The id of the gated MLP's activation in the kernels.
    pub(in crate::models) activation: usize,
    pub(in crate::models) is_cuda: bool,
    /// The block formats of all matrices.
    pub(in crate::models) formats: Formats,
}

impl StepShape {
    /// A kernel of `decode.metal`, compiled for these sizes.
    pub(in crate::models) fn kernel(&self, name: &'static str, has_updates: bool, threads: &Threads) -> Kernel {
        // loading further ahead is faster only for short rows, with enough registers
        let is_narrow = self.hidden <= 1024 && self.dtype != DType::F32;
        // with matrix products, no kernel depends on these two, so one module serves any number of rows
        let (batch, hidden) = if self.uses_matmul { (1, 8) } else { (self.batch, self.hidden) };
        let kernel = Kernel::new(Source::Decode, name, self.dtype)
            .with("BATCH", batch)
            .with("HIDDEN", hidden)
            .with("ACTIVATION", self.activation)
            .with("HAS_TERMS", usize::from(has_updates))
            .with("PROJECTION_THREADS", threads.projections)
            .with("LINEAR_THREADS", threads.linear)
            .with("GATED_THREADS", threads.gated)
            .with("HEAD_THREADS", threads.head)
            .with("HEAD_ROWS", HEAD_ROWS)
            .with("FORMATS", self.formats.constant())
            .with("AHEAD", if self.is_cuda && is_narrow { 5 } else { 1 });
        // four concurrent groups keep the memory busy, if there are enough registers
        let is_bounded = name == "decode_gated" && is_narrow && batch == 1;
        if is_bounded { kernel.with("BLOCK_THREADS", threads.gated).with("BLOCKS_BESIDE", 4) } else { kernel }
    }

    /// The kernel of `decode_attention.metal`.
    pub(in crate::models) fn attention_kernel(&self, threads: AttentionThreads) -> Kernel {
        Kernel::new(Source::DecodeAttention, "decode_attention", self.dtype)
            .with("HEAD_DIM", self.heads[2])
            .with("HEADS", threads.heads)
            .with("KEY_WARPS", threads.key_warps)
            .with("KEY_LANES", self.heads[2].div_ceil(8).next_power_of_two())
            .with("BLOCK_THREADS", threads.count())
            .with("BLOCKS_BESIDE", 1)
    }
}

/// The number of thread groups that keep a device busy.
fn target_groups(is_cuda: bool) -> usize {
    if is_cuda { 128 } else { 32 }
}

/// How attention is divided among thread groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) struct AttentionThreads {
    /// Query heads per thread group. They share a key/value head.
    pub(in crate::models) heads: usize,
    /// The number of warps that share the keys of a thread group; more than `heads`.
    pub(in crate::models) key_warps: usize,
}

impl AttentionThreads {
    /// With few sequences a group has one head; with many it has all heads that read the same keys.
    fn new(shape: &StepShape, rows: usize, like: &Tensor) -> Result<Self> {
        let [heads, kv_heads, head_dim] = shape.heads;
        let has_more_warps = shape.is_cuda && shape.dtype != DType::F32;
        let mut threads = Self { heads: 1, key_warps: if has_more_warps { 16 } else { 8 } };
        if rows * heads >= 2 * target_groups(shape.is_cuda) {
            // the results that the warps exchange must fit in shared memory
            let fits = |count: &usize| {
                (heads / kv_heads).is_multiple_of(*count) && count * head_dim * MANY_HEADS_WARPS * 4 <= MAX_SHARED_BYTES
            };
            let count = (2..MANY_HEADS_WARPS).rev().find(fits);
            threads = count.map_or(threads, |heads| Self { heads, key_warps: MANY_HEADS_WARPS });
        }
        let allowed = gpu::max_threads(&shape.attention_kernel(threads), like)?;
        while threads.count() > allowed {
            if threads == MIN_THREADS {
                let message =
                    format!("`decode_attention` needs {} threads, but the device supports {allowed}", threads.count());
                return Err(Error::Device(message));
            }
            threads = Self { heads: 1, key_warps: (threads.key_warps / 2).max(MIN_THREADS.key_warps) };
        }
        Ok(threads)
    }

    /// The maximum number of parts of keys, each with its own thread group, that is useful for this number of rows.
    fn max_parts(self, shape: &StepShape, rows: usize) -> usize {
        (target_groups(shape.is_cuda) * self.heads / (rows * shape.heads[0])).clamp(1, MAX_PARTS)
    }

    /// The minimum number of keys per part.
    pub(in crate::models) fn min_keys(self) -> usize {
        MIN_KEYS / self.heads
    }

    /// The number of parts for sequences of up to `len` tokens.
    fn parts(self, len: usize) -> usize {
        len.div_ceil(self.min_keys()).next_power_of_two()
    }

    /// The thread group size.
    pub(in crate::models) fn count(self) -> usize {
        32 * self.key_warps
    }
}

/// The thread group size of each kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) struct Threads {
    pub(in crate::models) projections: usize,
    pub(in crate::models) attention: AttentionThreads,
    pub(in crate::models) linear: usize,
    pub(in crate::models) gated: usize,
    pub(in crate::models) head: usize,
    pub(in crate::models) sample: usize,
}

impl Threads {
    /// Queries how many threads the device of `like` supports for each kernel, and halves the default until it fits.
    ///
    /// # Errors
    /// A kernel cannot be compiled, or the device supports too few threads for one.
    pub(in crate::models) fn new(shape: &StepShape, rows: usize, has_updates: bool, like: &Tensor) -> Result<Self> {
        let most = if shape.is_cuda { 512 } else { 256 };
        let mut threads = Self {
            projections: 128,
            attention: AttentionThreads::new(shape, rows, like)?,
            linear: most,
            gated: 256,
            head: 256,
            sample: gpu::threads(&Kernel::new(Source::Sampling, "sample", DType::F32), like, most)?,
        };
        loop {
            let tried = threads;
            for (name, count, least) in threads.compiled().into_iter().filter(|_| !shape.uses_matmul) {
                // layers without an update use the same thread count as those with one
                let mut allowed = gpu::max_threads(&shape.kernel(name, false, &tried), like)?;
                if has_updates {
                    allowed = allowed.min(gpu::max_threads(&shape.kernel(name, true, &tried), like)?);
                }
                while *count > allowed {
                    *count /= 2;
                    if *count < least {
                        let message = format!("`{name}` needs {least} threads, but the device supports {allowed}");
                        return Err(Error::Device(message));
                    }
                }
            }
            if threads == tried {
                return Ok(threads);
            }
        }
    }

    /// Rows of a linear layer per thread group.
    pub(in crate::models) fn linear_rows(&self) -> usize {
        2 * self.linear / 32 / LINEAR_WARPS
    }

    /// Logits per thread group of the LM head.
    pub(in crate::models) fn head_part(&self) -> usize {
        self.head / 32 * HEAD_ROWS
    }

    /// The kernels that are compiled for their number of threads, with that number and the minimum they support.
    fn compiled(&mut self) -> [(&'static str, &mut usize, usize); 4] {
        [
            ("decode_projections", &mut self.projections, 32),
            ("decode_linear", &mut self.linear, 32 * LINEAR_WARPS),
            ("decode_gated", &mut self.gated, 32),
            ("decode_head", &mut self.head, 32),
        ]
    }
}

/// The buffers of a decode step.
#[derive(Debug)]
pub(in crate::models) struct Step {
    pub(in crate::models) rows: usize,
    pub(in crate::models) max_seq_len: usize,
    pub(in crate::models) shape: StepShape,
    pub(in crate::models) threads: Threads,
    /// Ids, positions, slots and states of the random number generators.
    pub(in crate::models) state: Tensor,
    /// The residual stream: `[rows, hidden]`.
    pub(in crate::models) x: Tensor,
    pub(in crate::models) q: Tensor,
    pub(in crate::models) k: Tensor,
    pub(in crate::models) v: Tensor,
    pub(in crate::models) attention: Tensor,
    /// The number of parts that keys are split into, and its maximum. When it grows, the step is recorded again.
    pub(in crate::models) parts: usize,
    pub(in crate::models) max_parts: usize,
    /// Partial results that the groups of `decode_attention` exchange, and counters of the finished groups.
    pub(in crate::models) results: Tensor,
    pub(in crate::models) counters: Tensor,
    /// The products of vectors with A of low-rank updates, as laid out by [`Posts`].
    pub(in crate::models) posted: Tensor,
    /// Whether there are low-rank updates whose products are posted.
    pub(in crate::models) has_updates: bool,
    pub(in crate::models) activation: Tensor,
    /// The output of a part, if a norm follows: `[rows, hidden]`.
    pub(in crate::models) branch: Tensor,
    /// Cosines and sines of all positions, for each rotary table.
    pub(in crate::models) rotary: Vec<(Tensor, Tensor)>,
    pub(in crate::models) matmul: Option<MatmulBuffers>,
}

/// The additional buffers of matrix products.
#[derive(Debug)]
pub(in crate::models) struct MatmulBuffers {
    pub(in crate::models) normed: Tensor,
    pub(in crate::models) gate: Tensor,
    pub(in crate::models) up: Tensor,
    /// The low-rank updates of the rows, if there are any.
    pub(in crate::models) updates: Option<RowUpdates>,
    /// A buffer for dequantized weights, if any weight is quantized.
    pub(in crate::models) scratch: Option<Tensor>,
}

/// The slot in which a kernel posts the products with A of its low-rank updates: [`MAX_RANK`] words per row and update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) enum Posts {
    Projections,
    Output,
    Gated,
    Down,
    Head,
}

impl Posts {
    /// The number of words of all slots for one row.
    pub(in crate::models) const WORDS: usize = 8 * MAX_RANK;

    /// The first word and the number of words, for `rows` rows.
    fn range(self, rows: usize) -> [usize; 2] {
        let (first, count) = match self {
            Self::Projections => (0, 3),
            Self::Output => (3, 1),
            Self::Gated => (4, 2),
            Self::Down => (6, 1),
            Self::Head => (7, 1),
        };
        [first, count].map(|updates| updates * rows * MAX_RANK)
    }
}

impl Step {
    /// The number of words of `results` for `rows` rows.
    pub(in crate::models) fn num_results(shape: &StepShape, rows: usize, max_parts: usize) -> usize {
        if max_parts > 1 { rows * shape.heads[0] * max_parts * (shape.heads[2] + 2) } else { 1 }
    }

    /// The maximum number of parts of keys in a cache of sequences of up to `max_seq_len` tokens.
    pub(in crate::models) fn max_parts(shape: &StepShape, threads: &Threads, rows: usize, max_seq_len: usize) -> usize {
        threads.attention.max_parts(shape, rows).min(threads.attention.parts(max_seq_len))
    }

    /// Adapts the number of parts to the longest sequence. Returns whether it has grown.
    pub(in crate::models) fn grow(&mut self, longest: usize) -> bool {
        let parts = self.threads.attention.parts(longest).min(self.max_parts);
        let has_grown = parts > self.parts;
        self.parts = self.parts.max(parts);
        has_grown
    }

    /// Whether rows may have different low-rank updates.
    pub(in crate::models) fn updates_by_row(&self) -> bool {
        self.matmul.as_ref().is_some_and(|matmul| matmul.updates.is_some())
    }

    /// The words that a kernel clears, as its arguments.
    pub(in crate::models) fn cleared(&self, posts: Posts) -> [Word; 2] {
        if self.has_updates { posts.range(self.rows).map(Word::from) } else { [Word(0); 2] }
    }

    /// The first word that a kernel posts to and the words that it clears, as its arguments.
    pub(in crate::models) fn posts(&self, posts: Posts, cleared: Option<Posts>) -> [Word; 3] {
        let [from, count] = cleared.map_or([Word(0); 2], |cleared| self.cleared(cleared));
        [posts.range(self.rows)[0].into(), from, count]
    }

    /// The number of thread groups whose warps compute the rows of A for updates of these ranks, two rows per warp.
    pub(in crate::models) fn groups_of_a(ranks: &[usize], warps: usize) -> usize {
        ranks.iter().map(|rank| rank.div_ceil(2)).sum::<usize>().div_ceil(warps)
    }

    /// A kernel for layers with low-rank updates of these ranks.
    pub(in crate::models) fn kernel(&self, name: &'static str, ranks: &[usize]) -> Kernel {
        self.shape.kernel(name, ranks.iter().any(|rank| *rank > 0), &self.threads)
    }

    /// The number of thread groups that the rows are divided among.
    pub(in crate::models) fn chunks(&self) -> usize {
        self.rows.div_ceil(self.shape.batch)
    }

    /// Computes the last linear layer of a branch: applies the norm that follows, if any, multiplies by the branch's
    /// factor, and adds the result to the stream.
    pub(in crate::models) fn finish_branch(
        &self,
        layer: &StepLinear,
        x: &Tensor,
        branch: Branch,
        posts: [Word; 3],
    ) -> Result<()> {
        let (y, factor) = if branch.after.is_some() { (&self.branch, 1.0) } else { (&self.x, branch.factor) };
        let is_added = branch.after.is_none();
        if self.shape.uses_matmul {
            self.multiply(layer, x, (y, factor, if is_added { 1.0 } else { 0.0 }))?;
        } else {
            let [a, b] = layer.update_args();
            let args = [Arg::In(x), layer.weight()?, a, b, Arg::Out(y), Arg::Out(&self.posted)];
            let (output, input) = layer.weight.dims2()?;
            let (rank, scale) = (layer.rank(), layer.scale());
            let mut words = vec![self.rows.into(), input.into(), output.into(), rank.into(), scale.into()];
            words.extend([Word::from(factor), is_added.into(), layer.weight.format_word()]);
            words.extend(posts);
            let rows = self.threads.linear_rows();
            let groups = (output.div_ceil(rows) + rank.div_ceil(rows)) * self.chunks();
            gpu::launch(&self.kernel("decode_linear", &[rank]), Grid::row(groups, self.threads.linear), &args, &words)?;
        }
        let Some(norm) = branch.after else { return Ok(()) };
        let args = [Arg::In(y), norm.norm.weight.as_ref().map_or(Arg::None, Arg::In), Arg::Out(&self.x)];
        let [_, offset, eps] = norm_words(Some(norm));
        let words = [self.shape.hidden.into(), offset, eps, branch.factor.into()];
        gpu::launch(&self.kernel("decode_add", &[]), Grid::row(self.rows, ROW_THREADS), &args, &words)
    }

    /// The input of a branch: the normed stream, or the stream itself.
    pub(in crate::models) fn normed<'a>(&'a self, branch: Branch, matmul: &'a MatmulBuffers) -> Result<&'a Tensor> {
        let Some(norm) = branch.before else { return Ok(&self.x) };
        norm.norm.forward_into(&self.x, &matmul.normed)?;
        Ok(&matmul.normed)
    }

    /// `y = factor x W^T + beta y` plus low-rank updates, with matrix products.
    pub(in crate::models) fn multiply(
        &self,
        layer: &StepLinear,
        x: &Tensor,
        (y, factor, beta): (&Tensor, f32, f32),
    ) -> Result<()> {
        let matmul = self.matmul()?;
        layer.weight.multiply_on_gpu(y, x, true, (factor, beta), matmul.scratch.as_ref())?;
        matmul.updates.as_ref().map_or(Ok(()), |updates| updates.add(x, &[(layer.id, layer.start, y)], factor))
    }

    /// `y = x W^T` plus low-rank updates, for layers that share an input.
    pub(in crate::models) fn multiply_together<const N: usize>(
        &self,
        layers: &[StepLinear; N],
        x: &Tensor,
        ys: [&Tensor; N],
    ) -> Result<()> {
        let matmul = self.matmul()?;
        let products: Vec<_> = layers.iter().map(|layer| &layer.weight).zip(ys).collect();
        Weight::multiply_together(x, &products, matmul.scratch.as_ref())?;
        let Some(updates) = &matmul.updates else { return Ok(()) };
        let layers: Vec<_> = layers.iter().zip(ys).map(|(layer, y)| (layer.id, layer.start, y)).collect();
        updates.add(x, &layers, 1.0)
    }

    pub(in crate::models) fn matmul(&self) -> Result<&MatmulBuffers> {
        self.matmul.as_ref().ok_or_else(missing)
    }
}

/// The norms and the factor around a part of a layer.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct Branch<'a> {
    pub(in crate::models) before: Option<&'a NormLayer>,
    pub(in crate::models) after: Option<&'a NormLayer>,
    /// The factor on the branch.
    pub(in crate::models) factor: f32,
}

impl<'a> Branch<'a> {
    /// The branch of a part; `None` if the decode kernels do not support its norms.
    pub(in crate::models) fn new<P>(sublayer: &'a Sublayer<P>) -> Option<Self> {
        let (before, after) = (sublayer.before.as_ref(), sublayer.after.as_ref());
        let is_rms = before.into_iter().chain(after).all(is_rms_norm);
        is_rms.then_some(Self { before, after, factor: sublayer.scale })
    }

    /// The weight of the norm before the part.
    pub(in crate::models) fn weight(&self) -> Arg<'a> {
        self.before.and_then(|norm| norm.norm.weight.as_ref()).map_or(Arg::None, Arg::In)
    }
}

/// A linear layer in a decode step, or a range of the rows of one.
#[derive(Debug)]
pub(in crate::models) struct StepLinear<'a> {
    /// `[out_features, in_features]`
    pub(in crate::models) weight: Weight,
    pub(in crate::models) bias: Option<Tensor>,
    id: LinearId,
    /// The first of its rows.
    start: usize,
    /// The low-rank update of all rows of the step, and the rows of its B.
    update: Option<(&'a LowRank, Tensor)>,
}

impl<'a> StepLinear<'a> {
    pub(in crate::models) fn new(linear: &Linear, id: LinearId, updates: Option<&'a LowRankUpdates>) -> Self {
        let update = updates.and_then(|updates| updates.get(id)).map(|update| (update, update.b.clone()));
        Self { weight: linear.weight.clone(), bias: linear.bias.clone(), id, start: 0, update }
    }

    /// A linear layer of a part.
    pub(in crate::models) fn of(layer: &LinearLayer, updates: Option<&'a LowRankUpdates>) -> Self {
        Self::new(&layer.linear, layer.slot.id, updates)
    }

    /// The layers of these widths, which may be stored as the rows of one layer.
    pub(in crate::models) fn of_each<const N: usize>(
        layers: &[LinearLayer],
        widths: [usize; N],
        updates: Option<&'a LowRankUpdates>,
    ) -> Result<[Self; N]> {
        let mut all: Vec<_> = layers.iter().map(|layer| Self::of(layer, updates)).collect();
        if let ([together], true) = (all.as_slice(), N > 1) {
            let starts = widths.iter().scan(0, |end, width| Some(std::mem::replace(end, *end + width)));
            all = starts.zip(widths).map(|(start, width)| together.rows(start, width)).collect::<Result<_>>()?;
        }
        all.try_into().map_err(|_| missing())
    }

    fn rows(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Self {
            weight: self.weight.narrow_rows(start, count)?,
            bias: self.bias.as_ref().map(|bias| bias.narrow(0, start, count)).transpose()?,
            id: self.id,
            start: self.start + start,
            update: self
                .update
                .as_ref()
                .map(|(update, b)| Ok::<_, Error>((*update, b.narrow(0, start, count)?)))
                .transpose()?,
        })
    }

    /// The weight, as a kernel argument.
    pub(in crate::models) fn weight(&self) -> Result<Arg<'_>> {
        self.weight.stored().map(Arg::In)
    }

    /// A and B of the low-rank update, as kernel arguments.
    pub(in crate::models) fn update_args(&self) -> [Arg<'_>; 2] {
        self.update.as_ref().map_or([Arg::None, Arg::None], |(update, b)| [Arg::In(&update.a), Arg::In(b)])
    }

    pub(in crate::models) fn rank(&self) -> usize {
        self.update.as_ref().map_or(0, |(update, _)| update.a.dims()[0])
    }

    pub(in crate::models) fn scale(&self) -> f32 {
        self.update.as_ref().map_or(0.0, |(update, _)| update.scale)
    }
}

/// Whether kernels can load eight elements of the layer's weight at once.
pub(in crate::models) fn fits(layer: &LinearLayer, dtype: DType) -> bool {
    layer.linear.weight.supports_vector_loads(dtype)
}

/// Whether the decode kernels support this norm.
pub(in crate::models) fn is_rms_norm(norm: &NormLayer) -> bool {
    let norm = &norm.norm;
    matches!(norm.kind, NormKind::Rms { .. })
        && norm.weight.as_ref().is_some_and(|weight| gpu::supports_vector_loads(weight, weight.dtype()))
        && norm.bias.is_none()
}

/// Whether there is a norm, the offset of its weights, and its epsilon, as kernel arguments.
pub(in crate::models) fn norm_words(norm: Option<&NormLayer>) -> [Word; 3] {
    let Some(NormLayer { norm, .. }) = norm else { return [Word(0); 3] };
    let offset = if let NormKind::Rms { offset } = norm.kind { offset } else { 0.0 };
    [true.into(), offset.into(), (norm.eps as f32).into()]
}
