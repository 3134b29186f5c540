//! A linear layer of a part, with its low-rank update and the gradients of both.

use super::super::registry::LinearSlot;
use super::pass::{Backward, Context, StepSize, missing};
use crate::error::Result;
use crate::ops::fused::{GradientFactors, Layer};
use crate::ops::linear::{Linear, NeedsGrad};
use crate::ops::{LowRank, LowRankUpdates};
use crate::profile::{Kind, span};
use candle_core::{DType, Tensor};

/// A linear layer and its registered ids.
#[derive(Debug)]
pub(in crate::models) struct LinearLayer {
    pub(in crate::models) linear: Linear,
    pub(in crate::models) slot: LinearSlot,
    pub(in crate::models) in_features: usize,
    pub(in crate::models) out_features: usize,
}

impl LinearLayer {
    pub(in crate::models) fn update<'a>(&self, context: Context<'a>) -> Option<&'a LowRank> {
        context.updates.same().and_then(|updates| updates.get(self.slot.id))
    }

    fn seed(&self, context: Context) -> Option<u64> {
        context.dropout_seed.map(|seed| seed ^ (self.slot.id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The layer, as an argument of `ops::fused`.
    pub(in crate::models) fn layer<'a>(&'a self, context: Context<'a>) -> Layer<'a> {
        Layer { linear: &self.linear, update: self.update(context) }
    }

    /// The output. Appends what the backward pass can reuse to `z`.
    pub(in crate::models) fn forward_saving(
        &self,
        x: &Tensor,
        context: Context,
        z: &mut Vec<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut saved_z = None;
        let y = self.forward(x, None, context, &mut saved_z)?;
        z.push(saved_z);
        Ok(y)
    }

    /// The output, plus `residual` if given. Stores what the backward pass can reuse in `z`.
    pub(in crate::models) fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        context: Context,
        z: &mut Option<Tensor>,
    ) -> Result<Tensor> {
        let _span = span(self.slot.name, Kind::Group);
        if context.is_inference {
            if let Some(inputs) = context.inputs {
                inputs.add(self.slot.id, x)?;
            }
            return self.linear.infer_adapted(x, &context.updates.of_layer(self.slot.id), residual);
        }
        let (y, saved_z) = self.linear.forward_saving(x, self.update(context), self.seed(context), residual)?;
        *z = saved_z;
        Ok(y)
    }

    /// Whether the backward pass reads the layer's input.
    pub(in crate::models) fn needs_input(&self, pass: &Backward) -> bool {
        self.update(pass.context).is_some() || pass.trained[self.slot.weight]
    }

    /// Stores the gradients of the weights, and returns that of the input, added to `dx`, if `needs_dx`.
    pub(in crate::models) fn backward(
        &self,
        x: Option<&Tensor>,
        dy: &Tensor,
        (dx, needs_dx): (Option<Tensor>, bool),
        z: Option<&Tensor>,
        pass: &mut Backward,
    ) -> Result<Option<Tensor>> {
        let _span = span(self.slot.name, Kind::Group);
        let (update, seed) = (self.update(pass.context), self.seed(pass.context));
        let needs_grad = NeedsGrad {
            input: needs_dx,
            weight: pass.trained[self.slot.weight],
            bias: pass.is_trained(self.slot.bias),
        };
        let found = self.linear.backward(x, update, seed, dy, needs_grad, dx, z)?;
        pass.gradients.low_rank[self.slot.id] = found.update;
        pass.add(Some(self.slot.weight), found.weight)?;
        pass.add(self.slot.bias, found.bias)?;
        Ok(found.input)
    }

    /// Stores the tensors from which the gradient of the layer's low-rank update is computed later, together with those
    /// of the block's other layers: the layer's input, the gradient of its output, and the products of both with the
    /// update.
    pub(in crate::models) fn gather<'a>(
        &'a self,
        (x, dy): (&Tensor, &Tensor),
        (z, dz): (Option<Tensor>, Option<Tensor>),
        pass: &mut Backward<'a, '_>,
    ) {
        let layer = self.layer(pass.context);
        pass.factors.push(GradientFactors { id: self.slot.id, layer, x: x.clone(), dy: dy.clone(), z, dz });
    }

    /// The memory that low-rank update and trained weights of the layer add to a step.
    pub(in crate::models) fn extras(&self, size: StepSize) -> ExtraMemory {
        let of_parameters = size.gradient(Some(self.slot.weight)) + size.gradient(self.slot.bias);
        let found = ExtraMemory::new(size.updates, self.slot.id, [self.in_features, self.out_features], size.tokens);
        ExtraMemory { gradients: found.gradients + of_parameters, ..found }
    }
}

/// The layers, as arguments of `ops::fused`.
pub(in crate::models) fn fused_layers<'a, const N: usize>(
    layers: &'a [LinearLayer],
    context: Context<'a>,
) -> Result<[Layer<'a>; N]> {
    let layers: Vec<Layer> = layers.iter().map(|layer| layer.layer(context)).collect();
    layers.try_into().map_err(|_| missing())
}

/// Whether all weights of these layers are frozen, apart from low-rank updates.
pub(in crate::models) fn are_frozen<'a>(layers: impl IntoIterator<Item = &'a LinearLayer>, pass: &Backward) -> bool {
    let is_trained = |layer: &LinearLayer| pass.trained[layer.slot.weight] || pass.is_trained(layer.slot.bias);
    !layers.into_iter().any(is_trained)
}

/// Whether `ops::fused` supports the input and the low-rank updates of a pass, given that it supports the weights.
pub(in crate::models) fn are_fused<'a>(
    layers: impl IntoIterator<Item = &'a LinearLayer>,
    x: &Tensor,
    context: Context,
) -> bool {
    let (dtype, is_training) = (x.dtype(), context.dropout_seed.is_some());
    let is_fused = |layer: &LinearLayer| {
        layer.linear.weight.dtype() == dtype && layer.layer(context).has_plain_update(dtype, is_training)
    };
    !context.updates.is_mixed() && layers.into_iter().all(is_fused)
}

/// The memory that low-rank updates and trained weights add to a step, in bytes.
#[derive(Default, Clone, Copy)]
pub(in crate::models) struct ExtraMemory {
    /// Gradients, which stay allocated until the end of the step.
    pub(in crate::models) gradients: usize,
    /// The largest copies that dropout or DoRA magnitudes need in one layer.
    pub(in crate::models) copies: usize,
}

impl ExtraMemory {
    /// The extra memory of the low-rank update of one layer.
    pub(in crate::models) fn new(
        updates: Option<&LowRankUpdates>,
        id: usize,
        [in_features, out_features]: [usize; 2],
        tokens: usize,
    ) -> Self {
        let Some(update) = updates.and_then(|updates| updates.get(id)) else { return Self::default() };
        let float = DType::F32.size_in_bytes();
        let magnitudes = if update.magnitude.is_some() { out_features } else { 0 };
        let gradients = (update.a.elem_count() + update.b.elem_count() + magnitudes) * float;
        let dropped = if update.dropout > 0.0 { tokens * in_features * float } else { 0 };
        let scaled = if update.magnitude.is_some() { 3 * tokens * out_features * float } else { 0 };
        Self { gradients, copies: dropped + scaled }
    }

    /// The extra memory of several layers of a part.
    pub(in crate::models) fn of<'a>(layers: impl IntoIterator<Item = &'a LinearLayer>, size: StepSize) -> Self {
        layers.into_iter().map(|layer| layer.extras(size)).fold(Self::default(), |sum, one| Self {
            gradients: sum.gradients + one.gradients,
            copies: sum.copies.max(one.copies),
        })
    }
}
