//! The input and output of parts. Both may be partly evaluated, so that a device can fuse operations across parts.

use super::norm::NormLayer;
use super::pass::Backward;
use crate::error::Result;
use crate::ops::fused::Layer;
use crate::ops::linear::add_scaled;
use candle_core::Tensor;

/// The input of a part: the residual stream, and the norm that has not been applied yet, so that a part can fuse the
/// norm with its first product.
pub(in crate::models) struct Input<'a> {
    pub(in crate::models) stream: &'a Tensor,
    pub(in crate::models) norm: Option<&'a NormLayer>,
    /// The output of the norm, if the previous part has computed it.
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

/// The output of a part, including the residual if one was given. On Metal it may be the last product alone, to which
/// low-rank update and residual are added later.
pub(in crate::models) struct Output<'a> {
    pub(in crate::models) y: Tensor,
    pub(in crate::models) pending: Option<Pending<'a>>,
}

/// The low-rank update that has not been added to an [`Output`] yet.
pub(in crate::models) struct Pending<'a> {
    pub(in crate::models) layer: Layer<'a>,
    pub(in crate::models) z: Option<Tensor>,
}

impl From<Tensor> for Output<'_> {
    fn from(y: Tensor) -> Self {
        Self { y, pending: None }
    }
}
