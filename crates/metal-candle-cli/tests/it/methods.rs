//! `train` with the methods beside plain LoRA, and what other commands make of the result.

use crate::fixture::Fixture;
use metal_candle::models::SafetensorsFile;

const SMALL: &str =
    "train --model model --data data --steps 4 --batch-tokens 128 --learning-rate 0.01 --test-samples 0 --rank 2";

fn logits(fixture: &Fixture, model: &str, adapter: Option<&str>) -> Vec<f32> {
    let adapter = adapter.map_or_else(String::new, |adapter| format!(" --adapter {adapter}"));
    fixture.ok(&format!("logits --model {model}{adapter} --ids 1,2,3,4 --out logits.safetensors"));
    let file = SafetensorsFile::open(fixture.path("logits.safetensors")).unwrap();
    file.tensor("logits").unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

#[test]
fn adapters_of_all_methods_run_and_fuse() {
    let fixture = Fixture::new();
    let plain = logits(&fixture, "model", None);
    for (number, flags) in [
        "--use-dora",
        "--init-lora-weights pissa --use-rslora",
        "--init-lora-weights olora --layers 1 --rank-pattern q_proj=4",
        "--init-lora-weights orthogonal --neftune-noise-alpha 5",
        "--target-modules q_proj,embed_tokens,lm_head",
        "--modules-to-save lm_head,model.norm --target-modules v_proj",
        "--rank-pattern layers.0..*=4,down_proj=3 --alpha-pattern q_proj=9",
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{number}");
        fixture.ok(&format!("{SMALL} --output {run} {flags}"));
        let adapted = logits(&fixture, "model", Some(&run));
        assert!(largest_difference(&adapted, &plain) > 1e-3, "{flags}");
        let fused = format!("fused-{number}");
        fixture.ok(&format!("fuse --model model --adapter {run} --output {fused}"));
        let difference = largest_difference(&adapted, &logits(&fixture, &fused, None));
        assert!(difference < 1e-4, "{flags}: {difference}");
        fixture.ok(&format!("generate --model model --adapter {run} --prompt x --max-tokens 4"));
        fixture.ok(&format!("eval --model model --adapter {run} --data data"));
    }
}

#[test]
fn a_start_that_rounds_weights_keeps_its_model_beside_the_adapter() {
    let fixture = Fixture::new();
    let ran = fixture.ok(&format!("{SMALL} --output run --init-lora-weights loftq_niter_2 --json"));
    let loss = ran.json()["valid_loss_after"].clone();
    let evaluated = fixture.ok("eval --model run/base --adapter run --data data/valid.jsonl --json").json();
    assert!((evaluated["loss"].as_f64().unwrap() - loss.as_f64().unwrap()).abs() < 1e-4, "{evaluated} {loss}");
    let config = fixture.text("run/adapter/adapter_config.json");
    assert!(config.contains("run/base"), "{config}");
    for adapter in ["run", "run/adapter"] {
        let ran = fixture.run(&format!("generate --model model --adapter {adapter} --prompt x"));
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains("weights were rounded") && ran.stderr.contains("--model "), "{}", ran.stderr);
    }
}

