//! Chats with a model and an adapter, one line a turn: `cargo run --release --example chat_with_adapter [MODEL [ADAPTER]]`.
//!
//! `fine_tune` writes an adapter of the built-in model to `target/fine_tune`.

use metal_candle::data::{Message, Tokenizer};
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::training::LoRAAdapter;
use metal_candle::{Device, ModelLoader};
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let folder = arguments.next().unwrap_or_else(nano);
    let adapter = arguments.next();

    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let template = tokenizer.chat_template().cloned().ok_or("the model has no chat template")?;
    let mut generator = Generator::new(model).with_tokenizer(tokenizer);
    if let Some(path) = adapter {
        // the model's weights stay as they are; the adapter is an argument of each step
        let adapter = LoRAAdapter::load(generator.model(), path)?;
        generator.set_adapter(Some(adapter.low_rank_updates()?));
    }

    let config = GenerationConfig::default().with_max_tokens(128);
    let mut messages = Vec::new();
    for line in std::io::stdin().lock().lines() {
        messages.push(Message::user(line?));
        let prompt = template.render(&messages, None, true, &serde_json::Map::new())?;
        // the template has written the special tokens, so none are added
        let tokenizer = generator.tokenizer().ok_or("no tokenizer")?;
        let ids = tokenizer.encode(&prompt, false)?;
        // the generator computes only what the KV cache does not hold yet
        let mut answer = String::new();
        for piece in generator.stream(ids, &config)? {
            let text = piece?.text;
            print!("{text}");
            std::io::stdout().flush()?;
            answer.push_str(&text);
        }
        println!();
        messages.push(Message::assistant(answer));
    }
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
