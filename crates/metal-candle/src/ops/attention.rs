//! Attention with grouped key/value heads over a ragged batch (<https://arxiv.org/abs/2305.13245>).

use super::attention_gpu;
pub(crate) use super::attention_gpu::AttentionGradients;
use super::fused::Layer;
use super::host::{Host, on_cpu, tensor};
pub(crate) use super::spans::{CacheSlots, Spans};
use crate::error::{Error, Result};
use crate::profile::{self, Kind};
use candle_core::{D, DType, Device, Tensor};
use metal_candle_kernels::{
    self as kernels, AttentionShape, BlockFormat, BlockMatrix, HeadRows, KeyValues, Mask, Span,
};

/// The tensors of the forward pass that the backward pass reads.
#[derive(Debug)]
pub(crate) struct Saved {
    /// The result: `[tokens, heads * head_dim]`.
    pub(crate) out: Tensor,
    /// The log-sum-exp of each row, `[tokens, heads]`; `None` with candle's operations.
    log_sums: Option<Tensor>,
}

impl From<Tensor> for Saved {
    /// For a forward pass without a backward pass.
    fn from(out: Tensor) -> Self {
        Self { out, log_sums: None }
    }
}

impl Saved {
    /// Bytes saved for backward.
    pub(crate) fn num_bytes(&self) -> usize {
        super::num_bytes(&self.out) + self.log_sums.as_ref().map_or(0, super::num_bytes)
    }
}

/// Self-attention of each sequence. `sinks` adds one logit per head to the softmax, without a value.
///
/// # Shapes
/// `sinks: [heads]`, `q: [tokens, heads * head_dim]`, `k` and `v`: `[tokens, kv_heads * head_dim]`, result as `q`.
pub(crate) fn forward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &Spans,
) -> Result<Saved> {
    let offsets = &spans.offsets;
    if spans.has_tables(shape) {
        let _span = profile::span("attention", Kind::Attention);
        let (out, log_sums) = attention_gpu::forward(shape, wide(sinks)?.as_ref(), (q, k, v), spans)?;
        return Ok(Saved { out, log_sums: Some(log_sums) });
    }
    if !on_cpu(q) {
        return Ok(Saved { out: plain_forward(shape, sinks, q, k, v, offsets)?, log_sums: None });
    }
    let _span = profile::span("attention", Kind::Attention);
    let kv_width = shape.kv_heads * shape.head_dim;
    let span = |w: &[usize]| Span {
        query_start: w[0],
        num_queries: w[1] - w[0],
        key_start: w[0] * kv_width,
        num_keys: w[1] - w[0],
    };
    let spans: Vec<Span> = offsets.windows(2).map(span).collect();
    let sinks = wide(sinks)?;
    let sinks = sinks.as_ref().map(Host::new).transpose()?;
    let sinks = sinks.as_ref().map(Host::f32).transpose()?;
    let (keys, values, queries) = (Host::new(k)?, Host::new(v)?, Host::new(q)?);
    let kv = KeyValues {
        keys: keys.matrix()?.into(),
        values: values.matrix()?.into(),
        token_stride: kv_width,
        head_stride: shape.head_dim,
    };
    let tokens = q.dim(0)?;
    let (mut out, mut log_sums) = (vec![0.0; q.elem_count()], vec![0.0; tokens * shape.heads]);
    kernels::attention(shape, sinks, &spans, queries.f32()?, kv, &mut out, Some(&mut log_sums));
    Ok(Saved { out: tensor(out, q.shape())?, log_sums: Some(tensor(log_sums, (tokens, shape.heads))?) })
}

/// The sinks in f32.
fn wide(sinks: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(sinks.map(|sinks| sinks.to_dtype(DType::F32)).transpose()?)
}

/// Attention of new queries over cached keys and values, which include those of the new tokens.
///
/// # Shapes
/// `q: [tokens, heads * head_dim]`; `keys` and `values`: `[slots, kv_heads, max_seq_len, head_dim]`. Each sequence
/// attends to the tokens in its slot.
pub(crate) fn with_cache(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    spans: &Spans,
) -> Result<Tensor> {
    let Some(CacheSlots { slots, lengths, .. }) = &spans.cached else { return Err(no_slots()) };
    let offsets = &spans.offsets;
    if spans.has_tables(shape) && keys.dtype() == q.dtype() {
        let _span = profile::span("attention", Kind::Attention);
        return attention_gpu::with_cache(shape, wide(sinks)?.as_ref(), q, (keys, values), spans);
    }
    if !on_cpu(q) {
        return plain_with_cache(shape, sinks, q, (keys, values), offsets, slots, lengths);
    }
    let (_, _, max_seq_len, head_dim) = keys.dims4()?;
    let (keys, values) = (Host::new(keys)?, Host::new(values)?);
    let kv = KeyValues {
        keys: keys.matrix()?.into(),
        values: values.matrix()?.into(),
        token_stride: head_dim,
        head_stride: max_seq_len * head_dim,
    };
    on_host(shape, sinks, q, kv, spans)
}

