//! Tests that the result of a query does not depend on other queries, and that quantized blocks equal their dequantized values.

use super::*;
use crate::blocks::BlockFormat;
use crate::testing::random;
use half::bf16;

/// Without `log_sums`, the result of a query is the same bit for bit alone, in a chunk of a prompt, and in the whole prompt.
#[test]
fn the_result_of_a_query_does_not_depend_on_other_queries() {
    const TOKENS: usize = 200;
    for (heads, kv_heads, d) in [(7, 1, 64), (4, 4, 32), (2, 1, 8), (3, 3, 80), (2, 2, 256)] {
        for (mask, cap) in [(Mask::Causal, None), (Mask::Window(50), Some(20.0)), (Mask::Chunk(70), None)] {
            let shape = AttentionShape { mask, soft_cap: cap, ..AttentionShape::new(heads, kv_heads, d, 0.3) };
            let (keys, values) = (random(TOKENS * kv_heads * d, 1), random(TOKENS * kv_heads * d, 2));
            let q = random(TOKENS * heads * d, 3);
            let narrow = |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>();
            let halves = (narrow(&keys), narrow(&values));
            let strides = (kv_heads * d, d);
            let run = |is_half: bool, first: usize, count: usize| -> Vec<u32> {
                let (keys, values) = if is_half {
                    (Matrix::BF16(&halves.0), Matrix::BF16(&halves.1))
                } else {
                    (Matrix::F32(&keys), Matrix::F32(&values))
                };
                let (keys, values) = (keys.into(), values.into());
                let kv = KeyValues { keys, values, token_stride: strides.0, head_stride: strides.1 };
                let span = Span { query_start: 0, num_queries: count, key_start: 0, num_keys: first + count };
                let q = &q[first * heads * d..(first + count) * heads * d];
                let mut out = vec![0.0; q.len()];
                attention(shape, None, &[span], q, kv, &mut out, None);
                out.iter().map(|value| value.to_bits()).collect()
            };
            for is_half in [false, true] {
                let whole = run(is_half, 0, TOKENS);
                for (first, count) in
                    [(0, 1), (1, 1), (15, 1), (64, 1), (127, 1), (128, 1), (199, 1), (3, 2), (10, 37), (60, 100)]
                {
                    let expected = &whole[first * heads * d..(first + count) * heads * d];
                    let found = run(is_half, first, count);
                    assert!(found == expected, "{count} from {first}, {shape:?}, half: {is_half}");
                }
            }
        }
    }
}

/// Attention over quantized blocks equals attention over their dequantized values, bit for bit, for any mask and batch.
#[test]
fn attention_over_blocks_equals_attention_over_their_values() {
    const TOKENS: usize = 300;
    for (heads, kv_heads, d) in [(6, 2, 64), (4, 4, 32), (3, 1, 96), (2, 2, 256)] {
        let masks = [(Mask::Causal, None), (Mask::Window(50), Some(20.0)), (Mask::Chunk(70), None)];
        for (format, (mask, cap)) in
            [BlockFormat::Q8_0, BlockFormat::Q4_0].into_iter().flat_map(|format| masks.map(|mask| (format, mask)))
        {
            let shape = AttentionShape { mask, soft_cap: cap, ..AttentionShape::new(heads, kv_heads, d, 0.3) };
            // as in a KV cache: two slots, with the tokens of a head adjacent
            let count = 2 * kv_heads * TOKENS * d;
            let blocks = [1, 2].map(|seed| format.quantize(&random(count, seed), d, None).unwrap());
            let [keys, values] =
                [0, 1].map(|i| BlockMatrix::new(format, &blocks[i], 2 * kv_heads * TOKENS, d).unwrap());
            let widened = [keys, values].map(|matrix| {
                let mut rows = vec![0.0; count];
                matrix.widen_rows(0..matrix.rows(), &mut rows);
                rows
            });
            let sinks = random(heads, 4);
            for (first, queries) in [(0, 1), (129, 1), (299, 1), (0, 300), (200, 70)] {
                let span = Span {
                    query_start: 0,
                    num_queries: queries,
                    key_start: kv_heads * TOKENS * d,
                    num_keys: first + queries,
                };
                let q = random(queries * heads * d, 3);
                let run = |keys: HeadRows, values: HeadRows| -> Vec<u32> {
                    let kv = KeyValues { keys, values, token_stride: d, head_stride: TOKENS * d };
                    let mut out = vec![0.0; q.len()];
                    attention(shape, Some(&sinks), &[span], &q, kv, &mut out, None);
                    out.iter().map(|value| value.to_bits()).collect()
                };
                let floats = |i: usize| HeadRows::from(Matrix::F32(&widened[i]));
                let found = run(HeadRows::Blocks(keys), HeadRows::Blocks(values));
                assert!(found == run(floats(0), floats(1)), "{queries} from {first}, {shape:?}, {}", format.name());
            }
        }
    }
}
