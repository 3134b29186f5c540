//! AdamW and schedules against torch, losses against their formulas.

use crate::golden;
use candle_core::{Device, Tensor};
use metal_candle::models::SafetensorsFile;
use metal_candle::training::{
    AdamW, AdamWConfig, LRScheduler, bits_per_byte, cross_entropy, cross_entropy_rows, global_norm, perplexity,
};
use serde_json::Value;

const NAMES: [&str; 3] = ["matrix", "vector", "cube"];

/// The three golden tensors side by side, as `prefix.NAME`.
fn flat(file: &SafetensorsFile, prefix: &str) -> Tensor {
    let parts: Vec<Tensor> =
        NAMES.iter().map(|name| file.tensor(&format!("{prefix}.{name}")).unwrap().flatten_all().unwrap()).collect();
    Tensor::cat(&parts, 0).unwrap()
}

fn max_difference(left: &Tensor, right: &Tensor) -> f32 {
    let (left, right) = (left.to_vec1::<f32>().unwrap(), right.to_vec1::<f32>().unwrap());
    assert_eq!(left.len(), right.len());
    left.iter().zip(&right).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max)
}

#[test]
fn ten_steps_equal_those_of_torch() {
    let file = SafetensorsFile::open(golden::path("optimizer/adamw.safetensors")).unwrap();
    let mut optimizer = AdamW::new(&flat(&file, "step.0"), AdamWConfig::default()).unwrap();
    let view = optimizer.parameters().unwrap();
    for step in 1..=10 {
        optimizer.step(&flat(&file, &format!("grad.{step}")), 1e-2, 1.0).unwrap();
        let difference = max_difference(&view, &flat(&file, &format!("step.{step}")));
        assert!(difference < 1e-6, "step {step}: {difference}");
    }
    let (first, second) = optimizer.moments().unwrap();
    assert!(max_difference(&first, &flat(&file, "first_moment")) < 1e-6);
    assert!(max_difference(&second, &flat(&file, "second_moment")) < 1e-5);
    assert_eq!(optimizer.step_count(), 10);
}

#[test]
fn restored_state_goes_on_bit_for_bit() {
    let file = SafetensorsFile::open(golden::path("optimizer/adamw.safetensors")).unwrap();
    let mut whole = AdamW::new(&flat(&file, "step.0"), AdamWConfig::default()).unwrap();
    for step in 1..=4 {
        whole.step(&flat(&file, &format!("grad.{step}")), 1e-2, 0.5).unwrap();
    }
    let mut restored = AdamW::new(&flat(&file, "step.7"), AdamWConfig::default()).unwrap();
    let (first, second) = whole.moments().unwrap();
    restored.restore(&whole.parameters().unwrap(), &first, &second, whole.step_count()).unwrap();
    for step in 5..=8 {
        let gradients = flat(&file, &format!("grad.{step}"));
        whole.step(&gradients, 1e-2, 0.5).unwrap();
        restored.step(&gradients, 1e-2, 0.5).unwrap();
    }
    let bits = |optimizer: &AdamW| {
        let values: Vec<f32> = optimizer.parameters().unwrap().to_vec1().unwrap();
        values.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(bits(&whole), bits(&restored));
}

#[test]
fn wrong_shapes_and_settings_are_refused() {
    let parameters = Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap();
    let config = AdamWConfig { beta2: 1.0, ..AdamWConfig::default() };
    let error = AdamW::new(&parameters, config).unwrap_err().to_string();
    assert!(error.contains("optimizer_config.beta2"), "{error}");
    let mut optimizer = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    let gradients = Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(optimizer.step(&gradients, 1e-2, 1.0).unwrap_err().to_string().contains("[4]"));
}

#[test]
fn schedules_equal_those_of_transformers() {
    let golden: Value = golden::json("optimizer/schedules.json");
    let max_lr = golden["max_lr"].as_f64().unwrap();
    let total = golden["total"].as_u64().unwrap() as usize;
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let warmup = case["warmup"].as_u64().unwrap() as usize;
        let min_lr = case["min_lr"].as_f64().unwrap();
        let schedule = match (case["schedule"].as_str().unwrap(), warmup) {
            ("constant", 0) => LRScheduler::constant(max_lr),
            ("constant", _) => LRScheduler::linear(warmup, total, max_lr, max_lr),
            ("linear", _) => LRScheduler::linear(warmup, total, max_lr, min_lr),
            (_, 0) => LRScheduler::cosine(total, max_lr, min_lr),
            _ => LRScheduler::warmup_cosine(warmup, total, max_lr, min_lr),
        };
        for (step, rate) in case["lrs"].as_array().unwrap().iter().enumerate() {
            let (rate, found) = (rate.as_f64().unwrap(), schedule.learning_rate(step));
            assert!((found - rate).abs() < 1e-15, "{case} step {step}: {found} instead of {rate}");
        }
    }
}

#[test]
fn cross_entropy_follows_its_formula() {
    let logits = [[1.0_f32, -2.0, 0.5, 3.0], [0.0, 0.25, -1.0, 0.125]];
    let targets = [3_u32, 1];
    let smoothing = 0.2;
    let expected: Vec<f64> = logits
        .iter()
        .zip(targets)
        .map(|(row, target)| {
            let normalizer = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let likelihoods: Vec<f64> = row.iter().map(|&x| normalizer - f64::from(x)).collect();
            (1.0 - smoothing) * likelihoods[target as usize] + smoothing / 4.0 * likelihoods.iter().sum::<f64>()
        })
        .collect();
    let logits = Tensor::new(&logits, &Device::Cpu).unwrap();
    let targets = Tensor::new(&targets, &Device::Cpu).unwrap();
    let rows: Vec<f32> = cross_entropy_rows(&logits, &targets, smoothing).unwrap().to_vec1().unwrap();
    for (row, expected) in rows.iter().zip(&expected) {
        assert!((f64::from(*row) - expected).abs() < 1e-6, "{row} {expected}");
    }
    let mean: f32 = cross_entropy(&logits, &targets, smoothing).unwrap().to_scalar().unwrap();
    assert!((f64::from(mean) - expected.iter().sum::<f64>() / 2.0).abs() < 1e-6);
    let outside = Tensor::new(&[3_u32, 4], &Device::Cpu).unwrap();
    let error = cross_entropy(&logits, &outside, 0.0).unwrap_err().to_string();
    assert_eq!(error, "`targets`: `4` is outside a vocabulary of 4");
    assert!(cross_entropy(&logits, &targets, 1.5).unwrap_err().to_string().contains("1.5"));
}

#[test]
fn units_of_the_loss() {
    assert!((perplexity(8.0_f64.ln()) - 8.0).abs() < 1e-12);
    assert!((bits_per_byte(16.0 * std::f64::consts::LN_2, 4) - 4.0).abs() < 1e-12);
    let tensor = Tensor::new(&[3.0_f32, -4.0], &Device::Cpu).unwrap();
    assert_eq!(global_norm(&tensor).unwrap(), 5.0);
}
