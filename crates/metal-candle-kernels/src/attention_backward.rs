//! Computes the gradients of attention.
//!
//! No `[queries, keys]` matrix is saved: blocks of probabilities are recomputed from the saved log-sum-exp of each row
//! (<https://arxiv.org/abs/2307.08691>, algorithm 2). Blocks of keys that the mask hides are skipped.
//!
//! Query heads that share a key/value head, and queries of different tasks, contribute to the gradients of the same keys. The
//! keys are therefore processed in rounds of at most [`ROUND_KEYS`]. In a round, each task (one query head of one part of the
//! queries) accumulates to its own buffer. These buffers are then added in a fixed order, so results do not depend on threads.

use crate::attention::{AttentionShape, KEY_BLOCK, QUERY_BLOCK};
use crate::gemm::serial_gemm;
use crate::isa::{Arithmetic, dispatch};
use crate::math::{dot, exp, tanh};
use crate::parallel::{Shared, for_each};
use std::cell::RefCell;
use std::ops::Range;

/// Inputs and results of the forward pass that [`attention_backward`] reads.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The queries: `[tokens, heads, head_dim]`.
    pub q: &'a [f32],
    /// The keys: `[tokens, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// The values: `[tokens, kv_heads, head_dim]`.
    pub v: &'a [f32],
    /// The output of the forward pass: `[tokens, heads, head_dim]`.
    pub out: &'a [f32],
    /// The log-sum-exp of each row: `[tokens, heads]`.
    pub log_sums: &'a [f32],
}

/// Maximum number of keys in a round.
const ROUND_KEYS: usize = 512;
/// Maximum number of queries in a task. The buffers of a round are at most `2 * ROUND_KEYS / PART_QUERIES` times as large as the
/// queries, or twice as large as [`ROUND_KEYS`] queries.
const PART_QUERIES: usize = 1024;
/// Number of keys whose buffers one task adds.
const SUM_KEYS: usize = 32;

/// Keys of one sequence, and the queries that attend to them.
struct Piece {
    keys: Range<usize>,
    /// The first key of the sequence.
    sequence: usize,
    /// The end of the queries that attend to one of the keys; the first has the position of the first key.
    end: usize,
    /// The offset of its tasks' buffers in [`Gradients::sums`].
    sums: usize,
}

impl Piece {
    fn parts(&self) -> usize {
        (self.end - self.keys.start).div_ceil(PART_QUERIES)
    }
}

/// One query head of one part of the queries of a piece.
struct Task<'a> {
    piece: &'a Piece,
    head: usize,
    part: usize,
}

#[derive(Clone, Copy)]
struct Gradients {
    dq: Shared<f32>,
    dk: Shared<f32>,
    dv: Shared<f32>,
    /// The buffers of all tasks: `[2, keys, head_dim]` each, for dk and dv.
    sums: Shared<f32>,
}

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    products: Vec<f32>,
    deltas: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Adds the gradients of [`attention`](crate::attention()) to `dq`, `dk` and `dv`. Sequence `i` has the tokens
/// `offsets[i]..offsets[i + 1]`.
///
/// # Panics
/// An operand has fewer tokens than the last offset.
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
    assert!(long_enough && offsets.is_sorted(), "an operand is too short");
    assert!(shape.mask.is_valid(), "{:?} hides every key", shape.mask);
    let rounds = rounds(shape, offsets);
    let mut sums = vec![0.0; rounds.iter().map(|(_, sums)| *sums).max().unwrap_or(0)];
    let gradients =
        Gradients { dq: Shared::new(dq), dk: Shared::new(dk), dv: Shared::new(dv), sums: Shared::new(&mut sums) };
    for (pieces, _) in &rounds {
        let of_piece = |piece| {
            let task = move |head| (0..Piece::parts(piece)).map(move |part| Task { piece, head, part });
            (0..shape.heads).flat_map(task)
        };
        let tasks: Vec<Task> = pieces.iter().flat_map(of_piece).collect();
        let work: usize = pieces.iter().map(|piece| (piece.end - piece.keys.start) * q_width * 16).sum();
        for_each(tasks.len(), work, |i| {
            SCRATCH.with_borrow_mut(|scratch| backward_part(shape, &tasks[i], saved, d_out, gradients, scratch));
        });
        let blocks: Vec<(&Piece, Range<usize>)> = pieces
            .iter()
            .flat_map(|piece| {
                let keys = piece.keys.clone();
                keys.step_by(SUM_KEYS).map(move |key| (piece, key..(key + SUM_KEYS).min(piece.keys.end)))
            })
            .collect();
        for_each(blocks.len(), work / 16, |i| add_sums(shape, blocks[i].0, blocks[i].1.clone(), gradients));
    }
}

