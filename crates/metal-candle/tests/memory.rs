//! Compares the predicted peak memory with real allocations. It is a separate test binary because it counts all
//! allocations of the process.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use candle_core::{DType, Device, Tensor};
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::{Dataset, Random, Sample};
use metal_candle::models::{Batch, LossOptions, Targets, Trainable};
use metal_candle::training::{LRScheduler, Trained, Trainer, TrainingConfig};
use metal_candle::{Error, Model, ModelConfig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system allocator, with counts of the bytes in use and their peak.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are forwarded to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Shape {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    vocab: usize,
    is_tied: bool,
    dtype: DType,
}

fn model(shape: &Shape) -> Model {
    let Shape { hidden, intermediate, layers, vocab, is_tied, .. } = shape;
    let config = format!(
        r#"{{"model_type": "qwen2", "vocab_size": {vocab}, "hidden_size": {hidden}, "intermediate_size": {intermediate},
        "num_hidden_layers": {layers}, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": {is_tied}, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}}"#
    );
    let config = ModelConfig::from_json_str(&config).unwrap();
    let mut random = Random::new(1);
    let tensors: HashMap<String, Tensor> = Model::parameter_shapes(&config)
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| (random.next_f32() - 0.5) * 0.1).collect();
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .map(|(name, tensor)| (name, tensor.to_dtype(shape.dtype).unwrap()))
        .collect();
    Model::from_tensors(config, tensors, metal_candle::Device::CPU).unwrap()
}

fn dataset(lengths: &[usize], masked: usize) -> Dataset {
    let mut random = Random::new(2);
    let samples = lengths.iter().map(|&length| Sample {
        ids: (0..length).map(|_| random.below(900) as u32).collect(),
        trained: (0..length).map(|i| i >= masked).collect(),
        source: None,
    });
    Dataset::from_samples(samples.collect())
}

fn config() -> TrainingConfig {
    TrainingConfig { lr_scheduler: LRScheduler::constant(1e-4), ..TrainingConfig::default() }
}

/// The real memory of a run, beyond that before the model, and the prediction.
fn run<T: Trained>(before: usize, trainer: &Trainer<T>, dataset: &Dataset) -> (usize, usize) {
    let plan = trainer.plan(dataset).unwrap();
    PEAK.store(IN_USE.load(Ordering::Relaxed), Ordering::Relaxed);
    let metrics = trainer.train(dataset).unwrap();
    assert!(metrics.final_loss().unwrap().is_finite());
    assert_eq!((metrics.num_steps, metrics.tokens), (plan.steps, plan.tokens));
    assert_eq!(metrics.trained_tokens, plan.trained_tokens);
    (PEAK.load(Ordering::Relaxed) - before, plan.peak_bytes)
}

const SMALL: Shape = Shape { hidden: 96, intermediate: 256, layers: 6, vocab: 1000, is_tied: true, dtype: DType::F32 };

/// Measures on a new thread, because a thread reuses the buffer in which it packs operands.
fn alone<R: Send>(measure: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| scope.spawn(measure).join().unwrap())
}

