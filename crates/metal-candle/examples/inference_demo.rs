//! Continues a text token by token: `cargo run --example inference_demo [FOLDER [TEXT]]`.

use metal_candle::data::Tokenizer;
use metal_candle::inference::{GenerationConfig, Generator, SamplingConfig};
use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(nano, PathBuf::from);
    let text = arguments.next().unwrap_or_else(|| "/// Returns the number of elements.\n".to_string());
    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let mut generator = Generator::new(model).with_tokenizer(Tokenizer::from_folder(&folder)?);

    let sampling = SamplingConfig::default().with_temperature(0.7).with_top_p(0.9).with_seed(1);
    let config = GenerationConfig::default().with_max_tokens(96).with_sampling(sampling);
    print!("{text}");
    let mut finish = None;
    for piece in generator.stream(&text, &config)? {
        let piece = piece?;
        print!("{}", piece.text);
        std::io::stdout().flush()?;
        finish = piece.finish;
    }
    println!();
    if let Some(finish) = finish {
        eprintln!(
            "{} tokens after {} of the prompt, {:.0} a second, ended by {}",
            finish.generated_tokens, finish.prompt_tokens, finish.decode_tokens_per_second, finish.reason
        );
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
