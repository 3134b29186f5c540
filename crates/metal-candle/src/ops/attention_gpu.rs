//! Launches the attention kernels of Metal and CUDA, forward and backward.

use super::fused::UPDATE_ROWS;
use super::gpu::{self, Arg, Grid, Kernel, Source, Word};
use super::spans::{Spans, Tables, TensorCoreTiles};
use crate::error::{Error, Result};
use candle_core::Tensor;
use metal_candle_kernels::{AttentionShape, Mask};

/// The gradients of attention. `sinks` is `[heads]`, f32.
#[derive(Debug)]
pub(crate) struct AttentionGradients {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) sinks: Option<Tensor>,
}

/// The thread group size of `attention.metal`.
fn portable_threads(head_dim: usize) -> usize {
    if head_dim <= 128 { 256 } else { 128 }
}

/// The thread group size of `attention.cu`.
const TENSOR_CORE_THREADS: usize = 128;

/// A kernel of `attention.metal`.
fn portable(name: &'static str, shape: AttentionShape, has_sinks: bool, like: &Tensor, saves_sums: bool) -> Kernel {
    let (mask, _) = mask_of(shape);
    Kernel::new(Source::Attention, name, like.dtype())
        .with("HEAD_DIM", shape.head_dim)
        .with("KEEPS_SUMS", usize::from(saves_sums))
        .with("MASK", mask)
        .with("HAS_CAP", usize::from(shape.soft_cap.is_some()))
        .with("HAS_SINKS", usize::from(has_sinks))
}

/// The mask's kind and size as kernel arguments. A window or chunk of more than 31 bits hides no key.
fn mask_of(shape: AttentionShape) -> (usize, usize) {
    match shape.mask {
        Mask::Window(size) if i32::try_from(size).is_ok() => (1, size),
        Mask::Chunk(size) if i32::try_from(size).is_ok() => (2, size),
        _ => (0, 0),
    }
}

/// A kernel of `attention.cu`.
fn tensor_core(name: &'static str, shape: AttentionShape, has_sinks: bool, like: &Tensor) -> Kernel {
    Kernel::new(Source::TensorCoreAttention, name, like.dtype())
        .with("WIDTH", shape.head_dim)
        .with("MASK", mask_of(shape).0)
        .with("HAS_CAP", usize::from(shape.soft_cap.is_some()))
        .with("HAS_SINKS", usize::from(has_sinks))
}

/// Scale, mask size and soft cap of the scores, as kernel arguments.
fn score_words(shape: AttentionShape) -> [Word; 3] {
    [shape.scale.into(), mask_of(shape).1.into(), shape.soft_cap.unwrap_or(0.0).into()]
}

fn words_of(shape: AttentionShape, token_stride: usize, head_stride: usize) -> [Word; 7] {
    [
        shape.heads.into(),
        shape.kv_heads.into(),
        shape.scale.into(),
        token_stride.into(),
        head_stride.into(),
        mask_of(shape).1.into(),
        shape.soft_cap.unwrap_or(0.0).into(),
    ]
}

fn optional(tensor: Option<&Tensor>) -> Arg<'_> {
    tensor.map_or(Arg::None, Arg::In)
}

fn missing() -> Error {
    Error::Bug("the tables of the attention kernels are missing".into())
}

/// The result, and the log-sum-exps for the backward pass.
pub(super) fn forward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    spans: &Spans,
) -> Result<(Tensor, Tensor)> {
    let out = gpu::empty(q.shape(), q)?;
    let log_sums = gpu::empty_f32((q.dim(0)?, shape.heads), q)?;
    match spans.tables(shape).ok_or_else(missing)? {
        Tables::Portable { queries, .. } => {
            let read = [Arg::In(q), Arg::In(k), Arg::In(v), Arg::In(queries), optional(sinks)];
            let args: Vec<Arg> = read.into_iter().chain([Arg::Out(&out), Arg::Out(&log_sums)]).collect();
            let grid = Grid::plane((queries.elem_count() / 4, shape.heads), portable_threads(shape.head_dim));
            let words = words_of(shape, shape.kv_heads * shape.head_dim, shape.head_dim);
            gpu::launch(&portable("attention", shape, sinks.is_some(), q, true), grid, &args, &words)?;
        }
        Tables::TensorCore { offsets, queries, .. } => {
            let read = [Arg::In(q), Arg::In(k), Arg::In(v), optional(sinks)];
            let args = read.into_iter().chain([Arg::Out(&out), Arg::Out(&log_sums)]);
            let args: Vec<Arg> = args.chain([Arg::In(offsets), Arg::In(queries)]).collect();
            let mut grid = Grid::plane((queries.elem_count() / 2, shape.heads), TENSOR_CORE_THREADS);
            grid.shared_bytes = TensorCoreTiles::new(shape.head_dim).forward_bytes();
            let [scale, size, cap] = score_words(shape);
            let words = [shape.heads.into(), shape.kv_heads.into(), scale, size, cap];
            gpu::launch(&tensor_core("flash_forward", shape, sinks.is_some(), q), grid, &args, &words)?;
        }
    }
    Ok((out, log_sums))
}

