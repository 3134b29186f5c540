//! The trainer on golden models: numbers of torch and peft, batching, stopping, refusing.

use crate::golden::{self, max_difference};
use candle_core::Tensor;
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::{Dataset, Random, Sample, Source};
use metal_candle::models::SafetensorsFile;
use metal_candle::ops::LowRankUpdates;
use metal_candle::training::{
    AdamWConfig, LRScheduler, StopReason, Trained, Trainer, TrainingConfig, TrainingEvent, evaluate,
};
use metal_candle::{Error, Model, Result};
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub(crate) fn config(num_epochs: usize, learning_rate: f64) -> TrainingConfig {
    TrainingConfig {
        num_epochs,
        lr_scheduler: LRScheduler::constant(learning_rate),
        optimizer_config: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
    }
}

/// Samples of repeating tokens, so that there is something to learn.
pub(crate) fn dataset(count: usize, vocab_size: u32) -> Dataset {
    let mut random = Random::new(17);
    let samples = (0..count).map(|number| {
        let length = 4 + random.below(20) as usize;
        let start = random.below(u64::from(vocab_size)) as u32;
        let ids = (0..length as u32).map(|i| (start + 3 * (i % 4)) % vocab_size).collect();
        let trained = (0..length).map(|i| i > 1 && i % 5 != 4).collect();
        let source = Source { path: Arc::new(PathBuf::from("train.jsonl")), line: number + 1 };
        Sample { ids, trained, source: Some(source) }
    });
    Dataset::from_samples(samples.collect())
}

pub(crate) fn adapter(model: &Model) -> LoRAAdapter {
    LoRAAdapter::builder(model).with_rank(4).with_target_modules(TargetModule::ALL).with_seed(3).build().unwrap()
}

fn bits(adapter: &LoRAAdapter) -> Vec<u32> {
    adapter.parameters().to_vec1::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
}

/// The golden batches as samples, and their numbers.
pub(crate) fn golden_samples(batches: &Value) -> (Dataset, Vec<Vec<usize>>) {
    let (mut samples, mut numbers) = (Vec::new(), Vec::new());
    for batch in batches.as_array().unwrap() {
        let first = samples.len();
        for (ids, labels) in batch["sequences"].as_array().unwrap().iter().zip(batch["labels"].as_array().unwrap()) {
            let trained: Vec<bool> =
                labels.as_array().unwrap().iter().map(|label| label.as_i64().unwrap() >= 0).collect();
            // a sample without a trained token adds nothing, and the trainer refuses it
            if trained[1..].contains(&true) {
                samples.push(Sample { ids: golden::ids(ids), trained, source: None });
            }
        }
        numbers.push((first..samples.len()).collect());
    }
    (Dataset::from_samples(samples), numbers)
}

#[test]
fn ten_steps_equal_those_of_torch_and_peft() {
    let golden = golden::json("training/ten_steps.json");
    let model = golden::model(golden["model"].as_str().unwrap());
    let start = LoRAAdapter::load(&model, golden::path("training/initial")).unwrap();
    let (dataset, batches) = golden_samples(&golden["batches"]);
    let trainer = Trainer::new(start, config(1, 1e-2)).unwrap().with_batches(batches);
    let metrics = trainer.train(&dataset).unwrap();
    assert_eq!(metrics.steps.len(), 10);
    for (index, step) in metrics.steps.iter().enumerate() {
        let (loss, norm) = (golden["losses"][index].as_f64().unwrap(), golden["grad_norms"][index].as_f64().unwrap());
        assert!((step.loss - loss).abs() < 1e-4, "step {}: loss {} instead of {loss}", step.step, step.loss);
        assert!(
            (step.grad_norm / norm - 1.0).abs() < 1e-3,
            "step {}: norm {} instead of {norm}",
            step.step,
            step.grad_norm
        );
    }
    let file = SafetensorsFile::open(golden::path("training/final.safetensors")).unwrap();
    let trained = trainer.lora_adapter();
    for module in trained.modules() {
        let (a, b) = trained.matrices(module).unwrap();
        for (matrix, leaf) in [(a, "lora_A"), (b, "lora_B")] {
            let name = format!("base_model.model.{}.{leaf}.weight", module.path);
            let difference = max_difference(&matrix, &file.tensor(&name).unwrap());
            assert!(difference < 1e-3, "{name}: {difference}");
        }
    }
}

