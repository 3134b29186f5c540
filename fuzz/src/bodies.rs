//! What each target does with an input: reads it as a user's file and uses what was read.
//!
//! An input of several files holds them one after the other, with [`SEPARATOR`] between; an empty one is left out.
//! Every body returns for every input, in little time and memory, whether it could be read.

use candle_core::DType;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{ChatTemplate, DataReport, Dataset, DatasetOptions, Message, Sample, Tokenizer};
use metal_candle::files::GgufFile;
use metal_candle::models::{Batch, Rows, SafetensorsFile};
use metal_candle::training::{Trainer, TrainingConfig};
use metal_candle::{Device, Model, ModelConfig, ModelLoader};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// Between the files of an input.
pub const SEPARATOR: &[u8] = b"\n=== next file ===\n";

/// A target: its name, its body and words that its inputs may hold.
pub struct Target {
    /// The name, also that of the folder of its seeds.
    pub name: &'static str,
    /// Runs one input; returns whether it could be read.
    pub run: fn(&[u8]) -> bool,
    /// Longest input of the bounded run.
    pub max_bytes: usize,
    /// Words for the mutator.
    pub dictionary: &'static [&'static [u8]],
}

/// All targets.
pub const TARGETS: [Target; 8] = [
    Target {
        name: "safetensors",
        run: safetensors,
        max_bytes: 1 << 20,
        dictionary: &[
            SEPARATOR,
            b"\"__metadata__\"",
            b"\"data_offsets\":[0,0]",
            b"\"F4\"",
            b"\"F64\"",
            b"[",
            b"{\"a\":",
            b"\0\0\0\0",
        ],
    },
    Target {
        name: "gguf",
        run: gguf,
        max_bytes: 1 << 20,
        dictionary: &[
            b"GGUF",
            b"\x02\0\0\0",
            b"\x0c\0\0\0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\0\0\0\x01\0\0\0\0",
            b"general.alignment",
            b"llama.block_count",
            b"tokenizer.ggml.merges",
            b"tokenizer.ggml.model",
            b"split.count",
            b"rope_freqs.weight",
            b"gemma3",
            b"phi3",
            b"mistral3.block_count",
            b"attention.temperature_scale",
            b"blk.0.attn_output.bias",
            b"t5",
        ],
    },
    Target {
        name: "config",
        run: config,
        max_bytes: 1 << 20,
        dictionary: &[
            SEPARATOR,
            b"null",
            b"NaN",
            b"\"rope_scaling\":{}",
            b"\"layer_types\":[]",
            b"[",
            b"{\"a\":",
            b"1e400",
            b",",
        ],
    },
    Target {
        name: "tokenizer",
        run: tokenizer,
        max_bytes: 1 << 20,
        dictionary: &[
            SEPARATOR,
            b"{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"aa\"},",
            b"{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(a*)*\"},\"content\":\"bb\"},",
            b"{\"type\":\"Prepend\",\"prepend\":\"x\"},",
            b"{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAAA\"},",
            b"{\"type\":\"ByteLevel\"},",
            b"{\"type\":\"NFKC\"},",
            b"{\"type\":\"Strip\",\"content\":\"a\",\"start\":1,\"stop\":9},",
            b"\"WordPiece\"",
            b"\"Unigram\"",
            b"\"special\":true",
            b"\"normalized\":true",
            b"null",
            b"[",
            b"{\"a\":",
            b"\\u0000",
        ],
    },
    Target {
        name: "template",
        run: template,
        max_bytes: 1 << 20,
        dictionary: &[
            SEPARATOR,
            b"{{",
            b"}}",
            b"{% for x in range(99999) %}",
            b"{% endfor %}",
            b"{% if ",
            b"{% endif %}",
            b"{% set x = ",
            b"{% macro m(x) %}",
            b"{% endmacro %}",
            b"{{ m(m) }}",
            b" * 999999999",
            b" ** 99",
            b"~",
            b"|tojson",
            b"|join",
            b"[::-1]",
            b"(",
            b"[",
            b"not ",
            b"-",
            b"\"a\"",
            b".split('a')",
            b".replace('', 'aaaa')",
            b"|center(99999999)",
            b"loop",
            b"namespace(",
        ],
    },
    Target {
        name: "adapter",
        run: adapter,
        max_bytes: 1 << 20,
        dictionary: &[
            SEPARATOR,
            b"null",
            b"\"rank_pattern\":{\"(a*)*b\":3}",
            b"\"use_dora\":true",
            b"\"bias\":\"all\"",
            b"\"modules_to_save\":[\"lm_head\"]",
            b"\"lora_A\"",
            b"\"fine_tune_type\":\"dora\"",
            b"PK\x03\x04",
            b"\x80\x02}q\x00",
            b"[",
            b"{\"a\":",
            b".*",
        ],
    },
    Target {
        name: "dataset",
        run: dataset,
        max_bytes: 1 << 20,
        dictionary: &[
            b"\n",
            b"\r\n",
            b"{\"text\":\"",
            b"\"messages\":[",
            b"{\"role\":\"assistant\",\"content\":null}",
            b"\"tool_calls\":[",
            b"\\ud800",
            b"NaN",
            b"\xEF\xBB\xBF",
            b"\xFF\xFE",
            b"\x1F\x8B",
            b"[",
            b"{\"a\":",
            b"\"tools\":[{}]",
            b"<|im_end|>",
            b",",
        ],
    },
    Target {
        name: "checkpoint",
        run: checkpoint,
        max_bytes: 1 << 20,
        dictionary: &[SEPARATOR, b"null", b"\"step\":", b"\"files\":{}", b"\"best\":", b"[", b"{\"a\":", b"../"],
    },
];

