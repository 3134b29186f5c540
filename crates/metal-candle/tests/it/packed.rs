//! Loads quantized safetensors checkpoints (`dev/reference_packed.py`).

use crate::golden;
use candle_core::{DType, Tensor};
use metal_candle::data::{Dataset, Sample};
use metal_candle::models::{
    Batch, LossOptions, Model, Rows, SafetensorsFile, Targets, TensorEntry, Trainable, save_model, write_safetensors,
};
use metal_candle::ops::BlockFormat;
use metal_candle::training::{LoRAAdapter, Trainer, TrainingConfig};
use metal_candle::{Device, Error, ModelLoader};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const NAMES: [&str; 4] = ["bnb-llama", "gptq-llama", "mlx-llama", "mlx-qwen2"];

fn path(name: &str) -> PathBuf {
    golden::path(&format!("packed/{name}"))
}

fn load(name: &str) -> Model {
    ModelLoader::new().with_device(Device::CPU).load(path(name)).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let largest: f32 = b.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap();
    golden::max_difference(a, b) / largest
}

fn expected(name: &str) -> (Vec<u32>, Tensor) {
    let file = SafetensorsFile::open(golden::path(&format!("packed/{name}.safetensors"))).unwrap();
    let ids: Vec<i64> = file.tensor("ids").unwrap().to_vec1().unwrap();
    (ids.into_iter().map(|id| id as u32).collect(), file.tensor("logits").unwrap())
}

on_each_device! { logits_equal_those_of_the_reference, matrices_become_half_precision_on_a_gpu }

fn logits_equal_those_of_the_reference(device: Device) {
    for name in NAMES {
        let loader = ModelLoader::new().with_device(device);
        // products with blocks round activations to 8 bits
        let loaders = [(loader.clone().with_dtype(DType::F32), 5e-5), (loader, 5e-2)];
        for (loader, tolerance) in loaders.into_iter().take(if device.is_cpu() { 2 } else { 1 }) {
            let ((ids, logits), model) = (expected(name), loader.load(path(name)).unwrap());
            let found = model.forward(&Batch::single(&ids), None, None, Rows::All).unwrap();
            let found = found.to_device(&candle_core::Device::Cpu).unwrap();
            assert!(difference(&found, &logits) < tolerance, "{name}: {}", difference(&found, &logits));
        }
    }
}

fn matrices_become_half_precision_on_a_gpu(device: Device) {
    for (name, dtype) in [("mlx-llama", DType::BF16), ("mlx-qwen2", DType::F16)] {
        let model = ModelLoader::new().with_device(device).load(path(name)).unwrap();
        assert_eq!(model.dtype(), if device.is_cpu() { DType::F32 } else { dtype }, "{name}");
        model.forward(&Batch::single(&[1, 2, 3]), None, None, Rows::Last).unwrap();
    }
}

#[test]
fn all_keys_are_known() {
    for name in NAMES {
        assert_eq!(load(name).config().notes, [""; 0], "{name}");
    }
}

#[test]
fn matrices_become_blocks_if_these_have_the_same_values() {
    let model = load("mlx-llama");
    for (name, expected) in [
        ("model.embed_tokens", Ok("q4_1")),
        ("model.layers.0.self_attn.q_proj", Ok("q4_1")),
        ("model.layers.0.self_attn.v_proj", Err(DType::BF16)), // 6 bits
        ("model.layers.0.mlp.gate_proj", Ok("q5_1")),
        ("model.layers.0.mlp.down_proj", Err(DType::BF16)), // not quantized
        ("model.norm", Err(DType::BF16)),
    ] {
        let weight = &model.parameters().iter().find(|(known, _)| *known == format!("{name}.weight")).unwrap().1;
        let found = weight.block_format().map(BlockFormat::name).ok_or(weight.dtype());
        assert_eq!(found, expected, "{name}");
    }
    assert_eq!(model.config().quantization().as_deref(), Some("4 bits in groups of 64 (MLX)"));
    let progress = |name: &str| {
        let mut last = None;
        ModelLoader::new().load_with_progress(path(name), |progress| last = Some(progress)).unwrap();
        last.unwrap()
    };
    let progress = progress("mlx-llama");
    assert_eq!((progress.tensors, progress.bytes), (progress.num_tensors, progress.num_bytes));
    let file = SafetensorsFile::open(path("mlx-llama/model.safetensors")).unwrap();
    assert_eq!(progress.num_bytes, file.entries().iter().map(TensorEntry::num_bytes).sum::<usize>());
}

