//! Optimizers and schedules against torch and its relatives, losses against their formulas.

use crate::golden;
use candle_core::{DType, Device, Tensor};
use metal_candle::Result;
use metal_candle::models::{GradientOf, SafetensorsFile};
use metal_candle::training::{
    AdafactorConfig, AdamConfig, AdamWConfig, DecayShape, LRScheduler, LionConfig, MuonConfig, MuonScale, Optimizer,
    OptimizerConfig, Parameter, ParameterGroup, ScheduleFreeAdamWConfig, SgdConfig, bits_per_byte, cross_entropy,
    cross_entropy_rows, global_norm, perplexity,
};
use serde_json::Value;

const NAMES: [&str; 3] = ["matrix", "vector", "cube"];
const TWO_DIMENSIONS: [&str; 3] = ["tall", "wide", "vector"];

/// Ten steps of a golden file.
struct Steps {
    file: SafetensorsFile,
    names: Vec<&'static str>,
}

impl Steps {
    fn open(name: &str, names: &[&'static str]) -> Self {
        let file = SafetensorsFile::open(golden::path(&format!("optimizer/{name}.safetensors"))).unwrap();
        Self { file, names: names.to_vec() }
    }

    /// The golden tensors side by side, as `prefix.NAME`, of those that there are.
    fn flat(&self, prefix: &str) -> Tensor {
        let parts: Vec<Tensor> = self
            .names
            .iter()
            .map(|name| format!("{prefix}.{name}"))
            .filter(|name| self.file.entry(name).is_some())
            .map(|name| self.file.tensor(&name).unwrap().flatten_all().unwrap())
            .collect();
        Tensor::cat(&parts, 0).unwrap()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let mut offset = 0;
        let mut parameters = Vec::new();
        for name in &self.names {
            let shape = self.file.entry(&format!("step.0.{name}")).unwrap().shape.clone();
            let len = shape.iter().product();
            parameters.push(Parameter { name: (*name).into(), offset, len, shape, gradient: GradientOf::Parameter(0) });
            offset += len;
        }
        parameters
    }

    fn optimizer(&self, config: impl Into<OptimizerConfig>) -> Optimizer {
        Optimizer::new(&self.flat("step.0"), &self.parameters(), config, |_| ParameterGroup::default()).unwrap()
    }

    /// Makes all ten steps; the largest difference to the golden values.
    fn compare(&self, optimizer: &mut Optimizer, rate: impl Fn(usize) -> f64) -> f32 {
        let view = optimizer.parameters().unwrap();
        let mut largest = 0.0_f32;
        for step in 1..=10 {
            // gradients that clipping scales down give the same steps
            let gradients = (self.flat(&format!("grad.{step}")) * 4.0).unwrap();
            optimizer.step(&gradients, rate(step), 0.25).unwrap();
            largest = largest.max(max_difference(&view, &self.flat(&format!("step.{step}"))));
        }
        assert_eq!(optimizer.step_count(), 10);
        largest
    }

    /// The largest difference of a part of the state to the golden one of the same name.
    fn compare_state(&self, optimizer: &Optimizer, name: &str) -> f32 {
        max_difference(&state(optimizer, name).unwrap(), &self.flat(name))
    }
}

fn state(optimizer: &Optimizer, name: &str) -> Result<Tensor> {
    let found = optimizer.state()?.into_iter().find(|(key, _)| *key == name);
    Ok(found.unwrap_or_else(|| panic!("no `{name}`")).1)
}

fn max_difference(left: &Tensor, right: &Tensor) -> f32 {
    let (left, right) = (left.to_vec1::<f32>().unwrap(), right.to_vec1::<f32>().unwrap());
    assert_eq!(left.len(), right.len());
    left.iter().zip(&right).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max)
}

/// Every optimizer, with settings of which none is without effect.
pub(crate) fn all() -> Vec<OptimizerConfig> {
    let adamw = AdamWConfig::default();
    vec![
        OptimizerConfig::AdamW(adamw),
        OptimizerConfig::Adam(AdamConfig { weight_decay: 0.1, ..AdamConfig::default() }),
        OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, nesterov: false, weight_decay: 0.1 }),
        OptimizerConfig::Sgd(SgdConfig { momentum: 0.9, nesterov: true, weight_decay: 0.1 }),
        OptimizerConfig::Lion(LionConfig::default()),
        OptimizerConfig::Adafactor(AdafactorConfig { weight_decay: 0.1, ..AdafactorConfig::default() }),
        OptimizerConfig::Muon(MuonConfig::default()),
        OptimizerConfig::AdamW8bit(adamw),
        OptimizerConfig::ScheduleFreeAdamW(ScheduleFreeAdamWConfig { weight_decay: 0.1, ..Default::default() }),
    ]
}

