//! The gated MLP, `down(act(gate x) * up x)` (<https://arxiv.org/abs/2002.05202>).

use super::super::description::{GatedMlpSpec, GatedProjections};
use super::super::kv_cache::KVCache;
use super::super::registry::{LinearSlot, Registry};
use super::super::tensors::Tensors;
use super::input::{Input, Output, Pending};
use super::linear::{Extras, LinearLayer};
use super::norm::NormLayer;
use super::pass::{Backward, Context, Meter, StepSize, missing};
use super::step::{Step, fits, layer_args};
use super::sublayer::{Part, Saved};
use crate::error::Result;
use crate::ops::activation::{self, Activation};
use crate::ops::fused::{self, Factors, Layer};
use crate::ops::gpu::{self, Arg, Grid};
use crate::ops::{LowRankTerms, kept, num_bytes};
use candle_core::{DType, Tensor};

/// Where the tensors of a gated MLP are registered.
#[derive(Debug)]
pub(in crate::models) struct GatedMlpSlots {
    /// Gate and up, or their fused layer.
    inputs: Vec<LinearSlot>,
    down: LinearSlot,
}

impl GatedMlpSlots {
    pub(in crate::models) fn new(spec: &GatedMlpSpec, registry: &mut Registry, hidden: usize) -> Self {
        let mut linear = |name, sizes| registry.linear(spec.path, name, sizes, spec.has_bias);
        let inner = spec.inner;
        let (inputs, down) = match spec.projections {
            GatedProjections::Separate([gate, up, down]) => {
                (vec![linear(gate, [hidden, inner]), linear(up, [hidden, inner])], down)
            }
            GatedProjections::Fused([both, down]) => (vec![linear(both, [hidden, inner.saturating_mul(2)])], down),
        };
        Self { inputs, down: linear(down, [inner, hidden]) }
    }
}

/// The gated MLP of a layer.
#[derive(Debug)]
pub(in crate::models) struct GatedMlp {
    pub(in crate::models) inner: usize,
    pub(in crate::models) activation: Activation,
    /// Gate and up, or their fused layer.
    pub(in crate::models) inputs: Vec<LinearLayer>,
    pub(in crate::models) down: LinearLayer,
}

/// What the backward pass needs of the forward pass.
pub(in crate::models) struct GatedMlpSaved {
    gate: Tensor,
    up: Tensor,
    /// The product of each layer's input with A of its low-rank update, where it was saved; that of `down` is last.
    z: Vec<Option<Tensor>>,
}

impl Saved for GatedMlpSaved {
    fn num_bytes(&self) -> usize {
        [&self.gate, &self.up].into_iter().chain(self.z.iter().flatten()).map(num_bytes).sum()
    }
}

impl GatedMlp {
    pub(in crate::models) fn new(spec: &GatedMlpSpec, slots: &GatedMlpSlots, tensors: &Tensors) -> Result<Self> {
        Ok(Self {
            inner: spec.inner,
            activation: spec.activation,
            inputs: slots.inputs.iter().map(|slot| tensors.linear(*slot)).collect::<Result<_>>()?,
            down: tensors.linear(slots.down)?,
        })
    }

