//! Measures how much of an adapter's change survives rounding of the merged weights.

use super::LoRAAdapter;
use super::layout::weight;
use crate::error::Result;
use crate::models::Model;
use candle_core::{DType, Device, Tensor};

/// How much of an adapter's change of one weight survived.
#[derive(Debug, Clone, PartialEq)]
pub struct Survival {
    /// The weight: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The projection of the actual change onto the intended change, divided by the squared norm of the intended change: 1 if
    /// all of it survived, 0 if nothing did.
    pub share: f64,
    /// The norm of the rounding error divided by the norm of the intended change.
    pub noise: f64,
}

impl LoRAAdapter {
    /// Measures how much of the change of each adapted weight survived in `result`, which was merged from `base` and this
    /// adapter and then rounded. Weights that the adapter does not change are omitted.
    ///
    /// # Errors
    /// A model lacks a layer, or its shape differs.
    pub fn survival(&self, base: &Model, result: &Model) -> Result<Vec<Survival>> {
        let exact = self.merge_in(base, DType::F32)?;
        let mut found = Vec::new();
        for module in self.modules() {
            let name = format!("{}.weight", module.path);
            let values = |model: &Model| -> Result<Tensor> {
                Ok(weight(model, &name)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
            };
            let before = values(base)?;
            let intended = (values(&exact)? - &before)?;
            let realised = (values(result)? - before)?;
            let sum = |tensor: Tensor| -> Result<f64> {
                // rows are summed in f32, their sums in f64
                Ok(tensor.sum(1)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?)
            };
            let length = sum(intended.sqr()?)?;
            if length > 0.0 {
                let share = sum((&intended * &realised)?)? / length;
                let noise = (sum((realised - intended)?.sqr()?)? / length).sqrt();
                found.push(Survival { name, share, noise });
            }
        }
        Ok(found)
    }
}
