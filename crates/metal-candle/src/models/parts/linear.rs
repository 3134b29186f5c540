//! A linear layer of a part: its weights, its low-rank update and the gradients of both.

use super::super::registry::LinearSlot;
use super::pass::{Backward, Context, StepSize, missing};
use crate::error::Result;
use crate::ops::fused::{Factors, Layer};
use crate::ops::linear::{Linear, Wanted};
use crate::ops::{LowRank, LowRankTerms};
use crate::profile::{Kind, span};
use candle_core::{DType, Tensor};

/// A linear layer and where it is registered.
#[derive(Debug)]
pub(in crate::models) struct LinearLayer {
    pub(in crate::models) linear: Linear,
    pub(in crate::models) slot: LinearSlot,
    pub(in crate::models) in_features: usize,
    pub(in crate::models) out_features: usize,
}

impl LinearLayer {
    pub(in crate::models) fn term<'a>(&self, context: Context<'a>) -> Option<&'a LowRank> {
        context.terms.same().and_then(|terms| terms.get(self.slot.id))
    }

    fn seed(&self, context: Context) -> Option<u64> {
        context.dropout_seed.map(|seed| seed ^ (self.slot.id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The layer as the fused kernels take it.
    pub(in crate::models) fn layer<'a>(&'a self, context: Context<'a>) -> Layer<'a> {
        Layer { linear: &self.linear, term: self.term(context) }
    }

    /// The output; what the backward pass can use is appended to `z`.
    pub(in crate::models) fn forward_keeping(
        &self,
        x: &Tensor,
        context: Context,
        z: &mut Vec<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut kept = None;
        let y = self.forward(x, None, context, &mut kept)?;
        z.push(kept);
        Ok(y)
    }

    /// The output, added to `residual` if there is one; what the backward pass can use is put into `z`.
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
            return self.linear.infer_terms(x, &context.terms.of_layer(self.slot.id), residual);
        }
        let (y, kept) = self.linear.forward_keeping(x, self.term(context), self.seed(context), residual)?;
        *z = kept;
        Ok(y)
    }

    /// Whether the backward pass reads the layer's input.
    pub(in crate::models) fn needs_input(&self, pass: &Backward) -> bool {
        self.term(pass.context).is_some() || pass.trained[self.slot.weight]
    }

    /// Stores the gradients of the weights and returns that of the input, added to `dx`, if `needs_dx`.
    pub(in crate::models) fn backward(
        &self,
        x: Option<&Tensor>,
        dy: &Tensor,
        (dx, needs_dx): (Option<Tensor>, bool),
        z: Option<&Tensor>,
        pass: &mut Backward,
    ) -> Result<Option<Tensor>> {
        let _span = span(self.slot.name, Kind::Group);
        let (term, seed) = (self.term(pass.context), self.seed(pass.context));
        let wanted =
            Wanted { input: needs_dx, weight: pass.trained[self.slot.weight], bias: pass.is_trained(self.slot.bias) };
        let found = self.linear.backward(x, term, seed, dy, wanted, dx, z)?;
        pass.gradients.terms[self.slot.id] = found.term;
        pass.add(Some(self.slot.weight), found.weight)?;
        pass.add(self.slot.bias, found.bias)?;
        Ok(found.input)
    }

    /// Keeps what the gradient of the layer's low-rank update is computed from, together with those of all layers of the block:
    /// the layer's input, the gradient of its output, and the products of both with the update.
    pub(in crate::models) fn gather<'a>(
        &'a self,
        (x, dy): (&Tensor, &Tensor),
        (z, dz): (Option<Tensor>, Option<Tensor>),
        pass: &mut Backward<'a, '_>,
    ) {
        let layer = self.layer(pass.context);
        pass.factors.push(Factors { number: self.slot.id, layer, x: x.clone(), dy: dy.clone(), z, dz });
    }

    /// What the low-rank update of the layer adds to the memory of a step.
    pub(in crate::models) fn extras(&self, size: StepSize) -> Extras {
        let of_parameters = size.gradient(Some(self.slot.weight)) + size.gradient(self.slot.bias);
        let found = Extras::new(size.terms, self.slot.id, [self.in_features, self.out_features], size.tokens);
        Extras { gradients: found.gradients + of_parameters, ..found }
    }
}

/// The layers as the fused kernels take them.
pub(in crate::models) fn fused_layers<'a, const N: usize>(
    layers: &'a [LinearLayer],
    context: Context<'a>,
) -> Result<[Layer<'a>; N]> {
    let layers: Vec<Layer> = layers.iter().map(|layer| layer.layer(context)).collect();
    layers.try_into().map_err(|_| missing())
}

/// Whether nothing of these layers is trained but low-rank updates.
pub(in crate::models) fn are_frozen<'a>(layers: impl IntoIterator<Item = &'a LinearLayer>, pass: &Backward) -> bool {
    let is_trained = |layer: &LinearLayer| pass.trained[layer.slot.weight] || pass.is_trained(layer.slot.bias);
    !layers.into_iter().any(is_trained)
}

/// Whether the launches of `ops::fused` take the inputs of a pass and its low-rank updates, where they take the weights.
pub(in crate::models) fn are_fused<'a>(
    layers: impl IntoIterator<Item = &'a LinearLayer>,
    x: &Tensor,
    context: Context,
) -> bool {
    let (dtype, is_training) = (x.dtype(), context.dropout_seed.is_some());
    let is_fused = |layer: &LinearLayer| {
        layer.linear.weight.dtype() == dtype && layer.layer(context).has_plain_term(dtype, is_training)
    };
    !context.terms.is_mixed() && layers.into_iter().all(is_fused)
}

/// Bytes that low-rank updates and trained weights add to a step.
#[derive(Default, Clone, Copy)]
pub(in crate::models) struct Extras {
    /// Gradients that stay until the end of the step.
    pub(in crate::models) gradients: usize,
    /// The largest of the copies that dropout or magnitudes make in one layer.
    pub(in crate::models) copies: usize,
}

impl Extras {
    /// Those of the low-rank update of one layer.
    pub(in crate::models) fn new(
        terms: Option<&LowRankTerms>,
        id: usize,
        [in_features, out_features]: [usize; 2],
        tokens: usize,
    ) -> Self {
        let Some(term) = terms.and_then(|terms| terms.get(id)) else { return Self::default() };
        let float = DType::F32.size_in_bytes();
        let magnitudes = if term.magnitude.is_some() { out_features } else { 0 };
        let gradients = (term.a.elem_count() + term.b.elem_count() + magnitudes) * float;
        let dropped = if term.dropout > 0.0 { tokens * in_features * float } else { 0 };
        let scaled = if term.magnitude.is_some() { 3 * tokens * out_features * float } else { 0 };
        Self { gradients, copies: dropped + scaled }
    }

    /// Those of several layers of a part.
    pub(in crate::models) fn of<'a>(layers: impl IntoIterator<Item = &'a LinearLayer>, size: StepSize) -> Self {
        layers.into_iter().map(|layer| layer.extras(size)).fold(Self::default(), |sum, one| Self {
            gradients: sum.gradients + one.gradients,
            copies: sum.copies.max(one.copies),
        })
    }
}
