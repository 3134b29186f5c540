//! The built-in model of `metal-candle` and its sample data, as bytes. `README.md` describes the model.
//!
//! These files are a crate of their own, so that the program can be packaged and that a change of the program does not
//! compile 11 MB again.

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!($name).as_slice())),*]
    };
}

/// Path within the model's folder, and content of each file.
pub static FILES: [(&str, &[u8]); 8] = files![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "data/train.jsonl",
    "data/valid.jsonl",
    "data/test.jsonl",
];
