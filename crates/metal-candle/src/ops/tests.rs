//! Each operation against its twin in candle's operations, values and gradients, and gradients against finite differences.

#![allow(clippy::unwrap_used)]

use super::attention::{Cached, Spans};
use super::linear::{self, Linear, Wanted};
use super::rms_norm::RmsNorm;
use super::rotary::RotaryTable;
use super::{LowRank, Magnitude, Weight, attention, embedding, head, swiglu, weight_norms_squared};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AttentionShape, Row};
use std::sync::Arc;

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
fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let scale = values(expected).iter().fold(1.0f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in values(found).iter().zip(values(expected)).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "element {i}: {a} instead of {b}");
    }
}

/// Tokens that are no multiple of any block, and heads of an odd group.
const OFFSETS: [usize; 5] = [0, 1, 66, 68, 301];

#[test]
fn attention_equals_its_twin() {
    for (heads, kv_heads, head_dim) in [(7, 1, 8), (4, 2, 32), (3, 3, 20)] {
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3 };
        let tokens = OFFSETS[OFFSETS.len() - 1];
        let q = random(&[tokens, heads * head_dim], 1);
        let k = random(&[tokens, kv_heads * head_dim], 2);
        let v = random(&[tokens, kv_heads * head_dim], 3);
        let spans = Spans::new(&OFFSETS, shape, None, &q).unwrap();
        let saved = attention::forward(shape, &q, &k, &v, &spans).unwrap();
        assert_close(&saved.out, &attention::plain_forward(shape, &q, &k, &v, &OFFSETS).unwrap(), 1e-5);
        let d_out = random(&[tokens, heads * head_dim], 4);
        let (dq, dk, dv) = attention::backward(shape, (&q, &k, &v), &saved, &spans, &d_out).unwrap();
        let (pq, pk, pv) = attention::plain_backward(shape, (&q, &k, &v), &OFFSETS, &d_out).unwrap();
        assert_close(&dq, &pq, 1e-5);
        assert_close(&dk, &pk, 1e-5);
        assert_close(&dv, &pv, 1e-5);
    }
}

#[test]
fn attention_over_a_cache_equals_its_twin() {
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 16, scale: 0.25 };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let (keys, values) = (random(&[3, 2, 300, 16], 5), random(&[3, 2, 300, 16], 6));
        let (keys, values) = (keys.to_dtype(dtype).unwrap(), values.to_dtype(dtype).unwrap());
        let (offsets, slots, lengths) = ([0, 1, 71, 72], [2, 0, 1], [300, 131, 1]);
        let q = random(&[72, 96], 7);
        let cached = Cached { slots: slots.to_vec(), lengths: lengths.to_vec(), max_seq_len: 300 };
        let spans = Spans::new(&offsets, shape, Some(cached), &q).unwrap();
        let found = attention::with_cache(shape, &q, (&keys, &values), &spans).unwrap();
        let expected = attention::plain_with_cache(shape, &q, (&keys, &values), &offsets, &slots, &lengths).unwrap();
        assert_close(&found, &expected, tolerance);
    }
}

#[test]
fn large_scores_stay_finite() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 4, scale: 1.0 };
    let q = random(&[200, 4], 8).affine(60.0, 0.0).unwrap();
    let k = random(&[200, 4], 9).affine(60.0, 0.0).unwrap();
    let v = random(&[200, 4], 10);
    let spans = Spans::new(&[0, 200], shape, None, &q).unwrap();
    let found = attention::forward(shape, &q, &k, &v, &spans).unwrap();
    assert_close(&found.out, &attention::plain_forward(shape, &q, &k, &v, &[0, 200]).unwrap(), 1e-4);
}

