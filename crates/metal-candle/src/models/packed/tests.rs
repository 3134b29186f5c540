//! Compares matrices written by the original tools (`dev/reference_packed.py`) with the values that these tools read.

use super::{PackedWeights, Quantization};
use crate::files::{JsonObject, Shards};
use crate::models::keys::Keys;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> Shards {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed");
    Shards::open(&folder.join(name)).unwrap()
}

fn quantization(keys: &Value) -> crate::Result<Option<Quantization>> {
    let object = JsonObject::from_map(Path::new("config.json"), keys.as_object().unwrap().clone());
    Quantization::read(&Keys::new(&object))
}

/// The expected matrices of a golden file, by parameter.
fn expected(shards: &Shards) -> Vec<(String, Tensor)> {
    let expected = shards.names().filter_map(|name| Some((name, name.strip_suffix(".expected")?)));
    let read = |(name, module): (&str, &str)| {
        (format!("{module}.weight"), shards.get(name).unwrap().0.float_tensor(name, DType::F32).unwrap())
    };
    expected.map(read).collect()
}

/// Loads each matrix of a golden file without a dtype and as f32, f16 and bf16, and returns the block format or dtype
/// of each without one.
fn formats(file: &str, keys: &Value) -> HashMap<String, String> {
    let (shards, quantization) = (golden(file), quantization(keys).unwrap());
    let expected = expected(&shards);
    let found = shards.names().map(|name| (name.to_owned(), name.to_owned())).collect();
    let parameters: Vec<_> = expected.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    let packed = PackedWeights::find(&shards, quantization.as_ref(), &found, &parameters, DType::BF16);
    assert!(packed.problems.is_empty(), "{:?}", packed.problems);
    let mut formats = HashMap::new();
    let values =
        |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    for (name, expected) in expected {
        let weight = |dtype: Option<DType>| packed.weight(&name, dtype).unwrap().unwrap().0;
        let held = weight(None);
        let dtype = held.dtype();
        // the dtype of blocks is f32
        let rounded = expected.to_dtype(dtype).unwrap();
        assert_eq!(values(&held.tensor().unwrap()), values(&rounded), "{name}");
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let dense = weight(Some(dtype));
            assert_eq!((dense.dtype(), dense.block_format()), (dtype, None));
            assert_eq!(
                values(&dense.tensor().unwrap()),
                values(&expected.to_dtype(dtype).unwrap()),
                "{name} {dtype:?}"
            );
        }
        let format = held.block_format().map_or(dtype.as_str(), metal_candle_kernels::BlockFormat::name);
        formats.insert(name.trim_end_matches(".weight").to_owned(), format.to_owned());
    }
    formats
}

#[test]
fn matrices_of_mlx_have_the_values_of_mlx() {
    let formats = formats("mlx.safetensors", &json!({"quantization": {"bits": 4, "group_size": 64}}));
    assert_eq!(formats.len(), 21);
    // the dtypes of scales alternate: bf16, f16, f32
    for (name, format) in [
        ("affine_2_32", "q4_1"),
        ("affine_3_32", "q4_1"),
        ("affine_4_32", "f32"),
        ("affine_5_32", "q5_1"),
        ("affine_6_32", "f16"),
        ("affine_8_32", "f32"),
        ("affine_2_64", "q4_1"),
        ("affine_6_64", "f16"),
        ("affine_4_128", "f32"),
        ("affine_5_128", "q5_1"),
        ("mxfp4_4_32", "mxfp4"),
        ("nvfp4_4_16", "bf16"),
        ("mxfp8_8_32", "bf16"),
    ] {
        assert_eq!(formats[name], format, "{name}");
    }
}

/// Checks the formats of the matrices of a file. All values are compared with those of the tool.
fn check_formats(file: &str, settings: &Value, expected: &[(&str, &str)]) {
    let formats = formats(file, &json!({"quantization_config": settings}));
    assert_eq!(formats.len(), expected.len(), "{file}");
    for (name, format) in expected {
        assert_eq!(formats[*name], *format, "{file}: {name}");
    }
}

#[test]
fn matrices_of_bitsandbytes_have_its_values() {
    check_formats(
        "bitsandbytes.safetensors",
        &json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
        &[("nf4", "bf16"), ("nested", "f16"), ("fp4", "f32"), ("int8", "bf16")],
    );
}

#[test]
fn floats_of_8_bits_have_the_values_of_transformers() {
    let settings = json!({"quant_method": "fp8", "weight_block_size": [4, 16]});
    check_formats("fp8.safetensors", &settings, &[("blocks", "bf16"), ("whole", "bf16")]);
}