/// An adapter on the matrices as loaded, and on the same values in f32.
#[test]
fn adapters_train_as_on_dense_weights() {
    // with half-precision weights, some activations are saved in bf16
    for (name, tolerance) in [("gptq-llama", 5e-3), ("mlx-llama", 5e-3), ("mlx-qwen2", 1e-4)] {
        let (quantized, ids) = (load(name), expected(name).0);
        let tensors = golden::parameters_of(&quantized).into_iter();
        let tensors = tensors.map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap())).collect();
        let dense = Model::from_tensors(quantized.config().clone(), tensors, Device::CPU).unwrap();
        let batch = Batch::single(&ids);
        let targets = Targets { ids: [&ids[1..], &ids[..1]].concat(), weights: vec![1.0; ids.len()] };
        let adapter = LoRAAdapter::builder(&dense).with_rank(2).build().unwrap();
        let terms = adapter.low_rank_updates().unwrap();
        let run = |model: &Model| {
            model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), LossOptions::default()).unwrap()
        };
        let ((losses, gradients), (dense_losses, dense_gradients)) = (run(&quantized), run(&dense));
        for (found, expected) in losses.rows.iter().zip(&dense_losses.rows) {
            assert!((found - expected).abs() < 1e-4, "{name}: {found} {expected}");
        }
        let mut count = 0;
        for (found, expected) in gradients.iter().zip(dense_gradients.iter()) {
            // the gradients of A before the first step
            let is_zero = golden::max_difference(expected, &expected.zeros_like().unwrap()) == 0.0;
            assert!(is_zero || difference(found, expected) < tolerance, "{name}: {}", difference(found, expected));
            count += usize::from(!is_zero);
        }
        assert!(count > 0);
        let adapter = LoRAAdapter::builder(&quantized).with_rank(2).build().unwrap();
        let trainer = Trainer::new(adapter, TrainingConfig::default()).unwrap();
        let sample = Sample { ids, trained: vec![true; 12], source: None };
        let plan = trainer.plan(&Dataset::from_samples(vec![sample])).unwrap();
        let held = quantized.parameters().iter().map(|(_, weight)| weight.num_bytes()).sum::<usize>();
        assert_eq!(plan.weights_bytes, held);
    }
}

#[test]
fn a_merged_and_saved_model_is_dense() {
    for name in NAMES {
        let model = load(name);
        let adapter = LoRAAdapter::builder(&model).with_rank(2).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        save_model(&adapter.merge(&model).unwrap(), folder.path()).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
        assert!(config.as_object().unwrap().keys().all(|key| !key.contains("quantization")), "{config}");
        let saved = ModelLoader::new().with_device(Device::CPU).load(folder.path()).unwrap();
        assert!(saved.config().quantization().is_none());
        let (ids, logits) = expected(name);
        let found = saved.forward(&Batch::single(&ids), None, None, Rows::All).unwrap();
        assert!(difference(&found, &logits) < 2e-2, "{name}: {}", difference(&found, &logits));
    }
}