#[test]
fn same_seed_same_bits() {
    let model = golden::model("models/untied");
    let dataset = dataset(20, 97);
    let start = LoRAAdapter::builder(&model).with_rank(4).with_dropout(0.2).build().unwrap();
    let run = |seed| {
        let trainer = Trainer::new(start.clone(), config(2, 1e-2)).unwrap().with_batch_tokens(64).with_seed(seed);
        let metrics = trainer.train(&dataset).unwrap();
        let losses: Vec<u64> = metrics.steps.iter().map(|step| step.loss.to_bits()).collect();
        (losses, bits(&trainer.lora_adapter()))
    };
    let first = run(1);
    assert_eq!(first, run(1));
    let other = run(2);
    assert_ne!(first.0, other.0);
    assert_ne!(first.1, other.1);
    // what was given is left as it was
    assert!(
        start.matrices(&start.modules()[0]).unwrap().1.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
            == 0.0
    );
}

#[test]
fn loss_falls_and_is_reported() {
    let model = golden::model("models/gqa-tied");
    let dataset = dataset(12, 103);
    let start = adapter(&model);
    let (num_parameters, num_modules) = (start.num_parameters(), start.modules().len());
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let trainer = Trainer::new(start, config(30, 1e-2)).unwrap().with_batch_tokens(100).with_callback(move |event| {
        seen.lock().unwrap().push(event.clone());
        ControlFlow::Continue(())
    });
    let total_steps = trainer.total_steps(&dataset).unwrap();
    let metrics = trainer.train(&dataset).unwrap();
    assert_eq!((metrics.num_steps, metrics.steps.len(), metrics.num_epochs), (total_steps, total_steps, 30));
    assert_eq!(metrics.stop_reason, StopReason::Completed);
    assert!(metrics.final_loss().unwrap() < 0.7 * metrics.steps[0].loss, "{metrics:?}");
    assert_eq!(metrics.num_trainable_parameters, num_parameters);
    // one gradient for each A and B, in f32, and none for anything frozen
    assert_eq!(metrics.num_gradient_tensors, 2 * num_modules);
    assert_eq!(metrics.gradient_bytes, 4 * num_parameters);
    assert!(metrics.saved_bytes > 0);
    assert_eq!(metrics.tokens, 30 * dataset.samples.iter().map(|sample| sample.ids.len()).sum::<usize>());
    let trained = dataset.samples.iter().flat_map(|sample| &sample.trained[1..]).filter(|&&trained| trained).count();
    assert_eq!(metrics.trained_tokens, 30 * trained);
    let events = events.lock().unwrap();
    assert_eq!(events.len(), total_steps + 2);
    assert_eq!(events[0], TrainingEvent::Started { step: 0, total_steps, num_trainable_parameters: num_parameters });
    assert!(matches!(events[1], TrainingEvent::Step { step: 1, epoch: 1, loss, .. } if loss == metrics.steps[0].loss));
    assert_eq!(
        events[total_steps + 1],
        TrainingEvent::Finished { step: total_steps, stop_reason: StopReason::Completed }
    );
}

