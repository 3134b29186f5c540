//! The kernels of Metal or CUDA against candle's operations on the CPU: values and gradients, in each type, with odd sizes and
//! tensors that begin inside of others.

#![allow(clippy::unwrap_used)]

use super::attention::{self, Cached, Saved, Spans};
use super::linear::{self, Linear, Part, Start};
use super::rms_norm::RmsNorm;
use super::rotary::RotaryTable;
use super::tests::{random, values};
use super::{LowRank, adam, cache_write, gpu, head, swiglu};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AdamStep, AttentionShape, Row, Section};

fn device() -> Device {
    #[cfg(feature = "metal")]
    return crate::Device::metal().unwrap().candle();
    #[cfg(not(feature = "metal"))]
    return crate::Device::cuda(0).unwrap().candle();
}

/// The types, and what is left of a number of size 1 after a few roundings to them.
pub(super) const TYPES: [(DType, f32); 3] = [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)];

/// The same values rounded to `dtype`: on the device behind `offset` other elements, and on the CPU in f32.
pub(super) fn both(shape: &[usize], seed: u64, dtype: DType, offset: usize) -> (Tensor, Tensor) {
    let rounded = random(shape, seed).to_dtype(dtype).unwrap();
    let count = rounded.elem_count();
    let wide =
        Tensor::cat(&[random(&[offset], 99).to_dtype(dtype).unwrap(), rounded.flatten_all().unwrap()], 0).unwrap();
    let there = wide.to_device(&device()).unwrap().narrow(0, offset, count).unwrap().reshape(shape).unwrap();
    assert_eq!(there.layout().start_offset(), offset);
    (there, rounded.to_dtype(DType::F32).unwrap())
}

#[track_caller]
pub(super) fn assert_near(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    let found = found.to_device(&Device::Cpu).unwrap();
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (values(&found), values(expected));
    let scale = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{what}: element {i} is {a} instead of {b} (of {scale})");
    }
}

#[test]
fn norms() {
    for (dtype, tolerance) in TYPES {
        for (rows, width, offset) in [(1, 1, 0), (9, 31, 3), (33, 200, 1), (5, 896, 8)] {
            let (weight, weight_cpu) = both(&[width], 1, dtype, offset);
            let (x, x_cpu) = both(&[rows, width], 2, dtype, offset);
            let (dy, dy_cpu) = both(&[rows, width], 3, dtype, offset);
            let (base, base_cpu) = both(&[rows, width], 4, dtype, 0);
            let norm = RmsNorm { weight, eps: 1e-6 };
            let plain = RmsNorm { weight: weight_cpu, eps: 1e-6 };
            assert!(gpu::has_kernels(&x));
            assert_near("norm", &norm.forward(&x).unwrap(), &plain.plain_forward(&x_cpu).unwrap(), tolerance);
            let (dx, dw) = norm.backward(&x, &dy, base.force_contiguous().unwrap(), true).unwrap();
            let expected = plain.plain_backward(&x_cpu, &dy_cpu, &base_cpu, true).unwrap();
            assert_near("dx", &dx, &expected.0, 2.0 * tolerance);
            assert_near("dw", &dw.unwrap(), &expected.1.unwrap(), 2.0 * tolerance);
            assert_near("sums", &linear::column_sums(&x).unwrap(), &x_cpu.sum(0).unwrap(), tolerance);
        }
    }
}