/// The pieces of each round (at most one per sequence), and the total length of their buffers.
fn rounds(shape: AttentionShape, offsets: &[usize]) -> Vec<(Vec<Piece>, usize)> {
    let mut rounds = Vec::new();
    let (mut pieces, mut keys, mut sums) = (Vec::new(), 0, 0);
    for window in offsets.windows(2) {
        let (begin, end) = (window[0], window[1]);
        for start in (begin..end).step_by(ROUND_KEYS) {
            let keys_end = (start + ROUND_KEYS).min(end);
            let seen_until = shape.mask.queries_end(keys_end - 1 - begin).saturating_add(begin);
            let piece = Piece { keys: start..keys_end, sequence: begin, end: end.min(seen_until), sums: 0 };
            // every piece of a sequence except its last fills a round
            if keys + piece.keys.len() > ROUND_KEYS {
                rounds.push((std::mem::take(&mut pieces), sums));
                (keys, sums) = (0, 0);
            }
            keys += piece.keys.len();
            let len = shape.heads * piece.parts() * 2 * piece.keys.len() * shape.head_dim;
            pieces.push(Piece { sums, ..piece });
            sums += len;
        }
    }
    rounds.push((pieces, sums));
    rounds
}

/// Computes the gradients of one part of the queries, and its contribution to the gradients of keys and values.
fn backward_part(
    shape: AttentionShape,
    task: &Task,
    saved: Saved,
    d_out: &[f32],
    gradients: Gradients,
    scratch: &mut Scratch,
) {
    let (d, head, piece) = (shape.head_dim, task.head, task.piece);
    let (q_stride, kv_stride) = (shape.heads * d, shape.kv_heads * d);
    let kv_head = head / (shape.heads / shape.kv_heads);
    let len = piece.keys.len() * d;
    // SAFETY: each task has its own buffer.
    let sums = unsafe { gradients.sums.part(piece.sums + (head * piece.parts() + task.part) * 2 * len, 2 * len) };
    sums.fill(0.0);
    let (dk, dv) = sums.split_at_mut(len);
    let Scratch { scores, products, deltas } = scratch;
    scores.resize(QUERY_BLOCK * KEY_BLOCK, 0.0);
    products.resize(QUERY_BLOCK * KEY_BLOCK, 0.0);
    let first = piece.keys.start + task.part * PART_QUERIES;
    let last = (first + PART_QUERIES).min(piece.end);
    for query in (first..last).step_by(QUERY_BLOCK) {
        let queries = QUERY_BLOCK.min(last - query);
        let q_at = query * q_stride + head * d;
        let (q, d_out) = (&saved.q[q_at..], &d_out[q_at..]);
        deltas.clear();
        deltas.extend(
            (0..queries).map(|i| plain_dot(&d_out[i * q_stride..][..d], &saved.out[q_at + i * q_stride..][..d])),
        );
        let first_key = |query: usize| piece.sequence + shape.mask.first_key(query - piece.sequence);
        let seen = piece.keys.start.max(first_key(query))..piece.keys.end.min(query + queries);
        for key in seen.clone().step_by(KEY_BLOCK) {
            let keys = KEY_BLOCK.min(seen.end - key);
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
                let within = |other: usize| other.saturating_sub(key).min(keys);
                let visible = within(first_key(query + i))..within(query + i + 1);
                let log_sum = saved.log_sums[(query + i) * shape.heads + head];
                let (p, ds) = (&mut scores[i * keys..][..keys], &mut products[i * keys..][..keys]);
                score_gradient(p, ds, visible, log_sum, deltas[i], shape);
            }
            let at = (key - piece.keys.start) * d;
            // SAFETY: in a round, only this task writes these queries and heads of the gradient; the caller has checked the
            // lengths, and the buffer has a row for each key.
            unsafe {
                let dq = (gradients.dq.pointer().add(q_at), q_stride);
                let (dk, dv) = ((dk[at..].as_mut_ptr(), d), (dv[at..].as_mut_ptr(), d));
                serial_gemm((queries, d, keys), 1.0, products, (keys, 1), k, (kv_stride, 1), 1.0, dq);
                serial_gemm((keys, d, queries), 1.0, products, (1, keys), q, (q_stride, 1), 1.0, dk);
                serial_gemm((keys, d, queries), 1.0, scores, (1, keys), d_out, (q_stride, 1), 1.0, dv);
            }
        }
    }
}