#[test]
fn rms_norm_equals_its_twin() {
    for width in [1, 31, 64, 200] {
        let norm = RmsNorm { weight: random(&[width], 1), eps: 1e-6 };
        let (x, dy) = (random(&[9, width], 2), random(&[9, width], 3));
        assert_close(&norm.forward(&x).unwrap(), &norm.plain_forward(&x).unwrap(), 1e-5);
        let base = random(&[9, width], 4);
        let expected = norm.plain_backward(&x, &dy, &base, true).unwrap();
        let (dx, dw) = norm.backward(&x, &dy, base.copy().unwrap(), true).unwrap();
        assert_close(&dx, &expected.0, 1e-4);
        assert_close(&dw.unwrap(), &expected.1.unwrap(), 1e-4);
    }
}

#[test]
fn swiglu_equals_its_twin() {
    let (gate, up, dy) = (random(&[5, 77], 1), random(&[5, 77], 2), random(&[5, 77], 3));
    let gate = gate.affine(12.0, 0.0).unwrap();
    assert_close(&swiglu::forward(&gate, &up).unwrap(), &swiglu::plain_forward(&gate, &up).unwrap(), 1e-6);
    let (d_gate, d_up) = swiglu::backward(&gate, &up, dy.copy().unwrap()).unwrap();
    let expected = swiglu::plain_backward(&gate, &up, &dy).unwrap();
    assert_close(&d_gate, &expected.0, 1e-6);
    assert_close(&d_up, &expected.1, 1e-6);
}

#[test]
fn rotation_equals_its_twin_and_turns_back() {
    let table = RotaryTable::new(16, 1e4);
    let x = random(&[6, 48], 1);
    let rotation = table.rotation(&[0, 1, 2, 900, 5, 70], &x).unwrap();
    let turned = rotation.apply(x.copy().unwrap(), false).unwrap();
    assert_close(&turned, &rotation.plain(&x, false).unwrap(), 1e-6);
    assert_close(&turned.narrow(0, 0, 1).unwrap(), &x.narrow(0, 0, 1).unwrap(), 0.0);
    assert_close(&rotation.apply(turned, true).unwrap(), &x, 1e-6);
}

#[test]
fn cross_entropy_equals_its_twin() {
    let rows: Vec<Row> = (0..7).map(|i| Row { target: (i * 13) % 53, weight: i as f32 * 0.5 }).collect();
    let hidden = random(&[7, 12], 1);
    let weight = random(&[53, 12], 2).affine(3.0, 0.0).unwrap();
    let layer = Linear { weight: weight.clone().into(), bias: None };
    for smoothing in [0.0, 0.1, 1.0] {
        let wanted = head::HeadWanted { scale: 0.25, input: true, weight: true, rows: None };
        let run = |wanted| head::loss(&hidden, &layer, None, None, &rows, smoothing, wanted).unwrap();
        let found = run(Some(wanted));
        let logits = linear::product(&hidden, &weight).unwrap();
        let (losses, gradient) = head::plain_cross_entropy(&logits, &rows, smoothing, Some(0.25)).unwrap();
        let gradient = gradient.unwrap();
        for (a, b) in found.rows().unwrap().iter().zip(&losses) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        assert_eq!(run(None).rows().unwrap(), found.rows().unwrap());
        assert_close(&found.gradients.input.unwrap(), &gradient.matmul(&weight).unwrap(), 1e-5);
        assert_close(&found.gradients.weight.unwrap(), &gradient.t().unwrap().matmul(&hidden).unwrap(), 1e-5);
    }
    let outside = [Row { target: 53, weight: 1.0 }];
    assert!(head::loss(&hidden.narrow(0, 0, 1).unwrap(), &layer, None, None, &outside, 0.0, None).is_err());
}

