//! Loads GGUF files written by llama.cpp's converter (`dev/reference_gguf.py`).

use crate::golden;
use candle_core::{DType, Tensor};
use metal_candle::data::{Dataset, Sample};
use metal_candle::files::{GgufFile, GgufTensor, GgufValue};
use metal_candle::models::{Batch, GgufExport, LossOptions, Model, Rows, Targets, Trainable, save_model};
use metal_candle::ops::{BlockFormat, LowRank, LowRankUpdates};
use metal_candle::training::{LoRAAdapter, Trainer, TrainingConfig};
use metal_candle::{Device, Error, ModelLoader};
use std::path::PathBuf;

const NAMES: [&str; 13] = [
    "arcee",
    "ernie4_5",
    "exaone4",
    "gemma2",
    "glm",
    "hunyuan_v1_dense",
    "jais2",
    "llama-tied",
    "ministral3",
    "phi3",
    "qwen2",
    "seed_oss",
    "stablelm",
];

fn path(name: &str) -> PathBuf {
    golden::path(&format!("gguf/{name}.gguf"))
}

fn load(name: &str) -> Model {
    ModelLoader::new().with_device(Device::CPU).load(path(name)).unwrap()
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.to_dtype(DType::F32).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    largest(&(a - b).unwrap()) / largest(b)
}

fn expected(name: &str) -> (Vec<u32>, Tensor) {
    let file = golden::path(&format!("gguf/{name}.safetensors"));
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    let ids: Vec<i64> = tensors["ids"].to_vec1().unwrap();
    (ids.into_iter().map(|id| id as u32).collect(), tensors["logits"].clone())
}

on_each_device! { logits_equal_those_of_transformers, matrices_become_bf16_on_a_gpu }

fn logits_equal_those_of_transformers(device: Device) {
    for name in NAMES {
        let loader = ModelLoader::new().with_device(device).with_dtype(DType::F32);
        let ((ids, logits), model) = (expected(name), loader.load(path(name)).unwrap());
        let found = model.forward(&Batch::single(&ids), None, None, Rows::All).unwrap();
        let found = found.to_device(&candle_core::Device::Cpu).unwrap();
        assert!(difference(&found, &logits) < 5e-5, "{name}: {}", difference(&found, &logits));
    }
}

/// Inference rounds activations to 8 bits. The weights are random, so attention amplifies the differences at later
/// positions; the first position attends only to itself.
#[test]
fn logits_of_quantized_matrices_are_close_to_those_of_transformers() {
    for name in ["llama-tied", "phi3"] {
        let ((ids, logits), model) = (expected(name), load(name));
        let found = model.forward(&Batch::single(&ids[..1]), None, None, Rows::All).unwrap();
        let logits = logits.narrow(0, 0, 1).unwrap();
        assert!(difference(&found, &logits) < 0.05, "{name}: {}", difference(&found, &logits));
    }
}

fn matrices_become_bf16_on_a_gpu(device: Device) {
    let model = ModelLoader::new().with_device(device).load(path("phi3")).unwrap();
    let expected = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    assert_eq!(model.dtype(), expected);
    model.forward(&Batch::single(&[1, 2, 3]), None, None, Rows::Last).unwrap();
}

#[test]
fn matrices_stay_quantized() {
    let model = load("llama-tied");
    let of = |name: &str| &model.parameters().iter().find(|(known, _)| known == name).unwrap().1;
    for name in
        ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    {
        let weight = of(name);
        assert_eq!(weight.block_format().map(BlockFormat::name), Some("q8_0"), "{name}");
        assert_eq!(weight.num_bytes(), weight.elem_count() / 32 * 34, "{name}");
    }
    assert_eq!(of("model.norm.weight").block_format(), None);
}

/// A quantized model, and the same model with f32 matrices.
fn both(name: &str) -> (Model, Model) {
    let dense = ModelLoader::new().with_device(Device::CPU).with_dtype(DType::F32).load(path(name)).unwrap();
    assert!(dense.parameters().iter().all(|(_, weight)| weight.block_format().is_none()));
    (load(name), dense)
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_a_batch() {
    let model = load("phi3");
    let (ids, _) = expected("phi3");
    let alone = model.forward(&Batch::single(&ids[..9]), None, None, Rows::All).unwrap();
    let together = Batch::from_sequences([&ids[..9], &ids[3..20], &ids[5..6]]);
    let together = model.forward(&together, None, None, Rows::All).unwrap().narrow(0, 0, 9).unwrap();
    assert_eq!(alone.to_vec2::<f32>().unwrap(), together.to_vec2::<f32>().unwrap());
}

/// A low-rank update for each linear layer, with distinct non-zero values.
fn terms(model: &Model) -> LowRankUpdates {
    let mut terms = LowRankUpdates::new();
    for (number, linear) in model.linears().iter().enumerate().filter(|(_, linear)| linear.layer.is_some()) {
        let matrix = |rows: usize, columns: usize| {
            let values: Vec<f32> =
                (0..rows * columns).map(|i| ((i * 37 + number * 11) % 101) as f32 / 404.0 - 0.125).collect();
            Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu).unwrap()
        };
        terms.insert(number, LowRank::new(matrix(3, linear.in_features), matrix(linear.out_features, 3), 0.5));
    }
    terms
}

