//! Tests attention over a quantized cache against the definition of the block formats.
#![allow(clippy::unwrap_used)]

use super::attention::{self, CacheSlots, Spans};
use super::cache_write;
use super::tests::{assert_close, attention_kinds, random, values};
use candle_core::{Device, Tensor};
use half::f16;
use metal_candle_kernels::{AttentionShape, BlockFormat};

/// 32 values, not all zero, rounded as the format defines.
fn rounded(format: BlockFormat, values: &[f32]) -> Vec<f32> {
    let largest =
        values.iter().fold(0.0, |largest: f32, value| if value.abs() > largest.abs() { *value } else { largest });
    let (scale, to_integer): (f32, fn(f32) -> f32) = match format {
        BlockFormat::Q8_0 => (largest.abs() / 127.0, f32::round),
        _ => (largest / -8.0, |value| (value + 8.5).floor().min(15.0) - 8.0),
    };
    let stored = f16::from_f32(scale).to_f32();
    values.iter().map(|value| stored * to_integer(value * (1.0 / scale))).collect()
}

#[test]
fn attention_over_blocks_equals_attention_over_rounded_values() {
    let mut seen = 0;
    for (shape, sinks) in attention_kinds().into_iter().filter(|(shape, _)| shape.head_dim % 32 == 0) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        for format in [BlockFormat::Q8_0, BlockFormat::Q4_0] {
            let row_len = head_dim / 32 * format.bytes();
            let [keys, values_] = [5, 6].map(|seed| random(&[3 * kv_heads * 300, head_dim], seed));
            let blocks = [&keys, &values_].map(|rows| {
                cache_write::quantized(rows, format).unwrap().reshape((3, kv_heads, 300, row_len)).unwrap()
            });
            let exact = [&keys, &values_].map(|rows| {
                let rows: Vec<f32> = values(rows).chunks(32).flat_map(|block| rounded(format, block)).collect();
                Tensor::from_vec(rows, (3, kv_heads, 300, head_dim), &Device::Cpu).unwrap()
            });
            let (offsets, slots, lengths) = ([0, 1, 71, 72], [2, 0, 1], [300, 131, 1]);
            let q = random(&[72, heads * head_dim], 7);
            let cached = CacheSlots { slots: slots.to_vec(), lengths: lengths.to_vec(), max_seq_len: 300 };
            let spans = Spans::new(&offsets, &[shape], Some(cached), &q).unwrap();
            let sinks = sinks.as_ref();
            let [keys, values_] = &blocks;
            let found = attention::with_cached_blocks(shape, sinks, &q, (keys, values_), format, &spans).unwrap();
            let cache = (&exact[0], &exact[1]);
            let expected = attention::plain_with_cache(shape, sinks, &q, cache, &offsets, &slots, &lengths).unwrap();
            assert_close(&found, &expected, 1e-5);
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} kinds");
}
