//! The built-in model, anywhere and offline.

use crate::fixture::{Fixture, nano};

#[test]
fn the_built_in_model_needs_no_files() {
    let fixture = Fixture::new();
    let words = ["generate", "--temperature", "0", "--max-tokens", "6", "--json", "--prompt", "/// Adds.\nfn add"];
    let text = fixture.run_with(&words, "").json()["text"].clone();
    let model = nano().display().to_string();
    let from_folder = fixture.run_with(&[&words[..], &["--model", &model]].concat(), "").json()["text"].clone();
    assert_eq!(text, from_folder);

    // what was unpacked is repaired when it has suffered
    let unpacked = std::fs::read_dir(fixture.path("cache/metal-candle")).unwrap().next().unwrap().unwrap().path();
    let weights = unpacked.join("model.safetensors");
    assert_eq!(std::fs::read(&weights).unwrap(), std::fs::read(nano().join("model.safetensors")).unwrap());
    std::fs::write(&weights, b"cut").unwrap();
    assert_eq!(fixture.run_with(&words, "").json()["text"], text);
    // and a home that cannot be written to is no hindrance
    std::fs::write(fixture.path("file"), b"").unwrap();
    let mut command = fixture.command();
    command.args(words).env("XDG_CACHE_HOME", fixture.path("file")).env("TMPDIR", fixture.path("data"));
    let json: serde_json::Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    assert_eq!(json["text"], text);
}

#[test]
fn without_flags_its_sample_data_is_trained_on_and_measured() {
    let fixture = Fixture::new();
    let words = "train --steps 12 --eval-interval 12 --batch-tokens 1024 --test-samples 3";
    let ran = fixture.ok(&format!("{words} --json"));
    let json = ran.json();
    let loss = |key: &str| json[key].as_f64().unwrap();
    assert!(loss("valid_loss_after") < loss("valid_loss_before") - 0.05, "{json}");
    assert_eq!(json["run"], "runs/001");
    assert!(ran.stderr.contains("try it          metal-candle generate --adapter runs/001"), "{}", ran.stderr);
    let adapted = fixture.ok("eval --adapter runs/001 --json").json()["loss"].as_f64().unwrap();
    let plain = fixture.ok("eval --json").json()["loss"].as_f64().unwrap();
    assert!(adapted < plain - 0.05, "{adapted} {plain}");
}
