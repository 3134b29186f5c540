//! Loads a model and shows what is in it: `cargo run --example load_model [FOLDER]`.

use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map_or_else(nano, PathBuf::from);
    let device = Device::new_with_fallback(0);
    let start = Instant::now();
    let is_terminal = std::io::stderr().is_terminal();
    let model = ModelLoader::new().with_device(device).load_with_progress(&folder, |progress| {
        if is_terminal {
            eprint!("\r{} of {} tensors ", progress.tensors, progress.num_tensors);
        }
    })?;
    eprintln!("loaded in {:.2?}", start.elapsed());

    let config = model.config();
    let (dtype, parameters) = (model.dtype(), config.num_parameters());
    println!("{} on {device}, {}", folder.display(), dtype.as_str());
    println!("{parameters} parameters, {:.1} MB", config.num_bytes(dtype) as f64 / 1e6);
    println!(
        "{} blocks, width {}, {} heads over {} key/value heads of {}, vocabulary {}",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size
    );
    println!("{} linear layers can take an adapter", model.linears().len());
    let first_block =
        model.parameters().iter().filter(|(name, _)| !name.contains(".layers.") || name.contains(".layers.0."));
    for (name, tensor) in first_block {
        println!("  {name:<48} {:?}", tensor.dims());
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
