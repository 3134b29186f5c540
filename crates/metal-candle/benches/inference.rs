//! The cost of choosing a token at the vocabulary of Qwen2.5, beside that of the forward pass it follows.

#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use metal_candle::inference::{Sampler, SamplingConfig};
use std::hint::black_box;
use std::time::Duration;

const VOCAB: usize = 151_936;

/// Logits with the shape of a language model's: normal with a deviation of 2.5 and a few far above the rest.
fn peaked() -> Vec<f32> {
    let mut logits: Vec<f32> = normal(2.5);
    for (rank, logit) in logits.iter_mut().step_by(7001).enumerate() {
        *logit = 20.0 - rank as f32 * 0.7;
    }
    logits
}

/// Normal logits of this deviation: those of a model with random weights.
fn normal(deviation: f32) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    // the sum of twelve uniform numbers has deviation 1
    (0..VOCAB).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * deviation).collect()
}

fn sampling(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampling");
    let seeded = || SamplingConfig::default().with_seed(1);
    let strategies = [
        ("greedy", SamplingConfig::greedy()),
        ("temperature 1", seeded()),
        ("temperature 0.7", seeded().with_temperature(0.7)),
        ("top-k 40", seeded().with_top_k(40)),
        ("top-k 1000", seeded().with_top_k(1000)),
        ("top-p 0.95", seeded().with_top_p(0.95)),
        ("top-p 0.5", seeded().with_top_p(0.5)),
        ("min-p 0.05", seeded().with_min_p(0.05)),
        ("temperature 0.7, top-k 40, top-p 0.95", seeded().with_temperature(0.7).with_top_k(40).with_top_p(0.95)),
        ("temperature 0.7, top-p 0.8", seeded().with_temperature(0.7).with_top_p(0.8)),
        (
            "temperature 0.7, top-p 0.8, repetition penalty 1.05 over 1024 tokens",
            seeded()
                .with_temperature(0.7)
                .with_top_p(0.8)
                .with_repetition_penalty(1.05)
                .with_penalty_window(Some(1024)),
        ),
    ];
    for (shape, logits) in [("peaked", peaked()), ("flat", normal(1.0))] {
        for (name, config) in &strategies {
            let mut sampler = Sampler::new(config.clone()).unwrap();
            sampler.observe(&(0..1024).map(|i| i * 131).collect::<Vec<_>>());
            group.bench_function(BenchmarkId::new(*name, shape), |bencher| {
                bencher.iter(|| sampler.sample(black_box(&logits)).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    targets = sampling
}
criterion_main!(benches);