#[test]
fn the_last_layers_alone_are_trained() {
    let fixture = Fixture::new();
    let flags = SMALL.replace(" --rank 2", "");
    let ran = fixture.ok(&format!("{flags} --full --train-last-layers 1 --output run --json"));
    let (before, after) = (
        SafetensorsFile::open(fixture.path("model/model.safetensors")).unwrap(),
        SafetensorsFile::open(fixture.path("run/model/model.safetensors")).unwrap(),
    );
    let mut trained = 0;
    for entry in before.entries() {
        let values = |file: &SafetensorsFile| -> Vec<f32> {
            file.tensor(&entry.name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let is_last = entry.name.contains("layers.1.");
        assert_eq!(values(&before) != values(&after), is_last, "{}", entry.name);
        trained += if is_last { values(&before).len() } else { 0 };
    }
    assert_eq!(ran.json()["num_trainable_parameters"], trained);
    let ran = fixture.run(&format!("{flags} --train-last-layers 1"));
    assert!(ran.code == 1 && ran.stderr.contains("needs `--full`"), "{}", ran.stderr);
    let ran = fixture.run(&format!("{flags} --full --train-last-layers 3"));
    assert!(ran.code == 1 && ran.stderr.contains("expected 1 to 2, found 3"), "{}", ran.stderr);
}

#[test]
fn patterns_come_from_a_table_too() {
    let fixture = Fixture::new();
    let text = "modules_to_save = [\"model.norm\"]\n[rank_pattern]\nq_proj = 4\n\"layers.0..*\" = 3\n";
    std::fs::write(fixture.path("settings.toml"), text).unwrap();
    fixture.ok(&format!("{SMALL} --config settings.toml --output run"));
    let config = fixture.text("run/adapter/adapter_config.json");
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["modules_to_save"], serde_json::json!(["model.norm"]));
    assert_eq!(config["rank_pattern"]["model.layers.1.self_attn.q_proj"], 4);
    assert_eq!(config["rank_pattern"]["model.layers.0.self_attn.q_proj"], 3);
    let ran = fixture.run(&format!("{SMALL} --rank-pattern gate=3"));
    assert!(ran.code == 1 && ran.stderr.contains("`gate` matches no adapted layer"), "{}", ran.stderr);
}

#[test]
fn adapters_are_converted_and_what_mlx_lm_cannot_hold_is_named() {
    let fixture = Fixture::new();
    fixture.ok(&format!("{SMALL} --output run --rank-pattern q_proj=4 --use-dora"));
    let expected = logits(&fixture, "model", Some("run"));
    fixture.ok("convert --model model --adapter run --format mlx --output mlx");
    let ran = fixture.ok("convert --model model --adapter mlx --format peft --output peft --json");
    assert!(ran.json()["max_logit_difference"].as_f64().unwrap() < 1e-5, "{}", ran.json());
    for folder in ["mlx", "peft"] {
        assert!(largest_difference(&logits(&fixture, "model", Some(folder)), &expected) < 1e-4, "{folder}");
    }
    let again = fixture.run("convert --model model --adapter run --format mlx --output mlx");
    assert!(again.code == 1 && again.stderr.contains("`mlx` is not empty"), "{}", again.stderr);
    let kinds = [
        ("--trainable-tokens 5,9", "`model.embed_tokens.weight`: trained token rows"),
        ("--bias all", ".bias`: trained (`bias`)"),
        ("--modules-to-save model.norm", "`model.norm.weight`: trained in full"),
    ];
    for (number, (flags, expected)) in kinds.into_iter().enumerate() {
        let run = format!("run-{number}");
        fixture.ok(&format!("{SMALL} --output {run} {flags}"));
        let refused = fixture.run(&format!("convert --model model --adapter {run} --format mlx --output other"));
        assert!(refused.code == 1 && refused.stderr.contains(expected), "{}", refused.stderr);
        assert!(!fixture.path("other").exists());
        // and training from it continues with the same parameters
        fixture.ok(&format!("{} --adapter {run} --output {run}-again", SMALL.replace(" --rank 2", "")));
        let config = |run: &str| fixture.text(&format!("{run}/adapter/adapter_config.json"));
        assert_eq!(config(&run), config(&format!("{run}-again")));
    }
    let refused = fixture.run(&format!("{SMALL} --output x --trainable-tokens no-such-token"));
    assert!(refused.stderr.contains("`no-such-token` is neither an id nor in the vocabulary"), "{}", refused.stderr);
}

#[test]
fn an_adapter_of_another_model_names_that_model() {
    let fixture = Fixture::new();
    fixture.ok(&format!("{SMALL} --output run"));
    // the built-in model has other sizes
    let refused = fixture.run("generate --model nano --adapter run --prompt x");
    assert!(refused.code == 1 && refused.stderr.contains("hint: the adapter was trained on `"), "{}", refused.stderr);
    // tensors that no module of the model has
    let text = fixture.text("run/adapter/adapter_config.json").replace("_proj\"", "_projection\"");
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["base_model_name_or_path"] = "org/base".into();
    std::fs::write(fixture.path("run/adapter/adapter_config.json"), config.to_string()).unwrap();
    let path = fixture.path("run/adapter/adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let tensor = |name: &str| (name.replace("_proj", "_projection"), file.tensor(name).unwrap());
    let tensors: Vec<_> = file.entries().iter().map(|entry| tensor(&entry.name)).collect();
    metal_candle::models::write_safetensors(&path, &tensors, &[]).unwrap();
    let refused = fixture.run("logits --model model --adapter run --ids 1 --out x");
    assert!(refused.code == 1 && refused.stderr.contains("was trained on `org/base`"), "{}", refused.stderr);
}