/// A folder in memory where there is one, since some targets sync what they write.
fn folder() -> Option<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).ok() } else { tempfile::tempdir().ok() }
}

/// The files of an input.
fn parts(data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = data;
    while let Some(at) = rest.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
        parts.push(&rest[..at]);
        rest = &rest[at + SEPARATOR.len()..];
        if parts.len() == 15 {
            break;
        }
    }
    parts.push(rest);
    parts
}

fn write(folder: &Path, names: &[&str], parts: &[&[u8]]) -> Option<()> {
    for (name, part) in names.iter().zip(parts) {
        if !part.is_empty() {
            std::fs::write(folder.join(name), part).ok()?;
        }
    }
    Some(())
}

/// The configuration of a model small enough to be trained for each input.
#[must_use]
pub fn small_config() -> String {
    serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 16,
        "intermediate_size": 24, "max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1,
    })
    .to_string()
}

/// The model that adapters and checkpoints belong to.
///
/// # Panics
/// The built-in configuration is not valid.
pub fn small_model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let config = ModelConfig::from_json_str(&small_config()).expect("a valid configuration");
        Model::initialize(config, 3, Device::CPU).expect("a small model")
    })
}

/// The tokenizer of datasets, without a file of its own.
fn word_tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let golden = [root.join("tests/golden/tokenizer"), root.join("../crates/metal-candle/tests/golden/tokenizer")];
        let golden = golden.into_iter().find(|golden| golden.is_dir()).expect("the golden tokenizer");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(golden.join(name), folder.path().join(name)).expect("a copy");
        }
        Tokenizer::from_folder(folder.path()).expect("a tokenizer")
    })
}

/// Weights: one file, or an index and two shards.
pub fn safetensors(data: &[u8]) -> bool {
    let Some(folder) = folder() else { return false };
    let parts = parts(data);
    let names: &[&str] = match parts.len() {
        1 => &["model.safetensors"],
        _ => &["model.safetensors.index.json", "a.safetensors", "b.safetensors"],
    };
    if write(folder.path(), names, &parts).is_none() {
        return false;
    }
    let mut is_open = false;
    for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
        let Ok(file) = SafetensorsFile::open(folder.path().join(name)) else { continue };
        is_open = true;
        for entry in file.entries().iter().take(50) {
            let _ = file.bytes(&entry.name);
            let _ = file.tensor(&entry.name);
        }
    }
    let _ = ModelLoader::new().load_weights(folder.path());
    if let Ok(config) = ModelConfig::from_json_str(&small_config()) {
        let _ = ModelLoader::new().with_config(config).load(folder.path());
    }
    is_open
}

