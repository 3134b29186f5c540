//! Where the golden numbers are.

use candle_core::Tensor;
use metal_candle::models::{Batch, Targets};
use metal_candle::{Device, Model, ModelLoader};
use serde_json::Value;
use std::path::PathBuf;

/// A file or folder of golden numbers.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A JSON file of golden numbers.
pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(name)).unwrap()).unwrap()
}

/// A golden model in f32 on the CPU.
pub(crate) fn model(name: &str) -> Model {
    ModelLoader::new().with_device(Device::CPU).load(path(name)).unwrap()
}

/// The numbers of a JSON list.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A `batch` of the golden numbers.
pub(crate) fn batch(value: &Value) -> (Batch, Targets) {
    let batch = Batch::from_sequences(value["sequences"].as_array().unwrap().iter().map(ids));
    let weights = value["weights"].as_array().unwrap().iter().map(|weight| weight.as_f64().unwrap() as f32).collect();
    (batch, Targets { ids: ids(&value["targets"]), weights })
}

/// Name and tensor of each parameter of a model.
pub(crate) fn parameters_of(model: &Model) -> Vec<(String, Tensor)> {
    model.parameters().iter().map(|(name, weight)| (name.clone(), weight.tensor().unwrap())).collect()
}

/// The largest difference of two tensors of the same shape.
pub(crate) fn max_difference(left: &Tensor, right: &Tensor) -> f32 {
    assert_eq!(left.dims(), right.dims());
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values(left).iter().zip(values(right)).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max)
}
