//! Training steps of a model of the size of the built-in one, and the optimizer by itself.
//!
//! Throughput is in tokens for steps and in parameters for the optimizer.

#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{DType, Device as CandleDevice, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::Random;
use metal_candle::models::{Batch, GradientOf, LossOptions, Targets, Trainable};
use metal_candle::training::{
    AdafactorConfig, AdamWConfig, LionConfig, MuonConfig, Optimizer, OptimizerConfig, Parameter, ParameterGroup,
    ScheduleFreeAdamWConfig, SgdConfig, global_norm, save_checkpoint,
};
use metal_candle::{Device, Model, ModelConfig};
use std::collections::HashMap;
use std::time::Duration;

const CONFIG: &str = r#"{"model_type": "qwen2", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": true,
    "max_position_embeddings": 2048, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}"#;

/// Tokens of a sequence, and sequences of a batch.
const LENGTHS: (usize, usize) = (256, 4);

fn model(dtype: DType) -> Model {
    let config = ModelConfig::from_json_str(CONFIG).unwrap();
    let mut random = Random::new(1);
    let tensors: HashMap<String, Tensor> = Model::parameter_shapes(&config)
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| (random.next_f32() - 0.5) * 0.07).collect();
            let tensor = Tensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap();
            (name, tensor.to_dtype(dtype).unwrap())
        })
        .collect();
    Model::from_tensors(config, tensors, Device::CPU).unwrap()
}

fn batch() -> (Batch, Targets) {
    let (length, count) = LENGTHS;
    let mut random = Random::new(2);
    let mut sequence = || (0..length).map(|_| random.below(4096) as u32).collect::<Vec<u32>>();
    let batch = Batch::from_sequences((0..count).map(|_| sequence()));
    let mut ids = batch.ids()[1..].to_vec();
    ids.push(0);
    let weights = vec![1.0; ids.len()];
    (batch, Targets { ids, weights })
}

fn steps(criterion: &mut Criterion) {
    let (batch, targets) = batch();
    let options = LossOptions { label_smoothing: 0.0, grad_scale: 1e-3, dropout_seed: 0, ..LossOptions::default() };
    let mut group = criterion.benchmark_group("forward and backward");
    group.throughput(Throughput::Elements(batch.num_tokens() as u64));
    for dtype in [DType::F32, DType::BF16] {
        let model = model(dtype);
        for (name, modules) in
            [("q and v", vec![TargetModule::QProj, TargetModule::VProj]), ("all linear", TargetModule::ALL.to_vec())]
        {
            let adapter = LoRAAdapter::builder(&model).with_rank(8).with_target_modules(modules).build().unwrap();
            let terms = adapter.low_rank_updates().unwrap();
            group.bench_function(BenchmarkId::new(format!("LoRA on {name}"), dtype.as_str()), |bencher| {
                bencher
                    .iter(|| model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap());
            });
        }
    }
    let model = model(DType::F32);
    group.bench_function("all parameters", |bencher| {
        bencher.iter(|| model.loss_and_gradients(&batch, &targets, Trainable::all(), options).unwrap());
    });
    group.bench_function("loss only", |bencher| {
        bencher.iter(|| model.loss(&batch, &targets, None, 0.0).unwrap());
    });
    group.finish();
}

fn optimizer(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("optimizer");
    let configs = [
        OptimizerConfig::AdamW(AdamWConfig::default()),
        OptimizerConfig::Sgd(SgdConfig::default()),
        OptimizerConfig::Lion(LionConfig::default()),
        OptimizerConfig::Adafactor(AdafactorConfig::default()),
        OptimizerConfig::Muon(MuonConfig::default()),
        OptimizerConfig::AdamW8bit(AdamWConfig::default()),
        OptimizerConfig::ScheduleFreeAdamW(ScheduleFreeAdamWConfig::default()),
    ];
    // A and B of rank 8 of the linear layers of 24 blocks of width 896
    let shapes = [896, 128, 128, 896, 4864, 4864].map(|out| [[8, 896], [out, 8]]);
    let shapes: Vec<[usize; 2]> = shapes.into_iter().chain([[[8, 4864], [896, 8]]]).flatten().collect();
    let mut parameters: Vec<Parameter> = Vec::new();
    for shape in shapes.repeat(24) {
        let offset = parameters.last().map_or(0, |last| last.offset + last.len);
        let len = shape.iter().product();
        parameters.push(Parameter {
            name: "p".into(),
            offset,
            len,
            shape: shape.to_vec(),
            gradient: GradientOf::Parameter(0),
        });
    }
    let count = parameters.iter().map(|parameter| parameter.len).sum::<usize>();
    let values = Tensor::rand(-1.0_f32, 1.0, count, &CandleDevice::Cpu).unwrap();
    group.throughput(Throughput::Elements(count as u64));
    for config in configs {
        let mut optimizer = Optimizer::new(&values, &parameters, config, |_| ParameterGroup::default()).unwrap();
        group.bench_function(BenchmarkId::new(config.name(), count), |bencher| {
            bencher.iter(|| optimizer.step(&values, 1e-4, 1.0).unwrap());
        });
    }
    group.bench_function("norm", |bencher| bencher.iter(|| global_norm(&values).unwrap()));
    group.finish();
}

fn checkpoint(criterion: &mut Criterion) {
    let model = model(DType::BF16);
    let adapter = LoRAAdapter::builder(&model).with_rank(8).with_target_modules(TargetModule::ALL).build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut group = criterion.benchmark_group("checkpoint");
    group.throughput(Throughput::Bytes(4 * adapter.num_parameters() as u64));
    group.bench_function("adapter on all linear, rank 8", |bencher| {
        bencher.iter(|| save_checkpoint(&adapter, &path, None).unwrap());
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2)).sample_size(10);
    targets = steps, optimizer, checkpoint
}
criterion_main!(benches);
