//! The bodies of the fuzz targets on mutated seeds, in processes that are watched: no panic, abort, hang or large memory.
//!
//! `METAL_CANDLE_FUZZ_INPUTS` is the number of inputs of each target, `METAL_CANDLE_FUZZ_TARGET` the name of one target, and
//! `METAL_CANDLE_FUZZ_SEED` a number that selects other inputs.

use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[allow(clippy::expect_used, clippy::large_types_passed_by_value)]
#[path = "../../../../fuzz/src/bodies.rs"]
mod bodies;
#[path = "../../../../fuzz/src/mutate.rs"]
mod mutate;

const INPUTS: &str = "METAL_CANDLE_FUZZ_INPUTS";
const TARGET: &str = "METAL_CANDLE_FUZZ_TARGET";
const SEED: &str = "METAL_CANDLE_FUZZ_SEED";
/// Set in the processes that run inputs: the file for the input that is run just now.
const INPUT_FILE: &str = "METAL_CANDLE_FUZZ_INPUT_FILE";
/// Inputs of each target if nothing is said.
const NUM_INPUTS: usize = 150;
const MAX_SECONDS: u64 = 10;
/// Maximum memory in addition to the size of an input.
const MAX_BYTES: u64 = 200 << 20;

fn seeds_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target)
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(seeds_folder(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// `VmHWM` or `VmRSS` in bytes.
fn memory(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_matches([':', '\t', ' ', 'k', 'B']).parse::<u64>().unwrap() * 1024
}

/// Runs the inputs of one target in this process, which [`every_target_holds`] started.
#[test]
fn run_in_a_watched_process() {
    let Ok(file) = std::env::var(INPUT_FILE) else { return };
    let name = std::env::var(TARGET).unwrap();
    let count: usize = std::env::var(INPUTS).unwrap().parse().unwrap();
    let target = bodies::TARGETS.into_iter().find(|target| target.name == name).unwrap();
    let seeds = seeds(&name);
    let seed = std::env::var(SEED).map_or(11, |seed| seed.parse().unwrap());
    let mut mutator = mutate::Mutator::new(seed, target.max_bytes);
    let (mut slowest, mut largest, mut num_read) = (Duration::ZERO, 0, 0);
    let inputs = seeds.len() + count;
    for number in 0..inputs {
        // the seeds themselves first
        let input = seeds.get(number).cloned().unwrap_or_else(|| mutator.next_input(&seeds, target.dictionary));
        std::fs::write(&file, &input).unwrap();
        // the peak starts at what is in use now
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = memory("VmRSS");
        let started = Instant::now();
        let is_read = (target.run)(&input);
        let used = memory("VmHWM").saturating_sub(before);
        let seconds = started.elapsed();
        assert!(used < MAX_BYTES + input.len() as u64, "{name}, input {number}: {used} bytes of memory");
        assert!(seconds.as_secs() < MAX_SECONDS, "{name}, input {number}: {seconds:?}");
        // some seeds are wrong on purpose
        assert!(is_read || number > 0, "{name}: its first seed cannot be read");
        num_read += usize::from(is_read);
        (slowest, largest) = (slowest.max(seconds), largest.max(used));
    }
    println!(
        "{name}: {inputs} inputs, {num_read} of them could be read, slowest {slowest:.2?}, most memory {} MB",
        largest >> 20
    );
}

#[test]
fn every_target_holds() {
    let only = std::env::var(TARGET).ok();
    let count: usize = std::env::var(INPUTS).map_or(NUM_INPUTS, |count| count.parse().unwrap());
    if std::env::var(INPUT_FILE).is_ok() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for target in bodies::TARGETS.iter().filter(|target| only.as_ref().is_none_or(|only| only == target.name)) {
        let name = target.name;
        let (input, output) = (folder.path().join(name), folder.path().join(format!("{name}.txt")));
        let log = std::fs::File::create(&output).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fuzz::run_in_a_watched_process", "--nocapture"])
            .env(INPUT_FILE, &input)
            .env(TARGET, name)
            .env(INPUTS, count.to_string())
            .env("RAYON_NUM_THREADS", "2")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut last_change = Instant::now();
        let mut last = None;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            let written = std::fs::metadata(&input).and_then(|found| found.modified()).ok();
            if written != last {
                (last, last_change) = (written, Instant::now());
            }
            if last_change.elapsed().as_secs() > 2 * MAX_SECONDS {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let said = std::fs::read_to_string(&output).unwrap_or_default();
        if status.is_none_or(|status| !status.success()) {
            let kept = std::env::temp_dir().join(format!("metal-candle-fuzz-{name}"));
            std::fs::copy(&input, &kept).unwrap();
            let end = if status.is_some() { "it failed" } else { "it hangs" };
            panic!("{name}: {end}; the input is in {}\n{said}", kept.display());
        }
        print!(
            "{}",
            said.lines().filter(|line| line.contains(" inputs, ")).fold(String::new(), |all, line| all + line + "\n")
        );
    }
}

fn joined(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.join(bodies::SEPARATOR)
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(crate::golden::path(name)).unwrap()
}

/// A safetensors file of small tensors.
fn small_safetensors(tensors: &[(&str, &str, &[usize], usize)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut length = 0;
    for (name, dtype, shape, bytes) in tensors {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [length, length + bytes]});
        header.insert((*name).to_string(), entry);
        length += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..length).map(|byte| byte as u8));
    file
}

fn write(target: &str, name: &str, bytes: Vec<u8>) {
    std::fs::create_dir_all(seeds_folder(target)).unwrap();
    std::fs::write(seeds_folder(target).join(name), bytes).unwrap();
}

fn write_tokenizer_seeds() {
    // a small vocabulary, so that mutations often meet other parts
    let bytes: Vec<char> = ('!'..='~').chain(['\u{120}', '\u{10a}']).collect();
    let mut vocab = serde_json::Map::new();
    for (id, c) in bytes.iter().enumerate() {
        vocab.insert(c.to_string(), json!(id));
    }
    vocab.insert("aa".into(), json!(bytes.len()));
    let added = json!([{"id": bytes.len() + 1, "content": "<|im_end|>", "single_word": false, "lstrip": false,
        "rstrip": true, "normalized": true, "special": true}]);
    let bpe = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "x"}, "content": "yy"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "a"]], "unk_token": null, "byte_fallback": false}});
    let named =
        json!({"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}, "additional_special_tokens": ["<x>"]});
    write("tokenizer", "bpe", joined(&[bpe.to_string().into_bytes(), named.to_string().into_bytes()]));
    let unigram = json!({"version": "1.0", "added_tokens": [], "normalizer": {"type": "Prepend", "prepend": "\u{2581}"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true,
            "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["a", -1.0], ["\u{2581}", -2.0], ["<0x41>", -3.0]]}});
    write("tokenizer", "unigram", unigram.to_string().into_bytes());
    let words = json!({"version": "1.0", "added_tokens": [], "normalizer": {"type": "BertNormalizer", "clean_text": true,
        "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##a": 2, "hello": 3}}});
    write("tokenizer", "wordpiece", words.to_string().into_bytes());
    let side = json!({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"97": {"content": "<|im_end|>", "special": true}}});
    let empty = Vec::new();
    let merges = b"#version: 0.2\na a\n".to_vec();
    let vocab = serde_json::Value::Object(vocab).to_string().into_bytes();
    let parts = [empty.clone(), side.to_string().into_bytes(), empty.clone(), empty, vocab, merges];
    write("tokenizer", "vocab_and_merges", joined(&parts));
}

/// Writes `fuzz/seeds` again: `cargo test --test it fuzz::write_seeds -- --ignored`.
#[test]
#[ignore = "writes files of the repository"]
fn write_seeds() {
    use metal_candle::adapters::LoRAAdapter;
    let tensors: &[(&str, &str, &[usize], usize)] =
        &[("a", "F32", &[2, 3], 24), ("b", "BF16", &[4], 8), ("c", "F16", &[0, 5], 0), ("d", "U8", &[3], 3)];
    write("safetensors", "file", small_safetensors(tensors));
    let folder = tempfile::tempdir().unwrap();
    metal_candle::models::save_model(bodies::small_model(), folder.path()).unwrap();
    write("safetensors", "model", std::fs::read(folder.path().join("model.safetensors")).unwrap());
    let index = json!({"metadata": {"total_size": 32}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}});
    let shards = [&tensors[..1], &tensors[1..2]].map(small_safetensors);
    write("safetensors", "index", joined(&[vec![index.to_string().into_bytes()], shards.to_vec()].concat()));

    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano");
    let config = ["config.json", "generation_config.json"].map(|name| std::fs::read(nano.join(name)).unwrap());
    write("config", "nano", joined(&config));
    write("config", "small", bodies::small_config().into_bytes());

    write_tokenizer_seeds();
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "4"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    for name in ["chatml", "qwen2.5", "thinking"] {
        let parts =
            [golden(&format!("chat/{name}.jinja")), messages.to_string().into_bytes(), tools.to_string().into_bytes()];
        write("template", name, joined(&parts));
    }

    for (name, builder) in [
        ("lora", LoRAAdapter::builder(bodies::small_model()).with_rank(2)),
        ("dora", LoRAAdapter::builder(bodies::small_model()).with_rank(1).with_dora(true)),
    ] {
        let adapter = builder.with_seed(1).build().unwrap();
        adapter.save(folder.path().join(name)).unwrap();
        let parts = ["adapter_config.json", "adapter_model.safetensors"]
            .map(|file| std::fs::read(folder.path().join(name).join(file)).unwrap());
        write("adapter", name, joined(&parts));
    }
    let adapter = LoRAAdapter::builder(bodies::small_model()).with_rank(2).with_seed(1).build().unwrap();
    adapter.save_mlx(folder.path().join("mlx")).unwrap();
    let parts = ["adapter_config.json", "adapters.safetensors"]
        .map(|file| std::fs::read(folder.path().join("mlx").join(file)).unwrap());
    write("adapter", "mlx", joined(&parts));

    let rows = [
        json!({"messages": messages}),
        json!({"messages": messages, "tools": tools}),
        json!({"prompt": "p", "completion": "c"}),
        json!({"text": "some text"}),
    ];
    for (name, rows) in [("chat", &rows[..2]), ("pairs", &rows[2..3]), ("text", &rows[3..])] {
        let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
        write("dataset", name, (lines.join("\n") + "\n").into_bytes());
    }
    write("dataset", "list", json!(rows[..2]).to_string().into_bytes());
    write("dataset", "table", b"prompt,completion\na,b\n".to_vec());

    let run = bodies::run_of_two_steps();
    let parts: Vec<Vec<u8>> =
        bodies::run_files().iter().map(|file| std::fs::read(run.path().join(file)).unwrap_or_default()).collect();
    for path in crate::training_resume::files(run.path()).keys() {
        println!("{path}");
    }
    write("checkpoint", "two_steps", joined(&parts));
}