/// Adds the buffers of all tasks to the gradients, for `keys` of a piece.
fn add_sums(shape: AttentionShape, piece: &Piece, keys: Range<usize>, gradients: Gradients) {
    let (d, tasks) = (shape.head_dim, shape.heads / shape.kv_heads * piece.parts());
    let len = piece.keys.len() * d;
    for (gradient, offset) in [(gradients.dk, 0), (gradients.dv, len)] {
        for kv_head in 0..shape.kv_heads {
            for task in kv_head * tasks..(kv_head + 1) * tasks {
                let sums = piece.sums + task * 2 * len + offset + (keys.start - piece.keys.start) * d;
                for (row, key) in keys.clone().enumerate() {
                    // SAFETY: the tasks that wrote the buffers have ended, and only one call writes the gradients of a key.
                    let (to, from) = unsafe {
                        let to = gradient.part((key * shape.kv_heads + kv_head) * d, d);
                        (to, gradients.sums.part(sums + row * d, d))
                    };
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
                }
            }
        }
    }
}

/// The gradient with respect to `sinks: [heads]`. `saved` is from a forward pass with these sinks.
///
/// # Panics
/// An operand is too short.
#[must_use]
pub fn sink_gradient(shape: AttentionShape, sinks: &[f32], saved: Saved, d_out: &[f32]) -> Vec<f32> {
    let (heads, d) = (shape.heads, shape.head_dim);
    let mut gradient = vec![0.0; heads];
    for (row, log_sums) in saved.log_sums.chunks_exact(heads).enumerate() {
        for head in 0..heads {
            let at = (row * heads + head) * d;
            let delta = plain_dot(&d_out[at..][..d], &saved.out[at..][..d]);
            gradient[head] -= (sinks[head] - log_sums[head]).exp() * delta;
        }
    }
    gradient
}

dispatch! {
    /// Replaces scores in `p` with probabilities, and gradients of probabilities in `ds` with gradients of the unscaled scores.
    fn score_gradient(
        p: &mut [f32],
        ds: &mut [f32],
        visible: Range<usize>,
        log_sum: f32,
        delta: f32,
        shape: AttentionShape,
    ) = score_gradient_body
}

#[inline(always)]
fn score_gradient_body<A: Arithmetic>(
    p: &mut [f32],
    ds: &mut [f32],
    visible: Range<usize>,
    log_sum: f32,
    delta: f32,
    shape: AttentionShape,
) {
    for values in [&mut *p, &mut *ds] {
        values[visible.end..].fill(0.0);
        values[..visible.start].fill(0.0);
    }
    let scale = shape.scale;
    let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
    let Some(cap) = shape.soft_cap else {
        for (p, ds) in p.iter_mut().zip(ds) {
            let probability = exp::<A>(*p - log_sum);
            *p = probability;
            *ds = probability * (*ds - delta) * scale;
        }
        return;
    };
    for (p, ds) in p.iter_mut().zip(ds) {
        let t = tanh::<A>(*p / cap);
        let probability = exp::<A>(cap * t - log_sum);
        *p = probability;
        *ds = probability * (*ds - delta) * scale * (1.0 - t * t);
    }
}

dispatch! {
    fn plain_dot(a: &[f32], b: &[f32]) -> f32 = plain_dot_body
}

#[inline(always)]
fn plain_dot_body<A: Arithmetic>(a: &[f32], b: &[f32]) -> f32 {
    dot::<A, f32>(a, b)
}

#[cfg(test)]
mod tests {
    use super::{PART_QUERIES, ROUND_KEYS, Saved, attention_backward, rounds, sink_gradient};
    use crate::attention::{AttentionShape, KeyValues, Mask, Span, attention};
    use crate::operand::Matrix;

