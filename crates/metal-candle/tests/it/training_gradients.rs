//! Gradients of adapters against PEFT and against finite differences.

use crate::golden;
use candle_core::{DType, Tensor};
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::models::{GradientOf, Gradients, LossOptions, MatmulPrecision, SafetensorsFile, Trainable};
use metal_candle::{Device, Model};

fn norm(tensor: &Tensor) -> f64 {
    f64::from(tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

fn gradients_of(adapter: &LoRAAdapter, batch: &serde_json::Value) -> (f64, Gradients) {
    let (batch, targets) = golden::batch(batch);
    let trained: f32 = targets.weights.iter().sum();
    let options = LossOptions { grad_scale: 1.0 / trained, ..LossOptions::default() };
    let terms = adapter.low_rank_updates().unwrap();
    let (losses, gradients) =
        adapter.model().loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap();
    (losses.rows.iter().map(|&loss| f64::from(loss)).sum::<f64>() / f64::from(trained), gradients)
}

#[test]
fn gradients_equal_those_of_peft() {
    for name in ["qv", "all-linear", "all-linear-rslora", "patterns"] {
        let golden = golden::json(&format!("lora/{name}.json"));
        let file = SafetensorsFile::open(golden::path(&format!("lora/{name}.safetensors"))).unwrap();
        let model = golden::model(golden["model"].as_str().unwrap());
        let adapter = LoRAAdapter::load(&model, golden::path(&format!("lora/{name}"))).unwrap();
        let (loss, gradients) = gradients_of(&adapter, &golden["batch"]);
        assert!((loss - golden["loss"].as_f64().unwrap()).abs() < 1e-4, "{name}: {loss}");
        assert_eq!(gradients.iter().count(), 2 * adapter.modules().len(), "{name}");
        for module in adapter.modules() {
            for (leaf, of) in [("lora_A", GradientOf::A(module.number)), ("lora_B", GradientOf::B(module.number))] {
                let key = format!("grad.base_model.model.{}.{leaf}.weight", module.path);
                let expected = file.tensor(&key).unwrap();
                let found = gradients.get(of).unwrap();
                assert_eq!(found.dims(), expected.dims(), "{name}: {key}");
                let error = norm(&(found - &expected).unwrap()) / norm(&expected);
                assert!(error < 1e-4, "{name}: {key}: {error}");
            }
        }
    }
}

/// Rounding activations to bf16 changes gradients by about its rounding error.
#[test]
fn gradients_with_rounded_activations_are_close() {
    let golden = golden::json("lora/all-linear.json");
    let mut config = golden::model("models/gqa-tied").config().clone();
    (config.hidden_size, config.intermediate_size) = (256, 768);
    let model = Model::initialize(config, 1, Device::CPU).unwrap().to_dtype(DType::BF16).unwrap();
    let rounded = model.with_matmul_precision(MatmulPrecision::Bf16).unwrap();
    let [(loss, exact), (rounded_loss, found)] = [model, rounded].map(|model| {
        let adapter = LoRAAdapter::builder(&model).with_target_modules(TargetModule::ALL.to_vec()).build().unwrap();
        gradients_of(&adapter, &golden["batch"])
    });
    assert!((loss - rounded_loss).abs() < 1e-2 * loss, "{loss} {rounded_loss}");
    assert_eq!(loss.to_bits() != rounded_loss.to_bits(), Device::multiplies_bf16());
    assert_eq!(exact.iter().count(), found.iter().count());
    for (exact, found) in exact.iter().zip(found.iter()) {
        let error = norm(&(found - exact).unwrap()) / norm(exact).max(1e-9);
        assert!(error < 0.03, "{:?}: {error}", exact.dims());
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let golden = golden::json("lora/all-linear.json");
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::load(&model, golden::path("lora/all-linear")).unwrap();
    let (batch, targets) = golden::batch(&golden["batch"]);
    let trained: f32 = targets.weights.iter().sum();
    let (_, gradients) = gradients_of(&adapter, &golden["batch"]);
    let values: Vec<f32> = adapter.parameters().to_vec1().unwrap();
    let loss = |values: Vec<f32>| {
        let parameters = Tensor::from_vec(values, adapter.num_parameters(), &candle_core::Device::Cpu).unwrap();
        let moved = adapter.with_parameters(parameters).unwrap();
        let losses = model.loss(&batch, &targets, Some(&moved.low_rank_updates().unwrap()), 0.0).unwrap();
        losses.rows.iter().map(|&loss| f64::from(loss)).sum::<f64>() / f64::from(trained)
    };
    // along the gradient of each matrix the loss changes by its squared norm
    let mut offset = 0;
    for module in adapter.modules() {
        for of in [GradientOf::A(module.number), GradientOf::B(module.number)] {
            let gradient = gradients.get(of).unwrap().flatten_all().unwrap();
            let direction: Vec<f32> = gradient.to_vec1().unwrap();
            let expected = norm(&gradient);
            let step = 2e-3;
            let moved = |sign: f64| {
                let mut values = values.clone();
                for (value, change) in values[offset..].iter_mut().zip(&direction) {
                    *value += (sign * step * f64::from(*change) / expected) as f32;
                }
                loss(values)
            };
            let found = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            assert!((found - expected).abs() < 0.01 * expected + 2e-3, "{} {of:?}: {found} {expected}", module.path);
            offset += direction.len();
        }
    }
    assert_eq!(offset, adapter.num_parameters());
}

#[test]
fn nothing_is_made_for_frozen_tensors() {
    let golden = golden::json("lora/qv.json");
    let model = golden::model("models/gqa-tied");
    let adapter = LoRAAdapter::builder(&model)
        .with_rank(2)
        .with_target_modules([TargetModule::OProj])
        .with_layers([2])
        .build()
        .unwrap();
    let (_, gradients) = gradients_of(&adapter, &golden["batch"]);
    let made: Vec<usize> = gradients.iter().map(Tensor::elem_count).collect();
    assert_eq!(made, [2 * 56, 56 * 2]);
}
