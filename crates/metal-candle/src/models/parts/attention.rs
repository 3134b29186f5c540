//! The attention part of a layer: projections, norms of q and k, rotation and attention with grouped key/value heads.

mod step;

use super::super::description::{AttentionSpec, QkNormExtent, QkNormSpec};
use super::super::kv_cache::KVCache;
use super::super::registry::{LinearSlot, NormSlot, Registry, Role};
use super::super::tensors::Tensors;
use super::input::{Input, Output, Pending};
use super::linear::{ExtraMemory, LinearLayer, are_frozen, are_fused, fused_layers};
use super::norm::NormLayer;
use super::pass::{Backward, Context, MemoryMeter, StepSize, missing};
use super::sublayer::{Part, Saved};
use crate::error::Result;
use crate::ops::attention::{self, AttentionGradients};
use crate::ops::fused::{self, Layer};
use crate::ops::num_bytes;
use crate::ops::rotary::{Pairs, RotarySpec, scale_rows};
use candle_core::{DType, Tensor};
use metal_candle_kernels::AttentionShape;

const FOLDER: &str = "self_attn";

/// The registered tensors of an attention part.
#[derive(Debug)]
pub(in crate::models) struct AttentionSlots {
    /// q, k and v, or their fused layer.
    inputs: Vec<LinearSlot>,
    output: LinearSlot,
    qk_norm: Option<[NormSlot; 2]>,
    sinks: Option<usize>,
}

impl AttentionSlots {
    pub(in crate::models) fn new(spec: &AttentionSpec, registry: &mut Registry, hidden: usize) -> Self {
        let [queries, keys, values] = spec.widths();
        let inputs = if spec.is_fused {
            vec![registry.linear(FOLDER, "qkv_proj", [hidden, queries + keys + values], spec.has_bias)]
        } else {
            let layers = [("q_proj", queries), ("k_proj", keys), ("v_proj", values)];
            layers.map(|(name, width)| registry.linear(FOLDER, name, [hidden, width], spec.has_bias)).into()
        };
        let output = registry.linear(FOLDER, "o_proj", [queries, hidden], spec.has_output_bias);
        let qk_norm = spec.qk_norm.map(|norm| {
            let mut register = |name: &str, heads: usize| {
                let (width, shape) = norm.extent.sizes(heads, spec.head_dim);
                registry.norm(&format!("{FOLDER}.{name}"), norm.norm, width, &shape)
            };
            [register(norm.names[0], spec.heads), register(norm.names[1], spec.kv_heads)]
        });
        let sinks =
            spec.has_sinks.then(|| registry.parameter(&format!("{FOLDER}.sinks"), vec![spec.heads], Role::Bias));
        Self { inputs, output, qk_norm, sinks }
    }
}

impl AttentionSpec {
    /// The widths of q, k and v.
    fn widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads.saturating_mul(self.head_dim))
    }

    /// The arguments of the attention kernels.
    pub(in crate::models) fn shape(&self) -> AttentionShape {
        let Self { heads, kv_heads, head_dim, scale, mask, soft_cap, .. } = *self;
        AttentionShape { heads, kv_heads, head_dim, scale, mask, soft_cap }
    }
}

impl QkNormExtent {
    /// The number of elements that are normalized together, and the shape of the weight.
    fn sizes(self, heads: usize, head_dim: usize) -> (usize, Vec<usize>) {
        match self {
            Self::Head => (head_dim, vec![head_dim]),
            Self::OwnHead => (head_dim, vec![heads, head_dim]),
            Self::Width => (heads.saturating_mul(head_dim), vec![heads.saturating_mul(head_dim)]),
        }
    }
}

