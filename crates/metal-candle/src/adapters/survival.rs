//! How much of an adapter's change is left in weights that were rounded.

use super::LoRAAdapter;
use super::layout::weight;
use crate::error::Result;
use crate::models::Model;
use candle_core::{DType, Device, Tensor};

/// What is left of an adapter's change in one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Survival {
    /// The weight: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The projection of the realised change onto the intended one, divided by the square of the latter's length: 1 if all of
    /// it is there, 0 if nothing is.
    pub share: f64,
    /// The length of the error that rounding added, divided by that of the intended change.
    pub noise: f64,
}

impl LoRAAdapter {
    /// How much of the change of each adapted weight is left in `result`, which was merged from `base` and this adapter and
    /// rounded. Weights that the adapter does not change are left out.
    ///
    /// # Errors
    /// A model lacks a layer, or has it in another shape.
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
                // by rows in f32, then in f64
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
