//! Tests each operation against candle's operations (values and gradients), and gradients against finite differences.

#![allow(clippy::unwrap_used)]

use super::activation::{self, Activation};
use super::adapters::LayerUpdates;
use super::attention::{CacheSlots, Spans};
use super::head::Head;
use super::linear::{self, Linear, NeedsGrad};
use super::norm::{Norm, NormKind, NormNeedsGrad};
use super::rotary::{self, Pairs, RotaryScaling, RotarySpec, RotaryTable};
use super::{LowRank, Magnitude, attention, embedding, head, weight_norms_squared};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AttentionShape, LogitForm, Mask, Row};

pub(super) fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let count = shape.iter().product();
    let values: Vec<f32> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
    .take(count)
    .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub(super) fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let scale = values(expected).iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in values(found).iter().zip(values(expected)).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "element {i}: {a} instead of {b}");
    }
}

/// Sequence lengths that are not a multiple of any block.
const OFFSETS: [usize; 5] = [0, 1, 66, 68, 301];

/// Attention of every kind: causal, windows and chunks smaller and larger than a block, capped, with sinks.
pub(super) fn attention_kinds() -> Vec<(AttentionShape, Option<Tensor>)> {
    let masks = [Mask::Window(1), Mask::Window(5), Mask::Window(100), Mask::Chunk(3), Mask::Chunk(90), Mask::Causal];
    let heads = [(7, 1, 8), (4, 2, 32), (3, 3, 20), (2, 1, 96)];
    let kinds = heads.into_iter().flat_map(|heads| masks.map(|mask| (heads, mask))).enumerate();
    let kind = |(i, ((heads, kv_heads, head_dim), mask)): (usize, ((usize, usize, usize), Mask))| {
        let soft_cap = [None, Some(5.0), Some(0.7)][i % 3];
        let shape = AttentionShape { mask, soft_cap, ..AttentionShape::new(heads, kv_heads, head_dim, 0.3) };
        (shape, (i % 2 == 0).then(|| random(&[heads], 11).affine(3.0, 0.0).unwrap()))
    };
    let causal = heads.map(|(heads, kv_heads, head_dim)| (AttentionShape::new(heads, kv_heads, head_dim, 0.3), None));
    let wide = AttentionShape { mask: Mask::Window(70), ..AttentionShape::new(2, 1, 512, 0.1) };
    kinds.map(kind).chain(causal).chain([(wide, None)]).collect()
}

#[test]
fn attention_equals_candle() {
    for (shape, sinks) in attention_kinds() {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let sinks = sinks.as_ref();
        let tokens = OFFSETS[OFFSETS.len() - 1];
        let q = random(&[tokens, heads * head_dim], 1);
        let k = random(&[tokens, kv_heads * head_dim], 2);
        let v = random(&[tokens, kv_heads * head_dim], 3);
        let spans = Spans::new(&OFFSETS, &[shape], None, &q).unwrap();
        let saved = attention::forward(shape, sinks, &q, &k, &v, &spans).unwrap();
        assert_close(&saved.out, &attention::plain_forward(shape, sinks, &q, &k, &v, &OFFSETS).unwrap(), 1e-5);
        let d_out = random(&[tokens, heads * head_dim], 4);
        let found = attention::backward(shape, sinks, (&q, &k, &v), &saved, &spans, &d_out).unwrap();
        let expected = attention::plain_backward(shape, sinks, (&q, &k, &v), &OFFSETS, &d_out).unwrap();
        assert_close(&found.q, &expected.q, 1e-5);
        assert_close(&found.k, &expected.k, 1e-5);
        assert_close(&found.v, &expected.v, 1e-5);
        assert_eq!(found.sinks.is_some(), sinks.is_some());
        if let Some((found, expected)) = found.sinks.zip(expected.sinks) {
            assert_close(&found, &expected, 1e-5);
        }
    }
}

