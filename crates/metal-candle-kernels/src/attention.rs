//! Causal attention with grouped key/value heads over ragged sequences, block by block.
//!
//! No `[queries, keys]` matrix is made: blocks of scores are normalised as they come
//! (<https://arxiv.org/abs/2205.14135>, algorithm 1) and computed anew in the backward pass from the saved
//! logarithm of each row's sum (<https://arxiv.org/abs/2307.08691>, algorithm 2).

use crate::gemm::{Matrix, serial_gemm};
use crate::isa::{Arithmetic, dispatch};
use crate::math::{Element, dot, exp, max, widen};
use crate::parallel::{Shared, for_each};
use std::cell::RefCell;

/// Heads of an attention and the factor on its scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores, `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// Keys and values of all sequences: the element of token `t`, head `h` begins at
/// `sequence start + t * token_stride + h * head_stride`.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a> {
    /// The keys.
    pub keys: Matrix<'a>,
    /// The values, laid out like the keys.
    pub values: Matrix<'a>,
    /// Distance of neighbouring tokens.
    pub token_stride: usize,
    /// Distance of neighbouring heads.
    pub head_stride: usize,
}

/// One sequence: its last query sees its last key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first row of its queries.
    pub query_start: usize,
    /// The number of its queries.
    pub num_queries: usize,
    /// The element where its keys and values begin.
    pub key_start: usize,
    /// The number of its keys, at least that of its queries.
    pub num_keys: usize,
}

const QUERY_BLOCK: usize = 64;
const KEY_BLOCK: usize = 128;

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    products: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    sums: Vec<f32>,
    maxima: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Rows of queries that share a block of keys: `heads` from `head` on for one query, or one head for several.
struct Task {
    span: Span,
    head: usize,
    heads: usize,
    query: usize,
    queries: usize,
}

/// `softmax(scale Q K^T) V` for each sequence and head, query `i` seeing the keys up to its own.
///
/// `q` and `out`: `[tokens, heads, head_dim]`. `log_sums`, if given: `[tokens, heads]` receives the logarithm of
/// each row's sum of exponentials.
///
/// # Panics
/// A span reaches outside an operand.
pub fn attention(
    shape: AttentionShape,
    spans: &[Span],
    q: &[f32],
    kv: KeyValues,
    out: &mut [f32],
    log_sums: Option<&mut [f32]>,
) {
    let group = shape.heads / shape.kv_heads;
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
        SCRATCH.with_borrow_mut(|scratch| forward_block(shape, &tasks[i], q, kv, out, log_sums, scratch));
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
}

/// A block of keys or values as f32: the slice itself or its widened copy, and the distance of its rows.
fn block<'a>(
    from: Matrix<'a>,
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
        Matrix::F32(values) => return (&values[start..], stride),
        Matrix::F16(values) => fill(&values[start..], rows, stride, width, copy),
        Matrix::BF16(values) => fill(&values[start..], rows, stride, width, copy),
    }
    (copy, width)
}

