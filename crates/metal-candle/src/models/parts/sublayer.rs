//! A residual branch of a layer: a part, the norms around it, and the sum with the stream. `Part` is the interface of
//! attention and MLPs.

use super::super::kv_cache::KVCache;
use super::input::{Input, Output};
use super::norm::NormLayer;
use super::pass::{Backward, Context, MemoryMeter, StepSize};
use crate::error::Result;
use crate::ops::fused;
use crate::ops::linear::add_scaled;
use candle_core::Tensor;

/// A part of a layer. It hides everything else about attention, an MLP or another part from the model.
pub(in crate::models) trait Part {
    /// The tensors of the forward pass that the backward pass reads, besides the input.
    type Saved: Saved;

    /// The forward pass without a backward pass: the output, plus `residual` if given. Keys and values of the tokens
    /// are added to the cache, if it is given and the part has any.
    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<Output<'a>>;

    /// [`Part::forward`] in training. The output is `None` if `skips_output` is set and the backward pass does not need
    /// it.
    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        skips_output: bool,
    ) -> Result<(Option<Output<'a>>, Self::Saved)>;

    /// The gradient with respect to the stream of `input`, added to `carry`, from that of the part's output. `None` if
    /// `needs_input` is false.
    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: Self::Saved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>>;

    /// Counts the memory of [`Part::forward`], or of [`Part::forward_saving`]. The stream is allocated before it,
    /// stream and output after it.
    fn forward_memory(&self, size: StepSize, is_saving: bool, skips_output: bool, meter: &mut MemoryMeter);

    /// Counts the memory of [`Part::backward`]. The gradient of the output and the saved tensors are allocated before
    /// it; after it, the gradient of the input replaces that of the output. Returns the bytes that stay allocated until
    /// the end of the layer.
    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) -> usize;
}

/// The saved state of a part.
pub(in crate::models) trait Saved {
    fn num_bytes(&self) -> usize;
}

/// A part with its norms.
#[derive(Debug)]
pub(in crate::models) struct Sublayer<P> {
    pub(in crate::models) before: Option<NormLayer>,
    pub(in crate::models) part: P,
    pub(in crate::models) after: Option<NormLayer>,
    /// The factor on the branch.
    pub(in crate::models) scale: f32,
}

/// The tensors that the backward pass of a [`Sublayer`] reads, besides its input.
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

/// The stream after a branch and, if the device computes it in the same launch, the normed input of the next part.
type Stream = (Tensor, Option<Tensor>);

impl<P: Part> Sublayer<P> {
    /// Whether the part's output is added to the stream unchanged.
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

    /// [`Sublayer::forward`] in training, without the stream if `skips_output`.
    pub(in crate::models) fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: &Tensor,
        next: Option<&NormLayer>,
        context: Context<'a>,
        skips_output: bool,
    ) -> Result<(Option<Stream>, SublayerSaved<P::Saved>)> {
        if self.is_plain() {
            let (output, part) = self.part.forward_saving(input, Some(residual), context, skips_output)?;
            let stream = output.map(|output| finish(output, residual, next)).transpose()?;
            return Ok((stream, SublayerSaved { part, output: None }));
        }
        let is_skipped = skips_output && self.after.is_none();
        let (output, part) = self.part.forward_saving(input, None, context, is_skipped)?;
        let y = output.map(|output| output.y);
        let stream = match &y {
            Some(y) if !skips_output => Some((self.added(y, residual)?, None)),
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

    /// Whether the norm before the part is trained: its gradient is then required even if that of the input is not.
    pub(in crate::models) fn trains_norm(&self, trained: &[bool]) -> bool {
        self.before.as_ref().is_some_and(|norm| norm.is_trained(trained))
    }

    /// Counts the memory of the forward pass. The stream is allocated before it, both streams after it.
    pub(in crate::models) fn forward_memory(
        &self,
        size: StepSize,
        is_saving: bool,
        skips_output: bool,
        meter: &mut MemoryMeter,
    ) {
        let is_skipped = skips_output && self.after.is_none();
        self.part.forward_memory(size, is_saving, is_skipped, meter);
        if self.after.is_some() {
            meter.allocate(size.stream);
            meter.free(if is_saving { 0 } else { size.stream });
            meter.free(if skips_output { size.stream } else { 0 });
        }
    }

    /// Bytes that the branch saves besides the part: the part's output, if a norm follows.
    pub(in crate::models) fn saved_output(&self, size: StepSize) -> usize {
        if self.after.is_some() { size.stream } else { 0 }
    }

    /// Counts the memory of the backward pass. Returns the bytes that stay allocated until the end of the layer.
    pub(in crate::models) fn backward_memory(
        &self,
        size: StepSize,
        needs_input: bool,
        meter: &mut MemoryMeter,
    ) -> usize {
        let own = [&self.before, &self.after].into_iter().flatten();
        meter.allocate(own.map(|norm| norm.gradient_bytes(size)).sum());
        let copies = if self.is_plain() { 0 } else { size.stream };
        meter.allocate(copies);
        meter.free(self.saved_output(size));
        let gathered = self.part.backward_memory(size, needs_input, meter);
        meter.free(copies);
        gathered
    }
}

/// The stream plus a part's output, and the next norm of it if one launch can compute both.
fn finish(output: Output, residual: &Tensor, next: Option<&NormLayer>) -> Result<Stream> {
    let Some(pending) = output.pending else { return Ok((output.y, None)) };
    let next = next.filter(|next| next.norm.is_plain_rms(residual.dtype())).map(|next| &next.norm);
    fused::finish_stream(residual, output.y, pending.layer, pending.z.as_ref(), next)
}