/// Attention over a cache `[slots, kv_heads, max_seq_len, head_dim]`.
pub(super) fn with_cache(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    spans: &Spans,
) -> Result<Tensor> {
    let out = gpu::empty(q.shape(), q)?;
    let max_seq_len = keys.dim(2)?;
    match spans.tables(shape).ok_or_else(missing)? {
        Tables::Portable { queries, .. } => {
            let read = [Arg::In(q), Arg::In(keys), Arg::In(values), Arg::In(queries), optional(sinks)];
            let args: Vec<Arg> = read.into_iter().chain([Arg::Out(&out), Arg::None]).collect();
            let grid = Grid::plane((queries.elem_count() / 4, shape.heads), portable_threads(shape.head_dim));
            let words = words_of(shape, shape.head_dim, max_seq_len * shape.head_dim);
            gpu::launch(&portable("attention", shape, sinks.is_some(), q, false), grid, &args, &words)?;
        }
        Tables::TensorCore { offsets, queries, slots_and_lengths, .. } => {
            let (slots, lengths) = slots_and_lengths.as_ref().ok_or_else(missing)?;
            let args = [
                Arg::In(q),
                Arg::In(keys),
                Arg::In(values),
                optional(sinks),
                Arg::Out(&out),
                Arg::In(offsets),
                Arg::In(lengths),
                Arg::In(slots),
                Arg::In(queries),
            ];
            let mut grid = Grid::plane((queries.elem_count() / 2, shape.heads), TENSOR_CORE_THREADS);
            grid.shared_bytes = TensorCoreTiles::new(shape.head_dim).forward_bytes();
            let [scale, size, cap] = score_words(shape);
            let words = [shape.heads.into(), shape.kv_heads.into(), max_seq_len.into(), scale, size, cap];
            gpu::launch(&tensor_core("flash_forward_cached", shape, sinks.is_some(), q), grid, &args, &words)?;
        }
    }
    Ok(out)
}

/// The number of thread groups that keep a device busy.
const MANY_BLOCKS: usize = 512;

/// The gradients with respect to k and v on tensor cores. If there are few tiles of keys, several thread groups share
/// the heads of a group, and their sums are added in a fixed order.
fn keys_and_values_backward(
    shape: AttentionShape,
    read: [Arg; 6],
    (offsets, tiles): (&Tensor, &Tensor),
    (dk, dv): (&Tensor, &Tensor),
) -> Result<()> {
    let num_tiles = tiles.elem_count() / 2;
    let splits = (MANY_BLOCKS / (num_tiles * shape.kv_heads).max(1)).clamp(1, shape.heads / shape.kv_heads);
    let mut grid = Grid::plane((num_tiles, shape.kv_heads * splits), TENSOR_CORE_THREADS);
    let tiles_of = TensorCoreTiles::new(shape.head_dim);
    grid.shared_bytes = tiles_of.keys_bytes();
    grid.groups[2] = tiles_of.key_passes;
    let mut words = vec![shape.heads.into(), shape.kv_heads.into()];
    words.extend(score_words(shape));
    let launch = |name, written: [&Tensor; 2], words: &[Word]| {
        let written = [Arg::Out(written[0]), Arg::Out(written[1]), Arg::In(offsets), Arg::In(tiles)];
        let args: Vec<Arg> = read.into_iter().chain(written).collect();
        gpu::launch(&tensor_core(name, shape, false, dk), grid, &args, words)
    };
    if splits == 1 {
        return launch("flash_backward_dkv", [dk, dv], &words);
    }
    let (tokens, width) = dk.dims2()?;
    let parts = || gpu::empty_f32((splits, tokens, width), dk);
    let (k_parts, v_parts) = (parts()?, parts()?);
    words.extend([Word::from(tokens), splits.into()]);
    launch("flash_backward_dkv_split", [&k_parts, &v_parts], &words)?;
    let elements = tokens * width;
    let grid = Grid::plane((elements.div_ceil(8 * 256), 2), 256);
    let args = [Arg::In(&k_parts), Arg::In(&v_parts), Arg::Out(dk), Arg::Out(dv)];
    let kernel = tensor_core("flash_backward_sum", shape, false, dk);
    gpu::launch(&kernel, grid, &args, &[elements.into(), Word(0), splits.into()])
}