/// The shapes of few rows, of several tiles, and odd ones.
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
                &linear::sum(linear::Start::Zero, &[linear::Part::plain(&dy, &w, 1.0)]).unwrap(),
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
    let term = LowRank {
        dropout: 0.4,
        start: Some((random(&[2, 10], 8), random(&[6, 2], 9))),
        ..LowRank::new(random(&[3, 10], 3), random(&[6, 3], 4), 1.7)
    };
    let (x, dy) = (random(&[8, 10], 5), random(&[8, 6], 6));
    let loss = |layer: &Linear, term: &LowRank, x: &Tensor| -> f64 {
        let y = layer.forward(x, Some(term), Some(9), None).unwrap();
        values(&y).iter().zip(values(&dy)).map(|(a, b)| f64::from(a * b)).sum()
    };
    let wanted = Wanted { input: true, weight: true, bias: true };
    let gradients = layer.backward(Some(&x), Some(&term), Some(9), &dy, wanted, None, None).unwrap();
    let of_term = gradients.term.unwrap();
    let check = |gradient: &Tensor, moved: &dyn Fn(&Tensor) -> f64| {
        let direction = random(gradient.dims(), 7);
        let expected: f64 = values(gradient).iter().zip(values(&direction)).map(|(a, b)| f64::from(a * b)).sum();
        let step = |size: f64| moved(&direction.affine(size, 0.0).unwrap());
        let slope = (step(1e-2) - step(-1e-2)) / 2e-2;
        assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
    };
    check(&gradients.input.unwrap(), &|d| loss(&layer, &term, &(&x + d).unwrap()));
    check(&of_term.a, &|d| loss(&layer, &LowRank { a: (&term.a + d).unwrap(), ..term.clone() }, &x));
    check(&of_term.b, &|d| loss(&layer, &LowRank { b: (&term.b + d).unwrap(), ..term.clone() }, &x));
    check(&gradients.weight.unwrap(), &|d| {
        loss(&Linear { weight: (&weight + d).unwrap().into(), ..layer.clone() }, &term, &x)
    });
    check(&gradients.bias.unwrap(), &|d| {
        loss(&Linear { bias: Some((layer.bias.as_ref().unwrap() + d).unwrap()), ..layer.clone() }, &term, &x)
    });
}

