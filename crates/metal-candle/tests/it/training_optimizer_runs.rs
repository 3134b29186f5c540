//! Runs of the trainer with each optimizer, and with groups of parameters.

use crate::golden;
use crate::training_optimizer::all;
use crate::training_resume::{files, trainer};
use crate::training_trainer::{adapter, config, dataset, golden_samples};
use metal_candle::adapters::LoRAAdapter;
use metal_candle::training::{
    AdamWConfig, OptimizerConfig, ScheduleFreeAdamWConfig, SgdConfig, Trainer, TrainingEvent, evaluate,
};
use metal_candle::{Error, Model};
use std::ops::ControlFlow;

/// A learning rate of the right size for tiny models.
fn learning_rate(config: OptimizerConfig) -> f64 {
    match config {
        OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, .. }) => 1.0,
        OptimizerConfig::Sgd(_) => 0.1,
        OptimizerConfig::Lion(_) => 2e-3,
        _ => 1e-2,
    }
}

#[test]
fn the_loss_falls_with_each_optimizer() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    for optimizer in all() {
        let rate = learning_rate(optimizer);
        let of_adapter =
            Trainer::new(adapter(&model), config(30, rate)).unwrap().with_batch_tokens(60).with_optimizer(optimizer);
        let metrics = of_adapter.train(&data).unwrap();
        let (first, last) = (metrics.steps[0].loss, metrics.final_loss().unwrap());
        assert!(last < 0.9 * first, "adapter, {optimizer:?}: {first} {last}");
        let of_all = Trainer::full(model.clone(), config(20, 0.3 * rate)).unwrap().with_optimizer(optimizer);
        let metrics = of_all.train(&data).unwrap();
        let (first, last) = (metrics.steps[0].loss, metrics.final_loss().unwrap());
        assert!(last < 0.9 * first, "all parameters, {optimizer:?}: {first} {last}");
    }
}

#[test]
fn a_run_with_each_optimizer_goes_on_to_the_same_bytes() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    for optimizer in all() {
        let make = |folder: &std::path::Path| {
            trainer(&model, folder).with_optimizer(optimizer).with_lora_plus_ratio(4.0).with_decay_matrices_only(true)
        };
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make(whole.path()).train(&data).unwrap();
        for stop in [3, 4] {
            make(parts.path())
                .with_resume(true)
                .with_callback(move |event| match event {
                    TrainingEvent::Step { step, .. } if *step == stop => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(()),
                })
                .train(&data)
                .unwrap();
        }
        make(parts.path()).with_resume(true).train(&data).unwrap();
        let (expected, found) = (files(whole.path()), files(parts.path()));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, bytes) in &found {
            assert!(bytes == &expected[name], "{optimizer:?}: {name} differs");
        }
        let other = trainer(&model, whole.path()).with_optimizer(AdamWConfig { beta1: 0.5, ..Default::default() });
        let Err(Error::Argument { name, message }) = other.with_resume(true).train(&data) else { panic!() };
        assert!(name == "resume" && message.contains("`optimizer_config` was"), "{message}");
        assert!(message.contains("`lora_plus_ratio` was \"4\", is null"), "{message}");
    }
}

#[test]
fn what_schedule_free_adamw_evaluates_is_what_it_keeps() {
    let model = golden::model("models/untied");
    let (data, held_out) = (dataset(12, 97), dataset(4, 97));
    let folder = tempfile::tempdir().unwrap();
    let trainer = Trainer::new(adapter(&model), config(4, 1e-2))
        .unwrap()
        .with_optimizer(OptimizerConfig::ScheduleFreeAdamW(ScheduleFreeAdamWConfig::default()))
        .with_batch_tokens(60)
        .with_evaluation(held_out.clone(), 0)
        .with_run_folder(folder.path());
    let metrics = trainer.train(&data).unwrap();
    let loss = |adapter: &LoRAAdapter| {
        evaluate(&model, Some(&adapter.low_rank_updates().unwrap()), &held_out, 2048).unwrap().loss()
    };
    let last = metrics.evaluations.last().unwrap();
    let relative = |found: f64, expected: f64| (found / expected - 1.0).abs();
    assert!(relative(loss(&trainer.lora_adapter()), last.loss) < 1e-9);
    assert!(relative(loss(&trainer.best_adapter().unwrap()), metrics.best.unwrap().loss) < 1e-9);
    let saved = LoRAAdapter::load(&model, folder.path().join(format!("checkpoints/step-{:06}", last.step))).unwrap();
    assert!(relative(loss(&saved), last.loss) < 1e-9);
}