/// The parameters after one step on all samples, in batches of `batch_samples` samples.
fn after_one_step(batch_samples: usize, label_smoothing: f64) -> (f64, f64, Tensor) {
    let model = golden::model("models/gqa-tied");
    let dataset = dataset(9, 103);
    // a warm start, so that the gradients of A are not zero
    let start = LoRAAdapter::load(&model, golden::path("lora/all-linear")).unwrap();
    let trainer = Trainer::new(start, config(1, 1e-3))
        .unwrap()
        .with_batch_tokens(10_000)
        .with_batch_samples(batch_samples)
        .with_gradient_accumulation(9_usize.div_ceil(batch_samples))
        .with_label_smoothing(label_smoothing);
    let metrics = trainer.train(&dataset).unwrap();
    assert_eq!(metrics.num_steps, 1);
    (metrics.steps[0].loss, metrics.steps[0].grad_norm, trainer.lora_adapter().parameters().clone())
}

#[test]
fn packed_one_by_one_and_accumulated_agree() {
    for label_smoothing in [0.0, 0.1] {
        let (loss, norm, together) = after_one_step(9, label_smoothing);
        for batch_samples in [1, 4] {
            let (other_loss, other_norm, other) = after_one_step(batch_samples, label_smoothing);
            assert!((loss - other_loss).abs() < 1e-5, "{loss} {other_loss}");
            assert!((norm / other_norm - 1.0).abs() < 1e-4, "{norm} {other_norm}");
            // AdamW moves every element by up to the learning rate of 1e-3, whatever the size of its gradient
            let mean = (&together - &other).unwrap().abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(mean < 1e-6, "{mean}");
        }
    }
    assert!((after_one_step(9, 0.0).0 - after_one_step(9, 0.1).0).abs() > 1e-2);
}

#[test]
fn steps_may_be_given_instead_of_epochs() {
    let model = golden::model("models/untied");
    let trainer = Trainer::new(adapter(&model), config(1, 1e-3)).unwrap().with_batch_samples(2).with_max_steps(7);
    let metrics = trainer.train(&dataset(4, 97)).unwrap();
    assert_eq!((metrics.num_steps, metrics.num_epochs, metrics.steps[6].epoch), (7, 3, 4));
}

#[test]
fn evaluation_weighs_tokens_and_keeps_the_best() {
    let model = golden::model("models/untied");
    let (training, held_out) = (dataset(6, 97), dataset(5, 97));
    // a rate that makes the loss worse
    let trainer = Trainer::new(adapter(&model), config(50, 3.0))
        .unwrap()
        .with_evaluation(held_out.clone(), 2)
        .with_early_stopping(3);
    let metrics = trainer.train(&training).unwrap();
    assert_eq!(metrics.stop_reason, StopReason::EarlyStopping);
    let losses: Vec<f64> = metrics.evaluations.iter().map(|evaluation| evaluation.loss).collect();
    let best = metrics.best.unwrap();
    let position = losses.iter().position(|&loss| loss == best.loss).unwrap();
    assert!(losses.iter().all(|&loss| loss >= best.loss));
    assert_eq!(losses.len(), position + 4);
    assert_eq!(
        metrics.evaluations.iter().map(|evaluation| evaluation.step).collect::<Vec<_>>(),
        (0..losses.len()).map(|number| 2 * number).collect::<Vec<_>>()
    );
    let kept = trainer.best_adapter().unwrap();
    let terms = kept.low_rank_updates().unwrap();
    let again = evaluate(&model, Some(&terms), &held_out, 2048).unwrap();
    assert_eq!(again.loss(), best.loss);
    // the same, sample by sample
    let mut total = 0.0;
    for sample in &held_out.samples {
        total += evaluate(&model, Some(&terms), &Dataset::from_samples(vec![sample.clone()]), 1).unwrap().total_loss;
    }
    assert!((total / again.trained_tokens as f64 - again.loss()).abs() < 1e-5);
    assert!((again.perplexity() - again.loss().exp()).abs() < 1e-9);
}