#[test]
fn activation_rotation_bias_residual_and_dropout() {
    for (dtype, tolerance) in TYPES {
        for (rows, width, offset) in [(1, 1, 0), (5, 77, 3), (7, 64, 4), (3, 30, 5)] {
            let (gate, gate_cpu) = both(&[rows, width], 1, dtype, offset);
            let (up, up_cpu) = both(&[rows, width], 2, dtype, offset);
            let (dy, dy_cpu) = both(&[rows, width], 3, dtype, 0);
            let found = swiglu::forward(&gate, &up).unwrap();
            assert_near("swiglu", &found, &swiglu::plain_forward(&gate_cpu, &up_cpu).unwrap(), tolerance);
            let (d_gate, d_up) = swiglu::backward(&gate, &up, dy.force_contiguous().unwrap()).unwrap();
            let expected = swiglu::plain_backward(&gate_cpu, &up_cpu, &dy_cpu).unwrap();
            assert_near("d_gate", &d_gate, &expected.0, tolerance);
            assert_near("d_up", &d_up, &expected.1, tolerance);

            let sum = linear::add_scaled(dy.force_contiguous().unwrap(), -0.5, &gate).unwrap();
            assert_near("sum", &sum, &(&dy_cpu - (&gate_cpu * 0.5).unwrap()).unwrap(), tolerance);
            let (bias, bias_cpu) = both(&[width], 4, dtype, 1);
            let weight = random(&[width, width], 5).to_dtype(dtype).unwrap();
            let layer = Linear { weight: weight.to_device(&device()).unwrap().into(), bias: Some(bias) };
            let wide = weight.to_dtype(DType::F32).unwrap();
            let expected = gate_cpu.matmul(&wide.t().unwrap()).unwrap().broadcast_add(&bias_cpu).unwrap();
            let found = layer.forward(&gate, None, None, None).unwrap();
            assert_near("bias", &found, &expected, 2.0 * tolerance);
            let found = layer.forward(&gate, None, None, Some(&dy)).unwrap();
            assert_near("residual", &found, &(expected + &dy_cpu).unwrap(), 2.0 * tolerance);
            let factors = random(&[width], 6);
            let scaled =
                linear::scale_columns(dy.force_contiguous().unwrap(), &factors.to_device(&device()).unwrap()).unwrap();
            assert_near("columns", &scaled, &dy_cpu.broadcast_mul(&factors).unwrap(), tolerance);

            let term = LowRank { dropout: 0.4, ..LowRank::new(random(&[1, 1], 1), random(&[1, 1], 2), 1.0) };
            let found = linear::dropped(&gate, &term, Some(0x1234_5678_9abc_def0)).unwrap();
            let expected = linear::dropped(&gate_cpu, &term, Some(0x1234_5678_9abc_def0)).unwrap();
            assert_near("dropout", &found, &expected, tolerance);
        }
        let table = RotaryTable::new(16, 1e4);
        let positions = [0, 1, 2, 900, 5, 70];
        let ((q, q_cpu), (k, k_cpu)) = (both(&[6, 48], 1, dtype, 3), both(&[6, 16], 2, dtype, 0));
        let rotation = table.rotation(&positions, &q).unwrap();
        let plain = table.rotation(&positions, &q_cpu).unwrap();
        for inverse in [false, true] {
            let (q, k) = (q.force_contiguous().unwrap(), k.force_contiguous().unwrap());
            let (q, k) = rotation.apply_to_both(q, k, inverse).unwrap();
            assert_near("q", &q, &plain.plain(&q_cpu, inverse).unwrap(), tolerance);
            assert_near("k", &k, &plain.plain(&k_cpu, inverse).unwrap(), tolerance);
        }
    }
}

#[test]
fn products_and_low_rank_terms() {
    for (dtype, tolerance) in TYPES {
        for (m, n, k, rank) in [(1, 24, 16, 2), (33, 40, 24, 3), (70, 7, 130, 8)] {
            let ((x, x_cpu), (w, w_cpu)) = (both(&[m, k], 1, dtype, 0), both(&[n, k], 2, dtype, 0));
            let ((a, a_cpu), (b, b_cpu)) = (both(&[rank, k], 3, dtype, 0), both(&[n, rank], 4, dtype, 0));
            let layer = Linear { weight: w.into(), bias: None };
            let plain = Linear { weight: w_cpu.clone().into(), bias: None };
            let (term, plain_term) = (LowRank::new(a, b, 0.7), LowRank::new(a_cpu, b_cpu, 0.7));
            let (dy, dy_cpu) = both(&[m, n], 5, dtype, 0);
            let (before, before_cpu) = both(&[m, k], 6, dtype, 0);
            let found = layer.forward(&x, Some(&term), None, Some(&dy)).unwrap();
            let expected = plain.forward(&x_cpu, Some(&plain_term), None, Some(&dy_cpu)).unwrap();
            assert_near("y", &found, &expected, 2.0 * tolerance);
            let wanted = linear::Wanted { input: true, weight: true, bias: false };
            let found = layer
                .backward(Some(&x), Some(&term), None, &dy, wanted, Some(before.force_contiguous().unwrap()), None)
                .unwrap();
            let expected =
                plain.backward(Some(&x_cpu), Some(&plain_term), None, &dy_cpu, wanted, Some(before_cpu), None).unwrap();
            assert_near("dx", &found.input.unwrap(), &expected.input.unwrap(), 3.0 * tolerance);
            assert_near("dw", &found.weight.unwrap(), &expected.weight.unwrap(), 2.0 * tolerance);
            let (found, expected) = (found.term.unwrap(), expected.term.unwrap());
            assert_near("da", &found.a, &expected.a, 3.0 * tolerance);
            assert_near("db", &found.b, &expected.b, 3.0 * tolerance);
            assert_eq!(found.a.dtype(), DType::F32);
            let start = linear::sum(Start::Matrix(&x), &[Part::plain(&dy, &layer.weight, -0.5)]).unwrap();
            let expected = (x_cpu - (dy_cpu.matmul(&w_cpu).unwrap() * 0.5).unwrap()).unwrap();
            assert_near("matrix", &start, &expected, 2.0 * tolerance);
        }
    }
}