    pub(in crate::models) fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        self.inputs.iter().chain([&self.down])
    }

    /// Gate and up of the normed input; what the backward passes of the layers can use is appended to `z`.
    fn gate_and_up(&self, x: &Tensor, context: Context, z: &mut Vec<Option<Tensor>>) -> Result<(Tensor, Tensor)> {
        let mut linear = |layer: &LinearLayer| {
            z.push(None);
            let last = z.len() - 1;
            layer.forward(x, None, context, &mut z[last])
        };
        if let [gate, up] = self.inputs.as_slice() {
            return Ok((linear(gate)?, linear(up)?));
        }
        let both = linear(self.inputs.first().ok_or_else(missing)?)?;
        let part = |start| Ok::<_, crate::Error>(both.narrow(1, start, self.inner)?.contiguous()?);
        Ok((part(0)?, part(self.inner)?))
    }

    /// Gate and up in the type they are saved in.
    fn rounded(&self, gate: Tensor, up: Tensor) -> Result<(Tensor, Tensor)> {
        let weights = self.down.linear.weight.dtype();
        Ok((kept(gate, weights)?, kept(up, weights)?))
    }

    /// Whether the launches of `ops::fused` run this part for `x`.
    pub(in crate::models) fn is_fused(&self, x: &Tensor, context: Context) -> bool {
        let is_training = context.dropout_seed.is_some();
        x.device().is_metal()
            && !context.terms.is_mixed()
            && self.inputs.len() == 2
            && self.activation == Activation::Silu
            && self.linears().all(|layer| layer.layer(context).is_plain(x.dtype(), false, is_training))
    }

    fn layers<'a>(&'a self, context: Context<'a>) -> Result<[Layer<'a>; 2]> {
        let layers: Vec<Layer> = self.inputs.iter().map(|layer| layer.layer(context)).collect();
        layers.try_into().map_err(|_| missing())
    }

    fn fused_forward<'a>(
        &'a self,
        input: &Input,
        context: Context<'a>,
        is_last_skipped: bool,
    ) -> Result<(Option<Output<'a>>, GatedMlpSaved)> {
        let layers = self.layers(context)?;
        let made = fused::products(&input.get()?, &layers, true)?;
        let activation = fused::finish_mlp(&layers, &made)?;
        let mut z = made.z;
        let [gate, up]: [Tensor; 2] = made.y.try_into().map_err(|_| missing())?;
        let layer = self.down.layer(context);
        let mut made = fused::products(&activation, &[layer], !is_last_skipped)?;
        let z_down = made.z.pop().flatten();
        z.push(z_down.clone());
        let output = made.y.pop().map(|y| Output { y, pending: Some(Pending { layer, z: z_down }) });
        Ok((output, GatedMlpSaved { gate, up, z }))
    }

    fn fused_backward<'a>(
        &'a self,
        input: &Input,
        saved: GatedMlpSaved,
        dy: &Tensor,
        carry: &Tensor,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Tensor> {
        let GatedMlpSaved { gate, up, mut z } = saved;
        let (down, norm) = (self.down.layer(pass.context), input.norm.ok_or_else(missing)?);
        let (d_activation, mut dz_down) = fused::products_backward(&[down], &[dy], true)?;
        let dz_down = dz_down.pop().flatten();
        let d_activation = d_activation.ok_or_else(missing)?;
        let (d_gate, d_up, activation) =
            fused::finish_mlp_backward((&gate, &up), d_activation, down, dz_down.as_ref())?;
        drop((gate, up));
        let layers = self.layers(pass.context)?;
        let (d_normed, dz) = fused::products_backward(&layers, &[&d_gate, &d_up], true)?;
        let d_normed = d_normed.ok_or_else(missing)?;
        let (dx, normed) = fused::finish_norm_backward(&norm.norm, input.stream, d_normed, carry, &layers, &dz)?;
        let z_down = z.pop().flatten();
        let of_inputs = self.inputs.iter().zip(layers).zip([d_gate, d_up]).zip(z.into_iter().zip(dz));
        pass.factors.extend(of_inputs.map(|(((layer, fused), dy), (z, dz))| Factors {
            number: layer.slot.id,
            layer: fused,
            x: normed.clone(),
            dy,
            z,
            dz,
        }));
        let number = self.down.slot.id;
        pass.factors.push(Factors { number, layer: down, x: activation, dy: dy.clone(), z: z_down, dz: dz_down });
        Ok(dx)
    }
}

