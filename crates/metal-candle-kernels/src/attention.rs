//! Computes causal, sliding-window or chunked attention with grouped key/value heads over ragged sequences.
//!
//! No `[queries, keys]` matrix is allocated: the softmax runs over blocks of keys with a running maximum
//! (<https://arxiv.org/abs/2205.14135>, algorithm 1). Blocks of keys that no query of a task attends to are skipped.

use crate::blocks::BlockMatrix;
use crate::gemm::{serial_gemm, serial_gemm_by_row};
use crate::isa::{Arithmetic, dispatch};
use crate::math::{Element, exp, max, soft_cap, widen};
use crate::operand::Matrix;
use crate::parallel::{Shared, for_each};
use std::cell::RefCell;
use std::ops::Range;

/// Selects the keys that a query attends to, among those up to its own position. Positions count from the first key of a
/// sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mask {
    /// All keys.
    Causal,
    /// The last `n` keys, including the query's own; `n` is at least 1.
    Window(usize),
    /// The keys in the query's chunk of `n` positions; `n` is at least 1.
    Chunk(usize),
}

impl Mask {
    /// The first position that the query at `position` attends to.
    #[must_use]
    pub fn first_key(self, position: usize) -> usize {
        match self {
            Self::Causal => 0,
            Self::Window(size) => (position + 1).saturating_sub(size),
            Self::Chunk(size) => position - position % size,
        }
    }

    /// The position after the last query that attends to the key at `position`.
    #[must_use]
    pub fn queries_end(self, position: usize) -> usize {
        match self {
            Self::Causal => usize::MAX,
            Self::Window(size) => position.saturating_add(size),
            Self::Chunk(size) => (position - position % size).saturating_add(size),
        }
    }

    /// Whether every query attends at least to its own position.
    #[must_use]
    pub fn is_valid(self) -> bool {
        !matches!(self, Self::Window(0) | Self::Chunk(0))
    }
}

/// The heads of an attention, its mask, and how scores are scaled and capped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The scores are multiplied by this factor, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Selects the keys that a query attends to.
    pub mask: Mask,
    /// If set to `c`, scaled scores `s` are replaced with `c * tanh(s / c)` before the mask.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Causal attention without a cap.
    #[must_use]
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize, scale: f32) -> Self {
        Self { heads, kv_heads, head_dim, scale, mask: Mask::Causal, soft_cap: None }
    }
}

/// How keys or values are stored.
#[derive(Debug, Clone, Copy)]
pub enum HeadRows<'a> {
    /// As floats.
    Floats(Matrix<'a>),
    /// As quantized blocks. A row of the matrix is one head of one token: it has `head_dim` columns.
    Blocks(BlockMatrix<'a>),
}

impl HeadRows<'_> {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Floats(matrix) => matrix.len(),
            Self::Blocks(matrix) => matrix.rows() * matrix.columns(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether each head of this width, at these strides, is one row of the matrix of blocks.
    fn is_split_into_heads(&self, width: usize, strides: [usize; 2]) -> bool {
        match self {
            Self::Floats(_) => true,
            Self::Blocks(matrix) => {
                matrix.columns() == width && strides[0] == width && strides[1].is_multiple_of(width)
            }
        }
    }
}

impl<'a> From<Matrix<'a>> for HeadRows<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::Floats(matrix)
    }
}

/// Keys and values of all sequences. Head `h` of token `t` starts at
/// `sequence start + t * token_stride + h * head_stride`, in elements, also for quantized blocks.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a> {
    /// The keys.
    pub keys: HeadRows<'a>,
    /// The values, in the same layout.
    pub values: HeadRows<'a>,
    /// Elements between adjacent tokens; `head_dim` for blocks.
    pub token_stride: usize,
    /// Elements between adjacent heads; a multiple of `head_dim` for blocks.
    pub head_stride: usize,
}

/// One sequence. Its last query has the position of its last key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The row of its first query.
    pub query_start: usize,
    /// The number of queries.
    pub num_queries: usize,
    /// The index of the first element of its keys and values.
    pub key_start: usize,
    /// The number of keys; at least `num_queries`.
    pub num_keys: usize,
}

pub(crate) const QUERY_BLOCK: usize = 64;
pub(crate) const KEY_BLOCK: usize = 128;

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    products: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    sums: Vec<f32>,
    maxima: Vec<f32>,
    packed: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Rows of queries that share a block of keys: `heads` heads of one query starting at `head`, or one head of several queries.
struct Task {
    span: Span,
    head: usize,
    heads: usize,
    query: usize,
    queries: usize,
}

