//! What parts share in a single-token step on a device with kernels: buffers that live as long as the batch, so that nothing is
//! allocated per token, and kernels compiled for the model's sizes.
//!
//! For few rows a part reads rows of weights; for many, on CUDA, its products are those of matrices.

use super::linear::LinearLayer;
use super::norm::NormLayer;
use super::pass::missing;
use super::sublayer::Sublayer;
use crate::error::{Error, Result};
use crate::ops::gpu::{self, Arg, Formats, Grid, Kernel, Source, Word};
use crate::ops::linear::Linear;
use crate::ops::norm::NormKind;
use crate::ops::{LowRank, LowRankTerms, Weight};
use candle_core::{DType, Tensor};

/// Largest rank of a low-rank update.
pub(in crate::models) const MAX_RANK: usize = 64;

/// Rows of the LM head that a warp takes.
pub(in crate::models) const HEAD_ROWS: usize = 8;

/// Threads of a group that has an element each.
pub(in crate::models) const ROW_THREADS: usize = 128;

/// Most parts of the keys of a sequence.
const MOST_PARTS: usize = 16;

/// The fewest keys of a part, times the heads of a group.
const LEAST_KEYS: usize = 1024;

/// Warps of a group with several heads, and what they may take of the memory of a group.
const MANY_HEADS_WARPS: usize = 8;
const MOST_SHARED_BYTES: usize = 24 * 1024;

/// What attention needs to run at all.
const FEWEST_THREADS: AttentionThreads = AttentionThreads { heads: 1, key_warps: 2 };

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
    /// Query heads, key/value heads, and the width of one.
    pub(in crate::models) heads: [usize; 3],
    /// The number of the activation of gated MLPs, as kernels know it.
    pub(in crate::models) activation: usize,
    pub(in crate::models) is_cuda: bool,
    /// Of all matrices.
    pub(in crate::models) formats: Formats,
}

impl StepShape {
    /// A kernel of `decode.metal`, compiled for these sizes.
    pub(in crate::models) fn kernel(&self, name: &'static str, has_terms: bool, threads: &Threads) -> Kernel {
        // more is a gain where a row is short and there are registers for it
        let is_narrow = self.hidden <= 1024 && self.dtype != DType::F32;
        // with matrix products no kernel depends on these two: one module serves all numbers of rows
        let (batch, hidden) = if self.is_wide { (1, 8) } else { (self.batch, self.hidden) };
        let kernel = Kernel::new(Source::Decode, name, self.dtype)
            .with("BATCH", batch)
            .with("HIDDEN", hidden)
            .with("ACTIVATION", self.activation)
            .with("HAS_TERMS", usize::from(has_terms))
            .with("PROJECTION_THREADS", threads.projections)
            .with("LINEAR_THREADS", threads.linear)
            .with("GATED_THREADS", threads.gated)
            .with("HEAD_THREADS", threads.head)
            .with("HEAD_ROWS", HEAD_ROWS)
            .with("FORMATS", self.formats.constant())
            .with("AHEAD", if self.is_cuda && is_narrow { 5 } else { 1 });
        // four groups beside each other keep the memory busy, if their registers leave room
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

/// Groups that keep a device busy.
fn wanted_groups(is_cuda: bool) -> usize {
    if is_cuda { 128 } else { 32 }
}

/// How attention is shared out among groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) struct AttentionThreads {
    /// Query heads of a group, which share a key/value head.
    pub(in crate::models) heads: usize,
    /// Warps that share the keys of a group, more than heads.
    pub(in crate::models) key_warps: usize,
}

impl AttentionThreads {
    /// For few sequences a group has one head, for many it takes all heads that read the same keys.
    fn new(shape: &StepShape, rows: usize, like: &Tensor) -> Result<Self> {
        let [heads, kv_heads, head_dim] = shape.heads;
        let is_wide = shape.is_cuda && shape.dtype != DType::F32;
        let mut threads = Self { heads: 1, key_warps: if is_wide { 16 } else { 8 } };
        if rows * heads >= 2 * wanted_groups(shape.is_cuda) {
            // what the warps leave for each other has to fit into the memory of a group
            let fits = |count: &usize| {
                (heads / kv_heads).is_multiple_of(*count)
                    && count * head_dim * MANY_HEADS_WARPS * 4 <= MOST_SHARED_BYTES
            };
            let count = (2..MANY_HEADS_WARPS).rev().find(fits);
            threads = count.map_or(threads, |heads| Self { heads, key_warps: MANY_HEADS_WARPS });
        }
        let allowed = gpu::max_threads(&shape.attention_kernel(threads), like)?;
        while threads.count() > allowed {
            if threads == FEWEST_THREADS {
                let message =
                    format!("`decode_attention` needs {} threads, and the device runs {allowed}", threads.count());
                return Err(Error::Device(message));
            }
            threads = Self { heads: 1, key_warps: (threads.key_warps / 2).max(FEWEST_THREADS.key_warps) };
        }
        Ok(threads)
    }

