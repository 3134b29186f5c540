//! `--kv-cache` of all commands that have a cache.

use crate::fixture::Fixture;
use metal_candle::inference::KVCacheType;
use serde_json::Value;

const TEXT: &str = "/// The sum of all values.\nfn sum(values: &[f32]) -> f32 {\n    values.iter().sum()\n}\n";

#[test]
fn every_type_generates_chats_and_is_measured() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("text.txt"), TEXT.repeat(8)).unwrap();
    let generate = |flags: &str| -> Value {
        let words = "generate --device cpu --raw --prompt fn --temperature 0 --max-tokens 24 --json";
        fixture.ok(&format!("{words} {flags}")).json()
    };
    let eval = |flags: &str| fixture.ok(&format!("eval --device cpu --data text.txt --json {flags}")).json();
    let exact = eval("--kv-cache f32")["loss"].as_f64().unwrap();
    // without the flag no cache is used, and products are those of training
    let uncached = eval("");
    assert_eq!(uncached["kv_cache"], Value::Null);
    assert!((uncached["loss"].as_f64().unwrap() - exact).abs() < 1e-3, "{uncached} {exact}");
    // the weights of the built-in model are bf16
    assert_eq!(generate("")["log_probabilities"], generate("--kv-cache f16")["log_probabilities"]);
    let mut seen = Vec::new();
    for (kind, most) in KVCacheType::ALL.into_iter().zip([0.0, 2e-3, 5e-3, 1e-2, 1e-1]) {
        let flag = format!("--kv-cache {kind}");
        let found = eval(&flag);
        assert_eq!(found["kv_cache"], kind.name());
        let difference = (found["loss"].as_f64().unwrap() - exact).abs();
        assert!(difference <= most, "{kind}: {difference}");
        seen.push(generate(&flag)["log_probabilities"].to_string());
        let words = format!("chat --device cpu --max-tokens 4 --quiet {flag}");
        let ran = fixture.run_with(&words.split(' ').collect::<Vec<_>>(), "hello\n");
        assert!(ran.code == 0 && !ran.stdout.is_empty(), "{kind}: {}", ran.stderr);
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 5, "{seen:?}");
    let words = "bench --device cpu --model nano --skip prefill,train --decode-batch 2 --context 8 --decode-tokens 5";
    let report = fixture.ok(&format!("{words} --kv-cache q4_0 --json")).json();
    assert_eq!((&report["kv_cache"], &report["rows"][0]["work"]), (&"q4_0".into(), &"decode".into()));
}

#[test]
fn info_shows_the_memory_of_each_type() {
    let fixture = Fixture::new();
    let sizes = |flags: &str| {
        let json = fixture.ok(&format!("info --json {flags}")).json();
        json["model"]["kv_cache_bytes_per_token_by_type"].clone()
    };
    // keys and values of 5 layers, 3 heads of 32
    let elements = 2 * 5 * 3 * 32;
    let expected = serde_json::json!({
        "f32": 4 * elements, "f16": 2 * elements, "bf16": 2 * elements,
        "q8_0": elements / 32 * 34, "q4_0": elements / 32 * 18,
    });
    assert_eq!(sizes("--model nano"), expected);
    // heads of 8 have no blocks
    let mut names: Vec<String> = sizes("--model model").as_object().unwrap().keys().cloned().collect();
    names.sort();
    assert_eq!(names, ["bf16", "f16", "f32"]);
    let text = fixture.ok("info --model nano").stdout;
    assert!(text.contains("q8_0") && text.contains("key/value cache"), "{text}");
}

#[test]
fn a_type_that_the_model_cannot_have_is_refused() {
    let fixture = Fixture::new();
    let expected = "expected a head width that is a multiple of 32 for `q8_0`, found 8; use `f16`";
    for words in [
        "generate --model model --raw --prompt fn",
        "chat --model model",
        "eval --model model --data data/valid.jsonl",
        "serve --model model --port 0",
        "bench --model model --skip prefill,train",
    ] {
        let ran = fixture.run(&format!("{words} --device cpu --kv-cache q8_0"));
        assert!(ran.code == 1 && ran.stderr.contains(expected), "{words}: {}", ran.stderr);
        let ran = fixture.run(&format!("{words} --device cpu --kv-cache q5_1"));
        let known = "expected one of `f32`, `f16`, `bf16`, `q8_0`, `q4_0`, found `q5_1`";
        assert!(ran.code == 1 && ran.stderr.contains(known), "{words}: {}", ran.stderr);
    }
}
