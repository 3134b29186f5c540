//! Tests the fused launches of a block on a GPU against separate products and candle's operations on the CPU.

#![allow(clippy::unwrap_used)]

use super::activation::{self, Activation};
use super::attention::{self, Spans};
use super::fused::{self, GradientFactors, Layer, LowRankGradientBuffer};
use super::gpu_tests::{self, OFFSETS, TYPES, assert_near, both};
use super::linear::Linear;
use super::norm::{Norm, NormNeedsGrad};
use super::rotary::{Pairs, RotaryScaling};
use super::tests::{rotary_table, values};
use super::{LowRank, LowRankUpdates};
use candle_core::{DType, Tensor};
use metal_candle_kernels::AttentionShape;

/// A layer on the device; its weight, A and B on the CPU in f32.
struct TwoLayers {
    linear: Linear,
    update: Option<LowRank>,
    weight: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
}

const SCALE: f32 = 0.7;

/// Tokens, hidden size, inner size, head size, ranks, and the offset of tensors. On Metal any are supported.
#[cfg(feature = "metal")]
const SIZES: [(usize, usize, usize, usize, [usize; 3], usize); 3] =
    [(1, 12, 20, 16, [2, 0, 3], 0), (70, 64, 96, 16, [16, 16, 16], 4), (37, 26, 75, 16, [5, 70, 1], 3)];
#[cfg(not(feature = "metal"))]
const SIZES: [(usize, usize, usize, usize, [usize; 3], usize); 6] = [
    (1, 16, 24, 16, [8, 0, 16], 0),
    (37, 72, 136, 16, [24, 8, 32], 8),
    (70, 64, 96, 64, [16, 16, 16], 8),
    (150, 320, 576, 64, [8, 16, 24], 8),
    (2050, 64, 192, 128, [16, 16, 16], 8),
    (300, 160, 1056, 128, [32, 32, 8], 0),
];

/// The types for which there are fused kernels.
fn types() -> impl Iterator<Item = (DType, f32)> {
    let device = gpu_tests::device();
    TYPES.into_iter().filter(move |(dtype, _)| fused::has_kernels(&device, *dtype))
}

fn two_layers(out: usize, input: usize, rank: usize, seed: u64, dtype: DType, offset: usize) -> TwoLayers {
    let (weight, weight_cpu) = both(&[out, input], seed, dtype, offset);
    let (bias, bias_cpu) = both(&[out], seed + 1, dtype, offset);
    let (a, a_cpu) = both(&[rank.max(1), input], seed + 2, dtype, offset);
    let (b, b_cpu) = both(&[out, rank.max(1)], seed + 3, dtype, offset);
    let linear = Linear { weight: weight.into(), bias: Some(bias) };
    let scale = if rank == 0 { 0.0 } else { f64::from(SCALE) };
    let update = (rank > 0).then(|| LowRank::new(a, b, SCALE));
    TwoLayers { linear, update, weight: weight_cpu, bias: bias_cpu, a: (a_cpu * scale).unwrap(), b: b_cpu }
}

impl TwoLayers {
    fn layer(&self) -> Layer<'_> {
        Layer { linear: &self.linear, update: self.update.as_ref() }
    }

    /// `x (W + scale B A)^T`.
    fn plain(&self, x: &Tensor) -> Tensor {
        x.matmul(&self.adapted().t().unwrap()).unwrap()
    }

    fn adapted(&self) -> Tensor {
        (&self.weight + self.b.matmul(&self.a).unwrap()).unwrap()
    }
}

