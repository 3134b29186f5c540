//! `train`: the run folder and the settings.

use crate::events::scalars;
use crate::fixture::Fixture;
use metal_candle::ModelLoader;
use metal_candle::adapters::LoRAAdapter;
use serde_json::Value;

const SMALL: &str =
    "train --model model --data data --steps 8 --batch-tokens 128 --learning-rate 0.02 --test-samples 2";

fn lines(fixture: &Fixture, name: &str) -> Vec<Value> {
    fixture.text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_folder_holds_all_of_the_run() {
    let fixture = Fixture::new();
    let ran = fixture.ok(&format!("{SMALL} --eval-interval 4 --rank 4 --target-modules q_proj,v_proj --json"));
    let json = ran.json();
    assert_eq!(json["run"], "runs/001");
    assert_eq!((&json["steps"], &json["stop_reason"]), (&Value::from(8), &Value::from("completed")));
    assert!(json["valid_loss_after"].as_f64().unwrap() < json["valid_loss_before"].as_f64().unwrap() - 0.1, "{json}");
    assert_eq!(json["test_samples"], 2);

    let rows = lines(&fixture, "runs/001/metrics.jsonl");
    let steps: Vec<_> = rows.iter().filter(|row| row["event"] == "step").collect();
    let evaluations: Vec<_> = rows.iter().filter(|row| row["event"] == "evaluation").collect();
    assert_eq!((steps.len(), evaluations.len()), (8, 3));
    assert_eq!(json["valid_loss_after"], evaluations[2]["loss"]);

    // the event file contains the same
    let events = std::fs::read_dir(fixture.path("runs/001")).unwrap().flatten().map(|entry| entry.path());
    let events: Vec<_> = events.filter(|path| path.display().to_string().contains("events.out.tfevents.")).collect();
    assert_eq!(events.len(), 1);
    let scalars = scalars(&std::fs::read(&events[0]).unwrap());
    for (tag, rows, key) in [
        ("train/loss", &steps, "loss"),
        ("train/learning_rate", &steps, "learning_rate"),
        ("train/grad_norm", &steps, "grad_norm"),
        ("valid/loss", &evaluations, "loss"),
    ] {
        let found: Vec<_> = scalars.iter().filter(|scalar| scalar.tag == tag).map(|s| (s.step, s.value)).collect();
        let wanted: Vec<_> =
            rows.iter().map(|row| (row["step"].as_u64().unwrap(), row[key].as_f64().unwrap() as f32)).collect();
        assert_eq!(found, wanted, "{tag}");
    }

    let svg = fixture.text("runs/001/loss.svg");
    assert!(svg.starts_with("<svg") && svg.contains("validation loss"));
    assert!(std::fs::read_dir(fixture.path("runs/001/checkpoints")).unwrap().count() >= 1);
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let adapter = LoRAAdapter::load(&model, fixture.path("runs/001/adapter")).unwrap();
    assert_eq!((adapter.rank(), adapter.modules().len()), (4, 4));
    assert!((adapter.alpha() - 8.0).abs() < 1e-12);
    assert_eq!(json["num_trainable_parameters"], adapter.num_parameters());

    // plain lines of progress, and what comes next
    for text in
        ["adapter  rank 4", "training 8/8", "validation loss", "what the model writes after", "metal-candle generate"]
    {
        assert!(ran.stderr.contains(text), "{text} is not in\n{}", ran.stderr);
    }
}

#[test]
fn config_toml_starts_the_same_run_again() {
    let fixture = Fixture::new();
    fixture.ok(SMALL);
    fixture.ok("train --config runs/001/config.toml");
    let adapter = |run: &str| fixture.read(&format!("runs/{run}/adapter/adapter_model.safetensors"));
    assert_eq!(fixture.text("runs/001/config.toml"), fixture.text("runs/002/config.toml"));
    assert_eq!(adapter("001"), adapter("002"));
    // flags win
    fixture.ok("train --config runs/001/config.toml --seed 1 --output other");
    assert_ne!(adapter("001"), fixture.read("other/adapter/adapter_model.safetensors"));
    assert!(fixture.text("other/config.toml").contains("seed = 1\n"));
    // what was given are keys, everything else comments
    let text = fixture.text("runs/001/config.toml");
    let table: toml::Table = text.parse().unwrap();
    let keys: Vec<_> = table.keys().map(String::as_str).collect();
    assert_eq!(keys, ["batch_tokens", "data", "learning_rate", "model", "steps", "test_samples"]);
    for line in
        ["rank = 8", "alpha = 16.0", "warmup_steps = 0", "eval_interval = 1", "device = \"auto\"", "beta1 = 0.9"]
    {
        assert!(text.contains(&format!("\n# {line}  # derived\n")), "{line} is not in\n{text}");
    }
}

#[test]
fn what_a_config_does_not_set_is_derived_anew() {
    let fixture = Fixture::new();
    fixture.ok(&format!("{SMALL} --rank 4 --warmup-steps 1 --output first"));
    let words = "train --config first/config.toml --output";
    fixture.ok(&format!("{words} rate --learning-rate 1e-3 --steps 30 --rank 2"));
    let text = fixture.text("rate/config.toml");
    for line in
        ["# min_learning_rate = 0.0001  # derived", "# alpha = 4.0  # derived", "# eval_interval = 3  # derived"]
    {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    for (flags, run) in [("--full", "full"), ("--schedule constant", "constant"), ("--epochs 1", "epochs")] {
        fixture.ok(&format!("{words} {run} {flags}"));
    }
    assert!(!fixture.text("full/config.toml").contains("rank"));
    assert!(!fixture.text("constant/config.toml").contains("warmup_steps"));
    let ran = fixture.run(&format!("{words} no --min-learning-rate 0.5"));
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("`--min-learning-rate`") && ran.stderr.contains("`--learning-rate`"), "{}", ran.stderr);
}

#[test]
fn a_run_goes_on_from_any_folder() {
    let fixture = Fixture::new();
    let first = fixture.ok(&format!("{SMALL} --output run --json")).json();
    let mut command = fixture.command();
    let output = command.current_dir(fixture.path("run")).args(["train", "--resume", ".", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let again: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(again["valid_loss_after"], first["valid_loss_after"]);
    // it has no steps left, so the speed is that of the first process
    let record: Value = serde_json::from_str(&fixture.text("run/run.json")).unwrap();
    let speed = (record["tokens_per_second"].as_f64().unwrap(), first["tokens_per_second"].as_f64().unwrap());
    assert!((speed.0 / speed.1 - 1.0).abs() < 1e-3, "{speed:?}");
    let ran = fixture.run("train --resume run/adapter");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("not a run folder") && ran.stderr.contains("hint: `--resume run`"), "{}", ran.stderr);
}

#[test]
fn betas_reach_the_optimizer() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("betas.toml"), "beta1 = 0.5\nbeta2 = 0.9\n").unwrap();
    fixture.ok(&format!("{SMALL} --output default"));
    fixture.ok(&format!("{SMALL} --output same --beta1 0.9 --beta2 0.999"));
    fixture.ok(&format!("{SMALL} --output file --config betas.toml"));
    let adapter = |run: &str| fixture.read(&format!("{run}/adapter/adapter_model.safetensors"));
    assert_eq!(adapter("default"), adapter("same"));
    assert_ne!(adapter("default"), adapter("file"));
}

