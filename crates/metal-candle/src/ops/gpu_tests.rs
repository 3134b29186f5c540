//! Tests the kernels of Metal or CUDA against candle's operations on the CPU: values and gradients, in each type, with
//! odd sizes and tensors at an offset.

#![allow(clippy::unwrap_used)]

use super::activation;
use super::adapters::LayerUpdates;
use super::attention::{self, CacheSlots, Spans};
use super::gpu_blocks::GpuBlocks;
use super::head::{self, Head};
use super::linear::{self, Accumulator, Linear, ScaledProduct};
use super::norm::{Norm, NormNeedsGrad};
use super::rotary::{self, Pairs, RotaryScaling};
use super::tests::{ACTIVATIONS, norm_kinds, random, rotary_table, values};
use super::{BlockFormat, LowRank, Weight, adam, cache_write, gpu};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AdamStep, AttentionShape, Mask, Row, Section};

pub(super) fn device() -> Device {
    #[cfg(feature = "metal")]
    return crate::Device::metal().unwrap().candle();
    #[cfg(not(feature = "metal"))]
    return crate::Device::cuda(0).unwrap().candle();
}

/// The types, and a tolerance relative to 1 after a few roundings to them.
pub(super) const TYPES: [(DType, f32); 3] = [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)];

/// Random values rounded to `dtype`: on the device at an offset of `offset` elements, and on the CPU in f32.
pub(super) fn both(shape: &[usize], seed: u64, dtype: DType, offset: usize) -> (Tensor, Tensor) {
    place(&random(shape, seed), dtype, offset)
}