/// [`with_cache`] for a cache of quantized blocks, on the CPU.
///
/// # Shapes
/// `keys` and `values`: `[slots, kv_heads, max_seq_len, row_len]` in u8, where a row contains the blocks of one head of
/// one token.
pub(crate) fn with_cached_blocks(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    format: BlockFormat,
    spans: &Spans,
) -> Result<Tensor> {
    let (slots, kv_heads, max_seq_len, _) = keys.dims4()?;
    let rows = slots * kv_heads * max_seq_len;
    let (keys, values) = (Host::new(keys)?, Host::new(values)?);
    let wrong = || Error::Bug(format!("the cache does not contain `{}` blocks of {rows} heads", format.name()));
    let matrix = |bytes| BlockMatrix::new(format, bytes, rows, shape.head_dim).ok_or_else(wrong);
    let kv = KeyValues {
        keys: HeadRows::Blocks(matrix(keys.bytes()?)?),
        values: HeadRows::Blocks(matrix(values.bytes()?)?),
        token_stride: shape.head_dim,
        head_stride: max_seq_len * shape.head_dim,
    };
    on_host(shape, sinks, q, kv, spans)
}

/// Attention over a cache on the CPU. A slot stores its heads one after another.
fn on_host(shape: AttentionShape, sinks: Option<&Tensor>, q: &Tensor, kv: KeyValues, spans: &Spans) -> Result<Tensor> {
    let _span = profile::span("attention", Kind::Attention);
    let Some(CacheSlots { slots, lengths, .. }) = &spans.cached else { return Err(no_slots()) };
    let spans: Vec<Span> = spans
        .offsets
        .windows(2)
        .zip(slots.iter().zip(lengths))
        .map(|(w, (slot, length))| Span {
            query_start: w[0],
            num_queries: w[1] - w[0],
            key_start: slot * shape.kv_heads * kv.head_stride,
            num_keys: *length,
        })
        .collect();
    let sinks = wide(sinks)?;
    let sinks = sinks.as_ref().map(Host::new).transpose()?;
    let sinks = sinks.as_ref().map(Host::f32).transpose()?;
    let queries = Host::new(q)?;
    let mut out = vec![0.0; q.elem_count()];
    kernels::attention(shape, sinks, &spans, queries.f32()?, kv, &mut out, None);
    tensor(out, q.shape())
}

fn no_slots() -> Error {
    Error::Bug("attention over a cache was called without its slots".into())
}

/// The gradients with respect to q, k, v and the sinks.
pub(crate) fn backward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    saved: &Saved,
    spans: &Spans,
    d_out: &Tensor,
) -> Result<AttentionGradients> {
    let offsets = &spans.offsets;
    let Some(log_sums) = &saved.log_sums else {
        return plain_backward(shape, sinks, (q, k, v), offsets, d_out);
    };
    let _span = profile::span("attention", Kind::Attention);
    if spans.has_tables(shape) {
        let sinks = wide(sinks)?;
        return attention_gpu::backward(shape, sinks.as_ref(), (q, k, v), (&saved.out, log_sums), spans, d_out, None);
    }
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.elem_count()], vec![0.0; k.elem_count()], vec![0.0; v.elem_count()]);
    let sinks = wide(sinks)?;
    let d_sinks = {
        let (q, k, v) = (Host::new(q)?, Host::new(k)?, Host::new(v)?);
        let (out, log_sums) = (Host::new(&saved.out)?, Host::new(log_sums)?);
        let saved =
            kernels::Saved { q: q.f32()?, k: k.f32()?, v: v.f32()?, out: out.f32()?, log_sums: log_sums.f32()? };
        let d_out = Host::new(d_out)?;
        let d_out = d_out.f32()?;
        kernels::attention_backward(shape, offsets, saved, d_out, (&mut dq, &mut dk, &mut dv));
        let d_sinks = |sinks: &Tensor| {
            let gradient = kernels::sink_gradient(shape, Host::new(sinks)?.f32()?, saved, d_out);
            tensor(gradient, sinks.shape())
        };
        sinks.as_ref().map(d_sinks).transpose()?
    };
    Ok(AttentionGradients {
        q: tensor(dq, q.shape())?,
        k: tensor(dk, k.shape())?,
        v: tensor(dv, v.shape())?,
        sinks: d_sinks,
    })
}