/// All launches of a block with low-rank updates, with odd ranks, odd sizes and tensors at any offset.
#[test]
fn fused_layers() {
    for (dtype, tolerance) in types() {
        for (tokens, hidden, inner, head_dim, ranks, offset) in SIZES {
            let tolerance = 3.0 * tolerance;
            let (x, x_cpu) = both(&[tokens, hidden], 1, dtype, offset);
            let near = |what: &str, found: &Tensor, expected: &Tensor| {
                assert_near(&format!("{what} of {tokens} in {dtype:?}"), found, expected, tolerance);
            };

            // q, k and v, of two heads and one
            let qkv: Vec<TwoLayers> = [2 * head_dim, head_dim, head_dim]
                .into_iter()
                .zip(ranks)
                .zip([10, 20, 30])
                .map(|((out, rank), seed)| two_layers(out, hidden, rank, seed, dtype, offset))
                .collect();
            let layers: Vec<Layer> = qkv.iter().map(TwoLayers::layer).collect();
            let layers: [Layer; 3] = layers.try_into().unwrap();
            let made = fused::products(&x, &layers, true).unwrap();
            let table = rotary_table(head_dim, Pairs::Halves, RotaryScaling::Default);
            let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 41).collect();
            let (rotation, plain) = (
                table.rotation(&positions, &[0, tokens], &x).unwrap(),
                table.rotation(&positions, &[0, tokens], &x_cpu).unwrap(),
            );
            fused::finish_qkv(Some(&rotation), head_dim, &layers, &made).unwrap();
            for (i, two) in qkv.iter().enumerate() {
                let expected = two.plain(&x_cpu).broadcast_add(&two.bias).unwrap();
                let expected = if i < 2 { plain.plain(&expected, head_dim, false).unwrap() } else { expected };
                near("q, k or v", &made.y[i], &expected);
            }

            // the backward pass, including the norm before them
            let dys: Vec<(Tensor, Tensor)> = qkv
                .iter()
                .map(|two| both(&[tokens, two.weight.dims()[0]], 40 + two.weight.dims()[0] as u64, dtype, offset))
                .collect();
            let on_device: Vec<&Tensor> = dys.iter().map(|(dy, _)| dy).collect();
            let (d_normed, dzs) = fused::products_backward(&layers, &on_device, true).unwrap();
            let (none, same) = fused::products_backward(&layers, &on_device, false).unwrap();
            assert!(none.is_none());
            for (a, b) in dzs.iter().zip(&same) {
                assert_eq!(a.as_ref().map(values), b.as_ref().map(values));
            }
            let (weight, weight_cpu) = both(&[hidden], 50, dtype, offset);
            let norm = Norm::rms(weight, 1e-6);
            let plain_norm = Norm::rms(weight_cpu, 1e-6);
            let (before, before_cpu) = both(&[tokens, hidden], 51, dtype, offset);
            let through = |i: usize| dys[i].1.matmul(&qkv[i].adapted()).unwrap();
            let expected = ((through(0) + through(1)).unwrap() + through(2)).unwrap();
            let (expected, _) =
                plain_norm.plain_backward(&x_cpu, &expected, &before_cpu, NormNeedsGrad::default()).unwrap();
            let (dx, normed) =
                fused::finish_norm_backward(&norm, &x, d_normed.unwrap(), &before, &layers, &dzs).unwrap();
            near("dx", &dx, &expected);
            near("norm", &normed, &plain_norm.plain_forward(&x_cpu).unwrap());

            // the gradients of the low-rank updates
            let mut updates = LowRankUpdates::new();
            for (i, two) in qkv.iter().enumerate() {
                if let Some(update) = &two.update {
                    updates.insert(i, update.clone());
                }
            }
            let buffer = LowRankGradientBuffer::new(&updates, 7, &x).unwrap().unwrap();
            let factors: Vec<GradientFactors> = (0..3)
                .map(|i| GradientFactors {
                    id: i,
                    layer: layers[i],
                    x: x.clone(),
                    dy: on_device[i].clone(),
                    z: made.z[i].clone(),
                    dz: dzs[i].clone(),
                })
                .collect();
            let found = fused::low_rank_gradients(&factors, &buffer).unwrap();
            assert_eq!(found.len(), ranks.iter().filter(|&&rank| rank > 0).count());
            for (i, of_update) in found {
                let (two, dy) = (&qkv[i], &dys[i].1);
                let scaled = (dy * f64::from(SCALE)).unwrap();
                let dz = scaled.matmul(&two.b).unwrap();
                near("da", &of_update.a, &dz.t().unwrap().matmul(&x_cpu).unwrap());
                let z = x_cpu.matmul(&two.a.t().unwrap()).unwrap();
                near("db", &of_update.b, &dy.t().unwrap().matmul(&z).unwrap());
            }

            // the gated activation, forward and backward
            let mlp = [0, 1].map(|i| two_layers(inner, hidden, ranks[i], 60 + 10 * i as u64, dtype, offset));
            let layers = [mlp[0].layer(), mlp[1].layer()];
            let made = fused::products(&x, &layers, true).unwrap();
            let y = fused::finish_mlp(&layers, &made).unwrap();
            let (gate, up) = (mlp[0].plain(&x_cpu), mlp[1].plain(&x_cpu));
            let expected = activation::plain_gated(Activation::Silu, &gate, &up).unwrap();
            near("activation", &y, &expected);
            let down = two_layers(hidden, inner, ranks[2], 80, dtype, offset);
            let ((dy, dy_cpu), wide) = (both(&[tokens, hidden], 81, dtype, offset), down.adapted());
            let (d_activation, dz) = fused::products_backward(&[down.layer()], &[&dy], true).unwrap();
            let (d_gate, d_up, again) =
                fused::finish_mlp_backward(&layers, &made, d_activation.unwrap(), down.layer(), dz[0].as_ref())
                    .unwrap();
            fused::complete_mlp(&layers, (&made.y[0], &made.y[1]), &made.z).unwrap();
            near("gate", &made.y[0], &gate);
            near("up", &made.y[1], &up);
            let (pd_gate, pd_up) =
                activation::plain_gated_backward(Activation::Silu, &gate, &up, &dy_cpu.matmul(&wide).unwrap()).unwrap();
            near("d_gate", &d_gate, &pd_gate);
            near("d_up", &d_up, &pd_up);
            assert_eq!(values(&again), values(&y));

            // the residual stream after it
            let made = fused::products(&y, &[down.layer()], true).unwrap();
            let only = fused::products(&y, &[down.layer()], false).unwrap();
            assert_eq!(made.z[0].as_ref().map(values), only.z[0].as_ref().map(values));
            let z = made.z[0].as_ref();
            let product = || made.y[0].force_contiguous().unwrap();
            let (stream, _) = fused::finish_stream(&x, product(), down.layer(), z, None).unwrap();
            let expected = (&x_cpu + down.plain(&expected)).unwrap();
            near("stream", &stream, &expected);
            let (stream, normed) = fused::finish_stream(&x, product(), down.layer(), z, Some(&norm)).unwrap();
            near("stream", &stream, &expected);
            near("normed stream", &normed.unwrap(), &plain_norm.plain_forward(&expected).unwrap());
        }
    }
}