#[test]
fn ten_steps_of_adam_equal_those_of_torch() {
    for (name, config) in [
        ("adamw", OptimizerConfig::default()),
        ("adam", OptimizerConfig::Adam(AdamConfig { weight_decay: 0.1, ..AdamConfig::default() })),
    ] {
        let steps = Steps::open(name, &NAMES);
        let mut optimizer = steps.optimizer(config);
        let difference = steps.compare(&mut optimizer, |_| 1e-2);
        assert!(difference < 1e-6, "{name}: {difference}");
        assert!(steps.compare_state(&optimizer, "first_moment") < 1e-6);
        assert!(steps.compare_state(&optimizer, "second_moment") < 1e-5);
    }
}

#[test]
fn ten_steps_of_sgd_and_lion_equal_those_of_torch() {
    let sgd = |momentum, nesterov, weight_decay| OptimizerConfig::Sgd(SgdConfig { momentum, nesterov, weight_decay });
    for (name, config) in [
        ("sgd", sgd(0.9, false, 0.1)),
        ("sgd-nesterov", sgd(0.9, true, 0.0)),
        ("sgd-plain", sgd(0.0, false, 0.1)),
        ("lion", OptimizerConfig::Lion(LionConfig { beta1: 0.9, beta2: 0.99, weight_decay: 0.1 })),
    ] {
        let steps = Steps::open(name, &NAMES);
        let mut optimizer = steps.optimizer(config);
        let difference = steps.compare(&mut optimizer, |_| 1e-2);
        assert!(difference < 1e-6, "{name}: {difference}");
        if name == "sgd-plain" {
            assert!(optimizer.state().unwrap().is_empty());
        } else {
            assert!(steps.compare_state(&optimizer, "first_moment") < 2e-6, "{name}");
        }
    }
}

#[test]
fn ten_steps_of_adafactor_equal_those_of_transformers() {
    for (name, scale_parameter) in [("adafactor", false), ("adafactor-scaled", true)] {
        let steps = Steps::open(name, &TWO_DIMENSIONS);
        let mut optimizer = steps.optimizer(OptimizerConfig::Adafactor(AdafactorConfig {
            weight_decay: 0.1,
            scale_parameter,
            ..AdafactorConfig::default()
        }));
        let difference = steps.compare(&mut optimizer, |_| 1e-2);
        assert!(difference < 2e-6, "{name}: {difference}");
        for part in ["row_means", "column_means", "second_moment"] {
            assert!(steps.compare_state(&optimizer, part) < 1e-4, "{name} {part}");
        }
    }
}