/// [`both`] for a given tensor on the CPU.
fn place(tensor: &Tensor, dtype: DType, offset: usize) -> (Tensor, Tensor) {
    let (rounded, shape) = (tensor.to_dtype(dtype).unwrap(), tensor.dims());
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

/// The norm with its weight and bias rounded to `dtype`: on the device, and on the CPU in f32.
fn both_norms(norm: &Norm, dtype: DType, offset: usize) -> (Norm, Norm) {
    let placed = |tensor: &Option<Tensor>| {
        let placed = tensor.as_ref().map(|tensor| place(tensor, dtype, offset));
        placed.map_or((None, None), |(there, here)| (Some(there), Some(here)))
    };
    let ((weight, weight_cpu), (bias, bias_cpu)) = (placed(&norm.weight), placed(&norm.bias));
    (Norm { weight, bias, ..norm.clone() }, Norm { weight: weight_cpu, bias: bias_cpu, ..norm.clone() })
}

#[test]
fn norms() {
    let wide = [(200, 1), (896, 8)].map(|(width, offset)| (Norm::rms(random(&[width], 1), 1e-6), width, offset));
    let kinds = norm_kinds().into_iter().filter(|(norm, _)| norm.width > 1);
    let kinds: Vec<_> = kinds.enumerate().map(|(i, (norm, row))| (norm, row, [0, 3, 8][i % 3])).collect();
    for (dtype, tolerance) in TYPES {
        for (norm, row, offset) in kinds.iter().chain(&wide) {
            let (norm, plain) = both_norms(norm, dtype, *offset);
            let (rows, row) = (if *row > 100 { 33 } else { 9 }, *row);
            let (x, x_cpu) = both(&[rows, row], 2, dtype, *offset);
            let (dy, dy_cpu) = both(&[rows, row], 3, dtype, *offset);
            let (base, base_cpu) = both(&[rows, row], 4, dtype, 0);
            assert!(gpu::has_kernels(&x));
            assert_near("norm", &norm.forward(&x).unwrap(), &plain.plain_forward(&x_cpu).unwrap(), 2.0 * tolerance);
            let needs_grad = NormNeedsGrad { weight: norm.weight.is_some(), bias: norm.bias.is_some() };
            let (dx, found) = norm.backward(&x, &dy, Some(base.force_contiguous().unwrap()), needs_grad).unwrap();
            let expected = plain.plain_backward(&x_cpu, &dy_cpu, &base_cpu, needs_grad).unwrap();
            assert_near("dx", &dx, &expected.0, 2.0 * tolerance);
            for (name, found, expected) in
                [("dw", found.weight, expected.1.weight), ("db", found.bias, expected.1.bias)]
            {
                assert_eq!(found.is_some(), expected.is_some());
                if let Some((found, expected)) = found.zip(expected) {
                    assert_near(name, &found, &expected, 2.0 * tolerance);
                }
            }
            assert_near("sums", &linear::column_sums(&x).unwrap(), &x_cpu.sum(0).unwrap(), tolerance);
        }
    }
}

#[test]
fn activations() {
    for (dtype, tolerance) in TYPES {
        for (activation, (rows, width, offset)) in
            ACTIVATIONS.into_iter().zip([(5, 77, 3), (7, 64, 4), (3, 30, 5), (1, 1, 0)].into_iter().cycle())
        {
            // exceeds the limit of the clamped activation
            let (gate, gate_cpu) = place(&random(&[rows, width], 1).affine(9.0, 0.0).unwrap(), dtype, offset);
            let (up, up_cpu) = place(&random(&[rows, width], 2).affine(9.0, 0.0).unwrap(), dtype, offset);
            let (dy, dy_cpu) = both(&[rows, width], 3, dtype, 0);
            let found = activation::gated(activation, &gate, &up).unwrap();
            let expected = activation::plain_gated(activation, &gate_cpu, &up_cpu).unwrap();
            assert_near(&format!("{activation:?}"), &found, &expected, tolerance);
            let again = dy.force_contiguous().unwrap();
            let (d_gate, d_up) = activation::gated_backward(activation, &gate, &up, again).unwrap();
            let expected = activation::plain_gated_backward(activation, &gate_cpu, &up_cpu, &dy_cpu).unwrap();
            assert_near(&format!("{activation:?} d_gate"), &d_gate, &expected.0, tolerance);
            assert_near(&format!("{activation:?} d_up"), &d_up, &expected.1, tolerance);
            let found = activation::plain(activation, &gate).unwrap();
            let expected = activation::plain(activation, &gate_cpu).unwrap();
            assert_near(&format!("{activation:?} alone"), &found, &expected, tolerance);
            let found = activation::plain_backward(activation, &gate, dy.force_contiguous().unwrap()).unwrap();
            let expected = activation::plain_backward(activation, &gate_cpu, dy_cpu.copy().unwrap()).unwrap();
            assert_near(&format!("{activation:?} dx"), &found, &expected, tolerance);
        }
    }
}

#[test]
fn rotation_bias_residual_factors_and_dropout() {
    for (dtype, tolerance) in TYPES {
        for (rows, width, offset) in [(1, 1, 0), (5, 77, 3), (7, 64, 4), (3, 30, 5)] {
            let (gate, gate_cpu) = both(&[rows, width], 1, dtype, offset);
            let (dy, dy_cpu) = both(&[rows, width], 3, dtype, 0);
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

            let update = LowRank { dropout: 0.4, ..LowRank::new(random(&[1, 1], 1), random(&[1, 1], 2), 1.0) };
            let found = linear::dropped(&gate, &update, Some(0x1234_5678_9abc_def0)).unwrap();
            let expected = linear::dropped(&gate_cpu, &update, Some(0x1234_5678_9abc_def0)).unwrap();
            assert_near("dropout", &found, &expected, tolerance);
        }
        let positions = [0, 1, 2, 900, 5, 70];
        for (dim, pairs, head_dim) in
            [(16, Pairs::Halves, 16), (6, Pairs::Halves, 16), (16, Pairs::Adjacent, 16), (4, Pairs::Adjacent, 8)]
        {
            let table = rotary_table(dim, pairs, RotaryScaling::Default);
            let ((q, q_cpu), (k, k_cpu)) = (both(&[6, 48], 1, dtype, 3), both(&[6, 16], 2, dtype, 0));
            let rotation = table.rotation(&positions, &[0, 6], &q).unwrap();
            let plain = table.rotation(&positions, &[0, 6], &q_cpu).unwrap();
            for inverse in [false, true] {
                let (q, k) = (q.force_contiguous().unwrap(), k.force_contiguous().unwrap());
                let (q, k) = rotation.apply_to_both(q, k, head_dim, inverse).unwrap();
                assert_near("q", &q, &plain.plain(&q_cpu, head_dim, inverse).unwrap(), tolerance);
                assert_near("k", &k, &plain.plain(&k_cpu, head_dim, inverse).unwrap(), tolerance);
            }
            let factors = random(&[6], 5);
            let found = q.force_contiguous().unwrap();
            let found = rotary::scale_rows(found, &factors.to_device(&device()).unwrap()).unwrap();
            let expected = rotary::scale_rows(q_cpu.copy().unwrap(), &factors).unwrap();
            assert_near("rows", &found, &expected, tolerance);
        }
    }
}

#[test]
fn products_and_low_rank_updates() {
    for (dtype, tolerance) in TYPES {
        for (m, n, k, rank) in [(1, 24, 16, 2), (33, 40, 24, 3), (70, 7, 130, 8)] {
            let ((x, x_cpu), (w, w_cpu)) = (both(&[m, k], 1, dtype, 0), both(&[n, k], 2, dtype, 0));
            let ((a, a_cpu), (b, b_cpu)) = (both(&[rank, k], 3, dtype, 0), both(&[n, rank], 4, dtype, 0));
            let layer = Linear { weight: w.into(), bias: None };
            let plain = Linear { weight: w_cpu.clone().into(), bias: None };
            let (update, plain_update) = (LowRank::new(a, b, 0.7), LowRank::new(a_cpu, b_cpu, 0.7));
            let (dy, dy_cpu) = both(&[m, n], 5, dtype, 0);
            let (before, before_cpu) = both(&[m, k], 6, dtype, 0);
            let found = layer.forward(&x, Some(&update), None, Some(&dy)).unwrap();
            let expected = plain.forward(&x_cpu, Some(&plain_update), None, Some(&dy_cpu)).unwrap();
            assert_near("y", &found, &expected, 2.0 * tolerance);
            let needs_grad = linear::NeedsGrad { input: true, weight: true, bias: false };
            let found = layer
                .backward(
                    Some(&x),
                    Some(&update),
                    None,
                    &dy,
                    needs_grad,
                    Some(before.force_contiguous().unwrap()),
                    None,
                )
                .unwrap();
            let expected = plain
                .backward(Some(&x_cpu), Some(&plain_update), None, &dy_cpu, needs_grad, Some(before_cpu), None)
                .unwrap();
            assert_near("dx", &found.input.unwrap(), &expected.input.unwrap(), 3.0 * tolerance);
            assert_near("dw", &found.weight.unwrap(), &expected.weight.unwrap(), 2.0 * tolerance);
            let (found, expected) = (found.update.unwrap(), expected.update.unwrap());
            assert_near("da", &found.a, &expected.a, 3.0 * tolerance);
            assert_near("db", &found.b, &expected.b, 3.0 * tolerance);
            assert_eq!(found.a.dtype(), DType::F32);
            let start =
                linear::sum(Accumulator::Matrix(&x), &[ScaledProduct::plain(&dy, &layer.weight, -0.5)]).unwrap();
            let expected = (x_cpu - (dy_cpu.matmul(&w_cpu).unwrap() * 0.5).unwrap()).unwrap();
            assert_near("matrix", &start, &expected, 2.0 * tolerance);
        }
    }
}

/// Sequence lengths that are not a multiple of any tile.
pub(super) const OFFSETS: [usize; 5] = [0, 1, 66, 68, 131];

/// Causal attention in all types, and each other kind in one of them: this compiles every kernel for each type.
fn in_types<T: Clone>(shapes: Vec<(AttentionShape, T)>) -> Vec<((DType, f32), (AttentionShape, T))> {
    let is_plain = |shape: AttentionShape| shape.mask == Mask::Causal && shape.soft_cap.is_none();
    let (plain, others): (Vec<_>, Vec<_>) = shapes.into_iter().partition(|(shape, _)| is_plain(*shape));
    let plain = TYPES.into_iter().flat_map(|of_type| plain.clone().into_iter().map(move |shape| (of_type, shape)));
    plain.chain(TYPES.into_iter().cycle().zip(others)).collect()
}

/// The number of leading shapes of [`attention_shapes`] that have no cap, window or sinks.
const PLAIN_SHAPES: usize = 6;

/// Heads of all widths that the kernels support, and every kind of mask, cap and sinks.
fn attention_shapes() -> Vec<(AttentionShape, Option<Tensor>)> {
    let shape =
        |heads, kv_heads, head_dim| AttentionShape::new(heads, kv_heads, head_dim, 1.0 / (head_dim as f32).sqrt());
    let mut shapes: Vec<_> =
        [shape(7, 1, 8), shape(4, 2, 32), shape(3, 3, 20), shape(4, 1, 64), shape(2, 1, 128), shape(2, 1, 256)]
            .map(|shape| (shape, None))
            .into();
    let of = |shape: AttentionShape, mask, soft_cap, has_sinks: bool| {
        let sinks = has_sinks.then(|| random(&[shape.heads], 11).affine(2.0, 0.0).unwrap());
        // large scores, so that a cap has an effect
        (AttentionShape { scale: 2.0 * shape.scale, mask, soft_cap, ..shape }, sinks)
    };
    shapes.extend([
        of(shape(4, 2, 32), Mask::Causal, Some(2.0), true),
        of(shape(4, 1, 64), Mask::Window(9), None, true),
        of(shape(4, 4, 64), Mask::Window(100), Some(5.0), false),
        of(shape(3, 1, 20), Mask::Window(2), None, false),
        of(shape(2, 1, 96), Mask::Chunk(40), None, false),
        of(shape(4, 2, 128), Mask::Chunk(7), Some(5.0), true),
        of(shape(2, 1, 80), Mask::Causal, None, false),
        of(shape(4, 2, 40), Mask::Window(30), Some(5.0), true),
        of(shape(2, 1, 128), Mask::Causal, None, true),
        of(shape(2, 2, 256), Mask::Window(20), Some(5.0), false),
    ]);
    shapes
}

#[test]
fn attention_and_its_gradients() {
    for ((dtype, tolerance), (shape, sinks)) in in_types(attention_shapes()) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let tokens = OFFSETS[OFFSETS.len() - 1];
        let (q, q_cpu) = both(&[tokens, heads * head_dim], 1, dtype, 0);
        let (k, k_cpu) = both(&[tokens, kv_heads * head_dim], 2, dtype, 0);
        let (v, v_cpu) = both(&[tokens, kv_heads * head_dim], 3, dtype, 0);
        let (d_out, d_out_cpu) = both(&[tokens, heads * head_dim], 4, dtype, 0);
        let sinks = sinks.as_ref().map(|sinks| place(sinks, dtype, 0));
        let (sinks, sinks_cpu) = (sinks.as_ref().map(|s| &s.0), sinks.as_ref().map(|s| &s.1));
        let spans = Spans::new(&OFFSETS, &[shape], None, &q).unwrap();
        assert!(spans.has_tables(shape));
        let saved = attention::forward(shape, sinks, &q, &k, &v, &spans).unwrap();
        let expected = attention::plain_forward(shape, sinks_cpu, &q_cpu, &k_cpu, &v_cpu, &OFFSETS).unwrap();
        assert_near(&format!("{shape:?}: out"), &saved.out, &expected, 2.0 * tolerance);
        let found = attention::backward(shape, sinks, (&q, &k, &v), &saved, &spans, &d_out).unwrap();
        let expected =
            attention::plain_backward(shape, sinks_cpu, (&q_cpu, &k_cpu, &v_cpu), &OFFSETS, &d_out_cpu).unwrap();
        assert_near(&format!("{shape:?}: dq"), &found.q, &expected.q, 3.0 * tolerance);
        assert_near(&format!("{shape:?}: dk"), &found.k, &expected.k, 3.0 * tolerance);
        assert_near(&format!("{shape:?}: dv"), &found.v, &expected.v, 3.0 * tolerance);
        if let Some((found, expected)) = found.sinks.zip(expected.sinks) {
            assert_near(&format!("{shape:?}: sinks"), &found, &expected, 3.0 * tolerance);
        }
    }
}