/// The attention part of a layer.
#[derive(Debug)]
pub(in crate::models) struct Attention {
    pub(in crate::models) layer: usize,
    pub(in crate::models) spec: AttentionSpec,
    pub(in crate::models) shape: AttentionShape,
    /// q, k and v, or their fused layer.
    pub(in crate::models) inputs: Vec<LinearLayer>,
    pub(in crate::models) output: LinearLayer,
    pub(in crate::models) qk_norm: Option<([NormLayer; 2], QkNormSpec)>,
    sinks: Option<(usize, Tensor)>,
    /// Whether `ops::fused` supports the weights.
    can_fuse: bool,
    /// The index of the rotary table, which elements it pairs, and how many elements of a head it rotates.
    rotary: Option<(usize, Pairs, usize)>,
}

/// The tensors of the forward pass that the backward pass reads.
pub(in crate::models) struct AttentionSaved {
    /// q and k after norms and rotation.
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// q and k before their norms; without norms, q and k after clipping and before rotation.
    raw: Option<[Tensor; 2]>,
    attention: attention::Saved,
    /// Whether the forward pass used `ops::fused`.
    is_fused: bool,
    /// The product of each layer's input with A of its low-rank update, if it was saved. The output projection is last.
    z: Vec<Option<Tensor>>,
}

impl Saved for AttentionSaved {
    fn num_bytes(&self) -> usize {
        let tensors = [&self.q, &self.k, &self.v].into_iter().chain(self.raw.iter().flatten());
        tensors.chain(self.z.iter().flatten()).map(num_bytes).sum::<usize>() + self.attention.num_bytes()
    }
}

/// The result of the projections.
struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw: Option<[Tensor; 2]>,
}

impl Attention {
    pub(in crate::models) fn new(
        layer: usize,
        spec: &AttentionSpec,
        slots: &AttentionSlots,
        rotary: &[RotarySpec],
        tensors: &Tensors,
    ) -> Result<Self> {
        let table = spec.rotary.and_then(|index| Some((index, rotary.get(index)?)));
        let qk_norm = match (&slots.qk_norm, spec.qk_norm) {
            (Some([q, k]), Some(norm)) => Some(([tensors.norm(*q)?, tensors.norm(*k)?], norm)),
            _ => None,
        };
        let inputs = slots.inputs.iter().map(|slot| tensors.linear(*slot)).collect::<Result<Vec<_>>>()?;
        let output = tensors.linear(slots.output)?;
        let dtype = output.linear.weight.dtype();
        let can_fuse = inputs.len() == 3
            && inputs.iter().all(|layer| fused::supports(&layer.linear, true, dtype))
            && fused::supports(&output.linear, false, dtype);
        Ok(Self {
            layer,
            spec: spec.clone(),
            shape: spec.shape(),
            inputs,
            output,
            can_fuse,
            qk_norm,
            sinks: slots.sinks.map(|index| Ok::<_, crate::Error>((index, tensors.small(index)?))).transpose()?,
            rotary: table.map(|(index, table)| (index, table.pairs, 2 * table.num_pairs())),
        })
    }

    fn sinks(&self) -> Option<&Tensor> {
        self.sinks.as_ref().map(|(_, sinks)| sinks)
    }

    /// Computes q, k and v from the normed input. Appends what the backward passes of the layers can reuse to `z`.
    fn projections(&self, x: &Tensor, context: Context, z: &mut Vec<Option<Tensor>>) -> Result<Projected> {
        let mut linear = |layer: &LinearLayer| layer.forward_saving(x, context, z);
        if let [q, k, v] = self.inputs.as_slice() {
            let (q, k) = (linear(q)?, linear(k)?);
            let (q, k, raw) = self.positioned(q, k, context)?;
            return Ok(Projected { q, k, v: self.clipped(linear(v)?)?, raw });
        }
        let together = linear(self.inputs.first().ok_or_else(missing)?)?;
        let [queries, keys, values] = self.spec.widths();
        let part = |start, width| Ok::<_, crate::Error>(together.narrow(1, start, width)?.contiguous()?);
        let (q, k, v) = (part(0, queries)?, part(queries, keys)?, part(queries + keys, values)?);
        drop(together);
        let (q, k, raw) = self.positioned(q, k, context)?;
        Ok(Projected { q, k, v: self.clipped(v)?, raw })
    }