#[test]
fn each_optimizer_trains_and_goes_on() {
    let fixture = Fixture::new();
    let words = "train --model model --data data --steps 6 --test-samples 0 --json";
    for (name, flags) in [
        ("adamw", "--schedule polynomial --power 3 --lora-plus-ratio 8"),
        ("adam", "--schedule cosine-restarts --num-cycles 2"),
        ("sgd", "--momentum 0.8 --nesterov"),
        ("lion", "--schedule wsd --decay-steps 2 --decay-shape cosine"),
        ("adafactor", "--schedule inverse-sqrt --warmup-steps 2"),
        ("muon", "--momentum 0.9 --decay-matrices-only"),
        ("adamw-8bit", "--beta2 0.99"),
        ("schedule-free-adamw", "--warmup-steps 2"),
    ] {
        let json = fixture.ok(&format!("{words} --optimizer {name} {flags} --output {name}")).json();
        assert!(json["valid_loss_after"].as_f64() < json["valid_loss_before"].as_f64(), "{name}: {json}");
        let adapter = fixture.read(&format!("{name}/adapter/adapter_model.safetensors"));
        fixture.ok(&format!("train --config {name}/config.toml --json --output {name}-again"));
        assert!(adapter == fixture.read(&format!("{name}-again/adapter/adapter_model.safetensors")), "{name}");
        let table: toml::Table = fixture.text(&format!("{name}/config.toml")).parse().unwrap();
        assert_eq!(table["optimizer"].as_str(), Some(name));
        // without the last checkpoint, the run resumes from the previous one
        std::fs::remove_dir_all(fixture.path(&format!("{name}/checkpoints/step-000006"))).unwrap();
        fixture.ok(&format!("train --resume {name} --json"));
        assert!(adapter == fixture.read(&format!("{name}/adapter/adapter_model.safetensors")), "{name} resumed");
    }
}

