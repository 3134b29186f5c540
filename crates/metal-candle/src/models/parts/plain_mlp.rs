//! The ungated MLP part of a layer, `down(act(up x))`.

use super::super::description::PlainMlpSpec;
use super::super::kv_cache::KVCache;
use super::super::registry::{LinearSlot, Registry};
use super::super::tensors::Tensors;
use super::input::{Input, Output};
use super::linear::{ExtraMemory, LinearLayer};
use super::pass::{Backward, Context, MemoryMeter, StepSize, missing};
use super::sublayer::{Part, Saved};
use crate::error::Result;
use crate::ops::activation::{self, Activation};
use crate::ops::num_bytes;
use candle_core::Tensor;

const FOLDER: &str = "mlp";

/// The registered tensors of an MLP.
#[derive(Debug)]
pub(in crate::models) struct PlainMlpSlots {
    up: LinearSlot,
    down: LinearSlot,
}

impl PlainMlpSlots {
    pub(in crate::models) fn new(spec: &PlainMlpSpec, registry: &mut Registry, hidden: usize) -> Self {
        let [up, down] = spec.names;
        let mut linear = |name, sizes| registry.linear(FOLDER, name, sizes, spec.has_bias);
        Self { up: linear(up, [hidden, spec.inner]), down: linear(down, [spec.inner, hidden]) }
    }
}

/// The MLP of a layer.
#[derive(Debug)]
pub(in crate::models) struct PlainMlp {
    inner: usize,
    activation: Activation,
    pub(in crate::models) up: LinearLayer,
    pub(in crate::models) down: LinearLayer,
}

/// The tensors of the forward pass that the backward pass reads.
pub(in crate::models) struct PlainMlpSaved {
    up: Tensor,
    z: [Option<Tensor>; 2],
}

impl Saved for PlainMlpSaved {
    fn num_bytes(&self) -> usize {
        [&self.up].into_iter().chain(self.z.iter().flatten()).map(num_bytes).sum()
    }
}

impl PlainMlp {
    pub(in crate::models) fn new(spec: &PlainMlpSpec, slots: &PlainMlpSlots, tensors: &Tensors) -> Result<Self> {
        let (up, down) = (tensors.linear(slots.up)?, tensors.linear(slots.down)?);
        Ok(Self { inner: spec.inner, activation: spec.activation, up, down })
    }

    /// Bytes saved for backward, besides the input.
    pub(in crate::models) fn saved_memory(&self, size: StepSize) -> usize {
        size.activations(self.inner)
    }
}

impl Part for PlainMlp {
    type Saved = PlainMlpSaved;

    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        _: Option<&mut KVCache>,
    ) -> Result<Output<'a>> {
        let up = self.up.forward(&input.get()?, None, context, &mut None)?;
        let activation = activation::plain(self.activation, &up)?;
        drop(up);
        Ok(self.down.forward(&activation, residual, context, &mut None)?.into())
    }

    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        skips_output: bool,
    ) -> Result<(Option<Output<'a>>, PlainMlpSaved)> {
        let mut z = [None, None];
        let up = self.up.forward(&input.get()?, None, context, &mut z[0])?;
        let mut output = None;
        if !skips_output {
            let activation = activation::plain(self.activation, &up)?;
            output = Some(self.down.forward(&activation, residual, context, &mut z[1])?.into());
        }
        Ok((output, PlainMlpSaved { up, z }))
    }

    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: PlainMlpSaved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        let PlainMlpSaved { up, z } = saved;
        let needs_activation = self.down.needs_input(pass);
        let activation = needs_activation.then(|| activation::plain(self.activation, &up)).transpose()?;
        let d_activation = self.down.backward(activation.as_ref(), dy, (None, true), z[1].as_ref(), pass)?;
        drop(activation);
        let d_up = activation::plain_backward(self.activation, &up, d_activation.ok_or_else(missing)?)?;
        drop(up);
        let normed = self.up.needs_input(pass).then(|| input.get()).transpose()?;
        let d_normed = self.up.backward(normed.as_ref(), &d_up, (None, needs_input), z[0].as_ref(), pass)?;
        drop((normed, d_up));
        if !needs_input {
            return Ok(None);
        }
        input.backward(&d_normed.ok_or_else(missing)?, carry, pass).map(Some)
    }

    fn forward_memory(&self, size: StepSize, is_saving: bool, skips_output: bool, meter: &mut MemoryMeter) {
        let inner = size.activations(self.inner);
        let copies = ExtraMemory::of([&self.up, &self.down], size).copies;
        meter.allocate(size.stream + inner);
        meter.allocate_temporarily(copies);
        meter.free(size.stream);
        if !skips_output {
            meter.allocate(inner);
            meter.free(if is_saving { 0 } else { inner });
            meter.allocate_temporarily(copies);
            meter.allocate(size.stream);
            meter.free(inner);
        } else if !is_saving {
            meter.free(inner);
        }
    }

    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) -> usize {
        let inner = size.activations(self.inner);
        let extras = ExtraMemory::of([&self.up, &self.down], size);
        let has_update = size.updates.is_some_and(|updates| updates.get(self.down.slot.id).is_some());
        let activation = if has_update || size.trained[self.down.slot.weight] { inner } else { 0 };
        meter.allocate(activation + inner);
        meter.allocate_temporarily(extras.copies);
        meter.allocate(extras.gradients);
        // the saved product and the recomputed activation
        meter.free(activation + inner);
        meter.allocate(size.stream);
        if needs_input {
            meter.allocate(size.stream);
            meter.allocate_temporarily(extras.copies);
            meter.free(size.stream);
        }
        meter.free(inner + size.stream);
        0
    }
}