fn forward_block(
    shape: AttentionShape,
    task: &Task,
    q: &[f32],
    kv: KeyValues,
    out: Shared<f32>,
    log_sums: Option<Shared<f32>>,
    scratch: &mut Scratch,
) {
    let (d, span) = (shape.head_dim, task.span);
    let rows = task.heads * task.queries;
    let row_stride = if task.heads > 1 { d } else { shape.heads * d };
    let first_row = span.query_start + task.query;
    let q = &q[(first_row * shape.heads + task.head) * d..];
    let kv_head = task.head / (shape.heads / shape.kv_heads);
    // keys that the first and the last query of the block see
    let seen_first = span.num_keys - span.num_queries + task.query + 1;
    let seen_last = seen_first + task.queries - 1;

    let Scratch { scores, products, keys, values, sums, maxima } = scratch;
    scores.resize(scores.len().max(rows * KEY_BLOCK), 0.0);
    products.clear();
    products.resize(rows * d, 0.0);
    sums.clear();
    sums.resize(rows, 0.0);
    maxima.clear();
    maxima.resize(rows, f32::NEG_INFINITY);
    for start in (0..seen_last).step_by(KEY_BLOCK) {
        let count = KEY_BLOCK.min(seen_last - start);
        let at = span.key_start + start * kv.token_stride + kv_head * kv.head_stride;
        let (keys, key_stride) = block(kv.keys, at, count, kv.token_stride, d, keys);
        let (values, value_stride) = block(kv.values, at, count, kv.token_stride, d, values);
        let shape_in = (rows, count, d);
        // SAFETY: the scratch belongs to this thread and is large enough.
        unsafe {
            serial_gemm(
                shape_in,
                shape.scale,
                q,
                (row_stride, 1),
                keys,
                (1, key_stride),
                0.0,
                (scores.as_mut_ptr(), count),
            );
        }
        for row in 0..rows {
            let query = if task.heads > 1 { 0 } else { row };
            let visible = (seen_first + query).saturating_sub(start).min(count);
            let scores = &mut scores[row * count..][..count];
            accumulate_row(scores, visible, &mut maxima[row], &mut sums[row], &mut products[row * d..][..d]);
        }
        // SAFETY: as above.
        unsafe {
            let products = (products.as_mut_ptr(), d);
            serial_gemm((rows, d, count), 1.0, scores, (count, 1), values, (value_stride, 1), 1.0, products);
        }
    }
    for row in 0..rows {
        let (query, head) = if task.heads > 1 { (0, row) } else { (row, 0) };
        let index = (first_row + query) * shape.heads + task.head + head;
        // SAFETY: each task writes the rows of its own queries and heads.
        let out = unsafe { out.part(index * d, d) };
        let factor = 1.0 / sums[row];
        for (out, product) in out.iter_mut().zip(&products[row * d..][..d]) {
            *out = product * factor;
        }
        if let Some(log_sums) = log_sums {
            // SAFETY: as above.
            unsafe { log_sums.part(index, 1)[0] = maxima[row] + sums[row].ln() };
        }
    }
}

dispatch! {
    /// Turns scores into exponentials relative to the running maximum, hides those from `visible` on and scales what was summed before.
    fn accumulate_row(scores: &mut [f32], visible: usize, maximum: &mut f32, total: &mut f32, products: &mut [f32]) = accumulate_row_body
}

#[inline(always)]
fn accumulate_row_body<A: Arithmetic>(
    scores: &mut [f32],
    visible: usize,
    maximum: &mut f32,
    total: &mut f32,
    products: &mut [f32],
) {
    let (seen, hidden) = scores.split_at_mut(visible);
    hidden.fill(0.0);
    if seen.is_empty() {
        return;
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

/// What [`attention_backward`] reads.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The queries: `[tokens, heads, head_dim]`.
    pub q: &'a [f32],
    /// The keys: `[tokens, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// The values: `[tokens, kv_heads, head_dim]`.
    pub v: &'a [f32],
    /// The result of the forward pass: `[tokens, heads, head_dim]`.
    pub out: &'a [f32],
    /// The logarithms of the sums: `[tokens, heads]`.
    pub log_sums: &'a [f32],
}

/// Adds the gradients of [`attention`] to `dq`, `dk` and `dv`; sequence `i` is `offsets[i]..offsets[i + 1]`.
///
/// # Panics
/// An operand is shorter than the last offset says.
pub fn attention_backward(
    shape: AttentionShape,
    offsets: &[usize],
    saved: Saved,
    d_out: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let tokens = offsets.last().copied().unwrap_or(0);
    let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let long_enough = [saved.q.len(), saved.out.len(), d_out.len(), dq.len()].iter().all(|&n| n >= tokens * q_width)
        && [saved.k.len(), saved.v.len(), dk.len(), dv.len()].iter().all(|&n| n >= tokens * kv_width)
        && saved.log_sums.len() >= tokens * shape.heads;
    assert!(long_enough, "an operand is too short");
    let gradients = Gradients { dq: Shared::new(dq), dk: Shared::new(dk), dv: Shared::new(dv) };
    let sequences = offsets.len().saturating_sub(1);
    for_each(sequences * shape.kv_heads, tokens * q_width * 16, |task| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let range = (offsets[sequence], offsets[sequence + 1]);
        SCRATCH.with_borrow_mut(|scratch| backward_head(shape, range, kv_head, saved, d_out, gradients, scratch));
    });
}

#[derive(Clone, Copy)]
struct Gradients {
    dq: Shared<f32>,
    dk: Shared<f32>,
    dv: Shared<f32>,
}