/// The gradients of a weight-decomposed term, whose norms count as constant: against finite differences of the formula
/// with the norms as they are.
#[test]
fn decomposed_gradients_match_finite_differences() {
    let weight = random(&[6, 10], 1);
    let layer = Linear { weight: weight.clone().into(), bias: Some(random(&[6], 2)) };
    let (x, dy) = (random(&[8, 10], 5), random(&[8, 6], 6));
    for (dropout, has_start) in [(0.0, false), (0.0, true), (0.4, false), (0.4, true)] {
        let start = has_start.then(|| (random(&[2, 10], 8), random(&[6, 2], 9)));
        let weight_norms_squared = weight_norms_squared(&weight).unwrap();
        let magnitude = Some(Magnitude { m: random(&[6], 10), weight_norms_squared, reciprocal_norms: None });
        let term = LowRank {
            dropout,
            start: start.clone(),
            magnitude,
            ..LowRank::new(random(&[3, 10], 3), random(&[6, 3], 4), 1.7)
        };
        let change = |a: &Tensor, b: &Tensor| b.matmul(a).unwrap().affine(1.7, 0.0).unwrap();
        let base = match &start {
            Some((a, b)) => (&weight - change(a, b)).unwrap(),
            None => weight.clone(),
        };
        let adapted = (&base + change(&term.a, &term.b)).unwrap();
        let norms = adapted.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
        let mask = linear::dropped(&x.ones_like().unwrap(), &term, Some(9)).unwrap();
        let formula = |a: &Tensor, b: &Tensor, m: &Tensor, x: &Tensor| {
            let dropped = (x * &mask).unwrap();
            let adapted = (&base + change(a, b)).unwrap();
            let through = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
            let p = through(&dropped, &adapted).broadcast_mul(&(m / &norms).unwrap()).unwrap();
            let plain = (through(x, &base) - through(&dropped, &base)).unwrap();
            (plain + p).unwrap().broadcast_add(layer.bias.as_ref().unwrap()).unwrap()
        };
        let m = &term.magnitude.as_ref().unwrap().m;
        assert_close(&layer.forward(&x, Some(&term), Some(9), None).unwrap(), &formula(&term.a, &term.b, m, &x), 1e-5);
        let wanted = Wanted { input: true, weight: false, bias: false };
        let before = random(&[8, 10], 11);
        let gradients =
            layer.backward(Some(&x), Some(&term), Some(9), &dy, wanted, Some(before.copy().unwrap()), None).unwrap();
        let of_term = gradients.term.unwrap();
        let check = |gradient: &Tensor, moved: &dyn Fn(&Tensor) -> Tensor| {
            let direction = random(gradient.dims(), 7);
            let dot = |a: &Tensor, b: &Tensor| -> f64 {
                values(a).iter().zip(values(b)).map(|(a, b)| f64::from(a * b)).sum()
            };
            let step = |size: f64| dot(&moved(&direction.affine(size, 0.0).unwrap()), &dy);
            let (slope, expected) = ((step(1e-2) - step(-1e-2)) / 2e-2, dot(gradient, &direction));
            assert!((slope - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{slope} instead of {expected}");
        };
        check(&(gradients.input.unwrap() - before).unwrap(), &|d| formula(&term.a, &term.b, m, &(&x + d).unwrap()));
        check(&of_term.a, &|d| formula(&(&term.a + d).unwrap(), &term.b, m, &x));
        check(&of_term.b, &|d| formula(&term.a, &(&term.b + d).unwrap(), m, &x));
        check(&of_term.magnitude.unwrap(), &|d| formula(&term.a, &term.b, &(m + d).unwrap(), &x));
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
    let terms = [
        None,
        Some(plain.clone()),
        Some(LowRank { start: Some((random(&[2, 10], 8), random(&[33, 2], 9))), ..plain.clone() }),
        Some(LowRank { magnitude: magnitude(), ..plain.clone() }),
        Some(LowRank { magnitude: magnitude(), dropout: 0.4, ..plain }),
    ];
    for bias in [None, Some(random(&[33], 2))] {
        let layer = Linear { weight: weight.clone().into(), bias };
        for term in &terms {
            let run = |residual| layer.forward(&x, term.as_ref(), Some(9), residual).unwrap();
            assert_close(&run(Some(&residual)), &(run(None) + &residual).unwrap(), 1e-5);
        }
    }
}

#[test]
fn embedding_terms_match_finite_differences() {
    let weight = random(&[7, 6], 1);
    let (ids, dx) = ([4, 1, 4, 0], random(&[4, 6], 2));
    let start = Some((random(&[2, 7], 8), random(&[6, 2], 9)));
    let term = LowRank { start, ..LowRank::new(random(&[3, 7], 3), random(&[6, 3], 4), 1.3) };
    let loss = |term: &LowRank| -> f64 {
        let x = embedding::forward(&weight.clone().into(), Some(term), &ids, DType::F32).unwrap();
        values(&x).iter().zip(values(&dx)).map(|(a, b)| f64::from(a * b)).sum()
    };
    let gradients = embedding::term_backward(&weight.clone().into(), &term, &ids, &dx).unwrap();
    for (gradient, is_a) in [(&gradients.a, true), (&gradients.b, false)] {
        let direction = random(gradient.dims(), 7);
        let moved = |size: f64| {
            let change = direction.affine(size, 0.0).unwrap();
            let mut term = term.clone();
            let matrix = if is_a { &mut term.a } else { &mut term.b };
            *matrix = (&*matrix + change).unwrap();
            loss(&term)
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
    let table = weight.clone().into();
    let x = embedding::forward(&table, None, &[4, 1, 4], DType::F32).unwrap();
    assert_close(&x.narrow(0, 2, 1).unwrap(), &weight.narrow(0, 4, 1).unwrap(), 0.0);
    let dx = random(&[3, 3], 2);
    let dw = embedding::backward(&[4, 1, 4], &dx, head::zeros_like(&weight).unwrap()).unwrap();
    let expected = (dx.get(0).unwrap() + dx.get(2).unwrap()).unwrap();
    assert_close(&dw.get(4).unwrap(), &expected, 1e-6);
    assert_close(&dw.get(0).unwrap(), &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(), 0.0);
    assert!(embedding::forward(&table, None, &[5], DType::F32).is_err());
}

fn little_endian(tensor: &Tensor) -> Vec<u8> {
    fn bytes<T: candle_core::WithDType, const N: usize>(tensor: &Tensor, to_bytes: fn(T) -> [u8; N]) -> Vec<u8> {
        tensor.flatten_all().unwrap().to_vec1::<T>().unwrap().into_iter().flat_map(to_bytes).collect()
    }
    match tensor.dtype() {
        DType::F32 => bytes(tensor, f32::to_le_bytes),
        DType::F16 => bytes(tensor, half::f16::to_le_bytes),
        _ => bytes(tensor, half::bf16::to_le_bytes),
    }
}

/// A weight in a file gives the bits of the same weight in a tensor, in every use of it.
#[test]
fn a_mapped_weight_equals_its_tensor() {
    let path = std::env::temp_dir().join(format!("metal-candle-weight-{}", std::process::id()));
    let (rows, columns) = (19, 34);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let dense = random(&[rows, columns], 1).to_dtype(dtype).unwrap();
        let size = dtype.size_in_bytes();
        let bytes = little_endian(&dense);
        let content: Vec<u8> = [vec![7; 12], bytes, vec![7; 3]].concat();
        std::fs::write(&path, &content).unwrap();
        let file = Arc::new(metal_candle_kernels::map_file(&path).unwrap());
        let end = 12 + rows * columns * size;
        assert!(Weight::mapped(&file, 12..end, &[rows, columns + 1], dtype).is_none());
        assert!(Weight::mapped(&file, 11..end - 1, &[rows, columns], dtype).is_none());
        assert!(Weight::mapped(&file, 12..end, &[rows, columns], DType::I64).is_none());
        let mapped = Weight::mapped(&file, 12..end, &[rows, columns], dtype).unwrap();
        let weight = Weight::from(dense.clone());
        assert_eq!((mapped.dims(), mapped.dtype()), (weight.dims(), dtype));
        let same = |found: Tensor, expected: Tensor| {
            assert_eq!(found.dims(), expected.dims());
            assert_eq!(found.dtype(), expected.dtype());
            let bits =
                |x: &Tensor| values(&x.to_dtype(DType::F32).unwrap()).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{dtype:?}");
        };
        same(mapped.tensor().unwrap(), dense.clone());
        same(mapped.rows(&[18, 0, 18], DType::F32).unwrap(), weight.rows(&[18, 0, 18], DType::F32).unwrap());
        same(mapped.row_norms_squared().unwrap(), weight_norms_squared(&dense).unwrap());
        let part = mapped.narrow_rows(3, 7).unwrap();
        same(part.tensor().unwrap(), dense.narrow(0, 3, 7).unwrap());
        same(part.narrow_rows(6, 1).unwrap().tensor().unwrap(), dense.narrow(0, 9, 1).unwrap());
        assert!(part.narrow_rows(6, 2).is_err() && mapped.rows(&[19], DType::F32).is_err() && mapped.dense().is_err());
        let term = LowRank::new(random(&[3, columns], 3), random(&[rows, 3], 4), 1.7);
        let layers = [&mapped, &weight].map(|weight| Linear { weight: weight.clone(), bias: Some(random(&[rows], 2)) });
        for count in [1, 70] {
            let (x, dy) = (random(&[count, columns], 5), random(&[count, rows], 6));
            let [found, expected] = layers.each_ref().map(|layer| layer.forward(&x, Some(&term), None, None).unwrap());
            same(found, expected);
            let wanted = Wanted { input: true, weight: false, bias: false };
            let [found, expected] = layers
                .each_ref()
                .map(|layer| layer.backward(Some(&x), Some(&term), None, &dy, wanted, None, None).unwrap());
            same(found.input.unwrap(), expected.input.unwrap());
        }
    }
    std::fs::remove_file(&path).unwrap();
}