#[test]
fn callback_stops_the_run() {
    let model = golden::model("models/untied");
    let trainer = Trainer::new(adapter(&model), config(10, 1e-3)).unwrap().with_callback(|event| match event {
        TrainingEvent::Step { step: 3, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    let metrics = trainer.train(&dataset(4, 97)).unwrap();
    assert_eq!((metrics.num_steps, metrics.stop_reason), (3, StopReason::Callback));
}

#[test]
fn all_parameters_of_a_model_are_trained() {
    let model = golden::model("models/gqa-tied");
    let dataset = dataset(12, 103);
    let before = evaluate(&model, None, &dataset, 2048).unwrap().loss();
    let trainer = Trainer::full(model.clone(), config(20, 3e-3))
        .unwrap()
        .with_batch_tokens(100)
        .with_evaluation(dataset.clone(), 0);
    let metrics = trainer.train(&dataset).unwrap();
    assert_eq!(metrics.num_gradient_tensors, model.parameters().len());
    let total: usize = model.parameters().iter().map(|(_, tensor)| tensor.elem_count()).sum();
    assert_eq!((metrics.num_trainable_parameters, metrics.gradient_bytes), (total, 4 * total));
    let trained = trainer.model();
    let after = evaluate(&trained, None, &dataset, 100).unwrap().loss();
    // the run saw every update of every parameter
    assert_eq!(after, metrics.evaluations.last().unwrap().loss);
    assert_eq!(metrics.evaluations.len(), 21);
    assert!(after < 0.5 * before, "{before} {after}");
    for ((name, before), (_, after)) in
        crate::golden::parameters_of(&model).iter().zip(&crate::golden::parameters_of(&trained))
    {
        assert!(max_difference(before, after) > 0.0, "{name} was not trained");
    }
    // the weights that were given are as they were
    assert_eq!(evaluate(&model, None, &dataset, 2048).unwrap().loss(), before);
}

#[test]
fn samples_that_cannot_be_used_are_told_at_once() {
    let model = golden::model("models/untied");
    let mut dataset = dataset(5, 97);
    dataset.samples[1].trained.fill(false);
    dataset.samples[1].trained[0] = true;
    dataset.samples[3].ids[2] = 97;
    dataset.samples[4].trained.pop();
    match Trainer::new(adapter(&model), config(1, 1e-3)).unwrap().train(&dataset).unwrap_err() {
        Error::Data { problems } => {
            let lines: Vec<usize> = problems.iter().map(|problem| problem.line).collect();
            assert_eq!(lines, [2, 4, 5]);
            assert_eq!(problems[1].message, "token id 97 is outside the vocabulary of 97");
        }
        other => panic!("{other:?}"),
    }
    let error = Trainer::new(adapter(&model), config(1, 1e-3)).unwrap().train(&Dataset::default()).unwrap_err();
    assert!(error.to_string().contains("dataset"), "{error}");
}

#[test]
fn settings_that_cannot_be_used_are_refused() {
    let model = golden::model("models/untied");
    let name = |result: Result<Trainer>| match result.map(|trainer| trainer.train(&dataset(2, 97))) {
        Ok(Err(Error::Argument { name, .. })) | Err(Error::Argument { name, .. }) => name,
        other => panic!("{:?}", other.map(|metrics| metrics.map(|metrics| metrics.num_steps))),
    };
    let new = |config| Trainer::new(adapter(&model), config);
    assert_eq!(name(new(config(0, 1e-3))), "num_epochs");
    assert_eq!(name(new(config(1, f64::NAN))), "lr_scheduler");
    assert_eq!(name(new(TrainingConfig { max_grad_norm: Some(0.0), ..config(1, 1e-3) })), "max_grad_norm");
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_batch_tokens(0))), "batch_tokens");
    assert_eq!(
        name(new(config(1, 1e-3)).map(|trainer| trainer.with_gradient_accumulation(0))),
        "gradient_accumulation"
    );
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_label_smoothing(1.1))), "label_smoothing");
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_early_stopping(2))), "patience");
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_resume(true))), "resume");
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_batches(vec![vec![2]]))), "batches");
    let long_warmup = LRScheduler::warmup_cosine(10, 5, 1e-3, 0.0);
    assert_eq!(name(new(config(1, 1e-3)).map(|trainer| trainer.with_lr_scheduler(long_warmup))), "lr_scheduler");
}

