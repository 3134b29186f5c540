//! A norm of a layer, with the gradients of its weights.

use super::super::registry::NormSlot;
use super::pass::{Backward, StepSize};
use crate::error::Result;
use crate::ops::norm::{Norm, NormNeedsGrad};
use candle_core::Tensor;

/// A norm and its registered ids.
#[derive(Debug)]
pub(in crate::models) struct NormLayer {
    pub(in crate::models) norm: Norm,
    pub(in crate::models) slot: NormSlot,
}

impl NormLayer {
    /// # Shapes
    /// `x` and the result: `[tokens, n * width]`.
    pub(in crate::models) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    pub(in crate::models) fn is_trained(&self, trained: &[bool]) -> bool {
        [self.slot.weight, self.slot.bias].into_iter().flatten().any(|index| trained[index])
    }

    /// The gradient with respect to `x`, added to `dx` if given.
    pub(in crate::models) fn backward(
        &self,
        x: &Tensor,
        dy: &Tensor,
        dx: Option<Tensor>,
        pass: &mut Backward,
    ) -> Result<Tensor> {
        let needs_grad =
            NormNeedsGrad { weight: pass.is_trained(self.slot.weight), bias: pass.is_trained(self.slot.bias) };
        let (dx, found) = self.norm.backward(x, dy, dx, needs_grad)?;
        pass.add(self.slot.weight, found.weight)?;
        pass.add(self.slot.bias, found.bias)?;
        Ok(dx)
    }

    /// The size of the gradients of its weights, in bytes.
    pub(in crate::models) fn gradient_bytes(&self, size: StepSize) -> usize {
        size.gradient(self.slot.weight) + size.gradient(self.slot.bias)
    }
}