/// Sequences that are no multiple of any tile.
pub(super) const OFFSETS: [usize; 5] = [0, 1, 66, 68, 131];

#[test]
fn attention_and_its_gradients() {
    for (dtype, tolerance) in TYPES {
        for (heads, kv_heads, head_dim) in [(7, 1, 8), (4, 2, 32), (3, 3, 20), (4, 1, 64), (2, 1, 128)] {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
            let tokens = OFFSETS[OFFSETS.len() - 1];
            let (q, q_cpu) = both(&[tokens, heads * head_dim], 1, dtype, 0);
            let (k, k_cpu) = both(&[tokens, kv_heads * head_dim], 2, dtype, 0);
            let (v, v_cpu) = both(&[tokens, kv_heads * head_dim], 3, dtype, 0);
            let (d_out, d_out_cpu) = both(&[tokens, heads * head_dim], 4, dtype, 0);
            let spans = Spans::new(&OFFSETS, shape, None, &q).unwrap();
            assert!(spans.tables.is_some());
            let saved = attention::forward(shape, &q, &k, &v, &spans).unwrap();
            let expected = attention::plain_forward(shape, &q_cpu, &k_cpu, &v_cpu, &OFFSETS).unwrap();
            assert_near("out", &saved.out, &expected, 2.0 * tolerance);
            let Saved { .. } = saved;
            let (dq, dk, dv) = attention::backward(shape, (&q, &k, &v), &saved, &spans, &d_out).unwrap();
            let (pq, pk, pv) =
                attention::plain_backward(shape, (&q_cpu, &k_cpu, &v_cpu), &OFFSETS, &d_out_cpu).unwrap();
            assert_near("dq", &dq, &pq, 3.0 * tolerance);
            assert_near("dk", &dk, &pk, 3.0 * tolerance);
            assert_near("dv", &dv, &pv, 3.0 * tolerance);
        }
    }
}

#[test]
fn attention_over_a_cache_that_is_written_first() {
    for (dtype, tolerance) in TYPES {
        for head_dim in [16, 64] {
            let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim, scale: 0.25 };
            let (offsets, slots, lengths) = ([0, 1, 71, 72], [2, 0, 1], [90, 81, 1]);
            let (keys, keys_cpu) = both(&[3, 2, 90, head_dim], 5, dtype, 0);
            let (cached_values, values_cpu) = both(&[3, 2, 90, head_dim], 6, dtype, 0);
            let (q, q_cpu) = both(&[72, 6 * head_dim], 7, dtype, 0);
            let (k, k_cpu) = both(&[72, 2 * head_dim], 8, dtype, 0);
            let (v, v_cpu) = both(&[72, 2 * head_dim], 9, dtype, 0);
            let cached = Cached { slots: slots.to_vec(), lengths: lengths.to_vec(), max_seq_len: 90 };
            let spans = Spans::new(&offsets, shape, Some(cached), &q).unwrap();
            assert!(cache_write::append((&k, &v), (&keys, &cached_values), &spans).unwrap());
            for (from, to) in [(&k_cpu, &keys_cpu), (&v_cpu, &values_cpu)] {
                for i in 0..3 {
                    let (start, count) = (offsets[i], offsets[i + 1] - offsets[i]);
                    let rows = from.narrow(0, start, count).unwrap().reshape((count, 2, head_dim)).unwrap();
                    let rows = rows.transpose(0, 1).unwrap().contiguous().unwrap();
                    to.get(slots[i]).unwrap().slice_set(&rows, 1, lengths[i] - count).unwrap();
                }
            }
            assert_near("keys", &keys, &keys_cpu, 0.0);
            assert_near("values", &cached_values, &values_cpu, 0.0);
            let found = attention::with_cache(shape, &q, (&keys, &cached_values), &spans).unwrap();
            let expected =
                attention::plain_with_cache(shape, &q_cpu, (&keys_cpu, &values_cpu), &offsets, &slots, &lengths)
                    .unwrap();
            assert_near("out", &found, &expected, 2.0 * tolerance);
        }
    }
}

