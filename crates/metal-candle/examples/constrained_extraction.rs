//! Extracts fields from a text, each restricted to a set of values, in one batch:
//! `cargo run --release --example constrained_extraction [MODEL [TEXT]]`.
//!
//! A [`TokenMask`] decides before each token which ones may follow, so an answer is always one of the values.

use metal_candle::data::Tokenizer;
use metal_candle::inference::{AllowedTokens, GenerationConfig, Request, Scheduler, TokenMask};
use metal_candle::{Device, ModelLoader, Result};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;

/// The fields, and the values that each may have.
const FIELDS: [(&str, &[&str]); 3] = [
    ("visibility", &["pub", "pub(crate)", "private"]),
    ("receiver", &["&self", "&mut self", "self", "none"]),
    ("returns", &["Option", "Result", "bool", "nothing", "another type"]),
];

/// Allows the tokens that continue one of several values.
#[derive(Debug, Clone)]
struct OneOf {
    /// The tokens of each value, with the end of the text behind them.
    values: Vec<Vec<u32>>,
}

impl OneOf {
    fn new(values: &[&str], tokenizer: &Tokenizer) -> Result<Self> {
        let tokens = |value: &&str| {
            let mut ids = tokenizer.encode(value, false)?;
            ids.extend(tokenizer.eos_token_id());
            Ok(ids)
        };
        Ok(Self { values: values.iter().map(tokens).collect::<Result<_>>()? })
    }
}

impl TokenMask for OneOf {
    fn allow(&mut self, generated: &[u32], allowed: &mut AllowedTokens) -> Result<()> {
        let next = self.values.iter().filter_map(|value| value.strip_prefix(generated)?.first());
        next.copied().try_for_each(|id| allowed.insert(id))
    }

    fn fork(&self) -> Box<dyn TokenMask> {
        Box::new(self.clone())
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(nano, PathBuf::from);
    let text = arguments.next().unwrap_or_else(|| "pub fn pop(&mut self) -> Option<T>".to_owned());

    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let mut scheduler = Scheduler::new(model).with_tokenizer(tokenizer.clone());

    let mut names = HashMap::new();
    for (name, values) in FIELDS {
        let prompt = format!("// {text}\n// {name} (one of {}): ", values.join(", "));
        let request = Request::new(tokenizer.encode(&prompt, true)?, GenerationConfig::default().with_max_tokens(16))
            .with_mask(OneOf::new(values, &tokenizer)?);
        for sequence in scheduler.admit(request)? {
            names.insert(sequence, name);
        }
    }

    // one step computes a token of every sequence
    let mut answers: HashMap<&str, String> = HashMap::new();
    while scheduler.has_work() {
        for event in scheduler.step()? {
            let name = names[&event.sequence];
            answers.entry(name).or_default().push_str(&event.result?.text);
        }
    }
    let object: Map<String, Value> =
        FIELDS.iter().map(|(name, _)| ((*name).to_owned(), answers.remove(name).into())).collect();
    println!("{}", serde_json::to_string_pretty(&object)?);
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
