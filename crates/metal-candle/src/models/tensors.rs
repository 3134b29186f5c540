//! Looks up the tensors of a model by their registered ids, in the form that parts use.

use super::parts::linear::LinearLayer;
use super::parts::norm::NormLayer;
use super::registry::{LinearInfo, LinearSlot, NormSlot};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Weight;
use crate::ops::linear::Linear;
use crate::ops::norm::Norm;
use candle_core::{DType, Tensor};

/// The parameters of a model in the order of its layout.
pub(super) struct Tensors<'a> {
    pub(super) linears: &'a [LinearInfo],
    pub(super) parameters: &'a [(String, Weight)],
    pub(super) device: Device,
}

impl Tensors<'_> {
    /// The matrix with this index.
    pub(super) fn matrix(&self, index: usize) -> Result<Weight> {
        let found = self.parameters.get(index).map(|(_, weight)| weight.clone());
        found.ok_or_else(|| Error::Bug(format!("the model has no parameter {index}")))
    }

    /// The norm weight or bias with this index. On the CPU it becomes f32, the dtype of activations; these tensors are
    /// small.
    pub(super) fn small(&self, index: usize) -> Result<Tensor> {
        let tensor = self.matrix(index)?.tensor()?;
        Ok(if self.device.is_cpu() { tensor.to_dtype(DType::F32)? } else { tensor })
    }

    pub(super) fn linear(&self, slot: LinearSlot) -> Result<LinearLayer> {
        let weight = self.matrix(slot.weight)?;
        let bias = slot.bias.map(|index| self.small(index)).transpose()?;
        let info = &self.linears[slot.id];
        let (in_features, out_features) = (info.in_features, info.out_features);
        Ok(LinearLayer { linear: Linear { weight, bias }, slot, in_features, out_features })
    }

    pub(super) fn norm(&self, slot: NormSlot) -> Result<NormLayer> {
        let flat = |index| Ok::<_, Error>(self.small(index)?.flatten_all()?);
        let norm = Norm {
            kind: slot.spec.kind,
            weight: slot.weight.map(flat).transpose()?,
            bias: slot.bias.map(flat).transpose()?,
            eps: slot.spec.eps,
            width: slot.width,
        };
        Ok(NormLayer { norm, slot })
    }
}