    const SHAPE: AttentionShape =
        AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, scale: 0.35, mask: Mask::Causal, soft_cap: None };

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    struct Case {
        shape: AttentionShape,
        sinks: Option<Vec<f32>>,
        offsets: Vec<usize>,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        out: Vec<f32>,
        log_sums: Vec<f32>,
        d_out: Vec<f32>,
    }

    /// The output, and the gradients with respect to q, k, v and the sinks.
    #[derive(Default)]
    struct Expected {
        out: Vec<f64>,
        gradients: [Vec<f64>; 4],
    }

    impl Case {
        fn new(shape: AttentionShape, has_sinks: bool, offsets: &[usize]) -> Self {
            let tokens = offsets[offsets.len() - 1];
            let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
            let (q, d_out) = (noise(tokens * width, 1), noise(tokens * width, 2));
            let (k, v) = (noise(tokens * kv_width, 3), noise(tokens * kv_width, 4));
            let sinks = has_sinks.then(|| noise(shape.heads, 5).iter().map(|sink| 3.0 * sink).collect::<Vec<_>>());
            let (mut out, mut log_sums) = (vec![0.0; q.len()], vec![0.0; tokens * shape.heads]);
            let span = |w: &[usize]| Span {
                query_start: w[0],
                num_queries: w[1] - w[0],
                key_start: w[0] * kv_width,
                num_keys: w[1] - w[0],
            };
            let spans: Vec<Span> = offsets.windows(2).map(span).collect();
            let kv = KeyValues {
                keys: Matrix::F32(&k).into(),
                values: Matrix::F32(&v).into(),
                token_stride: kv_width,
                head_stride: shape.head_dim,
            };
            attention(shape, sinks.as_deref(), &spans, &q, kv, &mut out, Some(&mut log_sums));
            Self { shape, sinks, offsets: offsets.to_vec(), q, k, v, out, log_sums, d_out }
        }

        fn gradients(&self) -> [Vec<f32>; 4] {
            let Self { shape, q, k, v, out, log_sums, d_out, .. } = self;
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            let saved = Saved { q, k, v, out, log_sums };
            attention_backward(*shape, &self.offsets, saved, d_out, (&mut dq, &mut dk, &mut dv));
            let d_sinks = self.sinks.as_ref().map(|sinks| sink_gradient(*shape, sinks, saved, d_out));
            [dq, dk, dv, d_sinks.unwrap_or_default()]
        }

        /// Computes the definition in f64, over every key.
        fn expected(&self) -> Expected {
            let shape = self.shape;
            let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
            let zeros = |like: &[f32]| vec![0.0; like.len()];
            let (mut out, mut dq) = (zeros(&self.q), zeros(&self.q));
            let (mut dk, mut dv) = (zeros(&self.k), zeros(&self.v));
            let mut d_sinks = zeros(self.sinks.as_deref().unwrap_or_default());
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let is_seen = |query: usize, key: usize| match shape.mask {
                Mask::Causal => true,
                Mask::Window(size) => query - key < size,
                Mask::Chunk(size) => query / size == key / size,
            };
            for window in self.offsets.windows(2) {
                for (query, head) in (window[0]..window[1]).flat_map(|query| (0..shape.heads).map(move |h| (query, h)))
                {
                    let q_at = (query * shape.heads + head) * d;
                    let (q, d_out) = (&self.q[q_at..][..d], &self.d_out[q_at..][..d]);
                    let at = |key: usize| (key * shape.kv_heads + head / group) * d;
                    let keys: Vec<usize> =
                        (window[0]..=query).filter(|key| is_seen(query - window[0], key - window[0])).collect();
                    let scale = f64::from(shape.scale);
                    // the score, and its derivative with respect to the score before the cap
                    let score = |key: usize| {
                        let score = scale * dot(q, &self.k[at(key)..][..d]);
                        let Some(cap) = shape.soft_cap.map(f64::from) else { return (score, 1.0) };
                        let t = (score / cap).tanh();
                        (cap * t, 1.0 - t * t)
                    };
                    let scores: Vec<(f64, f64)> = keys.iter().map(|key| score(*key)).collect();
                    let exps: Vec<f64> = scores.iter().map(|(score, _)| score.exp()).collect();
                    let sink = self.sinks.as_ref().map_or(0.0, |sinks| f64::from(sinks[head]).exp());
                    let total = exps.iter().sum::<f64>() + sink;
                    let dp: Vec<f64> = keys.iter().map(|key| dot(d_out, &self.v[at(*key)..][..d])).collect();
                    let delta = exps.iter().zip(&dp).map(|(e, dp)| e * dp).sum::<f64>() / total;
                    if let Some(d_sink) = d_sinks.get_mut(head) {
                        *d_sink -= sink / total * delta;
                    }
                    for (i, key) in keys.into_iter().enumerate() {
                        let (p, k_at) = (exps[i] / total, at(key));
                        let ds = p * (dp[i] - delta) * scale * scores[i].1;
                        for i in 0..d {
                            out[q_at + i] += p * f64::from(self.v[k_at + i]);
                            dq[q_at + i] += ds * f64::from(self.k[k_at + i]);
                            dk[k_at + i] += ds * f64::from(q[i]);
                            dv[k_at + i] += p * f64::from(d_out[i]);
                        }
                    }
                }
            }
            Expected { out, gradients: [dq, dk, dv, d_sinks] }
        }

        fn check(&self) {
            let expected = self.expected();
            let pairs = [(self.out.clone(), expected.out)];
            for (index, (found, expected)) in
                pairs.into_iter().chain(self.gradients().into_iter().zip(expected.gradients)).enumerate()
            {
                assert_eq!(found.len(), expected.len());
                for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let error = (f64::from(*found) - expected).abs();
                    let shape = self.shape;
                    assert!(error < 3e-5 * (1.0 + expected.abs()), "{shape:?} {index} {i}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn gradients_over_several_rounds_and_parts_equal_the_definition() {
        let long = PART_QUERIES + ROUND_KEYS / 2 + 3;
        let offsets = [0, 5, 5 + long, 5 + long, 105 + long];
        Case::new(SHAPE, false, &offsets).check();
        // windows and chunks that end within a round, a part and a block
        for mask in [Mask::Window(700), Mask::Chunk(600)] {
            Case::new(AttentionShape { heads: 2, kv_heads: 1, mask, ..SHAPE }, true, &offsets).check();
        }
    }

    #[test]
    fn masks_caps_and_sinks_equal_the_definition() {
        let masks = [1, 3, 64, 100, 129, 400].into_iter().flat_map(|n| [Mask::Window(n), Mask::Chunk(n)]);
        for (i, mask) in masks.chain([Mask::Causal]).enumerate() {
            let soft_cap = [None, Some(0.6), Some(5.0)][i % 3];
            let (head_dim, scale) = [(8, 0.9), (20, 0.3), (6, 1.7)][i / 2 % 3];
            let shape = AttentionShape { head_dim, scale, mask, soft_cap, ..SHAPE };
            Case::new(shape, i % 2 == 0, &[0, 1, 131, 134, 430]).check();
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() -> Result<(), rayon::ThreadPoolBuildError> {
        for mask in [Mask::Causal, Mask::Window(300)] {
            let case = Case::new(AttentionShape { mask, ..SHAPE }, true, &[0, 700, 1900, 1960]);
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                let bits = |values: &Vec<f32>| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                Ok::<_, rayon::ThreadPoolBuildError>(pool.install(|| case.gradients()).each_ref().map(bits))
            };
            let one = with(1)?;
            for threads in [2, 5, 8] {
                assert_eq!(with(threads)?, one, "{threads} threads");
            }
        }
        Ok(())
    }

    #[test]
    fn buffers_are_not_larger_than_the_queries() {
        let width = SHAPE.heads * SHAPE.head_dim;
        for offsets in [vec![0, 16_384], vec![0, 3000, 3100, 8000], (0..33).map(|i| i * 256).collect()] {
            let rounds = rounds(SHAPE, &offsets);
            let keys: usize = rounds.iter().flat_map(|(pieces, _)| pieces).map(|piece| piece.keys.len()).sum();
            assert_eq!(keys, offsets[offsets.len() - 1]);
            let largest = rounds.iter().map(|(_, sums)| *sums).max().unwrap_or(0);
            assert!(largest <= (keys + PART_QUERIES) * width, "{largest} for {keys} tokens");
        }
    }
}