    /// `x` with its elements clamped to the maximum magnitude.
    fn clipped(&self, x: Tensor) -> Result<Tensor> {
        match self.spec.clip {
            Some(clip) => Ok(x.clamp(-clip, clip)?),
            None => Ok(x),
        }
    }

    /// The backward pass of [`Self::clipped`], given its result `x`: passes `dx` on where nothing was clamped.
    fn clipped_backward(&self, x: &Tensor, dx: Tensor) -> Result<Tensor> {
        match self.spec.clip {
            Some(clip) => Ok((x.abs()?.lt(f64::from(clip))?.to_dtype(dx.dtype())? * dx)?),
            None => Ok(dx),
        }
    }

    /// q and k after norms, rotation and scaling, and the tensors to save as `raw`.
    #[allow(clippy::type_complexity)]
    fn positioned(&self, q: Tensor, k: Tensor, context: Context) -> Result<(Tensor, Tensor, Option<[Tensor; 2]>)> {
        let Some(([q_norm, k_norm], spec)) = &self.qk_norm else {
            let (q, k) = (self.clipped(q)?, self.clipped(k)?);
            // q and k are rotated in place, and candle's `copy` shares the buffer on Metal
            let copies = || Ok::<_, crate::Error>([q.force_contiguous()?, k.force_contiguous()?]);
            let raw = self.spec.clip.map(|_| copies()).transpose()?;
            let (q, k) = self.rotated(q, k, context, false)?;
            return Ok((self.scaled(q, context)?, k, raw));
        };
        let (q, k) = if spec.is_after_rotary { self.rotated(q, k, context, false)? } else { (q, k) };
        let raw = [q, k];
        let (q, k) = (q_norm.forward(&raw[0])?, k_norm.forward(&raw[1])?);
        let (q, k) = if spec.is_after_rotary { (q, k) } else { self.rotated(q, k, context, false)? };
        Ok((self.scaled(q, context)?, k, Some(raw)))
    }

    fn rotated(&self, q: Tensor, k: Tensor, context: Context, is_inverse: bool) -> Result<(Tensor, Tensor)> {
        match self.spec.rotary {
            Some(table) => context.rotations[table].apply_to_both(q, k, self.spec.head_dim, is_inverse),
            None => Ok((q, k)),
        }
    }

    /// q times the factors of the token positions.
    fn scaled(&self, q: Tensor, context: Context) -> Result<Tensor> {
        let Some(scaling) = self.spec.query_scaling else { return Ok(q) };
        let factors: Vec<f32> = context.positions.iter().map(|&position| scaling.factor(position)).collect();
        let factors = Tensor::from_vec(factors, context.positions.len(), q.device())?;
        scale_rows(q, &factors)
    }

    /// The gradients with respect to the results of the projections, from those of q and k in attention.
    fn positioned_backward(
        &self,
        (dq, dk): (Tensor, Tensor),
        raw: Option<&[Tensor; 2]>,
        pass: &mut Backward,
    ) -> Result<(Tensor, Tensor)> {
        let dq = self.scaled(dq, pass.context)?;
        let (Some(([q_norm, k_norm], spec)), Some([q, k])) = (&self.qk_norm, raw) else {
            let (dq, dk) = self.rotated(dq, dk, pass.context, true)?;
            let Some([q, k]) = raw else { return Ok((dq, dk)) };
            return Ok((self.clipped_backward(q, dq)?, self.clipped_backward(k, dk)?));
        };
        let (dq, dk) = if spec.is_after_rotary { (dq, dk) } else { self.rotated(dq, dk, pass.context, true)? };
        let (dq, dk) = (q_norm.backward(q, &dq, None, pass)?, k_norm.backward(k, &dk, None, pass)?);
        if spec.is_after_rotary { self.rotated(dq, dk, pass.context, true) } else { Ok((dq, dk)) }
    }

