//! The names and signatures of the quick start, used as a crate outside would use them.

use candle_core::{DType, Tensor};
use metal_candle::data::{Dataset, Sample};
use metal_candle::inference::{GenerationConfig, Generator, KVCache, KVCacheConfig, SamplingStrategy, sample_token};
use metal_candle::models::{Batch, Qwen, Rows, write_safetensors};
use metal_candle::ops::{LowRank, LowRankUpdates};
use metal_candle::training::{
    AdamWConfig, LRScheduler, LoRAAdapter, LoRAAdapterConfig, TargetModule, Trainer, TrainingConfig, cross_entropy,
    save_checkpoint,
};
use metal_candle::{Device, ModelConfig, ModelLoader};
use std::error::Error;
use std::path::Path;

const CONFIG: &str = r#"{"model_type": "qwen2", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
    "eos_token_id": 3, "rope_theta": 10000.0, "max_position_embeddings": 64}"#;

/// A small model folder with weights that differ from each other.
fn write_model(folder: &Path) -> Result<(), Box<dyn Error>> {
    let config = ModelConfig::from_json_str(CONFIG)?;
    std::fs::write(folder.join("config.json"), CONFIG)?;
    let mut tensors = Vec::new();
    for (number, (name, shape)) in Qwen::parameter_shapes(&config).into_iter().enumerate() {
        let count: usize = shape.iter().product();
        let centre = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let values: Vec<f32> =
            (0..count).map(|i| centre + ((i * 37 + number * 11) % 101) as f32 / 250.0 - 0.2).collect();
        tensors.push((name, Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?));
    }
    write_safetensors(folder.join("model.safetensors"), &tensors, &[("format", "pt")])?;
    Ok(())
}

#[test]
fn load_train_save_and_generate() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    write_model(folder.path())?;

    let device = Device::new_with_fallback(0);
    let config = ModelConfig::from_json(folder.path().join("config.json"))?;
    let loader = ModelLoader::new().with_device(device).with_dtype(DType::F16);
    let model: Qwen = loader.load(folder.path().join("model.safetensors"))?;
    assert_eq!((model.dtype(), model.config()), (DType::F16, &config));

    let lora_config = LoRAAdapterConfig {
        rank: 8,
        alpha: 16.0,
        dropout: 0.0,
        target_modules: vec![TargetModule::QProj, TargetModule::VProj],
    };
    let adapter = LoRAAdapter::new(&model, lora_config, &device)?;
    let training_config = TrainingConfig {
        num_epochs: 3,
        lr_scheduler: LRScheduler::warmup_cosine(100, 1000, 1e-4, 1e-6),
        optimizer_config: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
    };
    let dataset = Dataset::from_samples(
        (0..4).map(|i| Sample { ids: vec![i, 5, 7, i + 9, 3], trained: vec![true; 5], source: None }).collect(),
    );
    let trainer = Trainer::new(adapter, training_config)?;
    let metrics = trainer.train(&dataset)?;
    assert_eq!(metrics.num_epochs, 3);
    let checkpoint = folder.path().join("checkpoint.safetensors");
    save_checkpoint(&trainer.lora_adapter(), &checkpoint, None)?;
    assert!(checkpoint.metadata()?.len() > 0);

    let cache_config = KVCacheConfig {
        max_seq_len: 64,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: 1,
    };
    let mut cache = KVCache::new(cache_config, &device)?;
    let logits = model.forward(&Batch::single(&[1, 5, 7]), None, Some(&mut cache), Rows::Last)?;
    assert_eq!((logits.dims(), cache.len(0)), ([1, 24].as_slice(), 3));
    let greedy = sample_token(&logits, &SamplingStrategy::Greedy)?;
    let best = logits.squeeze(0)?.argmax(0)?.to_scalar::<u32>()?;
    assert_eq!(greedy, best);
    for strategy in [
        SamplingStrategy::TopK { k: 5 },
        SamplingStrategy::TopP { p: 0.9 },
        SamplingStrategy::Temperature { temperature: 0.7 },
    ] {
        assert!(sample_token(&logits, &strategy)? < 24);
    }
    assert_eq!(sample_token(&logits, &SamplingStrategy::TopK { k: 1 })?, best);

    // losses with and without label smoothing, and a swap of adapters on the live model
    let target = Tensor::new(&[best], &device.candle())?;
    let plain = cross_entropy(&logits, &target, 0.0)?.to_scalar::<f32>()?;
    let smooth = cross_entropy(&logits, &target, 0.1)?.to_scalar::<f32>()?;
    assert!(smooth > plain, "smoothing {smooth} must cost more than {plain} on the likeliest token");
    let mut generator = Generator::new(model);
    let bare = generator.generate([1, 5, 7], &GenerationConfig::default())?;
    assert_eq!(bare.tokens.first(), Some(&best));
    // a few steps of a slow warm-up change less than half precision shows, so their effect is made larger
    let mut terms = LowRankUpdates::new();
    for (number, term) in trainer.lora_adapter().low_rank_updates()?.iter() {
        terms.insert(number, LowRank { scale: 1e4 * term.scale, ..term.clone() });
    }
    generator.set_adapter(Some(terms));
    let adapted = generator.generate([1, 5, 7], &GenerationConfig::default())?;
    assert_ne!(adapted.log_probabilities[0].to_bits(), bare.log_probabilities[0].to_bits());
    generator.set_adapter(None);
    assert_eq!(generator.generate([1, 5, 7], &GenerationConfig::default())?.tokens, bare.tokens);
    Ok(())
}

#[test]
fn each_schedule_of_the_quick_start() {
    let schedules = [
        LRScheduler::constant(1e-4),
        LRScheduler::linear(0, 1000, 1e-4, 1e-6),
        LRScheduler::cosine(1000, 1e-4, 1e-6),
        LRScheduler::warmup_cosine(100, 1000, 1e-4, 1e-6),
    ];
    let rates = schedules.map(|schedule| schedule.learning_rate(1000));
    assert!((rates[0] - 1e-4).abs() < 1e-12);
    assert!(rates[1..].iter().all(|rate| (rate - 1e-6).abs() < 1e-12), "{rates:?}");
}