/// How far the A and the B of an adapter have gone in a step, in the mean over their elements.
fn moved(model: &Model, ratio: Option<f64>) -> (f64, f64) {
    // with B at 0 there would be no gradient for A
    let start = LoRAAdapter::load(model, golden::path("lora/all-linear-rslora")).unwrap();
    let mut trainer = Trainer::new(start.clone(), config(1, 1e-3)).unwrap().with_max_steps(1);
    if let Some(ratio) = ratio {
        trainer = trainer.with_lora_plus_ratio(ratio);
    }
    trainer.train(&dataset(6, model.config().vocab_size as u32)).unwrap();
    let end = trainer.lora_adapter();
    let (mut of_a, mut of_b) = (0.0, 0.0);
    for (before, after) in start.modules().iter().zip(end.modules()) {
        let ((a, b), (new_a, new_b)) = (start.matrices(before).unwrap(), end.matrices(after).unwrap());
        let mean = |old: candle_core::Tensor, new: candle_core::Tensor| {
            f64::from((new - old).unwrap().abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap())
        };
        of_a += mean(a, new_a) / start.modules().len() as f64;
        of_b += mean(b, new_b) / start.modules().len() as f64;
    }
    (of_a, of_b)
}

#[test]
fn lora_plus_moves_b_by_the_ratio_further() {
    let model = golden::model("models/untied");
    let ((a, b), (plus_a, plus_b)) = (moved(&model, None), moved(&model, Some(16.0)));
    assert!((plus_a / a - 1.0).abs() < 1e-6, "{a} {plus_a}");
    assert!((plus_b / b - 16.0).abs() < 0.05, "{b} {plus_b}");
    for ratio in [0.0, -1.0, f64::NAN] {
        let trainer = Trainer::new(adapter(&model), config(1, 1e-3)).unwrap().with_lora_plus_ratio(ratio);
        assert!(trainer.train(&dataset(6, 97)).unwrap_err().to_string().contains("lora_plus_ratio"));
    }
}

#[test]
fn ten_steps_of_lora_plus_equal_those_of_peft() {
    let golden = golden::json("methods/loraplus.json");
    let model = golden::model(golden["model"].as_str().unwrap());
    let start = LoRAAdapter::load(&model, golden::path(golden["adapter"].as_str().unwrap())).unwrap();
    let (dataset, batches) = golden_samples(&golden::json("training/ten_steps.json")["batches"]);
    let trainer = Trainer::new(start, config(1, golden["lr"].as_f64().unwrap()))
        .unwrap()
        .with_batches(batches)
        .with_lora_plus_ratio(golden["loraplus_lr_ratio"].as_f64().unwrap());
    let metrics = trainer.train(&dataset).unwrap();
    let expected = golden["losses"].as_array().unwrap();
    assert_eq!(metrics.steps.len(), expected.len());
    for (step, expected) in metrics.steps.iter().zip(expected) {
        let expected = expected.as_f64().unwrap();
        assert!((step.loss - expected).abs() < 1e-4, "step {}: {} instead of {expected}", step.step, step.loss);
    }
}

#[test]
fn an_adapter_of_the_embedding_has_a_rate_of_its_own_with_lora_plus() {
    let model = golden::model("models/untied");
    let start = LoRAAdapter::load(&model, golden::path("methods/embeddings")).unwrap();
    let run = |ratio: Option<f64>| {
        let mut trainer = Trainer::new(start.clone(), config(1, 1e-2)).unwrap().with_max_steps(1);
        if let Some(ratio) = ratio {
            trainer = trainer.with_lora_plus_ratio(ratio);
        }
        trainer.train(&dataset(6, 97)).unwrap();
        trainer.lora_adapter()
    };
    let farthest = |end: &LoRAAdapter, of_embedding: bool| {
        let mut farthest = 0.0_f32;
        for module in start.modules().iter().filter(|module| module.path.ends_with("embed_tokens") == of_embedding) {
            let (old, new) = (start.matrices(module).unwrap(), end.matrices(module).unwrap());
            farthest = farthest.max(golden::max_difference(&old.0, &new.0)).max(golden::max_difference(&old.1, &new.1));
        }
        farthest
    };
    assert!(farthest(&run(None), true) > 5e-3);
    let plus = run(Some(1.0));
    assert!(farthest(&plus, true) < 2e-6, "{}", farthest(&plus, true));
    assert!(farthest(&plus, false) > 5e-3);
}

#[test]
fn vectors_can_be_left_without_decay() {
    let model = golden::model("models/untied");
    let config_of = || {
        let mut config = config(1, 1e-3);
        config.optimizer_config.weight_decay = 10.0;
        config
    };
    let trained = |matrices_only| {
        let trainer = Trainer::full(model.clone(), config_of()).unwrap().with_decay_matrices_only(matrices_only);
        trainer.train(&dataset(6, 97)).unwrap();
        trainer.model()
    };
    let (all, matrices) = (trained(false), trained(true));
    for ((name, left), (_, right)) in
        crate::golden::parameters_of(&all).iter().zip(&crate::golden::parameters_of(&matrices))
    {
        let difference = golden::max_difference(left, right);
        assert_eq!(difference > 0.0, left.rank() == 1, "{name}: {difference}");
    }
}
