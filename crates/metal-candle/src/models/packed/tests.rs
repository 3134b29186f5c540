//! Matrices as the tools that people use write them (`dev/reference_packed.py`), and the values that they stand for.

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

/// Loads each matrix of a golden file as it is and as f32, f16 and bf16; the formats of the blocks or the dtypes that they are
/// held in.
fn formats(file: &str, keys: &Value) -> HashMap<String, String> {
    let (shards, quantization) = (golden(file), quantization(keys).unwrap());
    let expected = expected(&shards);
    let found = shards.names().map(|name| (name.to_owned(), name.to_owned())).collect();
    let parameters: Vec<_> = expected.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    let packed = PackedWeights::find(&shards, quantization.as_ref(), &found, &parameters);
    assert!(packed.problems.is_empty(), "{:?}", packed.problems);
    let mut formats = HashMap::new();
    let values =
        |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    for (name, expected) in expected {
        let weight = |dtype: Option<DType>| packed.weight(&name, dtype).unwrap().unwrap().0;
        let held = weight(None);
        let dtype = held.dtype();
        // blocks are of f32
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
    // the dtypes of scales take turns: bf16, f16, f32
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

#[test]
fn unknown_methods_are_refused_with_what_to_do() {
    for (keys, expected) in [
        (json!({"quantization_config": {"quant_method": "aqlm"}}), "method `aqlm`: take the unquantized model, or"),
        (json!({"quantization": {}}), "method `unknown`"),
        (json!({"quantization": {"bits": 4, "group_size": 64, "mode": "ternary"}}), "mode `ternary`"),
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