    /// Self-attention of the batch, or attention over the cache after its keys and values have been added.
    fn attend(&self, projected: &Projected, context: Context, cache: Option<&mut KVCache>) -> Result<attention::Saved> {
        let Projected { q, k, v, .. } = projected;
        match cache {
            Some(cache) => {
                cache.append(self.layer, k, v, context.spans)?;
                Ok(cache.attend(self.layer, self.shape, self.sinks(), q, context.spans)?.into())
            }
            None => attention::forward(self.shape, self.sinks(), q, k, v, context.spans),
        }
    }

    /// Whether `ops::fused` runs this part for `x`.
    pub(in crate::models) fn is_fused(&self, x: &Tensor, context: Context) -> bool {
        self.can_fuse
            && context.spans.has_tables(self.shape)
            && are_fused(self.inputs.iter().chain([&self.output]), x, context)
    }

    /// The rotary table, if the launch after the products of q and k can apply it.
    fn fused_rotation(&self) -> Option<usize> {
        let is_whole = |(_, pairs, dim): &(usize, Pairs, usize)| *pairs == Pairs::Halves && *dim == self.spec.head_dim;
        let is_first = self.qk_norm.is_none() && self.spec.clip.is_none();
        self.rotary.filter(|rotary| is_first && is_whole(rotary)).map(|(table, _, _)| table)
    }

    fn fused_forward<'a>(
        &'a self,
        input: &Input,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<(Output<'a>, AttentionSaved)> {
        let normed = input.get()?;
        let layers = fused_layers(&self.inputs, context)?;
        let made = fused::products(&normed, &layers, true)?;
        drop(normed);
        let rotation = self.fused_rotation().map(|table| &context.rotations[table]);
        fused::finish_qkv(rotation, self.spec.head_dim, &layers, &made)?;
        let mut z = made.z;
        let [q, k, v] = to_array(made.y)?;
        let (q, k, raw) = match rotation {
            Some(_) => (self.scaled(q, context)?, k, None),
            None => self.positioned(q, k, context)?,
        };
        let projected = Projected { q, k, v: self.clipped(v)?, raw };
        let attention = self.attend(&projected, context, cache)?;
        let layer = self.output.layer(context);
        let mut made = fused::products(&attention.out, &[layer], true)?;
        let z_output = made.z.pop().flatten();
        z.push(z_output.clone());
        let output = Output { y: made.y.pop().ok_or_else(missing)?, pending: Some(Pending { layer, z: z_output }) };
        let Projected { q, k, v, raw } = projected;
        Ok((output, AttentionSaved { q, k, v, raw, attention, is_fused: true, z }))
    }

    fn fused_backward<'a>(
        &'a self,
        input: &Input,
        saved: AttentionSaved,
        dy: &Tensor,
        carry: &Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        let AttentionSaved { q, k, v, raw, attention, mut z, .. } = saved;
        let context = pass.context;
        let (output, norm) = (self.output.layer(context), input.norm.ok_or_else(missing)?);
        let (d_attention, mut dz_output) = fused::products_backward(&[output], &[dy], true)?;
        let dz_output = dz_output.pop().flatten();
        let d_attention = d_attention.ok_or_else(missing)?;
        let through = (output, dz_output.as_ref());
        let qkv = (&q, &k, &v);
        let AttentionGradients { q: dq, k: dk, v: dv, .. } = attention::backward_through(
            self.shape,
            self.sinks(),
            qkv,
            &attention,
            context.spans,
            &d_attention,
            through,
        )?;
        let dv = self.clipped_backward(&v, dv)?;
        drop((q, k, v, d_attention));
        let (dq, dk) = self.positioned_backward((dq, dk), raw.as_ref(), pass)?;
        drop(raw);
        let layers: [Layer; 3] = fused_layers(&self.inputs, context)?;
        let (d_normed, dz) = fused::products_backward(&layers, &[&dq, &dk, &dv], needs_input)?;
        let (dx, normed) = match d_normed {
            Some(d_normed) => {
                let (dx, normed) =
                    fused::finish_norm_backward(&norm.norm, input.stream, d_normed, carry, &layers, &dz)?;
                (Some(dx), normed)
            }
            None => (None, norm.forward(input.stream)?),
        };
        let z_output = z.pop().flatten();
        for ((layer, dy), of_layer) in self.inputs.iter().zip([&dq, &dk, &dv]).zip(z.into_iter().zip(dz)) {
            layer.gather((&normed, dy), of_layer, pass);
        }
        self.output.gather((&attention.out, dy), (z_output, dz_output), pass);
        Ok(dx)
    }
}

