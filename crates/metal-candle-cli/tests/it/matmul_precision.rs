//! `--matmul-precision` of all commands that multiply.

use crate::fixture::Fixture;
use metal_candle::Device;

/// Commands with a model whose weights are bf16, and what changes with the precision.
const COMMANDS: [(&str, &str); 4] = [
    ("generate --raw --prompt fn --temperature 0 --max-tokens 4", "/log_probabilities"),
    ("eval --data text.txt", "/loss"),
    ("logits --ids 1,2,3 --out logits.safetensors", ""),
    ("bench --model nano --skip prefill,train --decode-batch 1 --context 8 --decode-tokens 2", "/matmul_precision"),
];

#[test]
fn bf16_changes_results_where_the_processor_multiplies_it() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("text.txt"), "fn sum(values: &[f32]) -> f32 {\n    values.iter().sum()\n}\n").unwrap();
    for (words, pointer) in COMMANDS {
        let run = |precision: &str| {
            let ran = fixture.ok(&format!("{words} --device cpu --json --matmul-precision {precision}"));
            let warns = ran.stderr.contains("neither AVX512-BF16 nor AMX");
            assert_eq!(warns, precision == "bf16" && !Device::multiplies_bf16(), "{words}: {}", ran.stderr);
            match pointer {
                "" => format!("{:?}", std::fs::read(fixture.path("logits.safetensors")).unwrap()),
                pointer => ran.json().pointer(pointer).unwrap().to_string(),
            }
        };
        let differs = words.starts_with("bench") || Device::multiplies_bf16();
        assert_eq!(run("f32") != run("bf16"), differs, "{words}");
    }
    let words = "chat --device cpu --max-tokens 4 --quiet --matmul-precision bf16";
    let ran = fixture.run_with(&words.split(' ').collect::<Vec<_>>(), "hello\n");
    assert!(ran.code == 0 && !ran.stdout.is_empty(), "{}", ran.stderr);
}

#[test]
fn a_model_without_bf16_weights_is_refused() {
    let fixture = Fixture::new();
    for words in [
        "generate --raw --prompt fn",
        "chat",
        "eval --data data/valid.jsonl",
        "logits --ids 1 --out logits.safetensors",
        "serve --port 0",
        "bench --model nano --skip prefill,train",
        "train --data data",
    ] {
        let ran = fixture.run(&format!("{words} --dtype f32 --device cpu --matmul-precision bf16"));
        let expected = "expected bf16 weights, found f32: load the model as bf16";
        assert!(ran.code == 1 && ran.stderr.contains(expected), "{words}: {}", ran.stderr);
    }
}

#[test]
fn a_run_keeps_its_precision() {
    let fixture = Fixture::new();
    let words = "train --data data --device cpu --rank 2 --batch-tokens 64 --test-samples 0 --epochs 1";
    fixture.ok(&format!("{words} --output rounded --matmul-precision bf16"));
    let config = std::fs::read_to_string(fixture.path("rounded/config.toml")).unwrap();
    assert!(config.contains("matmul_precision = \"bf16\""), "{config}");
    fixture.ok("train --resume rounded");
    let ran = fixture.run("train --resume rounded --matmul-precision f32");
    assert!(ran.code == 1 && ran.stderr.contains("keeps its settings: remove `--matmul-precision`"), "{}", ran.stderr);
}