/// A GGUF file: its tokenizer, and its weights, which are multiplied.
pub fn gguf(data: &[u8]) -> bool {
    let Some(folder) = folder() else { return false };
    let path = folder.path().join("model.gguf");
    if std::fs::write(&path, data).is_err() {
        return false;
    }
    let Ok(file) = GgufFile::open(&path) else { return false };
    let _ = (file.types(), file.num_bytes());
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        for text in ["", "a", "Hello, world! <|im_end|> na\u{ef}ve \u{1f980}\0 12345"] {
            if let Ok(ids) = tokenizer.encode(text, true) {
                let _ = tokenizer.decode(&ids, false);
            }
        }
    }
    let Ok(model) = ModelLoader::new().load(&path) else { return false };
    if model.config().num_parameters() < 1 << 20 {
        let _ = model.forward(&Batch::single(&[0, 1, 2]), None, None, Rows::All);
    }
    true
}

/// `config.json` and `generation_config.json`.
pub fn config(data: &[u8]) -> bool {
    let Some(folder) = folder() else { return false };
    if write(folder.path(), &["config.json", "generation_config.json"], &parts(data)).is_none() {
        return false;
    }
    let Ok(config) = ModelConfig::from_json(folder.path().join("config.json")) else { return false };
    let _ = (config.num_parameters(), config.generation_to_json());
    let _ = ModelConfig::from_json_str(&config.to_json(DType::F32));
    true
}

/// The files of a tokenizer's folder.
pub fn tokenizer(data: &[u8]) -> bool {
    const NAMES: [&str; 7] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    ];
    let Some(folder) = folder() else { return false };
    if write(folder.path(), &NAMES, &parts(data)).is_none() {
        return false;
    }
    let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) else { return false };
    let long = "a b aa \u{fb01}\u{fdfa} 12 ".repeat(300);
    for text in ["", "a", "Hello, world! <|im_end|> na\u{ef}ve \u{1f980}\0", &long] {
        for add_special in [false, true] {
            if let Ok(ids) = tokenizer.encode(text, add_special) {
                let _ = tokenizer.decode(&ids, add_special);
            }
        }
        let _ = tokenizer.encode_with_offsets(text, true);
    }
    let mut decoder = tokenizer.stream_decoder(true);
    for id in (0..60).chain([481, 502, 4096, u32::MAX]) {
        let _ = decoder.push(id);
    }
    let _ = decoder.flush();
    true
}

/// A chat template, the messages and the tools.
pub fn template(data: &[u8]) -> bool {
    let parts = parts(data);
    let Ok(source) = std::str::from_utf8(parts[0]) else { return false };
    let Ok(template) = ChatTemplate::new(source) else { return false };
    let json = |part: usize| parts.get(part).and_then(|part| serde_json::from_slice::<Value>(part).ok());
    let messages: Vec<Message> = json(1).and_then(|messages| serde_json::from_value(messages).ok()).unwrap_or_default();
    let tools = json(2).and_then(|tools| tools.as_array().cloned());
    let render = |prompt| template.render(&messages, tools.as_deref(), prompt, &Map::new()).is_ok();
    render(false) | render(true)
}

/// An adapter's configuration and weights, as PEFT, mlx-lm and pickles have them.
pub fn adapter(data: &[u8]) -> bool {
    let Some(folder) = folder() else { return false };
    let parts = parts(data);
    let weights = parts.get(1).copied().unwrap_or_default();
    let is_pickle = weights.starts_with(b"PK") || weights.starts_with(b"\x80");
    let names: &[&str] = if is_pickle {
        &["adapter_config.json", "adapter_model.bin"]
    } else {
        &["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"]
    };
    if write(folder.path(), names, &[parts[0], weights, weights]).is_none() {
        return false;
    }
    let adapter = LoRAAdapter::load(small_model(), folder.path());
    if let Ok(adapter) = &adapter {
        let _ = adapter.merge(small_model());
    }
    if !is_pickle {
        let _ = LoRAAdapter::load(small_model(), folder.path().join("adapters.safetensors"));
    }
    adapter.is_ok()
}

