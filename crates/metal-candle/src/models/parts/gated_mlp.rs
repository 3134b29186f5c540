//! The gated MLP part of a layer, `down(act(gate x) * up x)` (<https://arxiv.org/abs/2002.05202>).

use super::super::description::{GatedMlpSpec, GatedProjections};
use super::super::kv_cache::KVCache;
use super::super::registry::{LinearSlot, Registry};
use super::super::tensors::Tensors;
use super::input::{Input, Output, Pending};
use super::linear::{ExtraMemory, LinearLayer, are_frozen, are_fused, fused_layers};
use super::pass::{Backward, Context, MemoryMeter, StepSize, missing};
use super::step::{Branch, Posts, Step, StepLinear, fits, norm_words};
use super::sublayer::{Part, Saved};
use crate::error::Result;
use crate::ops::activation::{self, Activation};
use crate::ops::fused::{self, Layer, Products};
use crate::ops::gpu::{self, Arg, Grid, Word};
use crate::ops::{LowRankUpdates, num_bytes, saved_activation};
use candle_core::{DType, Tensor};

/// The registered tensors of a gated MLP.
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
    /// Whether `ops::fused` supports the weights.
    can_fuse: bool,
}

/// The tensors of the forward pass that the backward pass reads.
pub(in crate::models) struct GatedMlpSaved {
    gate: Tensor,
    up: Tensor,
    /// Whether the forward pass used `ops::fused`.
    is_fused: bool,
    /// The product of each layer's input with A of its low-rank update, if it was saved. `down` is last.
    z: Vec<Option<Tensor>>,
}

impl Saved for GatedMlpSaved {
    fn num_bytes(&self) -> usize {
        [&self.gate, &self.up].into_iter().chain(self.z.iter().flatten()).map(num_bytes).sum()
    }
}

impl GatedMlp {
    pub(in crate::models) fn new(spec: &GatedMlpSpec, slots: &GatedMlpSlots, tensors: &Tensors) -> Result<Self> {
        let inputs = slots.inputs.iter().map(|slot| tensors.linear(*slot)).collect::<Result<Vec<_>>>()?;
        let down = tensors.linear(slots.down)?;
        let dtype = down.linear.weight.dtype();
        let can_fuse = inputs.len() == 2
            && spec.activation == Activation::Silu
            && inputs.iter().chain([&down]).all(|layer| fused::supports(&layer.linear, false, dtype));
        Ok(Self { inner: spec.inner, activation: spec.activation, inputs, down, can_fuse })
    }

