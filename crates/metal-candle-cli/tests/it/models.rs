//! `info`, `logits`, `generate`, `fuse`, `eval` and `completions`.

use crate::fixture::Fixture;
use candle_core::DType;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{Dataset, DatasetOptions, Tokenizer};
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::models::{Batch, Rows, SafetensorsFile};
use metal_candle::training::evaluate;
use metal_candle::{Model, ModelLoader};

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn logits(model: &Model, adapter: Option<&LoRAAdapter>, ids: &[u32]) -> Vec<f32> {
    let terms = adapter.map(|adapter| adapter.low_rank_updates().unwrap());
    let logits = model.forward(&Batch::single(ids), terms.as_ref(), None, Rows::All).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn read_logits(fixture: &Fixture, name: &str) -> Vec<f32> {
    let file = SafetensorsFile::open(fixture.path(name)).unwrap();
    assert_eq!(file.entries().len(), 1);
    file.float_tensor("logits", DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn info_counts_the_model() {
    let fixture = Fixture::new();
    let json = fixture.ok("info --model model --json").json();
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let count: usize = model.parameters().iter().map(|(_, tensor)| tensor.elem_count()).sum();
    assert_eq!(json["model"]["num_parameters"], count);
    let parts: u64 = json["model"]["parameters"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(parts, count as u64);
    assert_eq!(json["model"]["weight_bytes"]["f32"], 4 * count);
    // keys and values of 2 layers, 2 heads of 8
    assert_eq!(json["model"]["kv_cache_bytes_per_token"], 2 * 2 * 2 * 8 * 4);
    assert_eq!(json["device"], "cpu");
    let text = fixture.ok("info --model model").stdout;
    assert!(text.contains("2 blocks, hidden 32"), "{text}");
}

#[test]
fn logits_are_those_of_the_library() {
    let fixture = Fixture::new();
    let json = fixture.ok("logits --model model --ids 1,2,3,4000 --out out.safetensors --json").json();
    assert_eq!(json["shape"], serde_json::json!([4, 4096]));
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    assert_eq!(read_logits(&fixture, "out.safetensors"), logits(&model, None, &[1, 2, 3, 4000]));
    let ran = fixture.run("logits --model model --ids 1,4096 --out out2.safetensors");
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(!fixture.path("out2.safetensors").exists());
}

#[test]
fn generate_writes_what_the_library_writes() {
    let fixture = Fixture::new();
    let words = "generate --model model --raw --temperature 0 --max-tokens 12 --prompt fn";
    let json = fixture.ok(&format!("{words} --json")).json();
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let tokenizer = Tokenizer::from_folder(fixture.path("model")).unwrap();
    let mut generator = Generator::new(model).with_tokenizer(tokenizer.clone());
    let config = GenerationConfig::default().with_max_tokens(12);
    let wanted = generator.generate("fn", &config).unwrap();
    assert_eq!(json["text"], wanted.text);
    assert_eq!(json["tokens"], serde_json::json!(wanted.tokens));
    assert_eq!(json["finish_reason"], wanted.finish.reason.name());
    // in pieces or at once, standard output is the text and a line's end
    for extra in ["", " --no-stream", " --quiet"] {
        let ran = fixture.ok(&format!("{words}{extra}"));
        assert_eq!(ran.stdout, format!("{}\n", wanted.text));
        assert_eq!(ran.stderr.is_empty(), extra == " --quiet", "{}", ran.stderr);
    }
    // the prompt from standard input
    let words: Vec<_> = "generate --model model --raw --temperature 0 --max-tokens 12 --prompt -".split(' ').collect();
    assert_eq!(fixture.run_with(&words, "fn\n").stdout, format!("{}\n", wanted.text));

    // the chat template, with and without a system prompt
    let prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    let ids = tokenizer.encode(prompt, false).unwrap();
    let wanted = generator.generate(ids.clone(), &config).unwrap();
    let words = ["generate", "--model", "model", "--system", "be brief", "--prompt", "hi", "--temperature", "0"];
    let json = fixture.run_with(&[&words[..], &["--max-tokens", "12", "--json"]].concat(), "").json();
    assert_eq!(json["text"], wanted.text);
    assert_eq!(json["prompt_tokens"], ids.len());
}

#[test]
fn a_seed_decides_the_text() {
    let fixture = Fixture::new();
    let text = |seed: u32| {
        let words = format!("generate --model model --raw --prompt fn --max-tokens 20 --temperature 1.5 --seed {seed}");
        fixture.ok(&words).stdout
    };
    assert_eq!(text(1), text(1));
    assert_ne!(text(1), text(2));
}

#[test]
fn a_stop_string_ends_the_text() {
    let fixture = Fixture::new();
    let words = "generate --model model --raw --temperature 0 --max-tokens 12 --prompt fn --json";
    let text = fixture.ok(words).json()["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(6).take(3).collect();
    let words: Vec<_> = words.split(' ').chain(["--stop", &stop]).collect();
    let json = fixture.run_with(&words, "").json();
    assert_eq!(json["finish_reason"], "stop_string");
    assert_eq!(json["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
}

#[test]
fn fuse_keeps_the_logits_and_its_folder_is_a_model() {
    let fixture = Fixture::new();
    fixture.ok("train --model model --data data --output run --steps 6 --learning-rate 0.05 --test-samples 0");
    let json = fixture.ok("fuse --model model --adapter run --output merged --json").json();
    assert!(json["max_logit_difference"].as_f64().unwrap() < 1e-4, "{json}");
    assert!(json["max_adapter_effect"].as_f64().unwrap() > 1e-2, "{json}");
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let adapter = LoRAAdapter::load(&model, fixture.path("run/adapter")).unwrap();
    let merged = ModelLoader::new().load(fixture.path("merged")).unwrap();
    let ids = [5, 6, 7, 8, 9];
    let wanted = logits(&model, Some(&adapter), &ids);
    assert!(largest_difference(&wanted, &logits(&merged, None, &ids)) < 1e-4);
    assert!(largest_difference(&wanted, &logits(&model, None, &ids)) > 1e-2);
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert!(fixture.path("merged").join(name).exists(), "{name}");
    }
    // the program finds the adapter in the run, and in its folder
    for (number, adapter) in ["run", "run/adapter"].iter().enumerate() {
        fixture.ok(&format!("logits --model model --adapter {adapter} --ids 5,6,7,8,9 --out {number}.safetensors"));
        assert_eq!(read_logits(&fixture, &format!("{number}.safetensors")), wanted);
    }
    // nothing is overwritten
    let ran = fixture.run("fuse --model model --adapter run --output merged");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("`merged` is not empty"), "{}", ran.stderr);
    // in bf16 the model's dtype is kept
    let json = fixture.ok("fuse --model model --dtype bf16 --adapter run --output merged16 --json").json();
    assert_eq!(json["dtype"], "bf16");
    assert_eq!(ModelLoader::new().load(fixture.path("merged16")).unwrap().dtype(), DType::BF16);
}

#[test]
fn eval_measures_rows_and_text() {
    let fixture = Fixture::new();
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let tokenizer = Tokenizer::from_folder(fixture.path("model")).unwrap();
    let test = Dataset::from_file(fixture.path("data/test.jsonl"), &tokenizer, &DatasetOptions::default()).unwrap();
    let wanted = evaluate(&model, None, &test, 4096).unwrap();
    let close = |a: &serde_json::Value, b: f64| (a.as_f64().unwrap() - b).abs() < 1e-5;
    let json = fixture.ok("eval --model model --data data --json").json();
    assert!(json["data"].as_str().unwrap().ends_with("test.jsonl"));
    assert!(close(&json["loss"], wanted.loss()), "{json}");
    assert!((json["perplexity"].as_f64().unwrap() / wanted.loss().exp() - 1.0).abs() < 1e-5);
    assert_eq!(json["tokens"], wanted.trained_tokens);
    // four answers such as `fn item_48() -> usize`
    assert_eq!(json["bytes"], 4 * 21);

    // a text longer than the context: every token is measured once
    let text = "fn main() {\n    println!(\"grüße\");\n}\n".repeat(60);
    std::fs::write(fixture.path("text.rs"), &text).unwrap();
    let ids = tokenizer.encode(&text, false).unwrap();
    assert!(ids.len() > 600);
    let json = fixture.ok("eval --model model --data text.rs --max-tokens-per-sample 256 --json").json();
    // nothing comes before the first token, which is `fn`
    assert_eq!(json["tokens"], ids.len() - 1);
    assert_eq!(json["bytes"], text.len() - 2);
    let bits =
        json["loss"].as_f64().unwrap() * (ids.len() - 1) as f64 / std::f64::consts::LN_2 / (text.len() - 2) as f64;
    assert!(close(&json["bits_per_byte"], bits), "{json}");
    // the tokenizer has `add_bos_token: false`: no token comes before the text
    let short = "fn main() {}";
    std::fs::write(fixture.path("short.txt"), short).unwrap();
    let ids = tokenizer.encode(short, false).unwrap();
    let sample = metal_candle::data::Sample { trained: vec![true; ids.len()], ids, source: None };
    let wanted = evaluate(&model, None, &Dataset::from_samples(vec![sample]), 4096).unwrap();
    assert!(close(&fixture.ok("eval --model model --data short.txt --json").json()["loss"], wanted.loss()));
}

#[test]
fn completions_are_scripts() {
    let fixture = Fixture::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = fixture.ok(&format!("completions {shell}")).stdout;
        assert!(script.contains("metal-candle") && script.contains("learning-rate"), "{shell}");
    }
}

#[test]
fn help_has_examples() {
    let fixture = Fixture::new();
    for command in
        ["", "train", "generate", "chat", "fuse", "eval", "logits", "template", "tokenize", "detokenize", "data check"]
    {
        let text = fixture.ok(&format!("{command} --help")).stdout;
        assert!(text.contains("Example"), "{command}\n{text}");
    }
}
