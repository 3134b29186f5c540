//! Scores the rows of a dataset by the model's loss, worst first:
//! `cargo run --release --example batch_scoring [MODEL [DATA.jsonl [ADAPTER]]]`.
//!
//! Rows with a high loss are often mislabelled or cut off, so they are worth reading before training.

use metal_candle::data::{Dataset, DatasetOptions, Tokenizer};
use metal_candle::inference::prompt_log_probabilities;
use metal_candle::training::LoRAAdapter;
use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::path::PathBuf;

const ROWS: usize = 40;
const SHOWN: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let folder = arguments.next().unwrap_or_else(nano);
    let data = arguments.next().unwrap_or_else(|| nano().join("data/test.jsonl"));
    let adapter = arguments.next();

    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let terms = adapter.map(|path| LoRAAdapter::load(&model, path)?.low_rank_updates()).transpose()?;
    let options = DatasetOptions { max_tokens: Some(1024), truncate: true, ..DatasetOptions::default() };
    let mut samples = Dataset::from_file(&data, &tokenizer, &options)?.samples;
    samples.truncate(ROWS);

    let mut scored = Vec::new();
    for sample in samples {
        // the log-probability of each token after the first, in nats
        let scores = prompt_log_probabilities(&model, terms.as_ref(), &sample.ids, 0, None)?;
        let trained = scores.iter().zip(&sample.trained[1..]).filter(|(_, trained)| **trained);
        let log_probability: f64 = trained.map(|((score, _), _)| f64::from(*score)).sum();
        scored.push((-log_probability / sample.num_trained() as f64, sample));
    }
    scored.sort_by(|left, right| right.0.total_cmp(&left.0));

    let mean = scored.iter().map(|(loss, _)| loss).sum::<f64>() / scored.len().max(1) as f64;
    println!("{} rows, mean loss {mean:.3} nats a token; the worst:", scored.len());
    for (loss, sample) in scored.iter().take(SHOWN) {
        let line = sample.source.as_ref().map_or(0, |source| source.line);
        let answer: Vec<u32> =
            sample.ids.iter().zip(&sample.trained).filter(|(_, trained)| **trained).map(|(&id, _)| id).collect();
        println!("  line {line:>4}  {loss:6.3}  {}", tokenizer.decode(&answer, true)?.trim());
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