#[test]
fn attention_over_a_cache_equals_candle() {
    for (shape, sinks) in attention_kinds() {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let sinks = sinks.as_ref();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let cache = |seed| random(&[3, kv_heads, 300, head_dim], seed).to_dtype(dtype).unwrap();
            let (keys, values) = (cache(5), cache(6));
            let (offsets, slots, lengths) = ([0, 1, 71, 72], [2, 0, 1], [300, 131, 1]);
            let q = random(&[72, heads * head_dim], 7);
            let cached = CacheSlots { slots: slots.to_vec(), lengths: lengths.to_vec(), max_seq_len: 300 };
            let spans = Spans::new(&offsets, &[shape], Some(cached), &q).unwrap();
            let found = attention::with_cache(shape, sinks, &q, (&keys, &values), &spans).unwrap();
            let expected =
                attention::plain_with_cache(shape, sinks, &q, (&keys, &values), &offsets, &slots, &lengths).unwrap();
            assert_close(&found, &expected, tolerance);
        }
    }
}

#[test]
fn masks_that_hide_everything_are_refused() {
    let like = random(&[1, 4], 1);
    for mask in [Mask::Window(0), Mask::Chunk(0)] {
        let shape = AttentionShape { mask, ..AttentionShape::new(1, 1, 4, 1.0) };
        let message = Spans::new(&[0, 1], &[shape], None, &like).unwrap_err().to_string();
        assert!(message.contains("hides every key"), "{message}");
    }
}

#[test]
fn large_scores_stay_finite() {
    let shape = AttentionShape::new(1, 1, 4, 1.0);
    let q = random(&[200, 4], 8).affine(60.0, 0.0).unwrap();
    let k = random(&[200, 4], 9).affine(60.0, 0.0).unwrap();
    let v = random(&[200, 4], 10);
    for soft_cap in [None, Some(50.0)] {
        let shape = AttentionShape { soft_cap, ..shape };
        let spans = Spans::new(&[0, 200], &[shape], None, &q).unwrap();
        let found = attention::forward(shape, None, &q, &k, &v, &spans).unwrap();
        assert_close(&found.out, &attention::plain_forward(shape, None, &q, &k, &v, &[0, 200]).unwrap(), 1e-4);
    }
}

/// Norms of every kind: of whole rows, of heads, with a weight of each head, without weight.
pub(super) fn norm_kinds() -> Vec<(Norm, usize)> {
    let mut norms = Vec::new();
    for kind in [NormKind::Rms { offset: 0.0 }, NormKind::Rms { offset: 1.0 }, NormKind::Layer] {
        for (width, parts, runs) in [(1, 1, 1), (31, 1, 1), (64, 1, 1), (200, 1, 1), (8, 1, 6), (20, 3, 6)] {
            let weight = random(&[parts * width], 1);
            let bias = (kind == NormKind::Layer).then(|| random(&[parts * width], 12));
            norms.push((Norm { kind, weight: Some(weight), bias, eps: 1e-6, width }, runs * width));
        }
        norms.push((Norm { kind, weight: None, bias: None, eps: 1e-5, width: 12 }, 36));
    }
    norms
}

#[test]
fn norms_equal_candle() {
    for (norm, row) in norm_kinds() {
        let (x, dy) = (random(&[9, row], 2).affine(1.0, 0.4).unwrap(), random(&[9, row], 3));
        assert_close(&norm.forward(&x).unwrap(), &norm.plain_forward(&x).unwrap(), 1e-5);
        let base = random(&[9, row], 4);
        let needs_grad = NormNeedsGrad { weight: true, bias: true };
        let needs_grad_plain = NormNeedsGrad { weight: norm.weight.is_some(), bias: norm.bias.is_some() };
        let expected = norm.plain_backward(&x, &dy, &base, needs_grad_plain).unwrap();
        let (dx, found) = norm.backward(&x, &dy, Some(base.copy().unwrap()), needs_grad).unwrap();
        // a run of one element has no spread, so that its gradient is a difference of large numbers
        assert_close(&dx, &expected.0, if norm.width == 1 { 2e-3 } else { 1e-4 });
        for (found, expected, has) in [
            (found.weight, expected.1.weight, norm.weight.is_some()),
            (found.bias, expected.1.bias, norm.bias.is_some()),
        ] {
            assert_eq!((found.is_some(), expected.is_some()), (has, has));
            if let Some((found, expected)) = found.zip(expected) {
                assert_close(&found, &expected, 1e-4);
            }
        }
        let (alone, _) = norm.backward(&x, &dy, None, NormNeedsGrad::default()).unwrap();
        assert_close(&(alone + base).unwrap(), &dx, if norm.width == 1 { 2e-3 } else { 1e-5 });
    }
    let norm = Norm::rms(random(&[5], 1), 1e-6);
    assert!(norm.forward(&random(&[2, 12], 1)).is_err());
}