impl Part for Attention {
    type Saved = AttentionSaved;

    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<Output<'a>> {
        if residual.is_some() && self.is_fused(input.stream, context) {
            return Ok(self.fused_forward(input, context, cache)?.0);
        }
        let mut z = Vec::new();
        let x = input.get()?;
        let projected = self.projections(&x, context, &mut z)?;
        drop(x);
        let attention = self.attend(&projected, context, cache)?.out;
        drop(projected);
        Ok(self.output.forward(&attention, residual, context, &mut None)?.into())
    }

    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        _: bool,
    ) -> Result<(Option<Output<'a>>, AttentionSaved)> {
        if residual.is_some() && self.is_fused(input.stream, context) {
            let (output, saved) = self.fused_forward(input, context, None)?;
            return Ok((Some(output), saved));
        }
        let mut z = Vec::with_capacity(self.inputs.len() + 1);
        let x = input.get()?;
        let projected = self.projections(&x, context, &mut z)?;
        drop(x);
        let attention = self.attend(&projected, context, None)?;
        let mut z_output = None;
        let y = self.output.forward(&attention.out, residual, context, &mut z_output)?;
        z.push(z_output);
        let Projected { q, k, v, raw } = projected;
        Ok((Some(y.into()), AttentionSaved { q, k, v, raw, attention, is_fused: false, z }))
    }

    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: AttentionSaved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        let is_frozen = are_frozen(self.inputs.iter().chain([&self.output]), pass)
            && !input.norm.is_some_and(|norm| norm.is_trained(pass.trained))
            && !self.sinks.as_ref().is_some_and(|(index, _)| pass.trained[*index]);
        if pass.low_rank_buffer.is_some()
            && saved.is_fused
            && is_frozen
            && input.norm.is_some_and(|norm| norm.norm.is_plain_rms(input.stream.dtype()))
        {
            return self.fused_backward(input, saved, dy, &carry, needs_input, pass);
        }
        let AttentionSaved { q, k, v, raw, attention, z, .. } = saved;
        let z = |index: usize| z.get(index).and_then(Option::as_ref);
        let of_output = z(self.inputs.len());
        let d_attention = self.output.backward(Some(&attention.out), dy, (None, true), of_output, pass)?;
        let d_attention = d_attention.ok_or_else(missing)?;
        let found =
            attention::backward(self.shape, self.sinks(), (&q, &k, &v), &attention, pass.context.spans, &d_attention)?;
        let AttentionGradients { q: dq, k: dk, v: dv, sinks } = found;
        let dv = self.clipped_backward(&v, dv)?;
        drop((q, k, v, attention, d_attention));
        if let Some((index, _)) = &self.sinks {
            let sinks = sinks.filter(|_| pass.trained[*index]);
            pass.add(Some(*index), sinks)?;
        }
        let (dq, dk) = self.positioned_backward((dq, dk), raw.as_ref(), pass)?;
        drop(raw);

        // the input is recomputed only if a gradient needs it
        let needs_normed = self.inputs.iter().any(|layer| layer.needs_input(pass));
        let normed = needs_normed.then(|| input.get()).transpose()?;
        let dys = if self.inputs.len() == 3 { vec![dq, dk, dv] } else { vec![Tensor::cat(&[dq, dk, dv], 1)?] };
        let mut d_normed = None;
        for (index, (layer, dy)) in self.inputs.iter().zip(&dys).enumerate() {
            d_normed = layer.backward(normed.as_ref(), dy, (d_normed, needs_input), z(index), pass)?;
        }
        drop((dys, normed));
        if !needs_input {
            return Ok(None);
        }
        input.backward(&d_normed.ok_or_else(missing)?, carry, pass).map(Some)
    }

    fn forward_memory(&self, size: StepSize, is_saving: bool, _: bool, meter: &mut MemoryMeter) {
        let sizes = self.sizes(size);
        let Sizes { queries, keys, log_sums } = sizes;
        let copies = ExtraMemory::of(self.inputs.iter().chain([&self.output]), size).copies;
        meter.allocate(size.stream);
        meter.allocate_temporarily(copies);
        meter.allocate(queries + 2 * keys);
        if self.inputs.len() == 1 {
            meter.allocate_temporarily(queries + 2 * keys);
        }
        let raw = sizes.raw(self);
        meter.allocate(raw);
        meter.free(if is_saving { 0 } else { raw });
        meter.free(size.stream);
        meter.allocate(queries + log_sums);
        meter.free(if is_saving { 0 } else { queries + 2 * keys + log_sums });
        meter.allocate(size.stream);
        meter.allocate_temporarily(copies);
        meter.free(if is_saving { 0 } else { queries });
    }

    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) -> usize {
        let sizes = self.sizes(size);
        let Sizes { queries, keys, log_sums } = sizes;
        let extras = ExtraMemory::of(self.inputs.iter().chain([&self.output]), size);
        let norms = self.qk_norm.iter().flat_map(|(norms, _)| norms);
        let of_norms: usize = norms.map(|norm| norm.gradient_bytes(size)).sum();
        meter.allocate(extras.gradients + of_norms + size.gradient(self.sinks.as_ref().map(|(index, _)| *index)));
        meter.allocate(queries);
        meter.allocate_temporarily(extras.copies);
        // the gradients of q, k and v
        meter.allocate(queries + 2 * keys);
        meter.free(2 * queries + 2 * keys + log_sums + queries);
        if self.qk_norm.is_some() || self.spec.clip.is_some() {
            meter.allocate_temporarily(queries + keys);
            meter.free(sizes.raw(self));
        }
        if self.inputs.len() == 1 {
            meter.allocate_temporarily(queries + 2 * keys);
        }
        meter.allocate(size.stream);
        if needs_input {
            meter.allocate(size.stream);
            meter.allocate_temporarily(extras.copies);
            meter.free(size.stream);
        }
        meter.free(size.stream + queries + 2 * keys);
        let gathered = if size.is_gathered { size.stream } else { 0 };
        meter.allocate(gathered);
        gathered
    }
}

/// Sizes of tensors in a training step, in bytes.
struct Sizes {
    queries: usize,
    keys: usize,
    log_sums: usize,
}

impl Sizes {
    /// The size of q and k before norms or rotation, if they are saved, in bytes.
    fn raw(&self, attention: &Attention) -> usize {
        let is_saved = attention.qk_norm.is_some() || attention.spec.clip.is_some();
        if is_saved { self.queries + self.keys } else { 0 }
    }
}

impl Attention {
    fn sizes(&self, size: StepSize) -> Sizes {
        let [queries, keys, _] = self.spec.widths().map(|width| size.activations(width));
        Sizes { queries, keys, log_sums: size.tokens * self.spec.heads * DType::F32.size_in_bytes() }
    }

    /// Bytes saved for backward, besides the input.
    pub(in crate::models) fn saved_memory(&self, size: StepSize) -> usize {
        let sizes = self.sizes(size);
        2 * sizes.queries + 2 * sizes.keys + sizes.log_sums + sizes.raw(self)
    }
}

/// Converts the results of a launch to an array.
fn to_array<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| missing())
}
