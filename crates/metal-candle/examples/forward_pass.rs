//! One forward pass: the likeliest next tokens of a text: `cargo run --example forward_pass [FOLDER [TEXT]]`.

use metal_candle::data::Tokenizer;
use metal_candle::models::{Batch, Rows};
use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(nano, PathBuf::from);
    let text = arguments.next().unwrap_or_else(|| "impl fmt::Display for".to_string());
    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;

    let ids = tokenizer.encode(&text, false)?;
    let logits = model.forward(&Batch::single(&ids), None, None, Rows::Last)?;
    let logits = logits.squeeze(0)?.to_vec1::<f32>()?;

    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&left, &right| logits[right].total_cmp(&logits[left]));
    println!("{text:?} is {} tokens; the next one is", ids.len());
    for &id in order.iter().take(8) {
        let probability = (logits[id] - largest).exp() / sum;
        println!("  {:5.1} %  {:?}", 100.0 * probability, tokenizer.decode(&[id as u32], false)?);
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