/// `softmax(scale Q K^T) V` for each sequence and head, over the keys that the mask allows.
///
/// `q` and `out`: `[tokens, heads, head_dim]`. `sinks`: `[heads]`, an additional logit in the softmax of each head, without a
/// value. `log_sums`: `[tokens, heads]`, receives the log-sum-exp of each row, including the sink. Without `log_sums`, as in
/// inference, the result of a query does not depend on the other queries, bit for bit.
///
/// # Panics
/// A span exceeds an operand or splits a row of blocks, the length of `sinks` is not `heads`, or the mask hides every key.
pub fn attention(
    shape: AttentionShape,
    sinks: Option<&[f32]>,
    spans: &[Span],
    q: &[f32],
    kv: KeyValues,
    out: &mut [f32],
    log_sums: Option<&mut [f32]>,
) {
    let group = shape.heads / shape.kv_heads;
    assert!(shape.mask.is_valid(), "{:?} hides every key", shape.mask);
    assert!(sinks.is_none_or(|sinks| sinks.len() == shape.heads), "expected {} sinks, one per head", shape.heads);
    let strides = [kv.token_stride, kv.head_stride];
    let is_split = |rows: HeadRows| rows.is_split_into_heads(shape.head_dim, strides);
    assert!(is_split(kv.keys) && is_split(kv.values), "a row of blocks is not one head of one token");
    let mut tasks = Vec::new();
    let mut work = 0;
    for &span in spans {
        check(shape, span, q.len().min(out.len()), kv);
        work += span.num_queries * span.num_keys * shape.heads * shape.head_dim / 8;
        if span.num_queries == 1 {
            tasks.extend((0..shape.kv_heads).map(|kv_head| Task {
                span,
                head: kv_head * group,
                heads: group,
                query: 0,
                queries: 1,
            }));
        } else {
            for head in 0..shape.heads {
                tasks.extend((0..span.num_queries).step_by(QUERY_BLOCK).map(|query| Task {
                    span,
                    head,
                    heads: 1,
                    query,
                    queries: QUERY_BLOCK.min(span.num_queries - query),
                }));
            }
        }
    }
    let out = Shared::new(out);
    let log_sums = log_sums.map(|sums| {
        assert!(sums.len() * shape.head_dim >= q.len(), "`log_sums` is too short");
        Shared::new(sums)
    });
    for_each(tasks.len(), work, |i| {
        SCRATCH.with_borrow_mut(|scratch| forward_block(shape, sinks, &tasks[i], q, kv, (out, log_sums), scratch));
    });
}

fn check(shape: AttentionShape, span: Span, len: usize, kv: KeyValues) {
    let width = shape.heads * shape.head_dim;
    assert!((span.query_start + span.num_queries) * width <= len, "queries end outside the tensor");
    assert!(span.num_queries <= span.num_keys, "more queries than keys");
    let last = span.key_start
        + span.num_keys.saturating_sub(1) * kv.token_stride
        + (shape.kv_heads - 1) * kv.head_stride
        + shape.head_dim;
    assert!(span.num_keys == 0 || last <= kv.keys.len().min(kv.values.len()), "keys end outside the tensor");
    let is_block = matches!(kv.keys, HeadRows::Blocks(_)) || matches!(kv.values, HeadRows::Blocks(_));
    assert!(!is_block || span.key_start.is_multiple_of(shape.head_dim), "a sequence starts within a row of blocks");
}

/// A block of keys or values as f32, and the stride of its rows. Returns the slice itself for f32, otherwise a widened copy of
/// the rows of the block, so a cache is never widened as a whole.
fn block<'a>(
    from: HeadRows<'a>,
    start: usize,
    rows: usize,
    stride: usize,
    width: usize,
    copy: &'a mut Vec<f32>,
) -> (&'a [f32], usize) {
    fn fill<T: Element>(from: &[T], rows: usize, stride: usize, width: usize, copy: &mut Vec<f32>) {
        copy.resize(copy.len().max(rows * width), 0.0);
        for row in 0..rows {
            widen(&from[row * stride..][..width], &mut copy[row * width..][..width]);
        }
    }
    match from {
        HeadRows::Floats(Matrix::F32(values)) => return (&values[start..], stride),
        HeadRows::Floats(Matrix::F16(values)) => fill(&values[start..], rows, stride, width, copy),
        HeadRows::Floats(Matrix::BF16(values)) => fill(&values[start..], rows, stride, width, copy),
        HeadRows::Blocks(matrix) => {
            copy.resize(copy.len().max(rows * width), 0.0);
            matrix.widen_rows(start / width..start / width + rows, &mut copy[..rows * width]);
        }
    }
    (copy, width)
}