    pub(in crate::models) fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        self.inputs.iter().chain([&self.down])
    }

    /// Computes gate and up from the normed input. Appends what the backward passes of the layers can reuse to `z`.
    fn gate_and_up(&self, x: &Tensor, context: Context, z: &mut Vec<Option<Tensor>>) -> Result<(Tensor, Tensor)> {
        let mut linear = |layer: &LinearLayer| layer.forward_saving(x, context, z);
        if let [gate, up] = self.inputs.as_slice() {
            return Ok((linear(gate)?, linear(up)?));
        }
        let both = linear(self.inputs.first().ok_or_else(missing)?)?;
        let part = |start| Ok::<_, crate::Error>(both.narrow(1, start, self.inner)?.contiguous()?);
        Ok((part(0)?, part(self.inner)?))
    }

    /// Gate and up in the dtype in which they are saved.
    fn rounded(&self, gate: Tensor, up: Tensor) -> Result<(Tensor, Tensor)> {
        let weights = self.down.linear.weight.dtype();
        Ok((saved_activation(gate, weights)?, saved_activation(up, weights)?))
    }

    /// Whether `ops::fused` runs this part for `x`.
    pub(in crate::models) fn is_fused(&self, x: &Tensor, context: Context) -> bool {
        self.can_fuse && are_fused(self.linears(), x, context)
    }

    fn fused_forward<'a>(
        &'a self,
        input: &Input,
        context: Context<'a>,
        skips_output: bool,
    ) -> Result<(Option<Output<'a>>, GatedMlpSaved)> {
        let layers = fused_layers(&self.inputs, context)?;
        let made = fused::products(&input.get()?, &layers, true)?;
        let activation = fused::finish_mlp(&layers, &made)?;
        let mut z = made.z;
        let [gate, up]: [Tensor; 2] = made.y.try_into().map_err(|_| missing())?;
        let layer = self.down.layer(context);
        let mut made = fused::products(&activation, &[layer], !skips_output)?;
        let z_down = made.z.pop().flatten();
        z.push(z_down.clone());
        let output = made.y.pop().map(|y| Output { y, pending: Some(Pending { layer, z: z_down }) });
        Ok((output, GatedMlpSaved { gate, up, is_fused: true, z }))
    }

    fn fused_backward<'a>(
        &'a self,
        input: &Input,
        saved: GatedMlpSaved,
        dy: &Tensor,
        carry: &Tensor,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Tensor> {
        let GatedMlpSaved { gate, up, mut z, .. } = saved;
        let z_down = z.pop().flatten();
        let made = Products { y: vec![gate, up], z };
        let layers: [Layer; 2] = fused_layers(&self.inputs, pass.context)?;
        let (down, norm) = (self.down.layer(pass.context), input.norm.ok_or_else(missing)?);
        let (d_activation, mut dz_down) = fused::products_backward(&[down], &[dy], true)?;
        let dz_down = dz_down.pop().flatten();
        let d_activation = d_activation.ok_or_else(missing)?;
        let (d_gate, d_up, activation) =
            fused::finish_mlp_backward(&layers, &made, d_activation, down, dz_down.as_ref())?;
        let z = made.z;
        drop(made.y);
        let (d_normed, dz) = fused::products_backward(&layers, &[&d_gate, &d_up], true)?;
        let d_normed = d_normed.ok_or_else(missing)?;
        let (dx, normed) = fused::finish_norm_backward(&norm.norm, input.stream, d_normed, carry, &layers, &dz)?;
        for ((layer, dy), of_layer) in self.inputs.iter().zip([&d_gate, &d_up]).zip(z.into_iter().zip(dz)) {
            layer.gather((&normed, dy), of_layer, pass);
        }
        self.down.gather((&activation, dy), (z_down, dz_down), pass);
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
        skips_output: bool,
    ) -> Result<(Option<Output<'a>>, GatedMlpSaved)> {
        if residual.is_some() && self.is_fused(input.stream, context) {
            return self.fused_forward(input, context, skips_output);
        }
        let mut z = Vec::with_capacity(self.inputs.len() + 1);
        let x = input.get()?;
        let (gate, up) = self.gate_and_up(&x, context, &mut z)?;
        drop(x);
        let (mut output, mut z_down) = (None, None);
        if !skips_output {
            let activation = activation::gated(self.activation, &gate, &up)?;
            output = Some(self.down.forward(&activation, residual, context, &mut z_down)?.into());
        }
        z.push(z_down);
        let (gate, up) = self.rounded(gate, up)?;
        Ok((output, GatedMlpSaved { gate, up, is_fused: false, z }))
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
            are_frozen(self.linears(), pass) && !input.norm.is_some_and(|norm| norm.is_trained(pass.trained));
        if pass.low_rank_buffer.is_some()
            && saved.is_fused
            && needs_input
            && is_frozen
            && input.norm.is_some_and(|norm| norm.norm.is_plain_rms(input.stream.dtype()))
        {
            return self.fused_backward(input, saved, dy, &carry, pass).map(Some);
        }
        let GatedMlpSaved { gate, up, z, is_fused } = saved;
        if is_fused {
            fused::complete_mlp(&fused_layers(&self.inputs, pass.context)?, (&gate, &up), &z)?;
        }
        let z = |index: usize| z.get(index).and_then(Option::as_ref);
        // inputs are recomputed only if a gradient needs them
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

    fn forward_memory(&self, size: StepSize, is_saving: bool, skips_output: bool, meter: &mut MemoryMeter) {
        let inner = size.activations(self.inner);
        let copies = ExtraMemory::of(self.linears(), size).copies;
        meter.allocate(size.stream);
        meter.allocate(2 * inner);
        if self.inputs.len() == 1 {
            meter.allocate_temporarily(2 * inner);
        }
        meter.allocate_temporarily(copies);
        meter.free(size.stream);
        if !skips_output {
            meter.allocate(inner);
            meter.allocate_temporarily(copies);
            meter.allocate(size.stream);
            meter.free(inner);
        }
        if is_saving {
            self.round(size, meter);
        } else {
            meter.free(2 * inner);
        }
    }

    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) -> usize {
        let inner = size.activations(self.inner);
        let extras = ExtraMemory::of(self.linears(), size);
        let gathered = if size.is_gathered { inner + size.stream } else { 0 };
        let has_update = size.updates.is_some_and(|updates| updates.get(self.down.slot.id).is_some());
        let needs_activation = has_update || size.trained[self.down.slot.weight];
        let activation = if needs_activation && !size.is_gathered { inner } else { 0 };
        meter.allocate(gathered + activation + inner);
        meter.allocate_temporarily(extras.copies);
        meter.allocate(extras.gradients);
        meter.free(activation);
        // the gradient of gate overwrites that of the activation
        meter.allocate(inner);
        meter.free(self.saved_memory(size));
        if self.inputs.len() == 1 {
            meter.allocate_temporarily(2 * inner);
        }
        meter.allocate(size.stream);
        if needs_input {
            meter.allocate(size.stream);
            meter.allocate_temporarily(extras.copies);
            meter.free(size.stream);
        }
        meter.free(2 * inner + size.stream);
        gathered
    }
}