#[test]
fn ten_steps_of_muon_equal_those_of_torch() {
    for (name, scale, nesterov) in [
        ("muon-original", MuonScale::Original, false),
        ("muon-match_rms_adamw", MuonScale::MatchAdamW, true),
        ("muon-spectral_unclamped", MuonScale::Spectral, true),
    ] {
        let steps = Steps::open(name, &TWO_DIMENSIONS);
        let config = OptimizerConfig::Muon(MuonConfig { scale, nesterov, ..MuonConfig::default() });
        let difference = steps.compare(&mut steps.optimizer(config), |_| 1e-2);
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn ten_steps_of_schedule_free_adamw_equal_the_three_sequences() {
    let steps = Steps::open("schedule-free-adamw", &NAMES);
    let config = ScheduleFreeAdamWConfig { weight_decay: 0.1, ..ScheduleFreeAdamWConfig::default() };
    let mut optimizer = steps.optimizer(OptimizerConfig::ScheduleFreeAdamW(config));
    assert_eq!(max_difference(&optimizer.averaged_parameters().unwrap().unwrap(), &steps.flat("step.0")), 0.0);
    let difference = steps.compare(&mut optimizer, |step| 1e-2 * (step as f64 / 4.0).min(1.0));
    assert!(difference < 1e-6, "{difference}");
    assert!(steps.compare_state(&optimizer, "last_point") < 1e-6);
    let averaged = optimizer.averaged_parameters().unwrap().unwrap();
    assert!(max_difference(&averaged, &steps.flat("average")) < 1e-6);
    assert!(max_difference(&averaged, &optimizer.parameters().unwrap()) > 1e-4);
}

#[test]
fn ten_steps_of_8_bit_adamw_equal_those_of_its_formula() {
    let steps = Steps::open("adamw-8bit", &["matrix", "vector"]);
    for (signed, name) in [(true, "signed_map"), (false, "unsigned_map")] {
        let codes = Tensor::new(&metal_candle_kernels::dynamic_codes(signed), &Device::Cpu).unwrap();
        assert!(max_difference(&codes, &steps.file.tensor(name).unwrap()) < 1e-7);
    }
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let mut optimizer = steps.optimizer(OptimizerConfig::AdamW8bit(config));
    // a last bit may decide between two codes, which shows for some steps
    let difference = steps.compare(&mut optimizer, |_| 1e-2);
    assert!(difference < 1e-2, "{difference}");
    let (left, right) = (optimizer.parameters().unwrap(), steps.flat("step.10"));
    let pairs = left.to_vec1::<f32>().unwrap().into_iter().zip(right.to_vec1::<f32>().unwrap());
    assert!(pairs.filter(|(left, right)| (left - right).abs() > 1e-6).count() < 10);
    for name in ["first_scales", "second_scales"] {
        assert!(steps.compare_state(&optimizer, name) < 1e-5, "{name}");
    }
    for name in ["first_codes", "second_codes"] {
        let (left, right) = (state(&optimizer, name).unwrap(), steps.flat(name));
        let pairs = left.to_vec1::<u8>().unwrap().into_iter().zip(right.to_vec1::<u8>().unwrap());
        assert!(pairs.filter(|(left, right)| left != right).count() < 10, "{name}");
    }
}

#[test]
fn the_state_is_as_large_as_said() {
    let (matrix, vector) = (9 * 4 + 3 * 300, 11);
    let n = matrix + vector;
    let steps = Steps::open("adafactor", &TWO_DIMENSIONS);
    let blocks = 1 + 4 + 1;
    let expected =
        [8 * n, 8 * n, 0, 4 * n, 4 * n, 4 * (9 + 4 + 3 + 300 + 11), 4 * matrix + 8 * vector, 2 * n + 8 * blocks, 8 * n];
    for (config, expected) in all().into_iter().zip(expected) {
        assert_eq!(config.state_bytes(&steps.parameters()).unwrap(), expected, "{config:?}");
        let parts = steps.optimizer(config).state().unwrap();
        let own = parts.iter().filter(|(name, _)| !["training_point", "averaging"].contains(name));
        let bytes: usize = own.map(|(_, tensor)| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum();
        assert_eq!(bytes, expected, "{config:?}");
    }
}

#[test]
fn restored_state_goes_on_bit_for_bit() {
    let steps = Steps::open("adafactor", &TWO_DIMENSIONS);
    let bits = |tensor: &Tensor| {
        let values: Vec<f32> = tensor.to_vec1().unwrap();
        values.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    for config in all() {
        let mut whole = steps.optimizer(config);
        for step in 1..=4 {
            whole.step(&steps.flat(&format!("grad.{step}")), 1e-2, 0.5).unwrap();
        }
        let kept = match whole.averaged_parameters().unwrap() {
            Some(averaged) => averaged,
            None => whole.parameters().unwrap(),
        };
        let mut restored = steps.optimizer(config);
        restored.step(&steps.flat("grad.9"), 1.0, 1.0).unwrap();
        restored.restore(&kept, |name| state(&whole, name), whole.step_count()).unwrap();
        for step in 5..=8 {
            let gradients = steps.flat(&format!("grad.{step}"));
            whole.step(&gradients, 2e-2, 0.5).unwrap();
            restored.step(&gradients, 2e-2, 0.5).unwrap();
        }
        assert_eq!(bits(&whole.parameters().unwrap()), bits(&restored.parameters().unwrap()), "{config:?}");
        let averages = (whole.averaged_parameters().unwrap(), restored.averaged_parameters().unwrap());
        assert_eq!(averages.0.map(|values| bits(&values)), averages.1.map(|values| bits(&values)), "{config:?}");
    }
}

#[test]
fn groups_have_their_own_learning_rate_and_weight_decay() {
    let steps = Steps::open("adafactor", &TWO_DIMENSIONS);
    let parameters = steps.parameters();
    let (gradients, rate) = (steps.flat("grad.1"), 1e-2);
    for config in all() {
        let after = |rate: f64, group: &dyn Fn(&Parameter) -> ParameterGroup| {
            let mut optimizer = Optimizer::new(&steps.flat("step.0"), &parameters, config, group).unwrap();
            optimizer.step(&gradients, rate, 1.0).unwrap();
            optimizer.parameters().unwrap().to_vec1::<f32>().unwrap()
        };
        let (slow, fast) =
            (after(rate, &|_| ParameterGroup::default()), after(2.0 * rate, &|_| ParameterGroup::default()));
        let group = |parameter: &Parameter| ParameterGroup {
            learning_rate_factor: if parameter.name == "wide" { 2.0 } else { 1.0 },
            decays: parameter.name != "vector",
        };
        let mixed = after(rate, &group);
        let by_name = |name: &str| parameters.iter().find(|parameter| parameter.name == name).unwrap();
        let range = |parameter: &Parameter| parameter.offset..parameter.offset + parameter.len;
        assert_eq!(mixed[range(by_name("tall"))], slow[range(by_name("tall"))], "{config:?}");
        assert_eq!(mixed[range(by_name("wide"))], fast[range(by_name("wide"))], "{config:?}");
        assert_ne!(mixed[range(by_name("vector"))], slow[range(by_name("vector"))], "{config:?}");
    }
}

#[test]
fn wrong_shapes_and_settings_are_refused() {
    let parameters = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    let one = |shape: &[usize]| {
        vec![Parameter {
            name: "p".into(),
            offset: 0,
            len: 4,
            shape: shape.to_vec(),
            gradient: GradientOf::Parameter(0),
        }]
    };
    let make = |config: OptimizerConfig, shape: &[usize]| {
        Optimizer::new(&parameters, &one(shape), config, |_| ParameterGroup::default())
    };
    for (config, said) in [
        (OptimizerConfig::AdamW(AdamWConfig { beta2: 1.0, ..Default::default() }), "beta2"),
        (OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, nesterov: true, weight_decay: 0.0 }), "momentum"),
        (OptimizerConfig::ScheduleFreeAdamW(ScheduleFreeAdamWConfig { beta1: 0.0, ..Default::default() }), "beta1"),
        (OptimizerConfig::Adafactor(AdafactorConfig { clip_threshold: 0.0, ..Default::default() }), "clip_threshold"),
        (OptimizerConfig::Muon(MuonConfig { iterations: 0, ..Default::default() }), "iterations"),
        (OptimizerConfig::Lion(LionConfig { weight_decay: f64::NAN, ..Default::default() }), "weight_decay"),
    ] {
        let error = make(config, &[4]).unwrap_err().to_string();
        assert!(error.contains(&format!("`optimizer_config.{said}`: expected a number")), "{error}");
    }
    let error = make(OptimizerConfig::default(), &[2, 3]).unwrap_err().to_string();
    assert!(error.contains("`p`") && error.contains("4 elements"), "{error}");
    let mut optimizer = make(OptimizerConfig::default(), &[4]).unwrap();
    let gradients = Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap();
    assert!(optimizer.step(&gradients, 1e-2, 1.0).unwrap_err().to_string().contains("[4]"));
    let error = optimizer.restore(&parameters, |_| Ok(gradients.clone()), 1).unwrap_err().to_string();
    assert!(error.contains("first_moment") && error.contains("[4] in f32"), "{error}");
}

#[test]
fn schedules_equal_those_of_transformers() {
    let golden: Value = golden::json("optimizer/schedules.json");
    let max_lr = golden["max_lr"].as_f64().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 25);
    for case in cases {
        let number = |name: &str| case[name].as_u64().unwrap() as usize;
        let (warmup, total, min_lr) = (number("warmup"), number("total"), case["min_lr"].as_f64().unwrap());
        let schedule = match (case["schedule"].as_str().unwrap(), warmup) {
            ("constant", 0) => LRScheduler::constant(max_lr),
            ("constant", _) => LRScheduler::linear(warmup, total, max_lr, max_lr),
            ("linear", _) => LRScheduler::linear(warmup, total, max_lr, min_lr),
            ("cosine", 0) => LRScheduler::cosine(total, max_lr, min_lr),
            ("cosine", _) => LRScheduler::warmup_cosine(warmup, total, max_lr, min_lr),
            ("cosine-restarts", _) => LRScheduler::cosine_restarts(warmup, total, max_lr, min_lr, number("num_cycles")),
            ("polynomial", _) => {
                LRScheduler::polynomial(warmup, total, max_lr, min_lr, case["power"].as_f64().unwrap())
            }
            ("warmup-stable-decay", _) => {
                let shape = match case["shape"].as_str().unwrap() {
                    "linear" => DecayShape::Linear,
                    "cosine" => DecayShape::Cosine,
                    _ => DecayShape::OneMinusSqrt,
                };
                LRScheduler::warmup_stable_decay(warmup, total, number("decay_steps"), max_lr, min_lr, shape)
            }
            ("inverse-sqrt", _) => LRScheduler::inverse_sqrt(warmup, max_lr),
            (other, _) => panic!("{other}"),
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
