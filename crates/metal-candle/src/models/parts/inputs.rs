//! Sums the squares of the inputs of linear layers over a text, for importance matrices.

use crate::error::Result;
use crate::models::registry::LinearId;
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The sums of the squares of the inputs of each linear layer that has run: `[in_features]`.
#[derive(Debug, Default)]
pub(in crate::models) struct InputSquares(RefCell<BTreeMap<LinearId, Vec<f64>>>);

impl InputSquares {
    /// Adds `x: [tokens, in_features]`.
    pub(super) fn add(&self, layer: LinearId, x: &Tensor) -> Result<()> {
        let sums = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.sqr()?.sum(0)?.to_vec1::<f32>()?;
        let mut layers = self.0.borrow_mut();
        let own = layers.entry(layer).or_insert_with(|| vec![0.0; sums.len()]);
        for (own, sum) in own.iter_mut().zip(sums) {
            *own += f64::from(sum);
        }
        Ok(())
    }

    /// The sums by layer.
    pub(in crate::models) fn into_sums(self) -> BTreeMap<LinearId, Vec<f64>> {
        self.0.into_inner()
    }
}
