//! Runs that are stopped or killed and go on as if nothing had happened.

use crate::golden;
use crate::training_trainer::{adapter, config, dataset};
use candle_core::DType;
use metal_candle::adapters::{LoRAAdapter, TargetModule, TrainedBiases};
use metal_candle::models::MatmulPrecision;
use metal_candle::training::{LRScheduler, LastLayers, StopReason, Trained, Trainer, TrainingConfig, TrainingEvent};
use metal_candle::{Error, Model};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// All files below a folder and their bytes.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn copy(from: &Path, to: &Path) {
    for (name, bytes) in files(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn schedule() -> TrainingConfig {
    TrainingConfig { lr_scheduler: LRScheduler::warmup_cosine(2, 9, 1e-2, 1e-4), ..config(3, 0.0) }
}

/// A run of nine steps with everything that has a state.
pub(crate) fn trainer(model: &Model, folder: &Path) -> Trainer {
    let start = LoRAAdapter::builder(model).with_rank(4).with_dropout(0.1).with_seed(8).build().unwrap();
    Trainer::new(start, schedule())
        .unwrap()
        .with_batch_samples(2)
        .with_gradient_accumulation(2)
        .with_evaluation(dataset(4, 97), 2)
        .with_seed(5)
        .with_save_interval(1)
        .with_run_folder(folder)
}

#[test]
fn a_run_stopped_after_any_step_ends_with_the_same_bytes() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    let whole = tempfile::tempdir().unwrap();
    let metrics = trainer(&model, whole.path()).train(&data).unwrap();
    assert_eq!((metrics.num_steps, metrics.num_epochs), (9, 3));
    let expected = files(whole.path());
    assert!(expected.contains_key("checkpoints/step-000009/optimizer.safetensors"), "{:?}", expected.keys());
    for stop in 1..9 {
        let folder = tempfile::tempdir().unwrap();
        let stopped = trainer(&model, folder.path())
            .with_callback(move |event| match event {
                TrainingEvent::Step { step, .. } if *step == stop => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
            .train(&data)
            .unwrap();
        assert_eq!((stopped.num_steps, stopped.stop_reason), (stop, StopReason::Callback));
        let resumed = trainer(&model, folder.path()).with_resume(true);
        let rest = resumed.train(&data).unwrap();
        assert_eq!((rest.num_steps, rest.steps.len()), (9, 9 - stop));
        assert_eq!(rest.steps[0].loss, metrics.steps[stop].loss);
        assert_eq!(
            (rest.tokens, rest.trained_tokens, rest.best),
            (metrics.tokens, metrics.trained_tokens, metrics.best)
        );
        let found = files(folder.path());
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, bytes) in &found {
            assert!(bytes == &expected[name], "stopped after {stop}: {name} differs");
        }
    }
}

/// Stops runs after three of nine steps and compares what the resumed ones leave with the files of whole ones.
fn compare_resumed<T: Trained>(name: &str, start: impl Fn() -> T) {
    let data = dataset(12, 97);
    let trainer = |folder: &Path| {
        Trainer::of(start(), schedule())
            .unwrap()
            .with_batch_samples(4)
            .with_evaluation(dataset(4, 97), 2)
            .with_neftune_noise_alpha(5.0)
            .with_save_interval(1)
            .with_run_folder(folder)
    };
    let (whole, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    trainer(whole.path()).train(&data).unwrap();
    let stopped = trainer(folder.path()).with_callback(|event| match event {
        TrainingEvent::Step { step: 3, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(stopped.train(&data).unwrap().num_steps, 3);
    trainer(folder.path()).with_resume(true).train(&data).unwrap();
    let (found, expected) = (files(folder.path()), files(whole.path()));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
    for (file, bytes) in &found {
        assert!(bytes == &expected[file], "{name}: {file} differs");
    }
}

#[test]
fn all_methods_resume_with_the_same_bytes() {
    let model = golden::model("models/untied");
    for (start, use_dora) in [("pissa", false), ("olora", true), ("loftq", false), ("orthogonal", true)] {
        compare_resumed(start, || {
            LoRAAdapter::builder(&model)
                .with_rank(4)
                .with_dropout(0.1)
                .with_start(start.parse().unwrap())
                .with_dora(use_dora)
                .with_target_modules([TargetModule::QProj, TargetModule::DownProj, TargetModule::LmHead])
                .with_modules_to_save(["embed_tokens", "model.norm"])
                .build()
                .unwrap()
        });
    }
    let tied = golden::model("models/gqa-tied");
    for model in [&model, &tied] {
        compare_resumed("rows of tokens and biases", || {
            let builder = LoRAAdapter::builder(model).with_rank(4).with_bias(TrainedBiases::All);
            builder.with_trainable_tokens([90, 5, 7]).with_trainable_head_tokens([8, 2]).build().unwrap()
        });
    }
    compare_resumed("tied rows of tokens", || {
        LoRAAdapter::builder(&tied).with_rank(4).with_trainable_tokens([90, 5, 7]).build().unwrap()
    });
    compare_resumed("a tied embedding", || {
        let builder = LoRAAdapter::builder(&tied).with_modules_to_save(["lm_head"]);
        builder.with_ensure_weight_tying(true).build().unwrap()
    });
    compare_resumed("last layers", || LastLayers::new(&model, 1).unwrap());
}

#[test]
fn what_a_killed_run_leaves_behind_does_no_harm() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    let whole = tempfile::tempdir().unwrap();
    trainer(&model, whole.path()).with_kept_checkpoints(20).train(&data).unwrap();
    let expected = files(whole.path());
    for step in 0..9 {
        // as if killed while the checkpoint after `step` was being written
        let folder = tempfile::tempdir().unwrap();
        copy(whole.path(), folder.path());
        let checkpoints = folder.path().join("checkpoints");
        for later in step + 1..=9 {
            let path = checkpoints.join(format!("step-{later:06}"));
            if later == step + 1 {
                std::fs::remove_file(path.join("state.json")).unwrap();
                std::fs::rename(&path, checkpoints.join(format!(".tmp-step-{later:06}"))).unwrap();
            } else {
                std::fs::remove_dir_all(&path).unwrap();
            }
        }
        let metrics = folder.path().join("metrics.jsonl");
        let mut text = std::fs::read_to_string(&metrics).unwrap();
        let lines = text.lines().take_while(|line| !line.contains(&format!("\"step\":{}", step + 2))).count();
        text = text.split_inclusive('\n').take(lines).collect();
        text.push_str("{\"event\":\"step\",\"st");
        std::fs::write(&metrics, text).unwrap();

        trainer(&model, folder.path()).with_kept_checkpoints(20).with_resume(true).train(&data).unwrap();
        let found = files(folder.path());
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "killed after {step}");
        for (name, bytes) in &found {
            assert!(bytes == &expected[name], "killed after {step}: {name} differs");
        }
    }
}

#[test]
fn damaged_checkpoints_are_passed_over() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    let folder = tempfile::tempdir().unwrap();
    trainer(&model, folder.path()).train(&data).unwrap();
    let expected = files(folder.path());
    let newest = folder.path().join("checkpoints/step-000009/adapter_model.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&newest, &bytes).unwrap();
    let metrics = trainer(&model, folder.path()).with_resume(true).train(&data).unwrap();
    assert_eq!(metrics.steps.len(), 1);
    assert!(files(folder.path()) == expected);
    for entry in std::fs::read_dir(folder.path().join("checkpoints")).unwrap() {
        std::fs::write(entry.unwrap().path().join("state.json"), "{").unwrap();
    }
    let error = trainer(&model, folder.path()).with_resume(true).train(&data).unwrap_err().to_string();
    assert!(error.contains("state.json"), "{error}");
}

#[test]
fn old_checkpoints_are_removed_but_not_the_best() {
    let model = golden::model("models/untied");
    let folder = tempfile::tempdir().unwrap();
    let run = trainer(&model, folder.path()).with_kept_checkpoints(1);
    let metrics = run.train(&dataset(12, 97)).unwrap();
    let mut names: Vec<String> = std::fs::read_dir(folder.path().join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected = vec![format!("step-{:06}", metrics.best.unwrap().step), "step-000009".to_string()];
    expected.dedup();
    assert_eq!(names, expected);
}

#[test]
fn another_run_is_not_resumed_or_overwritten() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    let folder = tempfile::tempdir().unwrap();
    trainer(&model, folder.path()).train(&data).unwrap();
    let message = |result: metal_candle::Result<_>| match result.map(|_: metal_candle::training::TrainingMetrics| ()) {
        Err(Error::Argument { name, message }) => format!("{name}: {message}"),
        other => panic!("{other:?}"),
    };
    let again = message(trainer(&model, folder.path()).train(&data));
    assert!(again.starts_with("run_folder: ") && again.contains("step-000009"), "{again}");
    let seed = message(trainer(&model, folder.path()).with_seed(6).with_resume(true).train(&data));
    assert!(seed.contains("`seed` was 5, is 6") && !seed.contains("dataset"), "{seed}");
    let other_data = message(trainer(&model, folder.path()).with_resume(true).train(&dataset(11, 97)));
    assert!(other_data.contains("`dataset` was \"12 samples"), "{other_data}");
    let ranks = Trainer::new(adapter(&model), schedule()).unwrap().with_run_folder(folder.path()).with_resume(true);
    assert!(message(ranks.train(&data)).contains("`trained`"));
    let bf16 = model.to_dtype(DType::BF16).unwrap();
    let rounded = bf16.with_matmul_precision(MatmulPrecision::Bf16).unwrap();
    let precision = message(trainer(&rounded, folder.path()).with_resume(true).train(&data));
    assert!(precision.contains("`matmul_precision` was null, is \"bf16\""), "{precision}");
}

#[test]
fn a_finished_run_can_be_made_longer() {
    let model = golden::model("models/untied");
    let data = dataset(12, 97);
    let (short, long) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let steps = |folder: &Path, steps| {
        Trainer::new(adapter(&model), config(1, 1e-2)).unwrap().with_max_steps(steps).with_run_folder(folder)
    };
    steps(short.path(), 5).train(&data).unwrap();
    let extended = steps(short.path(), 8).with_resume(true);
    extended.train(&data).unwrap();
    let whole = steps(long.path(), 8);
    whole.train(&data).unwrap();
    let values = |trainer: &Trainer| trainer.lora_adapter().parameters().to_vec1::<f32>().unwrap();
    assert_eq!(values(&extended), values(&whole));
    assert_eq!(files(short.path())["metrics.jsonl"], files(long.path())["metrics.jsonl"]);
}

#[test]
fn training_of_all_parameters_resumes_too() {
    let model = golden::model("models/untied");
    let data = dataset(8, 97);
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let full = |folder: &Path| {
        Trainer::full(model.clone(), config(4, 1e-2)).unwrap().with_batch_samples(3).with_run_folder(folder)
    };
    let expected = full(whole.path());
    expected.train(&data).unwrap();
    let stop = |event: &TrainingEvent| match event {
        TrainingEvent::Step { step: 5, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    full(parts.path()).with_callback(stop).train(&data).unwrap();
    let resumed = full(parts.path()).with_resume(true);
    assert_eq!(resumed.train(&data).unwrap().steps.len(), 7);
    for ((name, left), (_, right)) in
        crate::golden::parameters_of(&expected.model()).iter().zip(&crate::golden::parameters_of(&resumed.model()))
    {
        assert_eq!(golden::max_difference(left, right), 0.0, "{name}");
    }
    let name = "checkpoints/step-000012/model.safetensors";
    assert_eq!(files(whole.path())[name], files(parts.path())[name]);
}

/// Names the run folder of [`run_of_a_child`].
const CHILD_FOLDER: &str = "METAL_CANDLE_TEST_RUN_FOLDER";

#[test]
#[ignore = "the process that a_process_killed_again_and_again_ends_with_the_same_bytes starts and kills"]
fn run_of_a_child() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return };
    let model = golden::model("models/untied");
    trainer(&model, Path::new(&folder)).with_resume(true).train(&dataset(12, 97)).unwrap();
}

#[test]
fn a_process_killed_again_and_again_ends_with_the_same_bytes() {
    let model = golden::model("models/untied");
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    trainer(&model, whole.path()).train(&dataset(12, 97)).unwrap();
    let mut num_kills = 0;
    loop {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "training_resume::run_of_a_child", "--ignored", "--quiet"])
            .env(CHILD_FOLDER, killed.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // longer each time, so that the run ends also where starting a process takes long
        std::thread::sleep(Duration::from_millis(5 + 7 * num_kills));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        // SIGKILL on Unix
        child.kill().unwrap();
        child.wait().unwrap();
        num_kills += 1;
    }
    assert!(num_kills > 0);
    let (expected, found) = (files(whole.path()), files(killed.path()));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in &found {
        assert!(bytes == &expected[name], "{name} differs after {num_kills} kills");
    }
}
