//! A residual branch of a layer: norms around a part, and the sum with the stream.

use super::super::kv_cache::KVCache;
use super::input::{Input, Output};
use super::norm::NormLayer;
use super::pass::{Backward, Context, Meter, StepSize};
use crate::error::Result;
use crate::ops::fused;
use crate::ops::linear::add_scaled;
use candle_core::Tensor;

/// What a layer is made of: everything the model needs to know of attention, an MLP or another part.
pub(in crate::models) trait Part {
    /// What the backward pass needs of the forward pass, beside the input.
    type Saved: Saved;

    /// The output of a pass without a backward pass, added to `residual` if it is given. Keys and values of the tokens are
    /// added to the cache, if there is one and the part has any.
    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<Output<'a>>;

    /// As [`Part::forward`] in training. The output is `None` if `is_last_skipped` and the backward pass does not need it.
    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        is_last_skipped: bool,
    ) -> Result<(Option<Output<'a>>, Self::Saved)>;

    /// The gradient with respect to the stream of `input`, added to `carry`, from that of the part's output. None if
    /// `!needs_input`.
    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: Self::Saved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>>;

    /// The memory of [`Part::forward`], or of [`Part::forward_saving`]. The stream is there before, stream and output after.
    fn forward_memory(&self, size: StepSize, is_saving: bool, is_last_skipped: bool, meter: &mut Meter);

    /// The memory of [`Part::backward`]. Before it there are the gradient of the output and what was saved; after it the
    /// gradient of the input, which takes the place of the first. Returns what stays until the end of the layer.
    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut Meter) -> usize;
}

/// The saved state of a part.
pub(in crate::models) trait Saved {
    fn num_bytes(&self) -> usize;
}

/// A part between its norms.
#[derive(Debug)]
pub(in crate::models) struct Sublayer<P> {
    pub(in crate::models) before: Option<NormLayer>,
    pub(in crate::models) part: P,
    pub(in crate::models) after: Option<NormLayer>,
    /// The factor on the branch.
    pub(in crate::models) scale: f32,
}

/// What the backward pass of a [`Sublayer`] needs beside its input.
pub(in crate::models) struct SublayerSaved<S> {
    part: S,
    /// The output of the part, if a norm follows it.
    output: Option<Tensor>,
}

impl<S: Saved> SublayerSaved<S> {
    pub(in crate::models) fn num_bytes(&self) -> usize {
        self.part.num_bytes() + self.output.as_ref().map_or(0, crate::ops::num_bytes)
    }
}

/// The stream after a branch and, where the device computes it in the same launch, the next part's normed input.
type Stream = (Tensor, Option<Tensor>);

impl<P: Part> Sublayer<P> {
    /// Whether the part's output is added to the stream as it is.
    pub(in crate::models) fn is_plain(&self) -> bool {
        self.after.is_none() && !self.is_scaled()
    }

    fn is_scaled(&self) -> bool {
        (self.scale - 1.0).abs() > f32::EPSILON
    }

    fn scaled(&self, y: Tensor) -> Result<Tensor> {
        if self.is_scaled() { Ok(y.affine(f64::from(self.scale), 0.0)?) } else { Ok(y) }
    }

    /// The stream after the branch, `residual + scale * after(part(before(input)))`. `next` is the norm that follows.
    pub(in crate::models) fn forward<'a>(
        &'a self,
        input: &Input,
        residual: &Tensor,
        next: Option<&NormLayer>,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<Stream> {
        if self.is_plain() {
            let output = self.part.forward(input, Some(residual), context, cache)?;
            return finish(output, residual, next);
        }
        let y = self.part.forward(input, None, context, cache)?.y;
        Ok((self.added(&y, residual)?, None))
    }

    /// As [`Sublayer::forward`] in training; without the stream if `is_last_skipped`.
    pub(in crate::models) fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: &Tensor,
        next: Option<&NormLayer>,
        context: Context<'a>,
        is_last_skipped: bool,
    ) -> Result<(Option<Stream>, SublayerSaved<P::Saved>)> {
        if self.is_plain() {
            let (output, part) = self.part.forward_saving(input, Some(residual), context, is_last_skipped)?;
            let stream = output.map(|output| finish(output, residual, next)).transpose()?;
            return Ok((stream, SublayerSaved { part, output: None }));
        }
        let is_skipped = is_last_skipped && self.after.is_none();
        let (output, part) = self.part.forward_saving(input, None, context, is_skipped)?;
        let y = output.map(|output| output.y);
        let stream = match &y {
            Some(y) if !is_last_skipped => Some((self.added(y, residual)?, None)),
            _ => None,
        };
        Ok((stream, SublayerSaved { part, output: y.filter(|_| self.after.is_some()) }))
    }

    fn added(&self, y: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let y = match &self.after {
            Some(norm) => norm.forward(y)?,
            None => y.clone(),
        };
        add_scaled(self.scaled(y)?, 1.0, residual)
    }

    /// The gradient with respect to the stream of `input`, added to `carry`, from that of the stream after the branch.
    pub(in crate::models) fn backward<'a>(
        &'a self,
        input: &Input,
        saved: SublayerSaved<P::Saved>,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        if self.is_plain() {
            return self.part.backward(input, saved.part, dy, carry, needs_input, pass);
        }
        let dy = self.scaled(dy.clone())?;
        let dy = match (&self.after, &saved.output) {
            (Some(norm), Some(output)) => norm.backward(output, &dy, None, pass)?,
            _ => dy,
        };
        drop(saved.output);
        self.part.backward(input, saved.part, &dy, carry, needs_input, pass)
    }

    /// Whether the norm before the part is trained, so that its gradient is required even if the input's is not.
    pub(in crate::models) fn trains_norm(&self, trained: &[bool]) -> bool {
        self.before.as_ref().is_some_and(|norm| norm.is_trained(trained))
    }

    /// The memory of the forward pass; stream before, both streams after.
    pub(in crate::models) fn forward_memory(
        &self,
        size: StepSize,
        is_saving: bool,
        is_last_skipped: bool,
        meter: &mut Meter,
    ) {
        let is_skipped = is_last_skipped && self.after.is_none();
        self.part.forward_memory(size, is_saving, is_skipped, meter);
        if self.after.is_some() {
            meter.take(size.stream);
            meter.give(if is_saving { 0 } else { size.stream });
            meter.give(if is_last_skipped { size.stream } else { 0 });
        }
    }

    /// Bytes that are saved of the branch beside those of the part: the part's output where a norm follows it.
    pub(in crate::models) fn saved_output(&self, size: StepSize) -> usize {
        if self.after.is_some() { size.stream } else { 0 }
    }

    /// The memory of the backward pass; returns what stays until the end of the layer.
    pub(in crate::models) fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut Meter) -> usize {
        let own = [&self.before, &self.after].into_iter().flatten();
        meter.take(own.map(|norm| norm.gradient_bytes(size)).sum());
        let copies = if self.is_plain() { 0 } else { size.stream };
        meter.take(copies);
        meter.give(self.saved_output(size));
        let gathered = self.part.backward_memory(size, needs_input, meter);
        meter.give(copies);
        gathered
    }
}

/// The stream with a part's output, and the next norm of it if both can be computed in one launch.
fn finish(output: Output, residual: &Tensor, next: Option<&NormLayer>) -> Result<Stream> {
    let Some(pending) = output.pending else { return Ok((output.y, None)) };
    let next = next.filter(|next| next.norm.is_plain_rms(residual.dtype())).map(|next| &next.norm);
    fused::finish_stream(residual, output.y, pending.layer, pending.z.as_ref(), next)
}