/// The gradients of one key/value head of one sequence and of the query heads that read it.
fn backward_head(
    shape: AttentionShape,
    (begin, end): (usize, usize),
    kv_head: usize,
    saved: Saved,
    d_out: &[f32],
    gradients: Gradients,
    scratch: &mut Scratch,
) {
    let d = shape.head_dim;
    let (q_stride, kv_stride) = (shape.heads * d, shape.kv_heads * d);
    let group = shape.heads / shape.kv_heads;
    let Scratch { scores, products, sums: deltas, .. } = scratch;
    scores.resize(scores.len().max(QUERY_BLOCK * KEY_BLOCK), 0.0);
    products.resize(products.len().max(QUERY_BLOCK * KEY_BLOCK), 0.0);
    for head in kv_head * group..(kv_head + 1) * group {
        for query in (begin..end).step_by(QUERY_BLOCK) {
            let queries = QUERY_BLOCK.min(end - query);
            let q_at = query * q_stride + head * d;
            let (q, d_out) = (&saved.q[q_at..], &d_out[q_at..]);
            deltas.clear();
            deltas.extend(
                (0..queries).map(|i| plain_dot(&d_out[i * q_stride..][..d], &saved.out[q_at + i * q_stride..][..d])),
            );
            for key in (begin..query + queries).step_by(KEY_BLOCK) {
                let keys = KEY_BLOCK.min(query + queries - key);
                let k_at = key * kv_stride + kv_head * d;
                let (k, v) = (&saved.k[k_at..], &saved.v[k_at..]);
                let block = (queries, keys, d);
                let (s, p) = ((scores.as_mut_ptr(), keys), (products.as_mut_ptr(), keys));
                // SAFETY: the scratch belongs to this thread and is large enough.
                unsafe {
                    serial_gemm(block, shape.scale, q, (q_stride, 1), k, (1, kv_stride), 0.0, s);
                    serial_gemm(block, 1.0, d_out, (q_stride, 1), v, (1, kv_stride), 0.0, p);
                }
                for i in 0..queries {
                    let visible = (query + i + 1).saturating_sub(key).min(keys);
                    let log_sum = saved.log_sums[(query + i) * shape.heads + head];
                    let (p, ds) = (&mut scores[i * keys..][..keys], &mut products[i * keys..][..keys]);
                    score_gradient(p, ds, visible, log_sum, deltas[i], shape.scale);
                }
                // SAFETY: this task alone writes these rows and heads of the gradients, which the caller checked to be there.
                unsafe {
                    let dq = (gradients.dq.pointer().add(q_at), q_stride);
                    let dk = (gradients.dk.pointer().add(k_at), kv_stride);
                    let dv = (gradients.dv.pointer().add(k_at), kv_stride);
                    serial_gemm((queries, d, keys), 1.0, products, (keys, 1), k, (kv_stride, 1), 1.0, dq);
                    serial_gemm((keys, d, queries), 1.0, products, (1, keys), q, (q_stride, 1), 1.0, dk);
                    serial_gemm((keys, d, queries), 1.0, scores, (1, keys), d_out, (q_stride, 1), 1.0, dv);
                }
            }
        }
    }
}

dispatch! {
    /// `p` holds scores and becomes probabilities; `ds` holds the gradients of these and becomes that of the unscaled scores.
    fn score_gradient(p: &mut [f32], ds: &mut [f32], visible: usize, log_sum: f32, delta: f32, scale: f32) = score_gradient_body
}

#[inline(always)]
fn score_gradient_body<A: Arithmetic>(
    p: &mut [f32],
    ds: &mut [f32],
    visible: usize,
    log_sum: f32,
    delta: f32,
    scale: f32,
) {
    p[visible..].fill(0.0);
    ds[visible..].fill(0.0);
    for i in 0..visible {
        let probability = exp::<A>(p[i] - log_sum);
        p[i] = probability;
        ds[i] = probability * (ds[i] - delta) * scale;
    }
}

dispatch! {
    fn plain_dot(a: &[f32], b: &[f32]) -> f32 = plain_dot_body
}

#[inline(always)]
fn plain_dot_body<A: Arithmetic>(a: &[f32], b: &[f32]) -> f32 {
    dot::<A, f32>(a, b)
}