/// The gradients with respect to q, k and v. `through` is dz and A of a low-rank update that follows attention: `dz A`
/// is added to `d_out` in place first.
pub(super) fn backward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (out, log_sums): (&Tensor, &Tensor),
    spans: &Spans,
    d_out: &Tensor,
    through: Option<(&Tensor, &Tensor)>,
) -> Result<AttentionGradients> {
    let (dq, dk, dv) = (gpu::empty(q.shape(), q)?, gpu::empty(k.shape(), k)?, gpu::empty(v.shape(), v)?);
    let rows = q.dim(0)? * shape.heads;
    let delta = gpu::empty_f32(rows, q)?;
    let read = [q, k, v, d_out, log_sums, &delta].map(Arg::In);
    match spans.tables(shape).ok_or_else(missing)? {
        Tables::Portable { queries, keys, .. } => {
            let keys = keys.as_ref().ok_or_else(missing)?;
            let threads = portable_threads(shape.head_dim);
            let (dz, a) = through.unzip();
            let rank = dz.map_or(0, |dz| dz.dims()[1]);
            let args = [Arg::In(out), Arg::Out(d_out), Arg::Out(&delta), optional(dz), optional(a)];
            let tokens = q.dim(0)?;
            let grid = Grid::row((tokens.div_ceil(UPDATE_ROWS) * shape.heads).div_ceil(threads / 32), threads);
            let words = [tokens.into(), shape.heads.into(), rank.into()];
            gpu::launch(&portable("attention_delta", shape, false, q, true), grid, &args, &words)?;
            let words = words_of(shape, shape.kv_heads * shape.head_dim, shape.head_dim);
            let args: Vec<Arg> = read.into_iter().chain([Arg::In(queries), Arg::Out(&dq)]).collect();
            let grid = Grid::plane((queries.elem_count() / 4, shape.heads), portable_threads(shape.head_dim));
            gpu::launch(&portable("attention_backward_q", shape, false, q, true), grid, &args, &words)?;
            let args: Vec<Arg> = read.into_iter().chain([Arg::In(keys), Arg::Out(&dk), Arg::Out(&dv)]).collect();
            let grid = Grid::plane((keys.elem_count() / 4, shape.kv_heads), threads);
            gpu::launch(&portable("attention_backward_kv", shape, false, q, true), grid, &args, &words)?;
        }
        Tables::TensorCore { offsets, queries, keys, .. } => {
            let keys = keys.as_ref().ok_or_else(missing)?;
            if let Some((dz, a)) = through {
                gpu::product(d_out, (dz, false), (a, false), 1.0, 1.0)?;
            }
            let args = [Arg::In(out), Arg::In(d_out), Arg::Out(&delta)];
            let tiles = TensorCoreTiles::new(shape.head_dim);
            let grid = Grid::elements(rows * tiles.chunks());
            let words = [rows.into(), Word(0)];
            gpu::launch(&tensor_core("flash_backward_delta", shape, false, q), grid, &args, &words)?;
            let [scale, size, cap] = score_words(shape);
            let words = [shape.heads.into(), shape.kv_heads.into(), scale, size, cap];
            let args: Vec<Arg> = read.into_iter().chain([Arg::Out(&dq), Arg::In(offsets), Arg::In(queries)]).collect();
            let mut grid = Grid::plane((queries.elem_count() / 2, shape.heads), TENSOR_CORE_THREADS);
            grid.shared_bytes = tiles.queries_bytes();
            gpu::launch(&tensor_core("flash_backward_dq", shape, false, q), grid, &args, &words)?;
            keys_and_values_backward(shape, read, (offsets, keys), (&dk, &dv))?;
        }
    }
    let sinks = sinks.map(|sinks| sink_gradient(shape, sinks, (log_sums, &delta))).transpose()?;
    Ok(AttentionGradients { q: dq, k: dk, v: dv, sinks })
}

/// The gradient with respect to the sinks, from each row's log-sum-exp and the dot product of its result and gradient.
fn sink_gradient(shape: AttentionShape, sinks: &Tensor, (log_sums, delta): (&Tensor, &Tensor)) -> Result<Tensor> {
    let gradient = gpu::empty_f32(shape.heads, sinks)?;
    let args = [Arg::In(sinks), Arg::In(log_sums), Arg::In(delta), Arg::Out(&gradient)];
    let words = [(delta.elem_count() / shape.heads).into(), shape.heads.into()];
    let kernel = portable("attention_sink_gradient", shape, true, sinks, true);
    gpu::launch(&kernel, Grid::row(shape.heads, 256), &args, &words)?;
    Ok(gradient)
}
