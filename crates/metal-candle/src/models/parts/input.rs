//! What parts are given and what they return, as far as it has yet to be computed.

use super::norm::NormLayer;
use super::pass::Backward;
use crate::error::Result;
use crate::ops::fused::Layer;
use crate::ops::linear::add_scaled;
use candle_core::Tensor;

/// The input of a part: the residual stream and the norm that has yet to be applied to it, so that a part can fuse the two.
pub(in crate::models) struct Input<'a> {
    pub(in crate::models) stream: &'a Tensor,
    pub(in crate::models) norm: Option<&'a NormLayer>,
    /// The norm's result, if the previous part has computed it.
    pub(in crate::models) normed: Option<Tensor>,
}

impl<'a> Input<'a> {
    pub(in crate::models) fn new(stream: &'a Tensor, norm: Option<&'a NormLayer>) -> Self {
        Self { stream, norm, normed: None }
    }

    /// The normed stream.
    pub(in crate::models) fn get(&self) -> Result<Tensor> {
        match (&self.normed, self.norm) {
            (Some(normed), _) => Ok(normed.clone()),
            (None, Some(norm)) => norm.forward(self.stream),
            (None, None) => Ok(self.stream.clone()),
        }
    }

    /// The gradient with respect to the stream, from that of the normed stream, added to `carry`.
    pub(in crate::models) fn backward(&self, d_normed: &Tensor, carry: Tensor, pass: &mut Backward) -> Result<Tensor> {
        match self.norm {
            Some(norm) => norm.backward(self.stream, d_normed, Some(carry), pass),
            None => add_scaled(carry, 1.0, d_normed),
        }
    }
}

/// What a part returns: its output with the residual, if one was given, or on Metal the last product, to which the low-rank
/// update and the residual have yet to be added.
pub(in crate::models) struct Output<'a> {
    pub(in crate::models) y: Tensor,
    pub(in crate::models) pending: Option<Pending<'a>>,
}

/// What is missing of an [`Output`].
pub(in crate::models) struct Pending<'a> {
    pub(in crate::models) layer: Layer<'a>,
    pub(in crate::models) z: Option<Tensor>,
}

impl From<Tensor> for Output<'_> {
    fn from(y: Tensor) -> Self {
        Self { y, pending: None }
    }
}
