//! Writes new keys and values into a key/value cache.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use super::host::Host;
use super::spans::Spans;
use crate::error::Result;
use candle_core::{Device, Tensor};
use metal_candle_kernels::BlockFormat;

/// Writes `k` and `v`, `[tokens, kv_heads * head_dim]`, into `[slots, kv_heads, max_seq_len, head_dim]` with a GPU
/// kernel. Returns false if there is none for these tensors.
pub(crate) fn append((k, v): (&Tensor, &Tensor), (keys, values): (&Tensor, &Tensor), spans: &Spans) -> Result<bool> {
    let Some(positions) = spans.cache_positions().filter(|_| keys.dtype() == k.dtype()) else { return Ok(false) };
    let (_, kv_heads, max_seq_len, head_dim) = keys.dims4()?;
    let args = [Arg::In(k), Arg::In(v), Arg::In(positions), Arg::Out(keys), Arg::Out(values)];
    let count = k.elem_count();
    let words = [count.into(), kv_heads.into(), head_dim.into(), max_seq_len.into()];
    gpu::launch(&Kernel::new(Source::Elementwise, "append", k.dtype()), Grid::elements(count), &args, &words)?;
    Ok(true)
}

/// Quantizes new keys or values on the CPU, `[tokens, kv_heads * head_dim]` in f32, to blocks:
/// `[tokens, kv_heads * row_len]` in u8. Values that a block cannot represent become NaN, so that only the sequence of
/// this token fails.
///
/// `head_dim` is a multiple of the block length.
pub(crate) fn quantized(rows: &Tensor, format: BlockFormat) -> Result<Tensor> {
    let (tokens, width) = rows.dims2()?;
    let row_len = width / format.len() * format.bytes();
    let mut blocks = vec![0; tokens * row_len];
    let rows = rows.contiguous()?;
    format.quantize_or_nan(Host::new(&rows)?.f32()?, &mut blocks);
    Ok(Tensor::from_vec(blocks, (tokens, row_len), &Device::Cpu)?)
}