/// The decode step.
impl GatedMlp {
    /// Whether the decode kernels support this part.
    pub(in crate::models) fn can_step(&self, dtype: DType) -> bool {
        !matches!(self.activation, Activation::Clamped { .. })
            && self.inner.is_multiple_of(8)
            && self.linears().all(|layer| fits(layer, dtype) && layer.linear.bias.is_none())
    }

    /// Runs the MLP and adds its output to the stream.
    pub(in crate::models) fn step(&self, branch: Branch, step: &Step, updates: Option<&LowRankUpdates>) -> Result<()> {
        let layers = StepLinear::of_each(&self.inputs, [self.inner; 2], updates)?;
        if let Some(matmul) = &step.matmul {
            let x = step.normed(branch, matmul)?;
            step.multiply_together(&layers, x, [&matmul.gate, &matmul.up])?;
            activation::gated_into(self.activation, &matmul.gate, &matmul.up, &step.activation)?;
        } else {
            self.vector_activation(&layers, branch, step)?;
        }
        let down = StepLinear::of(&self.down, updates);
        step.finish_branch(&down, &step.activation, branch, step.posts(Posts::Down, Some(Posts::Gated)))
    }

    /// Norm, gate, up and activation in one launch of a matrix-vector kernel.
    fn vector_activation(&self, layers: &[StepLinear; 2], branch: Branch, step: &Step) -> Result<()> {
        let mut args = vec![Arg::In(&step.x), branch.weight()];
        for layer in layers {
            args.push(layer.weight()?);
        }
        args.extend(layers.iter().flat_map(StepLinear::update_args));
        args.extend([&step.activation, &step.posted].map(Arg::Out));
        let ranks = layers.each_ref().map(StepLinear::rank);
        let mut words: Vec<Word> = vec![step.rows.into()];
        words.extend(norm_words(branch.before));
        words.push(self.inner.into());
        words.extend(ranks.map(Word::from));
        words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
        words.extend(layers.iter().map(|layer| layer.weight.format_word()));
        words.extend(step.posts(Posts::Gated, Some(Posts::Output)));
        let warps = step.threads.gated / 32;
        let groups = self.inner.div_ceil(warps) + Step::groups_of_a(&ranks, warps);
        let grid = Grid::row(groups * step.chunks(), step.threads.gated);
        gpu::launch(&step.kernel("decode_gated", &ranks), grid, &args, &words)
    }
}

impl GatedMlp {
    /// Bytes saved for backward, besides the input.
    pub(in crate::models) fn saved_memory(&self, size: StepSize) -> usize {
        let inner = size.activations(self.inner);
        2 * if size.is_rounded { inner / DType::F32.size_in_bytes() * DType::BF16.size_in_bytes() } else { inner }
    }

    /// Counts the conversion of gate and up to the smaller type in which they are saved.
    fn round(&self, size: StepSize, meter: &mut MemoryMeter) {
        let (inner, saved) = (size.activations(self.inner), self.saved_memory(size) / 2);
        if saved < inner {
            for _ in 0..2 {
                meter.allocate(saved);
                meter.free(inner);
            }
        }
    }
}