#[test]
fn attention_in_front_of_a_low_rank_update() {
    for ((dtype, tolerance), head_dim) in types().flat_map(|of| [(of, 20), (of, 40)]) {
        let shape = AttentionShape::new(4, 2, head_dim, 0.3);
        let tokens = OFFSETS[OFFSETS.len() - 1];
        let tensor = |width, seed| both(&[tokens, width], seed, dtype, 0);
        let ((q, q_cpu), (k, k_cpu), (v, v_cpu)) =
            (tensor(4 * head_dim, 1), tensor(2 * head_dim, 2), tensor(2 * head_dim, 3));
        let (rank, offset) = if cfg!(feature = "metal") { (5, 3) } else { (24, 8) };
        let o = two_layers(32, 4 * head_dim, rank, 4, dtype, offset);
        let (dy, dy_cpu) = tensor(32, 9);
        let spans = Spans::new(&OFFSETS, &[shape], None, &q).unwrap();
        let saved = attention::forward(shape, None, &q, &k, &v, &spans).unwrap();
        let (d_out, dz) = fused::products_backward(&[o.layer()], &[&dy], true).unwrap();
        let d_out = d_out.unwrap();
        let through = (o.layer(), dz[0].as_ref());
        let found = attention::backward_through(shape, None, (&q, &k, &v), &saved, &spans, &d_out, through).unwrap();
        let d_out = dy_cpu.matmul(&o.adapted()).unwrap();
        let expected = attention::plain_backward(shape, None, (&q_cpu, &k_cpu, &v_cpu), &OFFSETS, &d_out).unwrap();
        assert_near("dq", &found.q, &expected.q, 4.0 * tolerance);
        assert_near("dk", &found.k, &expected.k, 4.0 * tolerance);
        assert_near("dv", &found.v, &expected.v, 4.0 * tolerance);
    }
}
