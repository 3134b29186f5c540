//! Models written in the quantized formats of MLX. `dev/check_packed.py` reads such models with mlx-lm.

use candle_core::{DType, Tensor};
use metal_candle::models::{
    Batch, MlxQuantization, Model, Quantization, QuantizationMixture, Rows, SafetensorsFile, save_mlx_model,
};
use metal_candle::{Device, ModelConfig, ModelLoader};
use serde_json::{Value, json};
use std::path::Path;

fn model(hidden: usize, is_tied: bool) -> Model {
    let config = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": hidden, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": is_tied,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    });
    Model::initialize(ModelConfig::from_json_str(&config.to_string()).unwrap(), 7, Device::CPU).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Saves and loads a model.
fn written(model: &Model, quantization: MlxQuantization, folder: &Path) -> Model {
    assert_eq!(save_mlx_model(model, folder, quantization).unwrap(), Vec::<String>::new());
    ModelLoader::new().with_dtype(DType::F32).load(folder).unwrap()
}

/// The root mean square and the largest of the errors of weights, in units of the distance between two codes that span the range
/// of a group.
fn errors(source: &Model, read: &Model, (bits, group_size): (usize, usize)) -> (f32, f32) {
    let steps = ((1 << bits) - 1) as f32;
    let (mut sum, mut count, mut largest) = (0.0, 0, 0.0_f32);
    for ((name, expected), (_, found)) in source.parameters().iter().zip(read.parameters()) {
        let (expected, found) = (values(&expected.tensor().unwrap()), values(&found.tensor().unwrap()));
        if name.contains("norm") {
            assert_eq!(found, expected, "{name}");
            continue;
        }
        for (expected, found) in expected.chunks(group_size).zip(found.chunks(group_size)) {
            let least = expected.iter().copied().fold(f32::INFINITY, f32::min);
            let most = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for (expected, found) in expected.iter().zip(found) {
                let error = (expected - found).abs() * steps / (most - least);
                (sum, count, largest) = (sum + error * error, count + 1, largest.max(error));
            }
        }
    }
    ((sum / count as f32).sqrt(), largest)
}

#[test]
fn affine_weights_are_rounded_to_the_nearest_value() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let model = model(128, false).to_dtype(dtype).unwrap();
        for (bits, group_size) in [(2, 64), (3, 64), (4, 64), (5, 32), (6, 64), (8, 64)] {
            let folder = tempfile::tempdir().unwrap();
            let read = written(&model, MlxQuantization::Affine { bits, group_size }, folder.path());
            let (rms, largest) = errors(&model, &read, (bits, group_size));
            // errors that are spread evenly over half a step have 0.289, those of mlx's quantizer 0.25 to 0.457
            assert!((0.24..0.29).contains(&rms) && largest < 1.0, "{dtype:?} {bits} bits: {rms} {largest}");
        }
    }
}

#[test]
fn an_mlx_folder_has_the_tensors_and_keys_of_mlx_lm() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(64, true).to_dtype(DType::BF16).unwrap();
    save_mlx_model(&model, folder.path(), MlxQuantization::Affine { bits: 4, group_size: 64 }).unwrap();
    let file = SafetensorsFile::open(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(file.metadata()["format"], "mlx");
    let shape = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        (tensor.dtype(), tensor.dims().to_vec())
    };
    assert_eq!(shape("model.embed_tokens.weight"), (DType::U32, vec![97, 8]));
    assert_eq!(shape("model.layers.1.mlp.down_proj.weight"), (DType::U32, vec![64, 24]));
    assert_eq!(shape("model.layers.1.mlp.down_proj.scales"), (DType::BF16, vec![64, 3]));
    assert_eq!(shape("model.layers.1.mlp.down_proj.biases"), (DType::BF16, vec![64, 3]));
    assert_eq!(shape("model.norm.weight"), (DType::BF16, vec![64]));
    assert!(file.tensor("lm_head.weight").is_err());
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("config.json")).unwrap()).unwrap();
    let expected = json!({"group_size": 64, "bits": 4, "mode": "affine"});
    assert_eq!((&config["quantization"], &config["quantization_config"]), (&expected, &expected));
    assert_eq!(config["rope_scaling"]["factor"], 2.0);
    assert_eq!(config["rope_theta"], 500.0);
    let read = ModelLoader::new().load(folder.path()).unwrap();
    read.forward(&Batch::single(&[1, 2, 3]), None, None, Rows::Last).unwrap();
}

#[test]
fn mxfp4_has_the_values_of_the_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(64, false);
    let read = written(&model, MlxQuantization::Mxfp4, folder.path());
    let blocks = Quantization::from(QuantizationMixture::from_name("mxfp4").unwrap());
    let blocks = blocks.with_type(".", QuantizationMixture::from_name("mxfp4").unwrap().base).unwrap();
    let expected = model.quantize(&blocks, |_| ()).unwrap();
    for ((name, expected), (_, found)) in expected.parameters().iter().zip(read.parameters()) {
        assert_eq!(values(&found.tensor().unwrap()), values(&expected.tensor().unwrap()), "{name}");
    }
    // the blocks are those of the file again
    let packed = ModelLoader::new().load(folder.path()).unwrap();
    assert!(packed.parameters().iter().filter(|(_, weight)| weight.block_format().is_some()).count() > 10);
}

#[test]
fn equal_weights_stay_equal_and_wrong_sizes_are_refused() {
    let config = json!({
        "model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "initializer_range": 0.0,
    });
    let folder = tempfile::tempdir().unwrap();
    let zeros = Model::initialize(ModelConfig::from_json_str(&config.to_string()).unwrap(), 7, Device::CPU).unwrap();
    let read = written(&zeros, MlxQuantization::Affine { bits: 4, group_size: 64 }, folder.path());
    for ((name, expected), (_, found)) in zeros.parameters().iter().zip(read.parameters()) {
        assert_eq!(values(&found.tensor().unwrap()), values(&expected.tensor().unwrap()), "{name}");
    }
    let refused = |model: &Model, quantization: MlxQuantization, part: &str| {
        let folder = folder.path().join("none");
        let error = save_mlx_model(model, &folder, quantization).unwrap_err().to_string();
        assert!(error.contains(part) && !folder.exists(), "{error}");
    };
    refused(&zeros, MlxQuantization::Affine { bits: 7, group_size: 64 }, "found 7");
    refused(&zeros, MlxQuantization::Affine { bits: 4, group_size: 48 }, "found 48");
    refused(&zeros, MlxQuantization::Affine { bits: 4, group_size: 128 }, "found none in this model");
    // rows of 192 weights are no groups of 128
    let dense = save_mlx_model(&model(128, false), folder.path(), MlxQuantization::Affine { bits: 4, group_size: 128 });
    let expected = [0, 1].map(|layer| format!("model.layers.{layer}.mlp.down_proj.weight"));
    assert_eq!(dense.unwrap(), expected);
    let read = ModelLoader::new().load(folder.path()).unwrap();
    read.forward(&Batch::single(&[1, 2, 3]), None, None, Rows::Last).unwrap();
}
