//! Fine-tunes a model with LoRA: `cargo run --release --example fine_tune [MODEL [DATA [OUTPUT]]]`.

use metal_candle::data::{Dataset, DatasetOptions, Datasets, SplitOptions, Tokenizer};
use metal_candle::training::{
    AdamWConfig, LRScheduler, LoRAAdapter, LoRAAdapterConfig, TargetModule, Trainer, TrainingConfig, TrainingEvent,
    evaluate,
};
use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;

const STEPS: usize = 30;
const BATCH_TOKENS: usize = 2048;
/// Validation rows that are evaluated before and after.
const EVALUATED_ROWS: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let folder = arguments.next().unwrap_or_else(nano);
    let data = arguments.next().unwrap_or_else(|| nano().join("data"));
    let output = arguments.next().unwrap_or_else(|| PathBuf::from("target/fine_tune"));

    let device = Device::new_with_fallback(0);
    let model = ModelLoader::new().with_device(device).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let options = DatasetOptions { max_tokens: Some(BATCH_TOKENS), truncate: true, ..DatasetOptions::default() };
    let datasets = Datasets::load(&data, &tokenizer, &options, &SplitOptions::default())?;
    let mut valid = datasets.valid.unwrap_or_default();
    valid.samples.truncate(EVALUATED_ROWS);

    let lora_config = LoRAAdapterConfig {
        rank: 8,
        alpha: 16.0,
        dropout: 0.0,
        target_modules: vec![TargetModule::QProj, TargetModule::VProj],
    };
    let adapter = LoRAAdapter::new(&model, lora_config, &device)?;
    println!("{} rows, {} trainable parameters", datasets.train.len(), adapter.num_parameters());
    report("before", &adapter, &valid)?;

    let training_config = TrainingConfig {
        num_epochs: 1,
        lr_scheduler: LRScheduler::warmup_cosine(3, STEPS, 2e-3, 2e-4),
        optimizer_config: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
    };
    let trainer = Trainer::new(adapter, training_config)?
        .with_batch_tokens(BATCH_TOKENS)
        .with_max_steps(STEPS)
        .with_callback(|event| {
            if let TrainingEvent::Step { step, loss, tokens_per_second, .. } = event {
                println!("step {step:>3}  loss {loss:.4}  {tokens_per_second:.0} tokens/s");
            }
            ControlFlow::Continue(())
        });
    trainer.train(&datasets.train)?;
    let adapter = trainer.lora_adapter();
    report("after", &adapter, &valid)?;

    adapter.save(&output)?; // as PEFT does
    println!("adapter in {}", output.display());
    Ok(())
}

/// Prints the loss of the validation rows.
fn report(when: &str, adapter: &LoRAAdapter, valid: &Dataset) -> Result<(), Box<dyn Error>> {
    if !valid.is_empty() {
        let evaluation = evaluate(adapter.run_model(), Some(&adapter.low_rank_updates()?), valid, BATCH_TOKENS)?;
        println!("{when}: validation loss {:.4} nats a token, {} rows", evaluation.loss(), valid.len());
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