/// A dataset, as JSON lines and as JSON.
pub fn dataset(data: &[u8]) -> bool {
    let Some(folder) = folder() else { return false };
    let options =
        DatasetOptions { max_tokens: Some(512), truncate: true, vocab_size: Some(502), ..DatasetOptions::default() };
    let mut is_read = false;
    for name in ["rows.jsonl", "rows.json"] {
        let path = folder.path().join(name);
        if std::fs::write(&path, data).is_err() {
            return false;
        }
        let _ = DataReport::of(&path, word_tokenizer(), &options);
        is_read |= Dataset::from_file(&path, word_tokenizer(), &options).is_ok();
    }
    is_read
}

/// The rows that checkpoints are trained on.
fn rows() -> Dataset {
    let sample = |number: u32| Sample {
        ids: (0..6).map(|i| (number + i) % 40).collect(),
        trained: vec![false, true, true, true, true, true],
        source: None,
    };
    Dataset::from_samples((0..4).map(sample).collect())
}

/// A trainer of three steps, of which `steps` are run.
fn trainer(folder: &Path, steps: usize) -> Option<Trainer> {
    let adapter = LoRAAdapter::builder(small_model()).with_rank(2).with_seed(1).build().ok()?;
    let config = TrainingConfig { num_epochs: 3, ..TrainingConfig::default() };
    let trainer = Trainer::new(adapter, config).ok()?;
    Some(trainer.with_batch_samples(4).with_max_steps(steps).with_save_interval(1).with_run_folder(folder))
}

/// The run folder of two steps; its last checkpoint is a seed.
///
/// # Panics
/// The run cannot be made.
#[must_use]
pub fn run_of_two_steps() -> TempDir {
    let run = folder().expect("a folder");
    let trainer = trainer(run.path(), 2).expect("a trainer");
    let _ = trainer.train(&rows()).expect("a run");
    run
}

/// The files of a run that checkpoints consist of, by their paths in its folder.
#[must_use]
pub fn run_files() -> Vec<PathBuf> {
    let checkpoint = Path::new("checkpoints/step-000002");
    ["state.json", "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"]
        .into_iter()
        .map(|name| checkpoint.join(name))
        .chain([PathBuf::from("metrics.jsonl")])
        .collect()
}

/// A run that is resumed: its state, weights, optimizer and metrics.
pub fn checkpoint(data: &[u8]) -> bool {
    let Some(run) = folder() else { return false };
    let parts = parts(data);
    let names = run_files();
    let checkpoint = run.path().join("checkpoints/step-000002");
    if std::fs::create_dir_all(&checkpoint).is_err() {
        return false;
    }
    let names: Vec<&str> = names.iter().filter_map(|name| name.to_str()).collect();
    if write(run.path(), &names, &parts).is_none() {
        return false;
    }
    // without right checksums no damaged file would be read any further
    if data.len().is_multiple_of(4) {
        fix_checksums(&checkpoint);
    }
    trainer(run.path(), 3).is_some_and(|trainer| trainer.with_resume(true).train(&rows()).is_ok())
}

fn fix_checksums(checkpoint: &Path) {
    let state = checkpoint.join("state.json");
    let Ok(Ok(mut json)) = std::fs::read(&state).map(|bytes| serde_json::from_slice::<Value>(&bytes)) else { return };
    let Some(files) = json.get_mut("files").and_then(Value::as_object_mut) else { return };
    for (name, sum) in files {
        if let Ok(bytes) = std::fs::read(checkpoint.join(name)) {
            *sum = serde_json::json!({"bytes": bytes.len(), "crc32c": format!("{:08x}", crc32c::crc32c(&bytes))});
        }
    }
    let _ = std::fs::write(state, json.to_string());
}