#[test]
fn matrices_of_gptq_have_the_values_of_gptqmodel() {
    // unless the zero point is in the middle, code minus zero point needs one more bit
    let expected = [
        ("2", "q4_0"),
        ("3", "q4_0"),
        ("4", "q5_0"),
        ("8", "f16"),
        ("symmetric_4", "q4_0"),
        ("symmetric_8", "q8_0"),
        ("ordered", "f16"),
    ];
    let mixed = json!({"+:.*": {"bits": 3}});
    check_formats("gptq.safetensors", &json!({"quant_method": "gptq", "bits": 4, "dynamic": mixed}), &expected);
    let second = json!({"quant_method": "gptq", "bits": 4, "dynamic": mixed, "checkpoint_format": "gptq_v2"});
    check_formats("gptq_v2.safetensors", &second, &[("3", "q4_0"), ("4", "q5_0"), ("symmetric_4", "q4_0")]);
}

#[test]
fn matrices_of_awq_have_the_values_of_autoawq() {
    let settings = json!({"quant_method": "awq", "bits": 4, "version": "gemm"});
    check_formats("awq.safetensors", &settings, &[("f16", "q5_0"), ("bf16", "q5_0")]);
}

#[test]
fn matrices_of_compressed_tensors_have_its_values() {
    let block = json!({"group_0": {"weights": {"block_structure": [2, 16], "num_bits": 4}}, "group_1": {"weights": {"num_bits": 8}}});
    check_formats(
        "compressed.safetensors",
        &json!({"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": block}),
        &[
            ("int4", "q4_0"),
            ("zeros4", "q5_0"),
            ("int8", "q8_0"),
            ("f32", "bf16"),
            ("row", "bf16"), // 36 columns
            ("bytes", "q8_0"),
            ("byte_matrix", "q8_0"),
            ("float_rows", "bf16"),
            ("float_matrix", "bf16"),
            ("float_blocks", "bf16"),
        ],
    );
}

#[test]
fn settings_are_read_and_described() {
    for (settings, expected) in [
        (json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), "int8 (bitsandbytes)"),
        (json!({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}), "nf4 (bitsandbytes)"),
        (json!({"quant_method": "fp8"}), "fp8 in blocks of 128 x 128"),
        (json!({"quant_method": "fp8", "weight_block_size": null}), "fp8"),
        (json!({"quant_method": "fbgemm_fp8"}), "fp8"),
        (json!({"quant_method": "gptq", "bits": 3}), "3 bits (GPTQ)"),
        (json!({"quant_method": "awq", "bits": 4, "version": "GEMM"}), "4 bits (AWQ)"),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {"format": "dense"}}),
            "pack-quantized (compressed-tensors)",
        ),
    ] {
        let found = quantization(&json!({"quantization_config": settings})).unwrap().unwrap();
        assert_eq!(found.to_string(), expected);
    }
    for (settings, expected) in [
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), "weight_block_size`: expected two whole numbers"),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 1]}), "weight_block_size`: expected two whole numbers"),
        (json!({"quant_method": "gptq"}), "`quantization_config.bits`: expected a whole number"),
        (json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}), "`gptq` of format `marlin`"),
        (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), "`awq` of format `gemv`"),
        (json!({"quant_method": "awq", "bits": 8}), "`awq` of `8 bits`"),
        (json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}), "nvfp4-pack-quantized"),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": 1}}),
            "with `transform_config`",
        ),
    ] {
        let error = quantization(&json!({"quantization_config": settings})).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn unknown_methods_are_refused_with_what_to_do() {
    for (keys, expected) in [
        (json!({"quantization_config": {"quant_method": "aqlm"}}), "method `aqlm`; use the unquantized model, or"),
        (json!({"quantization": {}}), "method `unknown`"),
        (json!({"quantization": {"bits": 4, "group_size": 64, "mode": "ternary"}}), "method `mlx` of mode `ternary`"),
        (json!({"quantization": {"bits": 7, "group_size": 64}}), "`quantization.bits`: expected 2, 3, 4, 5, 6 or 8"),
        (
            json!({"quantization": {"bits": 4, "group_size": "64"}}),
            "`quantization.group_size`: expected a whole number",
        ),
        (json!({"quantization": {"bits": 4, "group_size": 64, "mode": 1}}), "`quantization.mode`: expected a string"),
        (json!({"quantization": true}), "`quantization`: expected an object, found `true`"),
    ] {
        let error = quantization(&keys).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains(expected), "{error}");
    }
    assert!(quantization(&json!({"quantization_config": null})).unwrap().is_none());
    let mlx = json!({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}});
    assert_eq!(quantization(&mlx).unwrap().unwrap().to_string(), "4 bits in groups of 32 (MLX mxfp4)");
}