/// [`backward`] with GPU kernels, when the low-rank update of `layer` follows attention: its part of the gradient,
/// `dz A`, is added to `d_out` in place first.
pub(crate) fn backward_through(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    qkv: (&Tensor, &Tensor, &Tensor),
    saved: &Saved,
    spans: &Spans,
    d_out: &Tensor,
    (layer, dz): (Layer, Option<&Tensor>),
) -> Result<AttentionGradients> {
    let (Some(log_sums), true) = (&saved.log_sums, spans.has_tables(shape)) else {
        return Err(Error::Bug(format!("the fused backward pass does not support {shape:?}")));
    };
    let _span = profile::span("attention", Kind::Attention);
    let through = dz.zip(layer.update.map(|update| &update.a));
    let sinks = wide(sinks)?;
    attention_gpu::backward(shape, sinks.as_ref(), qkv, (&saved.out, log_sums), spans, d_out, through)
}

/// `[tokens, heads * head_dim]` of one sequence as `[kv_heads, group * tokens, head_dim]`.
fn split_heads(x: &Tensor, kv_heads: usize, head_dim: usize) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let group = width / kv_heads / head_dim;
    let x = x.reshape((tokens, kv_heads, group, head_dim))?.permute((1, 2, 0, 3))?;
    Ok(x.contiguous()?.reshape((kv_heads, group * tokens, head_dim))?)
}

/// The inverse of [`split_heads`].
fn merge_heads(x: &Tensor, tokens: usize) -> Result<Tensor> {
    let (kv_heads, rows, head_dim) = x.dims3()?;
    let group = rows / tokens;
    let x = x.reshape((kv_heads, group, tokens, head_dim))?.permute((2, 0, 1, 3))?;
    Ok(x.contiguous()?.reshape((tokens, kv_heads * group * head_dim))?)
}

/// The attention probabilities of a sequence, f32: `[kv_heads, group * queries, keys]`, and `[.., .., 1]` for the sink.
struct Probabilities {
    of_keys: Tensor,
    of_sink: Option<Tensor>,
    /// The derivative of the capped scores with respect to the uncapped ones.
    cap_slope: Option<Tensor>,
}

/// The softmax of the scores of the last `queries` tokens of a sequence.
fn probabilities(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    k: &Tensor,
    queries: usize,
) -> Result<Probabilities> {
    let keys = k.dim(1)?;
    let mut scores = q.matmul(&k.t()?)?.to_dtype(DType::F32)?.affine(f64::from(shape.scale), 0.0)?;
    let (kv_heads, rows, _) = scores.dims3()?;
    let mut cap_slope = None;
    if let Some(cap) = shape.soft_cap.map(f64::from) {
        let t = scores.affine(1.0 / cap, 0.0)?.tanh()?;
        scores = t.affine(cap, 0.0)?;
        cap_slope = Some(t.sqr()?.affine(-1.0, 1.0)?);
    }
    if queries > 1 || shape.mask != Mask::Causal {
        let split = scores.reshape((kv_heads, rows / queries, queries, keys))?;
        let mask = mask_of(shape.mask, queries, keys, q.device())?;
        scores = split.broadcast_add(&mask)?.reshape((kv_heads, rows, keys))?;
    }
    let Some(sinks) = sinks else {
        let of_keys = softmax(&scores)?;
        return Ok(Probabilities { of_keys, of_sink: None, cap_slope });
    };
    let sinks = sinks.to_dtype(DType::F32)?.reshape((kv_heads, rows / queries, 1))?;
    let sinks = sinks.broadcast_as((kv_heads, rows / queries, queries))?.contiguous()?.reshape((kv_heads, rows, 1))?;
    let all = softmax(&Tensor::cat(&[scores, sinks], D::Minus1)?)?;
    let of_keys = all.narrow(D::Minus1, 0, keys)?.contiguous()?;
    Ok(Probabilities { of_keys, of_sink: Some(all.narrow(D::Minus1, keys, 1)?.contiguous()?), cap_slope })
}

