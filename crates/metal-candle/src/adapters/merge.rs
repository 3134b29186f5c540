//! Merging adapters into weights.

use super::LoRAAdapter;
use crate::error::{Error, Result};
use crate::models::Model;
use candle_core::{DType, Tensor};
use std::collections::HashMap;

impl LoRAAdapter {
    /// A model with `W + scale * B A` in place of each adapted W; everything else is shared with `model`.
    ///
    /// The sum is computed in f32 and rounded to the dtype of the weights.
    ///
    /// # Errors
    /// `model` lacks a layer, or has it in another shape.
    pub fn merge(&self, model: &Model) -> Result<Model> {
        self.add_to(model, 1.0)
    }

    /// A model with `W - scale * B A` in place of each adapted W: what [`LoRAAdapter::merge`] was given, but for the
    /// rounding to the dtype of the weights.
    ///
    /// # Errors
    /// `model` lacks a layer, or has it in another shape.
    pub fn unmerge(&self, model: &Model) -> Result<Model> {
        self.add_to(model, -1.0)
    }

    fn add_to(&self, model: &Model, sign: f64) -> Result<Model> {
        let adapter = self.attach(model)?;
        let mut tensors: HashMap<String, Tensor> = model.parameters().iter().cloned().collect();
        for module in adapter.modules() {
            let name = format!("{}.weight", module.path);
            let Some(weight) = tensors.get(&name) else {
                return Err(Error::argument("model", format!("has no tensor `{name}`")));
            };
            let (a, b) = adapter.matrices(module)?;
            let change = (b.matmul(&a)? * (sign * module.scale))?;
            let merged = (weight.to_dtype(DType::F32)? + change)?.to_dtype(weight.dtype())?;
            tensors.insert(name, merged);
        }
        Model::from_tensors(model.config().clone(), tensors, model.device())
    }
}