#[test]
fn cross_entropy_of_a_head() {
    for ((dtype, tolerance), vocab) in TYPES.into_iter().flat_map(|of_type| [53, 5000].map(|vocab| (of_type, vocab))) {
        let rows: Vec<Row> = (0..7).map(|i| Row { target: (i * 713) % vocab, weight: i as f32 * 0.5 }).collect();
        let (hidden, hidden_cpu) = both(&[7, 16], 1, dtype, 0);
        let (weight, weight_cpu) = both(&[vocab, 16], 2, dtype, 0);
        let (layer, plain) =
            (Linear { weight: weight.into(), bias: None }, Linear { weight: weight_cpu.into(), bias: None });
        for smoothing in [0.0, 0.1] {
            let wanted = Some(head::HeadWanted { scale: 0.25, input: true, weight: true, rows: None });
            let found = head::loss(&hidden, &layer, None, None, &rows, smoothing, wanted).unwrap();
            let expected = head::loss(&hidden_cpu, &plain, None, None, &rows, smoothing, wanted).unwrap();
            for (a, b) in found.rows().unwrap().iter().zip(expected.rows().unwrap()) {
                assert!((a - b).abs() <= 4.0 * tolerance * b.abs().max(1.0), "{a} instead of {b}");
            }
            let largest = |name: &str, found: Option<Tensor>, expected: Option<Tensor>| {
                assert_near(name, &found.unwrap(), &expected.unwrap(), 2.0 * tolerance);
            };
            largest("input", found.gradients.input, expected.gradients.input);
            largest("weight", found.gradients.weight, expected.gradients.weight);
        }
    }
}

#[test]
fn rows_go_to_their_places_and_the_others_are_zero() {
    for (dtype, _) in TYPES {
        let (rows, rows_cpu) = both(&[3, 5], 1, dtype, 3);
        let found = head::spread_rows(&rows, &[1, 2, 6], 8).unwrap();
        assert_near("rows", &found, &head::spread_rows(&rows_cpu, &[1, 2, 6], 8).unwrap(), 0.0);
    }
}

#[test]
fn adam_in_one_launch_and_norms() {
    let sections = [
        Section { start: 0, len: 300, state: 0, rate: 1.0, decays: true },
        Section { start: 300, len: 45, state: 300, rate: 16.0, decays: false },
        Section { start: 345, len: 700, state: 345, rate: 1.0, decays: true },
    ];
    let n = 1045;
    for is_decoupled in [true, false] {
        let (start, g) = (random(&[n], 1), random(&[n], 2));
        let buffer = Tensor::cat(&[&start, &Tensor::zeros(2 * n, DType::F32, &Device::Cpu).unwrap()], 0).unwrap();
        let there = buffer.to_device(&device()).unwrap();
        let table = adam::table(&sections, &device()).unwrap();
        let (mut parameters, mut m, mut v) = (values(&start), vec![0.0; n], vec![0.0; n]);
        for count in 1..=3 {
            let step = AdamStep {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.1,
                is_decoupled,
                step: count,
                grad_scale: 0.5,
            };
            metal_candle_kernels::adam(&mut parameters, &values(&g), &mut m, &mut v, &step, &sections);
            adam::step(&there, &g.to_device(&device()).unwrap(), (&table, &sections), (n, 2 * n), &step).unwrap();
        }
        let expected = Tensor::from_vec([parameters, m, v].concat(), 3 * n, &Device::Cpu).unwrap();
        assert_near("buffer", &there, &expected, 2e-6);
    }
    let x = random(&[70_001], 3);
    let expected: f64 = values(&x).iter().map(|v| f64::from(*v).powi(2)).sum();
    let found = f64::from(adam::sum_of_squares(&x.to_device(&device()).unwrap()).unwrap());
    assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
}