#[test]
fn adapters_on_quantized_matrices_have_the_gradients_of_those_on_dense_ones() {
    for name in ["llama-tied", "phi3"] {
        let (ids, _) = expected(name);
        let (quantized, dense) = both(name);
        let terms = terms(&dense);
        let batch = Batch::single(&ids);
        let targets = Targets { ids: [&ids[1..], &ids[..1]].concat(), weights: vec![1.0; ids.len()] };
        let run = |model: &Model| {
            model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), LossOptions::default()).unwrap()
        };
        let ((losses, gradients), (dense_losses, dense_gradients)) = (run(&quantized), run(&dense));
        for (found, expected) in losses.rows.iter().zip(&dense_losses.rows) {
            assert!((found - expected).abs() < 1e-4, "{name}: {found} {expected}");
        }
        assert!(gradients.iter().count() > 10);
        for (found, expected) in gradients.iter().zip(dense_gradients.iter()) {
            assert!(difference(found, expected) < 1e-5, "{name}: {}", difference(found, expected));
        }
    }
}

#[test]
fn a_plan_counts_the_blocks_and_not_their_values() {
    let (quantized, dense) = both("llama-tied");
    let plan = |model: &Model| {
        let adapter = LoRAAdapter::builder(model).with_rank(2).build().unwrap();
        let trainer = Trainer::new(adapter, TrainingConfig::default()).unwrap();
        let sample = Sample { ids: vec![1, 2, 3, 4], trained: vec![true; 4], source: None };
        trainer.plan(&Dataset::from_samples(vec![sample])).unwrap()
    };
    let (quantized, dense) = (plan(&quantized), plan(&dense));
    // 34 bytes per 32 weights, except the norms
    assert!(quantized.weights_bytes * 3 < dense.weights_bytes && dense.weights_bytes < quantized.weights_bytes * 4);
    assert_eq!(quantized.peak_bytes - quantized.weights_bytes, dense.peak_bytes - dense.weights_bytes);
}

#[test]
fn a_saved_model_has_the_same_values() {
    let model = load("llama-tied");
    let folder = tempfile::tempdir().unwrap();
    save_model(&model, folder.path()).unwrap();
    let (ids, logits) = expected("llama-tied");
    let saved = ModelLoader::new().with_device(Device::CPU).load(folder.path()).unwrap();
    let found = saved.forward(&Batch::single(&ids), None, None, Rows::All).unwrap();
    assert!(difference(&found, &logits) < 5e-5, "{}", difference(&found, &logits));
}

/// Keys of llama.cpp's converter that change nothing, and that are not written.
const NEUTRAL_KEYS: [&str; 5] = [
    "attention.sliding_window",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
];

#[test]
fn a_written_file_has_the_metadata_and_tensors_of_the_converter() {
    let folder = tempfile::tempdir().unwrap();
    for name in NAMES {
        let (source, model) = (GgufFile::open(path(name)).unwrap(), load(name));
        let written = folder.path().join(format!("{name}.gguf"));
        GgufExport::new(&model).unwrap().write(&written, None, |_| ()).unwrap();
        let written = GgufFile::open(&written).unwrap();
        let architecture = source.text("general.architecture").unwrap().unwrap();
        assert_eq!(written.text("general.architecture").unwrap(), Some(architecture));
        for (key, expected) in source.metadata() {
            let Some(own) = key.strip_prefix(architecture).and_then(|key| key.strip_prefix('.')) else { continue };
            match written.metadata().get(key) {
                Some(found) => assert_eq!(found, expected, "{name}: {key}"),
                None => assert!(NEUTRAL_KEYS.contains(&own), "{name}: {key} is missing"),
            }
        }
        let tensors = |file: &GgufFile| {
            let of = |tensor: &GgufTensor| (tensor.name.clone(), tensor.ggml_type, tensor.shape.clone());
            let mut tensors: Vec<_> = file.tensors().map(of).collect();
            tensors.sort();
            tensors
        };
        assert_eq!(tensors(&written), tensors(&source), "{name}");
        // one reader reads both, so equal values are equal bytes
        let read = ModelLoader::new().with_device(Device::CPU).load(written.path()).unwrap();
        for ((parameter, expected), (_, found)) in model.parameters().iter().zip(read.parameters()) {
            let (expected, found) = (expected.tensor().unwrap(), found.tensor().unwrap());
            assert_eq!(difference(&found, &expected), 0.0, "{name}: {parameter}");
        }
    }
}

#[test]
fn metadata_is_preserved() {
    let file = GgufFile::open(path("gemma2")).unwrap();
    assert_eq!(file.text("general.architecture").unwrap(), Some("gemma2"));
    assert_eq!(file.size("gemma2.block_count").unwrap(), Some(2));
    assert!(matches!(file.metadata()["gemma2.final_logit_softcapping"], GgufValue::Float(cap) if cap == 3.0));
    assert_eq!(file.types(), ["f16"]);
    assert!(file.text("gemma2.block_count").is_err() && file.size("general.architecture").is_err());
}

/// Each damaged file returns an error that names it; none panics.
#[test]
fn damaged_files_are_refused() {
    let bytes = std::fs::read(path("llama-tied")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("damaged.gguf");
    let load = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        ModelLoader::new().with_device(Device::CPU).load(&file).unwrap_err().to_string()
    };
    for len in [0, 3, 4, 8, 20, 24, 100, 1000, 3000, bytes.len() / 2, bytes.len() - 1] {
        let message = load(&bytes[..len]);
        assert!(message.contains("damaged.gguf"), "{len}: {message}");
    }
    for (at, value, expected) in [
        (0, b'X', "starts with `GGUF`"),
        (4, 9, "version 2 or 3"),
        (15, 255, "end of the file"),
        (23, 255, "end of the file"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        let message = load(&bytes);
        assert!(message.contains(expected), "{at}: {message}");
    }
    // every byte of the header
    for at in 0..3000.min(bytes.len()) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x81;
        std::fs::write(&file, &bytes).unwrap();
        if let Err(error @ Error::Bug(_)) = ModelLoader::new().with_device(Device::CPU).load(&file) {
            panic!("{at}: {error}");
        }
    }
}
