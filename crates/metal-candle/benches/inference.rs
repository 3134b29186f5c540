//! Prefill, decode and sampling at the size of Qwen2.5-Coder-0.5B.
//!
//! The model has random bf16 weights: the speed of a pass does not depend on them. The last lines give the cost of
//! choosing a token as a share of the forward pass before it.

#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use half::bf16;
use metal_candle::inference::{KVCache, KVCacheConfig, Sampler, SamplingConfig};
use metal_candle::models::{Batch, Model, Rows};
use metal_candle::{Device, ModelConfig, ModelLoader};
use std::hint::black_box;
use std::time::{Duration, Instant};

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

fn strategies() -> Vec<(&'static str, SamplingConfig)> {
    let seeded = || SamplingConfig::default().with_seed(1);
    vec![
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
    ]
}

/// A sampler that has seen a prompt of 1024 tokens.
fn sampler(config: &SamplingConfig) -> Sampler {
    let mut sampler = Sampler::new(config.clone()).unwrap();
    sampler.observe(&(0..1024).map(|i| i * 131).collect::<Vec<_>>());
    sampler
}

fn sampling(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampling");
    let strategies = strategies();
    for (shape, logits) in [("peaked", peaked()), ("flat", normal(1.0))] {
        for (name, config) in &strategies {
            let mut sampler = sampler(config);
            group.bench_function(BenchmarkId::new(*name, shape), |bencher| {
                bencher.iter(|| sampler.sample(black_box(&logits)).unwrap());
            });
        }
    }
    group.finish();
}

/// `config.json` of Qwen2.5-Coder-0.5B.
const CONFIG: &str = r#"{
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true
}"#;

fn model() -> Model {
    let config = ModelConfig::from_json_str(CONFIG).unwrap();
    let mut state = 1u32;
    let tensors = Model::parameter_shapes(&config)
        .into_iter()
        .map(|(name, shape)| {
            let is_norm = name.contains("norm");
            let mut weight = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bf16::from_f32(((state >> 8) as f32 / (1u32 << 24) as f32 - 0.5) * 0.07 + f32::from(u8::from(is_norm)))
            };
            let weights: Vec<bf16> = (0..shape.iter().product()).map(|_| weight()).collect();
            (name, Tensor::from_vec(weights, shape, &candle_core::Device::Cpu).unwrap())
        })
        .collect();
    Model::from_tensors(config, tensors, Device::CPU).unwrap()
}

fn cache(model: &Model, max_seq_len: usize) -> KVCache {
    let config = model.config();
    let sizes = KVCacheConfig {
        max_seq_len,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: 1,
    };
    KVCache::with_dtype(sizes, &model.device(), DType::F16).unwrap()
}

const CONTEXT: usize = 64;

fn forward(criterion: &mut Criterion) {
    let model = model();
    let prompt: Vec<u32> = (0..CONTEXT as u32).map(|i| i * 577).collect();
    let mut cache = cache(&model, CONTEXT + 1);
    let mut group = criterion.benchmark_group("forward");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(CONTEXT as u64));
    group.bench_function(format!("prefill of {CONTEXT} tokens"), |bencher| {
        bencher.iter(|| {
            cache.clear();
            model.forward(&Batch::single(&prompt), None, Some(&mut cache), Rows::Last).unwrap()
        });
    });
    // a filter may have skipped the prefill
    cache.clear();
    model.forward(&Batch::single(&prompt), None, Some(&mut cache), Rows::Last).unwrap();
    let mut decode = || {
        cache.truncate(0, CONTEXT);
        let mut batch = Batch::new();
        batch.push(&[1], CONTEXT, 0);
        model.forward(&batch, None, Some(&mut cache), Rows::Last).unwrap()
    };
    // the weights that a step reads: tied, so the embedding is read once, as the head
    group.throughput(Throughput::Bytes(model.config().num_bytes(DType::BF16) as u64));
    group.bench_function(format!("decode after {CONTEXT} tokens"), |bencher| bencher.iter(&mut decode));
    group.finish();

    let pass = median(15, &mut decode);
    let logits: Vec<f32> = decode().flatten_all().unwrap().to_vec1().unwrap();
    println!("decode step: {:.2} ms; choosing a token from its logits:", pass * 1e3);
    for (name, config) in strategies() {
        let mut sampler = sampler(&config);
        let choice = median(200, || sampler.sample(black_box(&logits)).unwrap());
        println!("  {name}: {:.3} ms, {:.2} % of the step", choice * 1e3, choice / pass * 100.0);
    }
}

/// The cost of a pass over one token and its drafts, in steps of one token.
fn drafts(_: &mut Criterion) {
    let built_in = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano");
    for (name, model) in [("built-in model", ModelLoader::new().load(built_in).unwrap()), ("0.5B", model())] {
        for context in [64, 1024] {
            let prompt: Vec<u32> = (0..context as u32).map(|i| i * 577 % 4000).collect();
            let mut cache = cache(&model, context + 17);
            model.forward(&Batch::single(&prompt), None, Some(&mut cache), Rows::Last).unwrap();
            let mut pass = |rows: usize| {
                fastest(25, || {
                    cache.truncate(0, context);
                    let mut batch = Batch::new();
                    batch.push(&prompt[..rows], context, 0);
                    model.forward(&batch, None, Some(&mut cache), Rows::All).unwrap()
                })
            };
            let step = pass(1);
            println!("{name} after {context} tokens: a step takes {:.2} ms", step * 1e3);
            for drafts in [1, 2, 3, 4, 6, 8, 12, 16] {
                println!("  {drafts} drafts: {:.2} steps", pass(1 + drafts) / step);
            }
        }
    }
}

/// The median time of a call, in seconds.
fn median<T>(calls: usize, call: impl FnMut() -> T) -> f64 {
    times(calls, call)[calls / 2]
}

/// The shortest time of a call, in seconds.
fn fastest<T>(calls: usize, call: impl FnMut() -> T) -> f64 {
    times(calls, call)[0]
}

/// The times of calls, in rising order.
fn times<T>(calls: usize, mut call: impl FnMut() -> T) -> Vec<f64> {
    let mut times: Vec<f64> = (0..calls)
        .map(|_| {
            let start = Instant::now();
            black_box(call());
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(10);
    targets = drafts, sampling, forward
}
criterion_main!(benches);