impl Part for GatedMlp {
    type Saved = GatedMlpSaved;

    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        _: Option<&mut KVCache>,
    ) -> Result<Output<'a>> {
        if residual.is_some() && self.is_fused(input.stream, context) {
            return self.fused_forward(input, context, false)?.0.ok_or_else(missing);
        }
        let x = input.get()?;
        let (gate, up) = self.gate_and_up(&x, context, &mut Vec::new())?;
        drop(x);
        let activation = activation::gated(self.activation, &gate, &up)?;
        Ok(self.down.forward(&activation, residual, context, &mut None)?.into())
    }

    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        is_last_skipped: bool,
    ) -> Result<(Option<Output<'a>>, GatedMlpSaved)> {
        if residual.is_some() && self.is_fused(input.stream, context) {
            return self.fused_forward(input, context, is_last_skipped);
        }
        let mut z = Vec::with_capacity(self.inputs.len() + 1);
        let x = input.get()?;
        let (gate, up) = self.gate_and_up(&x, context, &mut z)?;
        drop(x);
        let (mut output, mut z_down) = (None, None);
        if !is_last_skipped {
            let activation = activation::gated(self.activation, &gate, &up)?;
            output = Some(self.down.forward(&activation, residual, context, &mut z_down)?.into());
        }
        z.push(z_down);
        let (gate, up) = self.rounded(gate, up)?;
        Ok((output, GatedMlpSaved { gate, up, z }))
    }

    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: GatedMlpSaved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        let is_frozen =
            self.linears().all(|layer| !pass.trained[layer.slot.weight] && !pass.is_trained(layer.slot.bias))
                && !input.norm.is_some_and(|norm| norm.is_trained(pass.trained));
        if pass.room.is_some()
            && needs_input
            && is_frozen
            && input.norm.is_some_and(|norm| norm.norm.is_plain_rms(input.stream.dtype()))
            && self.is_fused(input.stream, pass.context)
        {
            return self.fused_backward(input, saved, dy, &carry, pass).map(Some);
        }
        let GatedMlpSaved { gate, up, z } = saved;
        let z = |index: usize| z.get(index).and_then(Option::as_ref);
        // inputs are recomputed only where a gradient needs them
        let needs_activation = self.down.needs_input(pass);
        let activation = needs_activation.then(|| activation::gated(self.activation, &gate, &up)).transpose()?;
        let d_activation = self.down.backward(activation.as_ref(), dy, (None, true), z(self.inputs.len()), pass)?;
        drop(activation);
        let (d_gate, d_up) =
            activation::gated_backward(self.activation, &gate, &up, d_activation.ok_or_else(missing)?)?;
        drop((gate, up));
        let needs_normed = self.inputs.iter().any(|layer| layer.needs_input(pass));
        let normed = needs_normed.then(|| input.get()).transpose()?;
        let mut d_normed = None;
        let dys = if self.inputs.len() == 2 { vec![d_gate, d_up] } else { vec![Tensor::cat(&[d_gate, d_up], 1)?] };
        for (index, (layer, dy)) in self.inputs.iter().zip(dys).enumerate() {
            d_normed = layer.backward(normed.as_ref(), &dy, (d_normed, needs_input), z(index), pass)?;
        }
        drop(normed);
        if !needs_input {
            return Ok(None);
        }
        input.backward(&d_normed.ok_or_else(missing)?, carry, pass).map(Some)
    }

    fn forward_memory(&self, size: StepSize, is_saving: bool, is_last_skipped: bool, meter: &mut Meter) {
        let inner = size.activations(self.inner);
        let copies = Extras::of(self.linears(), size).copies;
        meter.take(size.stream);
        meter.take(2 * inner);
        if self.inputs.len() == 1 {
            meter.touch(2 * inner);
        }
        meter.touch(copies);
        meter.give(size.stream);
        if !is_last_skipped {
            meter.take(inner);
            meter.touch(copies);
            meter.take(size.stream);
            meter.give(inner);
        }
        if is_saving {
            self.round(size, meter);
        } else {
            meter.give(2 * inner);
        }
    }

    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut Meter) -> usize {
        let inner = size.activations(self.inner);
        let extras = Extras::of(self.linears(), size);
        let gathered = if size.is_gathered { inner + size.stream } else { 0 };
        let has_term = size.terms.is_some_and(|terms| terms.get(self.down.slot.id).is_some());
        let needs_activation = has_term || size.trained[self.down.slot.weight];
        let activation = if needs_activation && !size.is_gathered { inner } else { 0 };
        meter.take(gathered + activation + inner);
        meter.touch(extras.copies);
        meter.take(extras.gradients);
        meter.give(activation);
        // the gradient of gate takes the place of that of the activation
        meter.take(inner);
        meter.give(self.saved_memory(size));
        if self.inputs.len() == 1 {
            meter.touch(2 * inner);
        }
        meter.take(size.stream);
        if needs_input {
            meter.take(size.stream);
            meter.touch(extras.copies);
            meter.give(size.stream);
        }
        meter.give(2 * inner + size.stream);
        gathered
    }
}

