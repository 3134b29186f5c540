//! `plan`, and runs that are made to fit.

use crate::fixture::Fixture;

#[test]
fn the_plan_tells_what_a_run_needs() {
    let fixture = Fixture::new();
    let flags = "--model model --data data --batch-tokens 256 --epochs 1";
    let plan = fixture.ok(&format!("plan --json --measure 1 {flags}")).json();
    let number = |key: &str| plan[key].as_u64().unwrap_or_else(|| panic!("{key} in {plan}"));
    assert!(number("peak_memory_bytes") >= number("weights_bytes") + number("trained_bytes"));
    assert!(number("micro_batch_tokens") <= 256 && number("longest_sample") <= 256);
    assert_eq!(number("checkpointed_blocks"), 0);
    assert!(plan["tokens_per_second"].as_f64().unwrap() > 0.0 && plan["seconds"].as_f64().unwrap() > 0.0);
    let run = fixture.ok(&format!("train --json --output run --test-samples 0 {flags}")).json();
    for key in ["steps", "tokens", "trained_tokens"] {
        assert_eq!(run[key], plan[key], "{key}");
    }
    let text = fixture.ok(&format!("plan --measure 0 {flags}")).stdout;
    for name in ["weights", "optimizer", "activations", "head", "kv cache", "peak", "steps", "longest row"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} in {text}");
    }
    assert!(!text.contains("tokens/s"), "{text}");
    // `train` prints the same numbers, in words that mean the same
    let flags = "--model model --data data --batch-tokens 256 --steps 1 --layers 0 --target-modules q_proj";
    let ran = fixture.ok(&format!("train --output one --test-samples 0 {flags}"));
    let plan = fixture.ok(&format!("plan --measure 0 {flags}")).stdout;
    let line = ran.stderr.lines().find(|line| line.starts_with("memory ")).unwrap();
    for name in ["weights", "trained", "optimizer", "activations", "step"] {
        let planned = plan.lines().find(|line| line.starts_with(name)).unwrap();
        let planned: Vec<&str> = planned.split_whitespace().skip(1).take(2).collect();
        assert!(line.contains(&format!("{name} {}", planned.join(" "))), "{name} {planned:?} is not in {line}");
    }
    for words in ["on 1 layer (q_proj)", ": 1 step of up to", "1 of 1 step in"] {
        assert!(ran.stderr.contains(words), "`{words}` is not in {}", ran.stderr);
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_it_starts() {
    let fixture = Fixture::new();
    let failed = fixture.run("train --model model --data data --output run --memory 1MB");
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    let says = |text: &str| assert!(failed.stderr.contains(text), "{}", failed.stderr);
    says("the run needs");
    says("longest sample");
    assert!(!fixture.path("run").exists());
    for (flag, expected) in [
        ("--memory much", "expected a size such as `8GB`"),
        ("--checkpointed-blocks some", "expected `none`, `all` or a number"),
        ("--micro-batch-tokens 0", "expected 1 to"),
    ] {
        let failed = fixture.run(&format!("plan --model model --data data {flag}"));
        assert!(failed.code == 1 && failed.stderr.contains(expected), "{}", failed.stderr);
    }
}

#[test]
fn blocks_computed_anew_train_the_same_adapter() {
    let fixture = Fixture::new();
    for (folder, blocks) in [("saved", "none"), ("recomputed", "all")] {
        let flags = "--model model --data data --steps 4 --test-samples 0 --dropout 0.1";
        fixture.ok(&format!("train --output {folder} --checkpointed-blocks {blocks} {flags}"));
    }
    let adapter = |folder: &str| fixture.read(&format!("{folder}/adapter/adapter_model.safetensors"));
    assert_eq!(adapter("saved"), adapter("recomputed"));
}