#[test]
fn the_predicted_peak_is_the_real_one() {
    // allocations of the pool's threads for themselves are not part of a run
    alone(|| {
        let adapter = LoRAAdapter::builder(&model(&SMALL)).build().unwrap();
        Trainer::new(adapter, config()).unwrap().train(&dataset(&[300, 300], 1)).unwrap()
    });
    let qv = vec![TargetModule::QProj, TargetModule::VProj];
    let all = TargetModule::ALL.to_vec();
    let mut worst: f64 = 0.0;
    let mut check = |name: &str, (found, predicted): (usize, usize)| {
        let error = predicted as f64 / found as f64 - 1.0;
        eprintln!("{name:44} {found:>12} bytes, predicted {predicted:>12}: {:+.2} %", 100.0 * error);
        worst = worst.max(error.abs());
    };
    let lora = |shape: &Shape, modules: &[TargetModule], dropout: f64, lengths: &[usize], masked, blocks| {
        alone(|| {
            let before = IN_USE.load(Ordering::Relaxed);
            let model = model(shape);
            let builder = LoRAAdapter::builder(&model).with_target_modules(modules.to_vec());
            let adapter = builder.with_rank(8).with_dropout(dropout).build().unwrap();
            let trainer = Trainer::new(adapter, config()).unwrap().with_checkpointed_blocks(blocks);
            run(before, &trainer, &dataset(lengths, masked))
        })
    };
    check("q and v, f32", lora(&SMALL, &qv, 0.0, &[500, 400, 300, 500], 1, 0));
    check("all linear, f32", lora(&SMALL, &all, 0.0, &[500, 400, 300, 500], 1, 0));
    check("all linear, bf16", lora(&Shape { dtype: DType::BF16, ..SMALL }, &all, 0.0, &[700, 900], 1, 0));
    check("all linear, dropout", lora(&SMALL, &all, 0.1, &[700, 900], 1, 0));
    check("most tokens masked", lora(&SMALL, &all, 0.0, &[700, 900], 600, 0));
    check("three checkpointed blocks", lora(&SMALL, &all, 0.0, &[700, 900], 1, 3));
    check("all blocks checkpointed", lora(&SMALL, &all, 0.0, &[700, 900], 1, 6));
    let wide = Shape { vocab: 50_000, layers: 2, is_tied: false, ..SMALL };
    check("a large vocabulary", lora(&wide, &qv, 0.0, &[600, 500], 1, 0));
    let deep = Shape { hidden: 64, intermediate: 512, layers: 12, ..SMALL };
    check("many wide layers, bf16", lora(&Shape { dtype: DType::BF16, ..deep }, &all, 0.0, &[400, 300], 1, 4));
    check(
        "last layers only",
        alone(|| {
            let before = IN_USE.load(Ordering::Relaxed);
            let model = model(&SMALL);
            let adapter = LoRAAdapter::builder(&model).with_last_layers(2).with_dora(true).build().unwrap();
            run(before, &Trainer::new(adapter, config()).unwrap(), &dataset(&[600, 500], 1))
        }),
    );
    for (name, is_tied) in [("rows of 64 tokens", true), ("rows of 64 tokens of embedding and head", false)] {
        check(
            name,
            alone(|| {
                let before = IN_USE.load(Ordering::Relaxed);
                let model = model(&Shape { is_tied, ..wide });
                let builder = LoRAAdapter::builder(&model).with_trainable_tokens(0..64);
                let builder = if is_tied { builder } else { builder.with_trainable_head_tokens(64..128) };
                let adapter = builder.build().unwrap();
                run(before, &Trainer::new(adapter, config()).unwrap(), &dataset(&[600, 500], 1))
            }),
        );
    }
    check(
        "micro-batches",
        alone(|| {
            let before = IN_USE.load(Ordering::Relaxed);
            let model = model(&SMALL);
            let adapter = LoRAAdapter::builder(&model).build().unwrap();
            let trainer = Trainer::new(adapter, config()).unwrap().with_micro_batch_tokens(500);
            run(before, &trainer, &dataset(&[250, 250, 250, 250, 250, 250], 1))
        }),
    );
    check(
        "all weights",
        alone(|| {
            let before = IN_USE.load(Ordering::Relaxed);
            let trainer = Trainer::full(model(&SMALL), config()).unwrap();
            run(before, &trainer, &dataset(&[700, 900], 1))
        }),
    );
    assert!(worst <= 0.05, "the worst prediction is {:.1} % off", 100.0 * worst);

    alone(a_run_is_made_to_fit);
    let taken = |vocab| alone(move || taken_by_a_step(vocab, 2048));
    let (of_head, of_blocks) = (taken(151_936), taken(64));
    eprintln!("the head takes {} bytes beside the {of_blocks} of the blocks", of_head - of_blocks);
    assert!(of_head - of_blocks < 100_000_000);
}

/// The memory of the gradients of one sequence of `tokens` tokens, besides the weights.
fn taken_by_a_step(vocab: usize, tokens: usize) -> usize {
    let model = model(&Shape { layers: 1, vocab, ..SMALL });
    let adapter = LoRAAdapter::builder(&model).build().unwrap();
    let terms = adapter.low_rank_updates().unwrap();
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i % 64).collect();
    let targets = Targets { ids: ids.clone(), weights: vec![1.0; tokens] };
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let trainable = Trainable::low_rank(&terms);
    model.loss_and_gradients(&Batch::single(&ids), &targets, trainable, LossOptions::default()).unwrap();
    PEAK.load(Ordering::Relaxed) - before
}

fn a_run_is_made_to_fit() {
    let data = dataset(&[600, 500, 400, 300, 200], 1);
    let before = IN_USE.load(Ordering::Relaxed);
    let model = model(&SMALL);
    let adapter = LoRAAdapter::builder(&model).with_target_modules(TargetModule::ALL).build().unwrap();
    let trainer = || Trainer::new(adapter.clone(), config()).unwrap();
    let whole = trainer().plan(&data).unwrap();
    assert_eq!((whole.checkpointed_blocks, whole.micro_batch_tokens), (0, whole.largest_batch));
    let mut before_that = whole.peak_bytes + 1;
    let reference = alone(|| trainer().train(&data).unwrap().final_loss().unwrap());
    for share in [100, 80, 60, 45, 35] {
        let limit = whole.peak_bytes * share / 100;
        let Ok((fitted, plan)) = trainer().fitted(&data, limit) else { continue };
        assert!(plan.peak_bytes <= limit && plan.peak_bytes <= before_that, "{share} %: {plan:?}");
        before_that = plan.peak_bytes;
        PEAK.store(IN_USE.load(Ordering::Relaxed), Ordering::Relaxed);
        let loss = alone(|| fitted.train(&data).unwrap().final_loss().unwrap());
        assert!((loss - reference).abs() < 1e-4, "{share} %: {loss} {reference}");
        let found = PEAK.load(Ordering::Relaxed) - before;
        assert!(found as f64 <= 1.06 * limit as f64, "{share} %: {found} of {limit}");
    }
    assert!(before_that < whole.peak_bytes * 3 / 5, "nothing smaller was found");
    let Err(Error::Memory { needed, limit, detail }) = trainer().fitted(&data, 1_000_000) else {
        panic!("a run that cannot fit is refused")
    };
    assert!(limit == 1_000_000 && needed < whole.peak_bytes, "{needed}");
    assert!(detail.contains("with the longest sample (600 tokens) alone"), "{detail}");
}