/// The single-token step.
impl GatedMlp {
    /// Whether the kernels of a step run this part.
    pub(in crate::models) fn can_step(&self, dtype: DType) -> bool {
        self.inputs.len() == 2
            && self.activation == Activation::Silu
            && self.inner.is_multiple_of(8)
            && self.linears().all(|layer| fits(layer, dtype) && layer.linear.bias.is_none())
    }

    /// Adds the MLP to the stream.
    pub(in crate::models) fn step(&self, norm: &NormLayer, step: &Step, terms: Option<&LowRankTerms>) -> Result<()> {
        let [gate, up] = self.inputs.as_slice() else { return Err(missing()) };
        if step.shape.is_wide {
            let wide = step.wide()?;
            norm.norm.forward_into(&step.x, &wide.normed)?;
            step.multiply(gate, &wide.normed, (&wide.gate, 0.0), terms)?;
            step.multiply(up, &wide.normed, (&wide.up, 0.0), terms)?;
            activation::gated_into(self.activation, &wide.gate, &wide.up, &step.activation)?;
            return step.multiply(&self.down, &step.activation, (&step.x, 1.0), terms);
        }
        let [of_gate, of_up] = [gate, up].map(|layer| layer_args(layer, terms));
        let args = [
            Arg::In(&step.x),
            norm.norm.weight.as_ref().map_or(Arg::None, Arg::In),
            Arg::In(gate.linear.weight.dense()?),
            Arg::In(up.linear.weight.dense()?),
            of_gate.0,
            of_gate.1,
            of_up.0,
            of_up.1,
            Arg::Out(&step.activation),
        ];
        let words = [
            step.rows.into(),
            (norm.norm.eps as f32).into(),
            self.inner.into(),
            of_gate.2.into(),
            of_up.2.into(),
            of_gate.3.into(),
            of_up.3.into(),
        ];
        let groups = self.inner.div_ceil(step.threads.gated / 32) * step.chunks();
        gpu::launch(&step.kernel("decode_gated"), Grid::row(groups, step.threads.gated), &args, &words)?;
        step.add_linear(&self.down, &step.activation, terms)
    }
}

impl GatedMlp {
    /// Bytes that are saved for the backward pass beside the input.
    pub(in crate::models) fn saved_memory(&self, size: StepSize) -> usize {
        let inner = size.activations(self.inner);
        2 * if size.is_rounded { inner / DType::F32.size_in_bytes() * DType::BF16.size_in_bytes() } else { inner }
    }

    /// Gate and up are saved in a smaller type.
    fn round(&self, size: StepSize, meter: &mut Meter) {
        let (inner, saved) = (size.activations(self.inner), self.saved_memory(size) / 2);
        if saved < inner {
            for _ in 0..2 {
                meter.take(saved);
                meter.give(inner);
            }
        }
    }
}