#[test]
fn attention_over_a_cache_that_is_written_first() {
    let head_dims = [16, 64].map(|head_dim| (AttentionShape::new(6, 2, head_dim, 0.25), None));
    let shapes = head_dims.into_iter().chain(attention_shapes().into_iter().skip(PLAIN_SHAPES)).collect();
    for ((dtype, tolerance), (shape, sinks)) in in_types(shapes) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let (offsets, slots, lengths) = ([0, 1, 71, 72], [2, 0, 1], [90, 81, 1]);
        let (keys, keys_cpu) = both(&[3, kv_heads, 90, head_dim], 5, dtype, 0);
        let (cached_values, values_cpu) = both(&[3, kv_heads, 90, head_dim], 6, dtype, 0);
        let (q, q_cpu) = both(&[72, heads * head_dim], 7, dtype, 0);
        let (k, k_cpu) = both(&[72, kv_heads * head_dim], 8, dtype, 0);
        let (v, v_cpu) = both(&[72, kv_heads * head_dim], 9, dtype, 0);
        let sinks = sinks.as_ref().map(|sinks| place(sinks, dtype, 0));
        let (sinks, sinks_cpu) = (sinks.as_ref().map(|s| &s.0), sinks.as_ref().map(|s| &s.1));
        let cached = CacheSlots { slots: slots.to_vec(), lengths: lengths.to_vec(), max_seq_len: 90 };
        let spans = Spans::new(&offsets, &[shape], Some(cached), &q).unwrap();
        assert!(cache_write::append((&k, &v), (&keys, &cached_values), &spans).unwrap());
        for (from, to) in [(&k_cpu, &keys_cpu), (&v_cpu, &values_cpu)] {
            for i in 0..3 {
                let (start, count) = (offsets[i], offsets[i + 1] - offsets[i]);
                let rows = from.narrow(0, start, count).unwrap().reshape((count, kv_heads, head_dim)).unwrap();
                let rows = rows.transpose(0, 1).unwrap().contiguous().unwrap();
                to.get(slots[i]).unwrap().slice_set(&rows, 1, lengths[i] - count).unwrap();
            }
        }
        assert_near("keys", &keys, &keys_cpu, 0.0);
        assert_near("values", &cached_values, &values_cpu, 0.0);
        let found = attention::with_cache(shape, sinks, &q, (&keys, &cached_values), &spans).unwrap();
        let expected =
            attention::plain_with_cache(shape, sinks_cpu, &q_cpu, (&keys_cpu, &values_cpu), &offsets, &slots, &lengths);
        assert_near(&format!("{shape:?}"), &found, &expected.unwrap(), 2.0 * tolerance);
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
        for (smoothing, scale, soft_cap) in
            [(0.0, 1.0, None), (0.1, 1.0, None), (0.1, 0.5, None), (0.1, 1.5, Some(3.0))]
        {
            let layer = Head { linear: layer.clone(), scale, soft_cap };
            let plain = Head { linear: plain.clone(), scale, soft_cap };
            let logits = head::logits(&hidden, &layer, &LayerUpdates::Same(None)).unwrap();
            assert_near(
                "logits",
                &logits,
                &head::logits(&hidden_cpu, &plain, &LayerUpdates::Same(None)).unwrap(),
                2.0 * tolerance,
            );
            let needs_grad = Some(head::HeadNeedsGrad { scale: 0.25, input: true, weight: true, rows: None });
            let found = head::loss(&hidden, &layer, None, None, &rows, smoothing, needs_grad).unwrap();
            let expected = head::loss(&hidden_cpu, &plain, None, None, &rows, smoothing, needs_grad).unwrap();
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
fn scattered_rows_have_their_indices_and_the_others_are_zero() {
    for (dtype, _) in TYPES {
        let (rows, rows_cpu) = both(&[3, 5], 1, dtype, 3);
        let found = head::scatter_rows(&rows, &[1, 2, 6], 8).unwrap();
        assert_near("rows", &found, &head::scatter_rows(&rows_cpu, &[1, 2, 6], 8).unwrap(), 0.0);
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

/// Quantized matrices that are dequantized as a whole, and in parts of 128 rows.
#[test]
fn products_of_parts_of_a_quantized_matrix_are_those_of_the_whole() {
    let (format, rows, columns) = (BlockFormat::Q4K, 300, 256);
    let blocks = format.quantize(&values(&random(&[rows, columns], 1)), columns, None).unwrap();
    for (dtype, tolerance) in TYPES {
        let there = GpuBlocks::upload(&blocks, (rows, columns), format, dtype, &device()).unwrap();
        let here = Weight::blocks(blocks.clone(), (rows, columns), format).unwrap().tensor().unwrap();
        for most in [1, 200 * columns, 1 << 25] {
            let (x, of_rows) = (both(&[7, columns], 2, dtype, 0), both(&[7, rows], 3, dtype, 4));
            let expected = x.1.matmul(&here.t().unwrap()).unwrap();
            let found = there.plain_product(&x.0, true, most).unwrap();
            assert_eq!(found.dtype(), dtype);
            assert_near(&format!("{dtype:?} transposed, {most}"), &found, &expected, tolerance);
            let found = there.plain_product(&of_rows.0, false, most).unwrap();
            assert_eq!(found.dtype(), dtype);
            let expected = of_rows.1.matmul(&here).unwrap();
            assert_near(&format!("{dtype:?} plain, {most}"), &found, &expected, tolerance);
        }
    }
}
