//! Training by a group of ranks, here threads with sockets between them.

use crate::golden;
use crate::training_resume::files;
use crate::training_trainer::{adapter, config, dataset};
use candle_core::{Device, Tensor};
use metal_candle::Error;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::training::{
    AdamWConfig, Group, LRScheduler, StopReason, Trainer, TrainingConfig, TrainingEvent, TrainingMetrics,
};
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::path::Path;

/// Runs `work` as each of `num_ranks` ranks at once.
fn ranks<R: Send>(num_ranks: usize, work: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        let start = |rank| {
            let (work, address) = (&work, &address);
            scope.spawn(move || work(Group::connect(rank, num_ranks, address, "of the test").unwrap()))
        };
        let threads: Vec<_> = (0..num_ranks).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn bits(adapter: &LoRAAdapter) -> Vec<u32> {
    adapter.parameters().to_vec1::<f32>().unwrap().iter().map(|value| value.to_bits()).collect()
}

/// Three times batches of very different sizes, one of them of a single sample.
fn trainer() -> Trainer {
    let config = TrainingConfig { lr_scheduler: LRScheduler::warmup_cosine(2, 9, 1e-2, 1e-4), ..config(3, 0.0) };
    let batches = vec![vec![0, 3, 4, 5, 6, 9, 11], vec![2, 1], vec![7], vec![8, 10]];
    Trainer::new(adapter(&golden::model("models/untied")), config)
        .unwrap()
        .with_batches(batches)
        .with_evaluation(dataset(7, 97), 2)
        .with_label_smoothing(0.1)
}

#[test]
fn any_number_of_ranks_trains_as_one() {
    let data = dataset(12, 97);
    for accumulation in [1, 3] {
        let alone = trainer().with_gradient_accumulation(accumulation);
        let expected = alone.train(&data).unwrap();
        let values = alone.lora_adapter().parameters().to_vec1::<f32>().unwrap();
        for num_ranks in [2, 3] {
            let trained = ranks(num_ranks, |group| {
                let trainer = trainer().with_gradient_accumulation(accumulation).with_group(group);
                (trainer.train(&data).unwrap(), bits(&trainer.lora_adapter()))
            });
            for (metrics, parameters) in &trained {
                assert_eq!(*parameters, trained[0].1, "parameters of the ranks differ");
                assert_eq!((metrics.tokens, metrics.trained_tokens), (expected.tokens, expected.trained_tokens));
                assert_eq!(metrics.steps.len(), expected.steps.len());
                for (found, expected) in metrics.steps.iter().zip(&expected.steps) {
                    assert!((found.loss - expected.loss).abs() < 1e-5, "{} {}", found.loss, expected.loss);
                    assert!((found.grad_norm / expected.grad_norm - 1.0).abs() < 1e-4);
                    assert_eq!((found.tokens, found.trained_tokens), (expected.tokens, expected.trained_tokens));
                }
                for (found, expected) in metrics.evaluations.iter().zip(&expected.evaluations) {
                    assert!((found.loss - expected.loss).abs() < 1e-5, "{} {}", found.loss, expected.loss);
                }
                // before training nothing differs, in whatever order batches were evaluated
                assert_eq!(metrics.evaluations[0].loss, expected.evaluations[0].loss);
            }
            for (found, expected) in trained[0].1.iter().zip(&values) {
                assert!((f32::from_bits(*found) - expected).abs() < 1e-4, "{} {expected}", f32::from_bits(*found));
            }
        }
    }
}

/// The same with everything that has a state, stopped by a callback of rank 0 after `stop` steps.
fn with_dropout(folder: &Path, group: Group, stop: usize) -> (TrainingMetrics, Vec<u32>) {
    let model = golden::model("models/untied");
    let start = LoRAAdapter::builder(&model).with_rank(4).with_dropout(0.1).with_seed(8).build().unwrap();
    let trainer = Trainer::new(start, config(3, 1e-2))
        .unwrap()
        .with_batch_samples(4)
        .with_neftune_noise_alpha(5.0)
        .with_evaluation(dataset(4, 97), 2)
        .with_run_folder(folder)
        .with_save_interval(1)
        .with_resume(true);
    let leads = group.rank() == 0;
    let trainer = trainer.with_group(group).with_callback(move |event| match event {
        TrainingEvent::Step { step, .. } if leads && *step == stop => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    let metrics = trainer.train(&dataset(12, 97)).unwrap();
    (metrics, bits(&trainer.lora_adapter()))
}

#[test]
fn a_group_that_was_stopped_goes_on_with_the_same_bytes() {
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |folder: &Path, num_ranks, stop| ranks(num_ranks, |group| with_dropout(folder, group, stop));
    let expected = run(whole.path(), 2, 0);
    for (metrics, _) in run(cut.path(), 2, 4) {
        assert_eq!((metrics.num_steps, metrics.stop_reason), (4, StopReason::Callback));
    }
    for ((metrics, parameters), (_, expected)) in run(cut.path(), 2, 0).into_iter().zip(&expected) {
        assert_eq!((metrics.num_steps, metrics.steps.len()), (9, 5));
        assert_eq!(parameters, *expected);
    }
    assert!(files(cut.path()) == files(whole.path()), "files differ");
    // a different number of ranks can also resume
    let other = tempfile::tempdir().unwrap();
    run(other.path(), 3, 4);
    for (metrics, _) in run(other.path(), 1, 0) {
        assert_eq!((metrics.num_steps, metrics.stop_reason), (9, StopReason::Completed));
    }
}

#[test]
fn a_failure_of_one_rank_ends_all() {
    let data = dataset(12, 97);
    // one that dies: the thread ends and its sockets close
    let ended = ranks(3, |group| (group.rank() != 1).then(|| trainer().with_group(group).train(&data)));
    for outcome in ended.into_iter().flatten() {
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::Peer { rank: 1, message } if message.contains("ended")), "{error}");
    }
    // one that fails says why
    let refused = ranks(2, |group| {
        let data = if group.rank() == 1 { dataset(0, 97) } else { data.clone() };
        trainer().with_group(group).train(&data).unwrap_err()
    });
    assert!(matches!(refused[1], Error::Argument { .. }), "{}", refused[1]);
    let text = refused[0].to_string();
    assert!(text.starts_with("rank 1: ") && text.contains("has no sample"), "{text}");
    // ranks that train different things notice
    let different = ranks(2, |group| {
        let seed = group.rank() as u64;
        trainer().with_seed(seed).with_group(group).train(&data).unwrap_err()
    });
    for error in different {
        assert!(error.to_string().contains("settings"), "{error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_on_one_rank_is_the_same_error_on_all() {
    let data = dataset(12, 97);
    let errors = ranks(2, |group| {
        let huge = TrainingConfig {
            lr_scheduler: LRScheduler::constant(1e30),
            optimizer_config: AdamWConfig::default(),
            ..config(3, 0.0)
        };
        let start = adapter(&golden::model("models/untied"));
        Trainer::new(start, huge).unwrap().with_batch_samples(4).with_group(group).train(&data).unwrap_err()
    });
    let is_divergence = |error: &Error| matches!(error, Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. });
    assert!(is_divergence(&errors[0]), "{}", errors[0]);
    assert_eq!(errors[0].to_string(), errors[1].to_string());
}

#[test]
fn sums_are_in_the_order_of_the_ranks() {
    // 1e8 + 1 - 1e8 is 0 in f32, in another order it is 1; longer than what is sent at once
    let numbers = [1e8_f32, 1.0, -1e8];
    let sums = ranks(3, |group| {
        let tensor = Tensor::full(numbers[group.rank()], 40_001, &Device::Cpu).unwrap();
        group.all_reduce(&tensor).unwrap();
        tensor.to_vec1::<f32>().unwrap()
    });
    assert_eq!(sums, vec![vec![0.0; 40_001]; 3]);
    // lengths must agree
    let failed = ranks(2, |group| {
        let tensor = Tensor::zeros(3 + group.rank(), candle_core::DType::F32, &Device::Cpu).unwrap();
        group.all_reduce(&tensor).is_err()
    });
    assert_eq!(failed, [true, true]);
    assert!(Group::connect(2, 2, "127.0.0.1:0", "").is_err());
    let alone = Group::connect(0, 1, "", "").unwrap();
    assert_eq!((alone.rank(), alone.num_ranks()), (0, 1));
}