/// The softmax over the last dimension.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?)
}

/// 0 where query `i` of the last `queries` sees the key, otherwise a large negative number: `[queries, keys]`.
fn mask_of(mask: Mask, queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let hidden = |i: usize, j: usize| {
        let position = i + keys - queries;
        if (mask.first_key(position)..=position).contains(&j) { 0.0 } else { -1e30 }
    };
    let mask: Vec<f32> = (0..queries).flat_map(|i| (0..keys).map(move |j| hidden(i, j))).collect();
    Ok(Tensor::from_vec(mask, (queries, keys), device)?)
}

/// The forward pass with candle's operations, one sequence at a time.
pub(crate) fn plain_forward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    offsets: &[usize],
) -> Result<Tensor> {
    let mut parts = Vec::new();
    for w in offsets.windows(2).filter(|w| w[1] > w[0]) {
        let n = w[1] - w[0];
        let part = |x: &Tensor| split_heads(&x.narrow(0, w[0], n)?, shape.kv_heads, shape.head_dim);
        let p = probabilities(shape, sinks, &part(q)?, &part(k)?, n)?.of_keys.to_dtype(v.dtype())?;
        parts.push(merge_heads(&p.matmul(&part(v)?)?, n)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// [`with_cache`] with candle's operations, one sequence at a time.
pub(crate) fn plain_with_cache(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    offsets: &[usize],
    slots: &[usize],
    lengths: &[usize],
) -> Result<Tensor> {
    let mut parts = Vec::new();
    for (w, (slot, length)) in offsets.windows(2).zip(slots.iter().zip(lengths)) {
        let n = w[1] - w[0];
        let q = split_heads(&q.narrow(0, w[0], n)?, shape.kv_heads, shape.head_dim)?;
        // force_contiguous: a view with an offset is not safe in every kernel
        let cached = |x: &Tensor| x.get(*slot)?.narrow(1, 0, *length)?.force_contiguous()?.to_dtype(q.dtype());
        let p = probabilities(shape, sinks, &q, &cached(keys)?, n)?.of_keys.to_dtype(q.dtype())?;
        parts.push(merge_heads(&p.matmul(&cached(values)?)?, n)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// The gradients with candle's operations, one sequence at a time. The probabilities are recomputed.
pub(crate) fn plain_backward(
    shape: AttentionShape,
    sinks: Option<&Tensor>,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    offsets: &[usize],
    d_out: &Tensor,
) -> Result<AttentionGradients> {
    let (mut dqs, mut dks, mut dvs, mut d_sinks) = (Vec::new(), Vec::new(), Vec::new(), None::<Tensor>);
    for w in offsets.windows(2).filter(|w| w[1] > w[0]) {
        let n = w[1] - w[0];
        let part = |x: &Tensor| split_heads(&x.narrow(0, w[0], n)?, shape.kv_heads, shape.head_dim);
        let (q, k, v, d_out) = (part(q)?, part(k)?, part(v)?, part(d_out)?);
        let Probabilities { of_keys: p, of_sink, cap_slope } = probabilities(shape, sinks, &q, &k, n)?;
        let dp = d_out.matmul(&v.t()?)?.to_dtype(DType::F32)?;
        let delta = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let ds = (dp.broadcast_sub(&delta)? * &p)?.affine(f64::from(shape.scale), 0.0)?;
        let ds = if let Some(slope) = cap_slope { (ds * slope)? } else { ds }.to_dtype(q.dtype())?;
        if let Some(of_sink) = of_sink {
            let of_heads = (of_sink * delta)?.neg()?.reshape((shape.heads, n))?.sum(1)?;
            d_sinks = Some(if let Some(sum) = d_sinks { (sum + of_heads)? } else { of_heads });
        }
        let p = p.to_dtype(q.dtype())?;
        dqs.push(merge_heads(&ds.matmul(&k)?, n)?);
        dks.push(merge_heads(&ds.t()?.contiguous()?.matmul(&q)?, n)?);
        dvs.push(merge_heads(&p.t()?.contiguous()?.matmul(&d_out)?, n)?);
    }
    let all = |parts: Vec<Tensor>| Tensor::cat(&parts, 0);
    Ok(AttentionGradients { q: all(dqs)?, k: all(dks)?, v: all(dvs)?, sinks: d_sinks })
}