#[test]
fn an_adapter_is_trained_on() {
    let fixture = Fixture::new();
    let first = fixture.ok(&format!("{SMALL} --rank 2 --output first --json")).json();
    let second = fixture.ok(&format!("{SMALL} --adapter first --output second --json")).json();
    assert_eq!(second["valid_loss_before"], first["best_valid_loss"]);
    assert!(second["valid_loss_after"].as_f64() < first["valid_loss_after"].as_f64());
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    assert_eq!(LoRAAdapter::load(&model, fixture.path("second/adapter")).unwrap().rank(), 2);
}

#[test]
fn settings_reach_the_trainer() {
    let fixture = Fixture::new();
    let words = "train --model model --data data --output run --steps 6 --schedule linear --warmup-steps 2 \
                 --learning-rate 0.01 --min-learning-rate 0.001 --layers 1 --use-rslora --dropout 0.1 --save-interval 2 \
                 --gradient-accumulation-steps 2 --batch-tokens 64 --weight-decay 0 --max-grad-norm 0.5 \
                 --label-smoothing 0.1 --train-last-turn-only --early-stopping-patience 9 --test-samples 0";
    fixture.ok(words);
    let rows = lines(&fixture, "run/metrics.jsonl");
    let rates: Vec<_> =
        rows.iter().filter(|row| row["event"] == "step").map(|row| row["learning_rate"].as_f64().unwrap()).collect();
    for (rate, wanted) in rates.iter().zip([0.0, 0.005, 0.01, 0.00775, 0.0055, 0.00325]) {
        assert!((rate - wanted).abs() < 1e-12, "{rates:?}");
    }
    let model = ModelLoader::new().load(fixture.path("model")).unwrap();
    let adapter = LoRAAdapter::load(&model, fixture.path("run/adapter")).unwrap();
    assert!(adapter.use_rslora());
    assert_eq!(adapter.modules().len(), 7);
    assert!(adapter.modules().iter().all(|module| module.layer == Some(1)));
    assert!((adapter.dropout() - 0.1).abs() < 1e-9);
    let tokens = rows.iter().filter_map(|row| row["tokens"].as_u64()).max().unwrap();
    assert!(tokens > 64 && tokens <= 128, "{tokens}");
}

#[test]
fn all_weights_can_be_trained() {
    let fixture = Fixture::new();
    let words = format!("{SMALL} --full --dtype bf16 --output full --json");
    let json = fixture.ok(&words).json();
    assert!(json["valid_loss_after"].as_f64() < json["valid_loss_before"].as_f64(), "{json}");
    let model = ModelLoader::new().load(fixture.path("full/model")).unwrap();
    assert_eq!(model.dtype(), candle_core::DType::BF16);
    fixture.ok("generate --model full/model --prompt hi --max-tokens 3");
    // from new random weights, without the old ones
    let json = fixture.ok(&format!("{SMALL} --full --from-scratch --output scratch --json")).json();
    let loss = json["valid_loss_before"].as_f64().unwrap();
    let old = fixture.ok("eval --model model --data data/valid.jsonl --json").json()["loss"].as_f64().unwrap();
    assert!((loss - old).abs() > 1e-3, "{loss} {old}");
    fixture.ok("generate --model scratch/model --prompt hi --max-tokens 3");
}

#[test]
fn one_file_is_split_by_the_seed() {
    let fixture = Fixture::new();
    let words = "train --model model --data data/train.jsonl --steps 2 --json --output";
    let json = fixture.ok(&format!("{words} run --valid-fraction 0.25")).json();
    assert!(json["valid_loss_before"].is_f64());
    assert!(json.get("test_samples").is_none());
    let json = fixture.ok(&format!("{words} none --valid-fraction 0")).json();
    assert!(json["valid_loss_before"].is_null());
}
