//! Counts the Metal dispatches of a token and of a training step, with the counters of the software device, the only
//! Metal device on Linux.

use metal_candle::data::{Dataset, Sample};
use metal_candle::inference::{GenerationConfig, Generator};
use metal_candle::training::{AdamWConfig, LRScheduler, LoRAAdapter, TargetModule, Trainer, TrainingConfig};
use metal_candle::{Device, Model, ModelConfig};
use serde_json::Value;
use std::process::Command;

const LAYERS: i64 = 3;

/// The work of one process.
const WORK: &str = "METAL_CANDLE_TEST_WORK";

fn model(family: &str) -> Model {
    let config = format!(
        r#"{{"model_type": "{family}", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": {LAYERS}, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
        "max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "initializer_range": 0.2}}"#
    );
    let config = ModelConfig::from_json_str(&config).unwrap();
    Model::initialize(config, 1, Device::metal().unwrap()).unwrap()
}

fn adapter(model: &Model, modules: &[TargetModule]) -> LoRAAdapter {
    LoRAAdapter::builder(model).with_rank(4).with_target_modules(modules.to_vec()).build().unwrap()
}

/// Runs in its own process, whose counters are read when it ends.
#[test]
#[ignore = "a part of the tests below, which run it"]
fn worker() {
    let work = std::env::var(WORK).unwrap();
    let [family, kind, count] = work.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let count: usize = count.parse().unwrap();
    let model = model(family);
    match kind {
        "decode" | "decode-adapter" => {
            let mut generator = Generator::new(model.clone());
            if kind == "decode-adapter" {
                generator.set_adapter(Some(adapter(&model, &[TargetModule::AllLinear]).low_rank_updates().unwrap()));
            }
            let config = GenerationConfig { ignore_eos: true, ..GenerationConfig::default() }.with_max_tokens(count);
            assert_eq!(generator.generate(vec![1u32, 2, 3], &config).unwrap().tokens.len(), count);
        }
        _ => {
            let modules = if kind == "train-all" { &TargetModule::ALL[..] } else { &[TargetModule::QProj][..] };
            let config = TrainingConfig {
                num_epochs: 1,
                lr_scheduler: LRScheduler::constant(1e-2),
                optimizer_config: AdamWConfig::default(),
                max_grad_norm: Some(1.0),
            };
            let sample = Sample { ids: (0..20).map(|i| i * 7 % 50).collect(), trained: vec![true; 20], source: None };
            let trainer = Trainer::new(adapter(&model, modules), config).unwrap().with_max_steps(count);
            assert_eq!(trainer.train(&Dataset::from_samples(vec![sample])).unwrap().num_steps, count);
        }
    }
}

/// The counters of a process that does this work.
fn counters(work: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("counters.json");
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "metal_budget::worker", "--ignored"])
        .env(WORK, work)
        .env("METAL_SIM_STATS", &file)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
    let text = std::fs::read_to_string(&file).expect("the software Metal device writes its counters");
    let counters: Value = serde_json::from_str(&text).unwrap();
    let problems = &counters["problems"];
    assert!(problems.as_object().is_none_or(serde_json::Map::is_empty), "{work}: {problems}");
    counters
}

/// The counts that one more token or step adds, by counter.
fn added(family: &str, kind: &str, few: usize, many: usize) -> impl Fn(&str) -> i64 {
    let counters = |count: usize| counters(&format!("{family} {kind} {count}"));
    let (less, more) = (counters(few), counters(many));
    let count = (many - few) as i64;
    move |name: &str| {
        let value = |counters: &Value| counters[name].as_i64().unwrap_or_else(|| panic!("no counter `{name}`"));
        let difference = value(&more) - value(&less);
        assert_eq!(difference % count, 0, "`{name}` differs from one to the next");
        difference / count
    }
}

#[test]
fn a_token_takes_five_dispatches_a_block_and_three() {
    for family in ["qwen2", "llama", "qwen3", "granite", "gemma", "mistral", "phi3", "gemma2", "olmo2"] {
        for kind in ["decode", "decode-adapter"] {
            let added = added(family, kind, 4, 12);
            // a norm after a part adds one
            let blocks = if ["gemma2", "olmo2"].contains(&family) { 7 } else { 5 };
            assert_eq!(added("dispatches"), blocks * LAYERS + 3, "{family}, {kind}");
            assert_eq!(added("waits"), 1);
            assert_eq!(added("buffers_allocated"), 0);
            assert_eq!(added("blit_copies") + added("blit_fills"), 0);
        }
    }
}

/// The head, the gradient norm and copies of the parameters are blits or waits of a step. They do not depend on the
/// number of blocks or matrices.
#[test]
fn a_training_step_takes_as_many_dispatches_for_one_matrix_as_for_seven() {
    for family in ["qwen2", "llama"] {
        let (few, all) = (added(family, "train-q", 1, 3), added(family, "train-all", 1, 3));
        for added in [&few, &all] {
            assert_eq!(added("dispatches"), 21 * LAYERS + 14, "{family}");
            assert!(added("blit_copies") + added("blit_fills") <= 6);
            assert!(added("waits") <= 3);
        }
    }
}

/// Norms of q and k are separate launches: two, plus the rotation, in the forward pass, and two in the backward pass.
#[test]
fn a_training_step_of_qwen3_takes_five_dispatches_a_block_more() {
    let added = added("qwen3", "train-all", 1, 3);
    assert_eq!(added("dispatches"), 26 * LAYERS + 14);
    assert!(added("waits") <= 3);
}