    /// The most parts of keys, each with a group of its own, that so many rows of so many heads are worth.
    fn most_parts(self, shape: &StepShape, rows: usize) -> usize {
        (wanted_groups(shape.is_cuda) * self.heads / (rows * shape.heads[0])).clamp(1, MOST_PARTS)
    }

    /// The fewest keys of a part.
    pub(in crate::models) fn least_keys(self) -> usize {
        LEAST_KEYS / self.heads
    }

    /// The parts of the keys of sequences of up to `len` tokens.
    fn parts(self, len: usize) -> usize {
        len.div_ceil(self.least_keys()).next_power_of_two()
    }

    /// The threads of a group.
    pub(in crate::models) fn count(self) -> usize {
        32 * self.key_warps
    }
}

/// Threads of a group, by kernel.
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
    /// Asks the device of `like` how many threads it can run of each kernel, and halves the usual number until it can.
    ///
    /// # Errors
    /// A kernel cannot be compiled, or the device runs too few threads of one.
    pub(in crate::models) fn new(shape: &StepShape, rows: usize, has_terms: bool, like: &Tensor) -> Result<Self> {
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
            for (name, count, least) in threads.compiled().into_iter().filter(|_| !shape.is_wide) {
                // layers without an update run beside those with one
                let mut allowed = gpu::max_threads(&shape.kernel(name, false, &tried), like)?;
                if has_terms {
                    allowed = allowed.min(gpu::max_threads(&shape.kernel(name, true, &tried), like)?);
                }
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
    fn compiled(&mut self) -> [(&'static str, &mut usize, usize); 4] {
        [
            ("decode_projections", &mut self.projections, 32),
            ("decode_linear", &mut self.linear, 32 * LINEAR_WARPS),
            ("decode_gated", &mut self.gated, 32),
            ("decode_head", &mut self.head, 32),
        ]
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
    pub(in crate::models) k: Tensor,
    pub(in crate::models) v: Tensor,
    pub(in crate::models) attention: Tensor,
    /// Parts of the keys of a sequence, and the most there can be: with more parts the step is recorded again.
    pub(in crate::models) parts: usize,
    pub(in crate::models) most_parts: usize,
    /// What groups of `decode_attention` leave for each other, and how many have.
    pub(in crate::models) results: Tensor,
    pub(in crate::models) counters: Tensor,
    /// The products of vectors with A of low-rank updates: [`Posts`].
    pub(in crate::models) posted: Tensor,
    /// Whether there are low-rank updates that are posted.
    pub(in crate::models) has_terms: bool,
    pub(in crate::models) activation: Tensor,
    /// The output of a part that a norm follows: `[rows, hidden]`.
    pub(in crate::models) branch: Tensor,
    /// Cosines and sines of all positions, by rotary table.
    pub(in crate::models) rotary: Vec<(Tensor, Tensor)>,
    pub(in crate::models) wide: Option<Wide>,
}

/// The buffers that products of matrices need beside those.
#[derive(Debug)]
pub(in crate::models) struct Wide {
    pub(in crate::models) normed: Tensor,
    pub(in crate::models) gate: Tensor,
    pub(in crate::models) up: Tensor,
    /// Of low-rank updates: `rows * MAX_RANK` elements.
    pub(in crate::models) z: Tensor,
    /// Room for weights that are dequantized, where there are such.
    pub(in crate::models) scratch: Option<Tensor>,
}

/// Where a kernel posts the products with A of its low-rank updates: for each row of the step [`MAX_RANK`] words an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::models) enum Posts {
    Projections,
    Output,
    Gated,
    Down,
    Head,
}

impl Posts {
    /// Words of all of them for a row.
    pub(in crate::models) const WORDS: usize = 8 * MAX_RANK;

    /// The first word and the number of words, for so many rows.
    fn place(self, rows: usize) -> [usize; 2] {
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
    /// Words of `results` for so many rows.
    pub(in crate::models) fn num_results(shape: &StepShape, rows: usize, most_parts: usize) -> usize {
        if most_parts > 1 { rows * shape.heads[0] * most_parts * (shape.heads[2] + 2) } else { 1 }
    }

    /// The most parts of keys in a cache of sequences of up to `max_seq_len` tokens.
    pub(in crate::models) fn most_parts(
        shape: &StepShape,
        threads: &Threads,
        rows: usize,
        max_seq_len: usize,
    ) -> usize {
        threads.attention.most_parts(shape, rows).min(threads.attention.parts(max_seq_len))
    }

    /// Divides keys as the longest of the sequences wants it. Whether they were divided into fewer parts before.
    pub(in crate::models) fn grow(&mut self, longest: usize) -> bool {
        let parts = self.threads.attention.parts(longest).min(self.most_parts);
        let has_grown = parts > self.parts;
        self.parts = self.parts.max(parts);
        has_grown
    }

    /// Which words a kernel empties, as an argument of it.
    pub(in crate::models) fn emptied(&self, posts: Posts) -> [Word; 2] {
        if self.has_terms { posts.place(self.rows).map(Word::from) } else { [Word(0); 2] }
    }

    /// Where a kernel posts, and which words it empties.
    pub(in crate::models) fn posts(&self, posts: Posts, emptied: Option<Posts>) -> [Word; 3] {
        let [from, count] = emptied.map_or([Word(0); 2], |emptied| self.emptied(emptied));
        [posts.place(self.rows)[0].into(), from, count]
    }

    /// The groups whose warps take the rows of A of updates of these ranks, two each.
    pub(in crate::models) fn groups_of_a(ranks: &[usize], warps: usize) -> usize {
        ranks.iter().map(|rank| rank.div_ceil(2)).sum::<usize>().div_ceil(warps)
    }

    /// A kernel for layers with low-rank updates of these ranks.
    pub(in crate::models) fn kernel(&self, name: &'static str, ranks: &[usize]) -> Kernel {
        self.shape.kernel(name, ranks.iter().any(|rank| *rank > 0), &self.threads)
    }

    /// The number of groups that share out the rows.
    pub(in crate::models) fn chunks(&self) -> usize {
        self.rows.div_ceil(self.shape.batch)
    }

    /// A linear layer whose result ends a branch: it is normed if a norm follows, multiplied, and added to the stream.
    pub(in crate::models) fn finish_branch(
        &self,
        layer: &StepLinear,
        x: &Tensor,
        branch: Branch,
        posts: [Word; 3],
    ) -> Result<()> {
        let (y, factor) = if branch.after.is_some() { (&self.branch, 1.0) } else { (&self.x, branch.factor) };
        let is_added = branch.after.is_none();
        if let Some(wide) = &self.wide {
            multiply(layer, x, (y, factor, if is_added { 1.0 } else { 0.0 }), wide)?;
        } else {
            let [a, b] = layer.term_args();
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

    /// The input of a branch: the normed stream, or the stream.
    pub(in crate::models) fn normed<'a>(&'a self, branch: Branch, wide: &'a Wide) -> Result<&'a Tensor> {
        let Some(norm) = branch.before else { return Ok(&self.x) };
        norm.norm.forward_into(&self.x, &wide.normed)?;
        Ok(&wide.normed)
    }

    pub(in crate::models) fn wide(&self) -> Result<&Wide> {
        self.wide.as_ref().ok_or_else(missing)
    }
}

/// What is around a part of a layer.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct Branch<'a> {
    pub(in crate::models) before: Option<&'a NormLayer>,
    pub(in crate::models) after: Option<&'a NormLayer>,
    /// The factor on the branch.
    pub(in crate::models) factor: f32,
}

impl<'a> Branch<'a> {
    /// The branch of a part, if the kernels of a step take its norms.
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

/// A linear layer in a step, or some of the rows of one.
#[derive(Debug)]
pub(in crate::models) struct StepLinear<'a> {
    /// `[out_features, in_features]`
    pub(in crate::models) weight: Weight,
    pub(in crate::models) bias: Option<Tensor>,
    /// The low-rank update, and its B.
    term: Option<(&'a LowRank, Tensor)>,
}

impl<'a> StepLinear<'a> {
    pub(in crate::models) fn new(linear: &Linear, term: Option<&'a LowRank>) -> Self {
        let term = term.map(|term| (term, term.b.clone()));
        Self { weight: linear.weight.clone(), bias: linear.bias.clone(), term }
    }

    /// The layer of a part.
    pub(in crate::models) fn of(layer: &LinearLayer, terms: Option<&'a LowRankTerms>) -> Self {
        Self::new(&layer.linear, terms.and_then(|terms| terms.get(layer.slot.id)))
    }

    /// The layers of these widths, which may be the rows of one.
    pub(in crate::models) fn of_each<const N: usize>(
        layers: &[LinearLayer],
        widths: [usize; N],
        terms: Option<&'a LowRankTerms>,
    ) -> Result<[Self; N]> {
        let mut all: Vec<_> = layers.iter().map(|layer| Self::of(layer, terms)).collect();
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
            term: self
                .term
                .as_ref()
                .map(|(term, b)| Ok::<_, Error>((*term, b.narrow(0, start, count)?)))
                .transpose()?,
        })
    }

    /// The weight as an argument of a kernel.
    pub(in crate::models) fn weight(&self) -> Result<Arg<'_>> {
        self.weight.stored().map(Arg::In)
    }

    /// A and B of the low-rank update.
    pub(in crate::models) fn term_args(&self) -> [Arg<'_>; 2] {
        self.term.as_ref().map_or([Arg::None, Arg::None], |(term, b)| [Arg::In(&term.a), Arg::In(b)])
    }

    pub(in crate::models) fn rank(&self) -> usize {
        self.term.as_ref().map_or(0, |(term, _)| term.a.dims()[0])
    }

    pub(in crate::models) fn scale(&self) -> f32 {
        self.term.as_ref().map_or(0.0, |(term, _)| term.scale)
    }
}

/// `y = factor x W^T + beta y`, and a low-rank update, by products of matrices.
pub(in crate::models) fn multiply(
    layer: &StepLinear,
    x: &Tensor,
    (y, factor, beta): (&Tensor, f32, f32),
    wide: &Wide,
) -> Result<()> {
    layer.weight.multiply_on_gpu(y, x, true, (factor, beta), wide.scratch.as_ref())?;
    add_update(layer, x, (y, factor), wide)
}

/// `y = x W^T` and low-rank updates of layers that share an input.
pub(in crate::models) fn multiply_together<const N: usize>(
    layers: &[StepLinear; N],
    x: &Tensor,
    ys: [&Tensor; N],
    wide: &Wide,
) -> Result<()> {
    let products: Vec<_> = layers.iter().map(|layer| &layer.weight).zip(ys).collect();
    Weight::multiply_together(x, &products, wide.scratch.as_ref())?;
    layers.iter().zip(ys).try_for_each(|(layer, y)| add_update(layer, x, (y, 1.0), wide))
}

fn add_update(layer: &StepLinear, x: &Tensor, (y, factor): (&Tensor, f32), wide: &Wide) -> Result<()> {
    let Some((term, b)) = &layer.term else { return Ok(()) };
    let (rows, rank) = (x.dim(0)?, term.a.dim(0)?);
    let z = wide.z.narrow(0, 0, rows * rank)?.reshape((rows, rank))?;
    gpu::product(&z, (x, false), (&term.a, true), factor * term.scale, 0.0)?;
    gpu::product(y, (&z, false), (b, true), 1.0, 1.0)
}

/// Whether kernels that read eight elements at once take the layer's weight.
pub(in crate::models) fn fits(layer: &LinearLayer, dtype: DType) -> bool {
    layer.linear.weight.is_read_by_eights(dtype)
}

/// Whether the kernels that apply a norm on the way take this one.
pub(in crate::models) fn is_rms_norm(norm: &NormLayer) -> bool {
    let norm = &norm.norm;
    matches!(norm.kind, NormKind::Rms { .. })
        && norm.weight.as_ref().is_some_and(|weight| gpu::is_read_by_eights(weight, weight.dtype()))
        && norm.bias.is_none()
}

/// Whether there is such a norm, what its weights are added to, and its epsilon.
pub(in crate::models) fn norm_words(norm: Option<&NormLayer>) -> [Word; 3] {
    let Some(NormLayer { norm, .. }) = norm else { return [Word(0); 3] };
    let offset = if let NormKind::Rms { offset } = norm.kind { offset } else { 0.0 };
    [true.into(), offset.into(), (norm.eps as f32).into()]
}