/// Writes a golden model with modified tensors and keys; `change` receives each tensor and returns its replacement.
fn damage(
    name: &str,
    folder: &Path,
    keys: &Value,
    change: impl Fn(&str, Tensor) -> Option<Tensor>,
) -> metal_candle::Result<Model> {
    let mut config: Value = serde_json::from_slice(&std::fs::read(path(name).join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let file = SafetensorsFile::open(path(name).join("model.safetensors")).unwrap();
    let names = file.entries().iter().map(|entry| entry.name.clone());
    let tensors = names.filter_map(|name| Some((name.clone(), change(&name, file.tensor(&name).unwrap())?)));
    write_safetensors(folder.join("model.safetensors"), &tensors.collect::<Vec<_>>(), &[]).unwrap();
    ModelLoader::new().with_device(Device::CPU).load(folder)
}

type Change = fn(Tensor) -> Option<Tensor>;

#[test]
fn damaged_matrices_of_mlx_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |keys: &Value, damaged: &str, change: Change, expected: &str| {
        let change = |name: &str, tensor| if name.ends_with(damaged) { change(tensor) } else { Some(tensor) };
        let error = damage("mlx-llama", folder.path(), keys, change).expect_err(expected);
        let is_clear = matches!(&error, Error::Tensors { problems, .. } if problems.len() == 1);
        assert!(is_clear && error.to_string().contains(expected), "{expected}: {error}");
    };
    damage("mlx-llama", folder.path(), &json!({}), |_, tensor| Some(tensor)).unwrap();
    let changes: [(&str, Change, &str); 10] = [
        ("up_proj.scales", |_| None, "`model.layers.0.mlp.up_proj.scales`: expected F32 or F16 or BF16 or U8"),
        ("up_proj.biases", |_| None, "expected F32 or F16 or BF16 for a quantized matrix, found no such tensor"),
        ("up_proj.biases", |t| Some(t.narrow(0, 0, 9).unwrap()), "up_proj.biases`: expected [64, 1], found [9, 1]"),
        ("up_proj.scales", |t| Some(t.narrow(0, 0, 9).unwrap()), "up_proj.scales`: expected [64, 1], found [9, 1]"),
        ("up_proj.scales", |t| Some(t.flatten_all().unwrap()), "up_proj.scales`: expected a matrix, found [64]"),
        (
            "up_proj.scales",
            |t| Some(t.repeat((1, 3)).unwrap()),
            "up_proj.weight`: [64, 8] and scales [64, 3] do not make 64 columns",
        ),
        (
            "up_proj.weight",
            |t| Some(t.narrow(1, 0, 7).unwrap().force_contiguous().unwrap()),
            "up_proj.weight`: [64, 7] and scales [64, 1] do not make 64 columns",
        ),
        (
            "up_proj.weight",
            |t| Some(t.repeat((1, 2)).unwrap().narrow(1, 0, 14).unwrap().force_contiguous().unwrap()),
            "expected 2, 3, 4, 5, 6 or 8 bits per weight, found 7",
        ),
        ("up_proj.weight", |t| Some(t.to_dtype(DType::I64).unwrap()), "up_proj.weight`: expected dtype U32, found I64"),
        (
            "up_proj.scales",
            |t| Some(t.to_dtype(DType::U8).unwrap()),
            "expected mxfp4 (4 bits in groups of 32), nvfp4 (4 in 16) or mxfp8 (8 in 32), found 4 bits in groups of 64",
        ),
    ];
    for (damaged, change, expected) in changes {
        refused(&json!({}), damaged, change, expected);
    }
    let keys = json!({"bits": 4, "group_size": 64, "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 4}});
    let expected = "up_proj.weight`: expected group_size 32, as the configuration says, found 64";
    refused(&json!({"quantization": keys}), "none", Some, expected);
    // without the module's own settings in the configuration
    let error =
        damage("mlx-llama", folder.path(), &json!({"quantization": null, "quantization_config": null}), |_, t| Some(t));
    assert!(error.unwrap_err().to_string().contains("up_proj.weight`: expected [64, 64], found [64, 8]"));
    let powers = |name: &str, tensor: Tensor| {
        let is_scales = name.ends_with("up_proj.scales");
        Some(if is_scales { Tensor::full(255_u8, tensor.shape(), &candle_core::Device::Cpu).unwrap() } else { tensor })
    };
    let error = damage("mlx-qwen2", folder.path(), &json!({}), powers).unwrap_err().to_string();
    assert!(error.contains("up_proj.scales`: expected powers of two, found 255"), "{error}");
}

/// The raw tensor of a file.
struct Raw {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// [`damage`] for tensors of any dtype. `damaged` is the suffix of the names of the tensors that change; empty ones are
/// omitted.
fn damage_raw(name: &str, keys: &Value, damaged: &str, change: fn(&mut Raw)) -> metal_candle::Result<Model> {
    let folder = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(path(name).join("config.json")).unwrap()).unwrap();
    config["quantization_config"].as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(path(name).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            (name, Raw { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
        })
        .collect();
    changed.iter_mut().filter(|(name, _)| name.ends_with(damaged)).for_each(|(_, raw)| change(raw));
    changed.retain(|(_, raw)| !raw.bytes.is_empty());
    let views = changed.iter().map(|(name, raw)| {
        (name, safetensors::tensor::TensorView::new(raw.dtype, raw.shape.clone(), &raw.bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    ModelLoader::new().with_device(Device::CPU).load(folder.path())
}

fn remove(raw: &mut Raw) {
    raw.bytes.clear();
}

fn remove_last_row(raw: &mut Raw) {
    raw.bytes.truncate(raw.bytes.len() / raw.shape[0] * (raw.shape[0] - 1));
    raw.shape[0] -= 1;
}

fn replace(raw: &mut Raw, from: &str, to: &str) {
    let text = String::from_utf8(raw.bytes.clone()).unwrap();
    assert!(text.contains(from), "{text}");
    raw.bytes = text.replace(from, to).into_bytes();
    raw.shape = vec![raw.bytes.len()];
}

type Case = (&'static str, &'static str, fn(&mut Raw), &'static str);

#[test]
fn damaged_matrices_of_other_methods_are_refused() {
    const STATE: &str = "k_proj.weight.quant_state.bitsandbytes__nf4";
    let none = json!({});
    let cases: [Case; 18] = [
        ("bnb-llama", STATE, remove, "k_proj.weight`: expected `weight.quant_state.bitsandbytes__nf4` or `SCB` beside"),
        ("bnb-llama", STATE, |raw| replace(raw, "{", "{]"), "quant_state.bitsandbytes__nf4`: expected JSON"),
        ("bnb-llama", STATE, |raw| replace(raw, "[16, 32]", "[32, 16]"), "expected the shape [16, 32], found [32, 16]"),
        (
            "bnb-llama",
            STATE,
            |raw| replace(raw, "\"blocksize\": 64", "\"blocksize\": 0"),
            "expected a `blocksize` above 0",
        ),
        (
            "bnb-llama",
            "k_proj.weight",
            remove_last_row,
            "k_proj.weight`: expected 256 bytes for 512 weights, found 255",
        ),
        ("bnb-llama", "k_proj.weight.absmax", remove_last_row, "k_proj.weight.absmax`: expected [8], found [7]"),
        ("bnb-llama", "k_proj.weight.quant_map", remove_last_row, "weight.quant_map`: expected [16], found [15]"),
        (
            "bnb-llama",
            "k_proj.weight.nested_absmax",
            remove,
            "nested_absmax`: expected F32 for a quantized matrix, found no",
        ),
        ("gptq-llama", "k_proj.qweight", remove_last_row, "k_proj.qweight`: expected 4 bits per weight, found 3"),
        (
            "gptq-llama",
            "k_proj.qweight",
            |raw| raw.shape = vec![8, 8],
            "k_proj.qweight`: [8, 8] does not make 16 rows of 32",
        ),
        ("gptq-llama", "k_proj.qweight", remove, "k_proj.weight`: expected [16, 32], found no such tensor"),
        ("gptq-llama", "k_proj.scales", remove, "k_proj.scales`: expected F32 or F16 or BF16 for a quantized matrix"),
        ("gptq-llama", "k_proj.qzeros", remove, "k_proj.qzeros`: expected I32 for a quantized matrix, found no such"),
        ("gptq-llama", "down_proj.qzeros", remove_last_row, "down_proj.qzeros`: expected [3, 4], found [2, 4]"),
        ("gptq-llama", "k_proj.g_idx", remove_last_row, "k_proj.g_idx`: expected [32], found [31]"),
        (
            "gptq-llama",
            "k_proj.g_idx",
            |raw| raw.bytes[..4].copy_from_slice(&(-1_i32).to_le_bytes()),
            "k_proj.g_idx`: expected groups below 1, found -1",
        ),
        (
            "gptq-llama",
            "k_proj.bias",
            |raw| raw.bytes[3] = 1,
            "k_proj.bias`: expected no such tensor, or zeros, found a bias",
        ),
        ("gptq-llama", "k_proj.scales", |raw| raw.shape = vec![2, 8], "k_proj.scales`: expected [2, 16], found [2, 8]"),
    ];
    for (name, damaged, change, expected) in cases {
        damage_raw(name, &none, "nothing", remove).unwrap();
        let error = damage_raw(name, &none, damaged, change).map(|_| ()).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // fp8 settings for a checkpoint without fp8, and the reverse
    let message = |name: &str, keys: Value| damage_raw(name, &keys, "nothing", remove).unwrap_err().to_string();
    let found = message("gptq-llama", json!({"quant_method": "fp8"}));
    assert!(found.contains("down_proj.qweight`: expected no such tensor"), "{found}");
    let found = message("bnb-llama", json!({"quant_method": "gptq", "bits": 4}));
    assert!(found.contains("down_proj.weight`: expected [32, 96], found [1536, 1]"), "{found}");
}

#[test]
fn quantization_settings_for_dense_weights_are_refused() {
    let model = ModelLoader::new().with_dtype(DType::F32).load(path("mlx-llama")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save_model(&model, folder.path()).unwrap();
    let config = folder.path().join("config.json");
    let mut keys: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    ModelLoader::new().load(folder.path()).unwrap();
    keys["quantization_config"] =
        serde_json::json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"});
    std::fs::write(&config, keys.to_string()).unwrap();
    let error = ModelLoader::new().load(folder.path()).unwrap_err();
    let is_clear =
        matches!(&error, Error::Tensors { problems, .. } if problems.len() == 1 && problems[0].contains("AWQ"));
    assert!(is_clear, "{error:?}");
}