/// An adapter that claims one more tensor than the model gives gradients for.
#[derive(Clone)]
struct Unreached(LoRAAdapter);

impl Trained for Unreached {
    fn trainable(&self) -> Vec<metal_candle::training::Parameter> {
        let mut parameters = self.0.trainable();
        parameters[1].gradient = metal_candle::models::GradientOf::A(10_000);
        parameters
    }

    fn values(&self) -> Result<Tensor> {
        self.0.values()
    }

    fn with_values(&self, values: &Tensor) -> Result<Self> {
        self.0.with_values(values).map(Self)
    }

    fn run_model(&self) -> &Model {
        self.0.run_model()
    }

    fn run_terms(&self) -> Result<Option<LowRankUpdates>> {
        self.0.run_terms()
    }

    fn terms_are_copies(&self) -> bool {
        self.0.terms_are_copies()
    }

    fn save_files(&self, folder: &Path) -> Result<()> {
        self.0.save_files(folder)
    }

    fn load_values(&self, folder: &Path) -> Result<Tensor> {
        self.0.load_values(folder)
    }

    fn identity(&self) -> Value {
        self.0.identity()
    }
}

#[test]
fn training_refuses_a_tensor_that_no_gradient_reaches() {
    let model = golden::model("models/untied");
    let trainer = Trainer::of(Unreached(adapter(&model)), config(1, 1e-3)).unwrap();
    let error = trainer.train(&dataset(2, 97)).unwrap_err().to_string();
    assert!(error.contains("no gradient reaches `model.layers.0.self_attn.q_proj.lora_B`"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_after_saving() {
    let model = golden::model("models/untied");
    let mut tensors: std::collections::HashMap<String, Tensor> =
        crate::golden::parameters_of(&model).into_iter().collect();
    // token 50 has no finite embedding
    let embedding = tensors["model.embed_tokens.weight"].clone();
    let (rows, width) = embedding.dims2().unwrap();
    let mut values: Vec<f32> = embedding.flatten_all().unwrap().to_vec1().unwrap();
    values[50 * width..51 * width].fill(f32::NAN);
    let embedding = Tensor::from_vec(values, (rows, width), &candle_core::Device::Cpu).unwrap();
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    let model = Model::from_tensors(model.config().clone(), tensors, model.device()).unwrap();

    let mut dataset = dataset(6, 97);
    for sample in &mut dataset.samples {
        sample.ids.iter_mut().for_each(|id| *id %= 50);
    }
    dataset.samples[4].ids[1] = 50;
    match evaluate(&model, None, &dataset, 1000).unwrap_err() {
        Error::NonFiniteEvaluation { loss, rows } => {
            assert!(loss.is_nan() && rows == ["train.jsonl:5"], "{loss} {rows:?}");
        }
        other => panic!("{other:?}"),
    }
    let folder = tempfile::tempdir().unwrap();
    let trainer = Trainer::new(adapter(&model), config(1, 1e-3))
        .unwrap()
        .with_batches(vec![vec![0, 1], vec![2], vec![3, 4, 5]])
        .with_run_folder(folder.path());
    match trainer.train(&dataset).unwrap_err() {
        Error::NonFiniteLoss { step, loss, rows } => {
            assert_eq!((step, rows), (3, vec!["train.jsonl:5".to_string()]));
            assert!(loss.is_nan());
        }
        other => panic!("{other:?}"),
    }
    let saved = LoRAAdapter::load(&model, folder.path().join("checkpoints/step-000002")).unwrap();
    assert_eq!(bits(&saved), bits(&trainer.lora_adapter()));
    assert!(saved.parameters().to_vec1::<f32>().unwrap().iter().all(|value| value.is_finite()));
}