fn forward_block(
    shape: AttentionShape,
    sinks: Option<&[f32]>,
    task: &Task,
    q: &[f32],
    kv: KeyValues,
    (out, log_sums): (Shared<f32>, Option<Shared<f32>>),
    scratch: &mut Scratch,
) {
    let (d, span) = (shape.head_dim, task.span);
    let rows = task.heads * task.queries;
    let row_stride = if task.heads > 1 { d } else { shape.heads * d };
    let first_row = span.query_start + task.query;
    let q = &q[(first_row * shape.heads + task.head) * d..];
    let kv_head = task.head / (shape.heads / shape.kv_heads);
    // the position of the first query of the block, and the union of the keys that its queries attend to
    let position = span.num_keys - span.num_queries + task.query;
    let first_seen = shape.mask.first_key(position);
    // starts at a multiple of the block size, so that the block of a key does not depend on the queries of the task
    let seen = first_seen - first_seen % KEY_BLOCK..position + task.queries;
    let is_by_row = log_sums.is_none();

    let Scratch { scores, products, keys, values, sums, maxima, packed } = scratch;
    scores.resize(scores.len().max(rows * KEY_BLOCK), 0.0);
    products.clear();
    products.resize(rows * d, 0.0);
    sums.clear();
    sums.resize(rows, 0.0);
    maxima.clear();
    maxima.resize(rows, f32::NEG_INFINITY);
    for start in seen.clone().step_by(KEY_BLOCK) {
        let count = KEY_BLOCK.min(seen.end - start);
        let at = span.key_start + start * kv.token_stride + kv_head * kv.head_stride;
        let (keys, key_stride) = block(kv.keys, at, count, kv.token_stride, d, keys);
        let (values, value_stride) = block(kv.values, at, count, kv.token_stride, d, values);
        let (size, strides) = ((rows, count, d), ((row_stride, 1), (1, key_stride)));
        let to = (scores.as_mut_ptr(), count);
        // SAFETY: the scratch belongs to this thread and is large enough.
        unsafe {
            if is_by_row {
                serial_gemm_by_row(size, shape.scale, q, strides.0, keys, strides.1, 0.0, to, packed);
            } else {
                serial_gemm(size, shape.scale, q, strides.0, keys, strides.1, 0.0, to);
            }
        }
        for row in 0..rows {
            let position = position + if task.heads > 1 { 0 } else { row };
            let within = |key: usize| key.saturating_sub(start).min(count);
            let visible = within(shape.mask.first_key(position))..within(position + 1);
            let scores = &mut scores[row * count..][..count];
            let of_row = &mut products[row * d..][..d];
            accumulate_row(scores, visible, shape.soft_cap, &mut maxima[row], &mut sums[row], of_row);
        }
        let (size, strides) = ((rows, d, count), ((count, 1), (value_stride, 1)));
        let to = (products.as_mut_ptr(), d);
        // SAFETY: as above.
        unsafe {
            if is_by_row {
                serial_gemm_by_row(size, 1.0, scores, strides.0, values, strides.1, 1.0, to, packed);
            } else {
                serial_gemm(size, 1.0, scores, strides.0, values, strides.1, 1.0, to);
            }
        }
    }
    for row in 0..rows {
        let (query, head) = if task.heads > 1 { (0, row) } else { (row, 0) };
        let index = (first_row + query) * shape.heads + task.head + head;
        // SAFETY: each task writes the rows of its own queries and heads.
        let out = unsafe { out.part(index * d, d) };
        let (mut largest, mut sum, mut factor) = (maxima[row], sums[row], 1.0);
        if let Some(sinks) = sinks {
            let sink = sinks[task.head + head];
            largest = maxima[row].max(sink);
            factor = (maxima[row] - largest).exp();
            sum = sum * factor + (sink - largest).exp();
        }
        factor /= sum;
        for (out, product) in out.iter_mut().zip(&products[row * d..][..d]) {
            *out = product * factor;
        }
        if let Some(log_sums) = log_sums {
            // SAFETY: as above.
            unsafe { log_sums.part(index, 1)[0] = largest + sum.ln() };
        }
    }
}

dispatch! {
    /// Replaces `visible` scores with exponentials relative to the running maximum and other scores with 0, and rescales the
    /// previous sums.
    fn accumulate_row(
        scores: &mut [f32],
        visible: Range<usize>,
        cap: Option<f32>,
        maximum: &mut f32,
        total: &mut f32,
        products: &mut [f32],
    ) = accumulate_row_body
}

#[inline(always)]
fn accumulate_row_body<A: Arithmetic>(
    scores: &mut [f32],
    visible: Range<usize>,
    cap: Option<f32>,
    maximum: &mut f32,
    total: &mut f32,
    products: &mut [f32],
) {
    let (seen, later) = scores.split_at_mut(visible.end);
    later.fill(0.0);
    let (earlier, seen) = seen.split_at_mut(visible.start);
    earlier.fill(0.0);
    if seen.is_empty() {
        return;
    }
    if let Some(cap) = cap {
        for v in seen.iter_mut() {
            *v = soft_cap::<A>(*v, cap);
        }
    }
    let largest = max(seen).max(*maximum);
    let correction = if *maximum == f32::NEG_INFINITY { 0.0 } else { exp::<A>(*maximum - largest) };
    for v in seen.iter_mut() {
        *v = exp::<A>(*v - largest);
    }
    *total = A::mul_add(*total, correction, seen.iter().sum::<f32>());
    *maximum = largest;
    if correction < 1.0 {
        for v in products {
            *v *= correction;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