pub(super) const ACTIVATIONS: [Activation; 7] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::Gelu,
    Activation::Relu,
    Activation::Relu2,
    Activation::Sigmoid,
    Activation::Clamped { limit: 7.0, alpha: 1.702 },
];

#[test]
fn activations_equal_candle() {
    let (gate, up, dy) = (random(&[5, 77], 1), random(&[5, 77], 2), random(&[5, 77], 3));
    let (gate, up) = (gate.affine(12.0, 0.0).unwrap(), up.affine(9.0, 0.0).unwrap());
    for activation in ACTIVATIONS {
        let expected = activation::plain_gated(activation, &gate, &up).unwrap();
        assert_close(&activation::gated(activation, &gate, &up).unwrap(), &expected, 1e-6);
        let (d_gate, d_up) = activation::gated_backward(activation, &gate, &up, dy.copy().unwrap()).unwrap();
        let expected = activation::plain_gated_backward(activation, &gate, &up, &dy).unwrap();
        assert_close(&d_gate, &expected.0, 4e-6);
        assert_close(&d_up, &expected.1, 4e-6);
        // the same as a gated activation with an `up` factor of 1 (0 + 1 if clamped)
        let one = if matches!(activation, Activation::Clamped { .. }) { 0.0 } else { 1.0 };
        let ones = gate.affine(0.0, one).unwrap();
        let expected = activation::plain_gated(activation, &gate, &ones).unwrap();
        assert_close(&activation::plain(activation, &gate).unwrap(), &expected, 1e-6);
        let expected = activation::plain_gated_backward(activation, &gate, &ones, &dy).unwrap().0;
        assert_close(&activation::plain_backward(activation, &gate, dy.copy().unwrap()).unwrap(), &expected, 4e-6);
    }
    let found = activation::sigmoid_gate(&up, &gate).unwrap();
    assert_close(&found, &(&up * (gate.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap()).unwrap(), 1e-6);
    let (dx, d_gate) = activation::sigmoid_gate_backward(&up, &gate, dy.copy().unwrap()).unwrap();
    let expected = activation::plain_gated_backward(Activation::Sigmoid, &gate, &up, &dy).unwrap();
    assert_close(&dx, &expected.1, 1e-6);
    assert_close(&d_gate, &expected.0, 1e-6);
}

pub(super) fn rotary_table(dim: usize, pairs: Pairs, scaling: RotaryScaling) -> RotaryTable {
    RotaryTable::new(&RotarySpec { dim, theta: 1e4, scaling, pairs, max_position_embeddings: 1000 }).unwrap()
}

#[test]
fn rotation_equals_candle_and_is_invertible() {
    let positions = [0, 1, 2, 900, 5, 70];
    for (dim, head_dim) in [(16, 16), (12, 16), (2, 24)] {
        for pairs in [Pairs::Halves, Pairs::Adjacent] {
            let table = rotary_table(dim, pairs, RotaryScaling::Default);
            let x = random(&[6, 48], 1);
            let rotation = table.rotation(&positions, &[0, 6], &x).unwrap();
            let turned = rotation.apply(x.copy().unwrap(), head_dim, false).unwrap();
            assert_close(&turned, &rotation.plain(&x, head_dim, false).unwrap(), 1e-6);
            assert_close(&turned.narrow(0, 0, 1).unwrap(), &x.narrow(0, 0, 1).unwrap(), 0.0);
            // the first pair of the fourth token is rotated by 900 rad; the elements after the rotated ones are
            // unchanged
            let second = if pairs == Pairs::Halves { dim / 2 } else { 1 };
            let (x_row, row) = (values(&x.get(3).unwrap()), values(&turned.get(3).unwrap()));
            let (sin, cos) = 900f32.sin_cos();
            assert!((row[0] - (x_row[0] * cos - x_row[second] * sin)).abs() < 1e-6);
            assert!((row[second] - (x_row[second] * cos + x_row[0] * sin)).abs() < 1e-6);
            assert_eq!(row[dim..head_dim], x_row[dim..head_dim]);
            assert_close(&rotation.apply(turned, head_dim, true).unwrap(), &x, 1e-6);
            assert!(rotation.apply(x.copy().unwrap(), dim - 1, false).is_err());
            assert!(rotation.apply(x.narrow(0, 0, 5).unwrap(), head_dim, false).is_err());
        }
    }
}

#[test]
fn rows_are_scaled() {
    let (x, factors) = (random(&[6, 48], 1), random(&[6], 2));
    let expected = x.broadcast_mul(&factors.reshape((6, 1)).unwrap()).unwrap();
    assert_close(&rotary::scale_rows(x.copy().unwrap(), &factors).unwrap(), &expected, 0.0);
    assert!(rotary::scale_rows(x, &factors.narrow(0, 0, 5).unwrap()).is_err());
}

#[test]
fn cross_entropy_equals_candle() {
    let rows: Vec<Row> = (0..7).map(|i| Row { target: (i * 13) % 53, weight: i as f32 * 0.5 }).collect();
    let hidden = random(&[7, 12], 1);
    let weight = random(&[53, 12], 2).affine(3.0, 0.0).unwrap();
    let layer = || Linear { weight: weight.clone().into(), bias: None };
    for (smoothing, scale, soft_cap) in [
        (0.0, 1.0, None),
        (0.1, 1.0, None),
        (1.0, 1.0, None),
        (0.1, 0.25, None),
        (0.0, 1.0, Some(3.0)),
        (0.1, 1.5, Some(5.0)),
    ] {
        let head = Head { linear: layer(), scale, soft_cap };
        let needs_grad = head::HeadNeedsGrad { scale: 0.25, input: true, weight: true, rows: None };
        let run = |needs_grad| head::loss(&hidden, &head, None, None, &rows, smoothing, needs_grad).unwrap();
        let found = run(Some(needs_grad));
        let products = linear::product(&hidden, &weight).unwrap();
        let form = LogitForm { scale, soft_cap };
        let (losses, gradient) = head::plain_cross_entropy(&products, form, &rows, smoothing, Some(0.25)).unwrap();
        let gradient = gradient.unwrap();
        for (a, b) in found.rows().unwrap().iter().zip(&losses) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        assert_eq!(run(None).rows().unwrap(), found.rows().unwrap());
        assert_close(&found.gradients.input.unwrap(), &gradient.matmul(&weight).unwrap(), 1e-5);
        assert_close(&found.gradients.weight.unwrap(), &gradient.t().unwrap().matmul(&hidden).unwrap(), 1e-5);

        let logits = head::logits(&hidden, &head, &LayerUpdates::Same(None)).unwrap();
        for (found, product) in values(&logits).into_iter().zip(values(&products)) {
            let product = f64::from(product) * f64::from(scale);
            let expected = soft_cap.map(f64::from).map_or(product, |cap| cap * (product / cap).tanh());
            assert!((f64::from(found) - expected).abs() < 1e-5, "{found} {expected}");
        }
        // the loss of these logits is the same without scale and cap
        let (plain, _) = head::plain_cross_entropy(&logits, LogitForm::PLAIN, &rows, smoothing, None).unwrap();
        for (a, b) in losses.iter().zip(plain) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
    let outside = [Row { target: 53, weight: 1.0 }];
    let head = Head::new(layer());
    assert!(head::loss(&hidden.narrow(0, 0, 1).unwrap(), &head, None, None, &outside, 0.0, None).is_err());
}

#[test]
fn gradients_of_scaled_and_capped_logits_match_finite_differences() {
    let rows: Vec<Row> = (0..5).map(|i| Row { target: (i * 7) % 11, weight: 1.0 }).collect();
    let (hidden, weight) = (random(&[5, 6], 1), random(&[11, 6], 2).affine(2.0, 0.0).unwrap());
    let head = Head { linear: Linear { weight: weight.into(), bias: None }, scale: 1.5, soft_cap: Some(2.0) };
    let loss = |hidden: &Tensor| {
        let rows = head::loss(hidden, &head, None, None, &rows, 0.1, None).unwrap().rows().unwrap();
        rows.iter().map(|loss| f64::from(*loss)).sum::<f64>()
    };
    let needs_grad = head::HeadNeedsGrad { scale: 1.0, input: true, weight: false, rows: None };
    let found = head::loss(&hidden, &head, None, None, &rows, 0.1, Some(needs_grad)).unwrap().gradients.input.unwrap();
    let direction = random(&[5, 6], 3);
    let expected: f64 = values(&found).iter().zip(values(&direction)).map(|(a, b)| f64::from(a * b)).sum();
    let step = |size: f64| loss(&(&hidden + direction.affine(size, 0.0).unwrap()).unwrap());
    let slope = (step(1e-2) - step(-1e-2)) / 2e-2;
    assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
}

/// Shapes with few rows, with several tiles, and with odd sizes.
const PRODUCTS: [(usize, usize, usize); 6] =
    [(1, 300, 70), (3, 5, 33), (5, 600, 64), (300, 300, 20), (70, 7, 1500), (513, 1, 9)];

#[test]
fn products_equal_candle_for_every_weight_type() {
    for (m, n, k) in PRODUCTS {
        let x = random(&[m, k], 1);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let w = random(&[n, k], 2).to_dtype(dtype).unwrap();
            let wide = w.to_dtype(DType::F32).unwrap();
            assert_close(&linear::product(&x, &w).unwrap(), &x.matmul(&wide.t().unwrap()).unwrap(), 1e-5);
            let dy = random(&[m, n], 3);
            assert_close(
                &linear::sum(linear::Accumulator::Zero, &[linear::ScaledProduct::plain(&dy, &w, 1.0)]).unwrap(),
                &dy.matmul(&wide).unwrap(),
                1e-5,
            );
        }
        let y = random(&[m, n], 4);
        assert_close(&linear::outer(&x, &y).unwrap(), &x.t().unwrap().matmul(&y).unwrap(), 1e-5);
    }
}

#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let (x, w) = (random(&[300, 500], 1), random(&[700, 500], 2));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| values(&linear::product(&x, &w).unwrap()))
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn linear_gradients_match_finite_differences() {
    let weight = random(&[6, 10], 1);
    let layer = Linear { weight: weight.clone().into(), bias: Some(random(&[6], 2)) };
    let update = LowRank {
        dropout: 0.4,
        initial_factors: Some((random(&[2, 10], 8), random(&[6, 2], 9))),
        ..LowRank::new(random(&[3, 10], 3), random(&[6, 3], 4), 1.7)
    };
    let (x, dy) = (random(&[8, 10], 5), random(&[8, 6], 6));
    let loss = |layer: &Linear, update: &LowRank, x: &Tensor| -> f64 {
        let y = layer.forward(x, Some(update), Some(9), None).unwrap();
        values(&y).iter().zip(values(&dy)).map(|(a, b)| f64::from(a * b)).sum()
    };
    let needs_grad = NeedsGrad { input: true, weight: true, bias: true };
    let gradients = layer.backward(Some(&x), Some(&update), Some(9), &dy, needs_grad, None, None).unwrap();
    let of_update = gradients.update.unwrap();
    let check = |gradient: &Tensor, moved: &dyn Fn(&Tensor) -> f64| {
        let direction = random(gradient.dims(), 7);
        let expected: f64 = values(gradient).iter().zip(values(&direction)).map(|(a, b)| f64::from(a * b)).sum();
        let step = |size: f64| moved(&direction.affine(size, 0.0).unwrap());
        let slope = (step(1e-2) - step(-1e-2)) / 2e-2;
        assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
    };
    check(&gradients.input.unwrap(), &|d| loss(&layer, &update, &(&x + d).unwrap()));
    check(&of_update.a, &|d| loss(&layer, &LowRank { a: (&update.a + d).unwrap(), ..update.clone() }, &x));
    check(&of_update.b, &|d| loss(&layer, &LowRank { b: (&update.b + d).unwrap(), ..update.clone() }, &x));
    check(&gradients.weight.unwrap(), &|d| {
        loss(&Linear { weight: (&weight + d).unwrap().into(), ..layer.clone() }, &update, &x)
    });
    check(&gradients.bias.unwrap(), &|d| {
        loss(&Linear { bias: Some((layer.bias.as_ref().unwrap() + d).unwrap()), ..layer.clone() }, &update, &x)
    });
}

/// The gradients of a DoRA update against finite differences of its formula, with the norms treated as constants.
#[test]
fn decomposed_gradients_match_finite_differences() {
    let weight = random(&[6, 10], 1);
    let layer = Linear { weight: weight.clone().into(), bias: Some(random(&[6], 2)) };
    let (x, dy) = (random(&[8, 10], 5), random(&[8, 6], 6));
    for (dropout, has_start) in [(0.0, false), (0.0, true), (0.4, false), (0.4, true)] {
        let start = has_start.then(|| (random(&[2, 10], 8), random(&[6, 2], 9)));
        let weight_norms_squared = weight_norms_squared(&weight).unwrap();
        let magnitude = Some(Magnitude { m: random(&[6], 10), weight_norms_squared, reciprocal_norms: None });
        let update = LowRank {
            dropout,
            initial_factors: start.clone(),
            magnitude,
            ..LowRank::new(random(&[3, 10], 3), random(&[6, 3], 4), 1.7)
        };
        let change = |a: &Tensor, b: &Tensor| b.matmul(a).unwrap().affine(1.7, 0.0).unwrap();
        let base = match &start {
            Some((a, b)) => (&weight - change(a, b)).unwrap(),
            None => weight.clone(),
        };
        let adapted = (&base + change(&update.a, &update.b)).unwrap();
        let norms = adapted.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
        let mask = linear::dropped(&x.ones_like().unwrap(), &update, Some(9)).unwrap();
        let formula = |a: &Tensor, b: &Tensor, m: &Tensor, x: &Tensor| {
            let dropped = (x * &mask).unwrap();
            let adapted = (&base + change(a, b)).unwrap();
            let through = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
            let p = through(&dropped, &adapted).broadcast_mul(&(m / &norms).unwrap()).unwrap();
            let plain = (through(x, &base) - through(&dropped, &base)).unwrap();
            (plain + p).unwrap().broadcast_add(layer.bias.as_ref().unwrap()).unwrap()
        };
        let m = &update.magnitude.as_ref().unwrap().m;
        assert_close(
            &layer.forward(&x, Some(&update), Some(9), None).unwrap(),
            &formula(&update.a, &update.b, m, &x),
            1e-5,
        );
        let needs_grad = NeedsGrad { input: true, weight: false, bias: false };
        let before = random(&[8, 10], 11);
        let gradients = layer
            .backward(Some(&x), Some(&update), Some(9), &dy, needs_grad, Some(before.copy().unwrap()), None)
            .unwrap();
        let of_update = gradients.update.unwrap();
        let check = |gradient: &Tensor, moved: &dyn Fn(&Tensor) -> Tensor| {
            let direction = random(gradient.dims(), 7);
            let dot = |a: &Tensor, b: &Tensor| -> f64 {
                values(a).iter().zip(values(b)).map(|(a, b)| f64::from(a * b)).sum()
            };
            let step = |size: f64| dot(&moved(&direction.affine(size, 0.0).unwrap()), &dy);
            let (slope, expected) = ((step(1e-2) - step(-1e-2)) / 2e-2, dot(gradient, &direction));
            assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
        };
        check(&(gradients.input.unwrap() - before).unwrap(), &|d| formula(&update.a, &update.b, m, &(&x + d).unwrap()));
        check(&of_update.a, &|d| formula(&(&update.a + d).unwrap(), &update.b, m, &x));
        check(&of_update.b, &|d| formula(&update.a, &(&update.b + d).unwrap(), m, &x));
        check(&of_update.magnitude.unwrap(), &|d| formula(&update.a, &update.b, &(m + d).unwrap(), &x));
    }
}

#[test]
fn a_residual_is_added_to_every_kind_of_layer() {
    let (x, residual) = (random(&[70, 10], 5), random(&[70, 33], 6));
    let weight = random(&[33, 10], 1);
    let plain = LowRank::new(random(&[3, 10], 3), random(&[33, 3], 4), 1.7);
    let magnitude = || {
        let weight_norms_squared = weight_norms_squared(&weight).unwrap();
        Some(Magnitude { m: random(&[33], 10), weight_norms_squared, reciprocal_norms: None })
    };
    let updates = [
        None,
        Some(plain.clone()),
        Some(LowRank { initial_factors: Some((random(&[2, 10], 8), random(&[33, 2], 9))), ..plain.clone() }),
        Some(LowRank { magnitude: magnitude(), ..plain.clone() }),
        Some(LowRank { magnitude: magnitude(), dropout: 0.4, ..plain }),
    ];
    for bias in [None, Some(random(&[33], 2))] {
        let layer = Linear { weight: weight.clone().into(), bias };
        for update in &updates {
            let run = |residual| layer.forward(&x, update.as_ref(), Some(9), residual).unwrap();
            assert_close(&run(Some(&residual)), &(run(None) + &residual).unwrap(), 1e-5);
        }
    }
}

#[test]
fn low_rank_updates_of_an_embedding_match_finite_differences() {
    let weight = random(&[7, 6], 1);
    let (ids, dx) = ([4, 1, 4, 0], random(&[4, 6], 2));
    let start = Some((random(&[2, 7], 8), random(&[6, 2], 9)));
    let update = LowRank { initial_factors: start, ..LowRank::new(random(&[3, 7], 3), random(&[6, 3], 4), 1.3) };
    let loss = |update: &LowRank| -> f64 {
        let x = embedding::forward(&weight.clone().into(), Some(update), &ids, DType::F32, 1.7).unwrap();
        values(&x).iter().zip(values(&dx)).map(|(a, b)| f64::from(a * b)).sum()
    };
    let gradients = embedding::low_rank_backward(&weight.clone().into(), &update, &ids, &dx, 1.7).unwrap();
    for (gradient, is_a) in [(&gradients.a, true), (&gradients.b, false)] {
        let direction = random(gradient.dims(), 7);
        let moved = |size: f64| {
            let change = direction.affine(size, 0.0).unwrap();
            let mut update = update.clone();
            let matrix = if is_a { &mut update.a } else { &mut update.b };
            *matrix = (&*matrix + change).unwrap();
            loss(&update)
        };
        let expected: f64 = values(gradient).iter().zip(values(&direction)).map(|(a, b)| f64::from(a * b)).sum();
        let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
    }
}

#[test]
fn noise_is_bounded_by_the_length_and_repeats() {
    let zeros = || Tensor::zeros((6, 4), DType::F32, &Device::Cpu).unwrap();
    let noise = |seed| values(&embedding::add_noise(zeros(), &[0, 2, 6], 5.0, seed).unwrap());
    let found = noise(1);
    assert_eq!(found, noise(1));
    assert_ne!(found, noise(2));
    let largest = |part: &[f32]| part.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let (short, long) = (largest(&found[..8]), largest(&found[8..]));
    let (short_bound, long_bound) = (5.0 / 8.0f32.sqrt(), 5.0 / 16.0f32.sqrt());
    assert!(short > 0.5 * short_bound && short <= short_bound, "{short}");
    assert!(long > 0.5 * long_bound && long <= long_bound, "{long}");
}

#[test]
fn embedding_gradient_adds_up_repeated_ids() {
    let weight = random(&[5, 3], 1);
    for scale in [1.0, 2.5] {
        let x = embedding::forward(&weight.clone().into(), None, &[4, 1, 4], DType::F32, scale).unwrap();
        let row = weight.narrow(0, 4, 1).unwrap().affine(f64::from(scale), 0.0).unwrap();
        assert_close(&x.narrow(0, 2, 1).unwrap(), &row, 0.0);
        let dx = random(&[3, 3], 2);
        let dw = embedding::backward(&[4, 1, 4], &dx, Tensor::zeros((5, 3), DType::F32, &Device::Cpu).unwrap(), scale)
            .unwrap();
        let expected = (dx.get(0).unwrap() + dx.get(2).unwrap()).unwrap().affine(f64::from(scale), 0.0).unwrap();
        assert_close(&dw.get(4).unwrap(), &expected, 1e-6);
        assert_close(&dw.get(0).unwrap(), &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(), 0.0);
        let rows = embedding::rows_backward(&[4, 1, 4], &dx, &[4, 2], None, scale).unwrap();
        assert_close(&rows.get(0).unwrap(), &expected, 1e-6);
    }
    assert!(embedding::forward(&weight.clone().into(), None, &[5], DType::F32, 1.0).is_err());
}
