//! A decoder block, forward and backward.

use super::decoder::NUM_LINEARS;
use super::kv_cache::KVCache;
use super::step::Gradients;
use crate::error::{Error, Result};
use crate::ops::activation::{self, Activation};
use crate::ops::attention::{self, AttentionGradients, Saved, Spans};
use crate::ops::fused::TermRoom;
use crate::ops::linear::{Linear, LinearGradients, Wanted};
use crate::ops::norm::{Norm, NormWanted};
use crate::ops::rotary::Rotation;
use crate::ops::{LowRank, LowRankTerms, kept, num_bytes};
use crate::profile::{Kind, span};
use candle_core::Tensor;
use metal_candle_kernels::AttentionShape;

/// The place of each linear layer in a block; its number is `NUM_LINEARS * layer + place`.
pub(super) const MODULES: [&str; NUM_LINEARS] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
pub(super) const Q: usize = 0;
pub(super) const K: usize = 1;
pub(super) const V: usize = 2;
pub(super) const O: usize = 3;
pub(super) const GATE: usize = 4;
pub(super) const UP: usize = 5;
pub(super) const DOWN: usize = 6;

/// The weights of a block.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) layer: usize,
    pub(super) input_layernorm: Norm,
    pub(super) post_attention_layernorm: Norm,
    /// In the order of [`MODULES`].
    pub(super) linears: Vec<Linear>,
    pub(super) parameters: BlockParameters,
    pub(super) shape: AttentionShape,
}

/// What a block is given beside its input.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) rotation: &'a Rotation,
    pub(super) spans: &'a Spans,
    pub(super) terms: Option<&'a LowRankTerms>,
    /// In training, the seed of this step's dropout.
    pub(super) dropout_seed: Option<u64>,
}

/// What the backward pass of a block needs of its forward pass.
pub(super) struct BlockSaved {
    pub(super) x: Tensor,
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) attention: Saved,
    pub(super) middle: Tensor,
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    /// The product of the input of each layer with A of its term, where it was kept.
    pub(super) z: Vec<Option<Tensor>>,
}

impl BlockSaved {
    pub(super) fn num_bytes(&self) -> usize {
        let tensors = [&self.x, &self.q, &self.k, &self.v, &self.middle, &self.gate, &self.up];
        let tensors = tensors.into_iter().chain(self.z.iter().flatten());
        tensors.map(num_bytes).sum::<usize>() + self.attention.num_bytes()
    }
}

/// Where the weights of a block are among the model's parameters.
#[derive(Debug)]
pub(super) struct BlockParameters {
    /// Weight and bias of each linear layer, in the order of [`MODULES`].
    pub(super) linears: Vec<(usize, Option<usize>)>,
    pub(super) input_layernorm: usize,
    pub(super) post_attention_layernorm: usize,
}

impl BlockParameters {
    /// The places of all of them.
    pub(super) fn places(&self) -> impl Iterator<Item = usize> {
        let linears = self.linears.iter().flat_map(|&(weight, bias)| [Some(weight), bias]);
        let norms = [Some(self.input_layernorm), Some(self.post_attention_layernorm)];
        linears.chain(norms).flatten()
    }

    /// Whether one of the block's parameters is among the `wanted`.
    pub(super) fn any(&self, wanted: &[bool]) -> bool {
        self.places().any(|place| wanted[place])
    }
}

/// Which gradients of a block are wanted beside those of low-rank terms.
#[derive(Clone, Copy)]
pub(super) struct BlockWanted<'a> {
    pub(super) input: bool,
    /// For each parameter of the model.
    pub(super) parameters: &'a [bool],
    /// Where the gradients of terms go, if the device gathers them.
    pub(super) room: Option<&'a TermRoom>,
}

impl Block {
    pub(super) fn term<'a>(&self, context: Context<'a>, place: usize) -> Option<&'a LowRank> {
        context.terms.and_then(|terms| terms.get(NUM_LINEARS * self.layer + place))
    }

    fn seed(&self, context: Context, place: usize) -> Option<u64> {
        let number = (NUM_LINEARS * self.layer + place) as u64;
        context.dropout_seed.map(|seed| seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Linear layer `place`; what its backward pass can use is put into `z`.
    fn linear(
        &self,
        context: Context,
        place: usize,
        x: &Tensor,
        residual: Option<&Tensor>,
        z: &mut [Option<Tensor>],
    ) -> Result<Tensor> {
        let _span = span(MODULES[place], Kind::Group);
        let (term, seed) = (self.term(context, place), self.seed(context, place));
        let (y, kept) = self.linears[place].forward_keeping(x, term, seed, residual)?;
        z[place] = kept;
        Ok(y)
    }

    /// Normed input, and q and k (rotated) and v from it.
    fn projections(&self, x: &Tensor, context: Context, z: &mut [Option<Tensor>]) -> Result<(Tensor, Tensor, Tensor)> {
        let x = self.input_layernorm.forward(x)?;
        let (q, k) = (self.linear(context, Q, &x, None, z)?, self.linear(context, K, &x, None, z)?);
        let (q, k) = context.rotation.apply_to_both(q, k, self.shape.head_dim, false)?;
        Ok((q, k, self.linear(context, V, &x, None, z)?))
    }

    /// The residual stream after attention, `x + o_proj(attention)`.
    fn after_attention(
        &self,
        x: &Tensor,
        attention: &Tensor,
        context: Context,
        z: &mut [Option<Tensor>],
    ) -> Result<Tensor> {
        self.linear(context, O, attention, Some(x), z)
    }

    /// The gate and up projections of the normed stream.
    fn gate_and_up(&self, middle: &Tensor, context: Context, z: &mut [Option<Tensor>]) -> Result<(Tensor, Tensor)> {
        let x = self.post_attention_layernorm.forward(middle)?;
        Ok((self.linear(context, GATE, &x, None, z)?, self.linear(context, UP, &x, None, z)?))
    }

    fn after_mlp(
        &self,
        middle: &Tensor,
        activation: &Tensor,
        context: Context,
        z: &mut [Option<Tensor>],
    ) -> Result<Tensor> {
        self.linear(context, DOWN, activation, Some(middle), z)
    }

    /// The block's output for new tokens whose keys and values are added to the cache, if there is one.
    pub(super) fn forward(&self, x: &Tensor, context: Context, cache: Option<&mut KVCache>) -> Result<Tensor> {
        if self.is_fused(x, context) {
            return self.fused_forward(x, context, cache, false)?.0.ok_or_else(missing);
        }
        let z = &mut [const { None }; NUM_LINEARS];
        let (q, k, v) = self.projections(x, context, z)?;
        let attention = match cache {
            Some(cache) => {
                cache.append(self.layer, &k, &v, context.spans)?;
                attention::with_cache(self.shape, None, &q, cache.layer(self.layer), context.spans)?
            }
            None => attention::forward(self.shape, None, &q, &k, &v, context.spans)?.out,
        };
        drop((q, k, v));
        let middle = self.after_attention(x, &attention, context, z)?;
        drop(attention);
        let (gate, up) = self.gate_and_up(&middle, context, z)?;
        self.after_mlp(&middle, &activation::gated(Activation::Silu, &gate, &up)?, context, z)
    }

    /// As [`Block::forward`], keeping what the backward pass needs.
    pub(super) fn forward_saving(&self, x: &Tensor, context: Context) -> Result<(Tensor, BlockSaved)> {
        if self.is_fused(x, context) {
            let (y, saved) = self.fused_forward(x, context, None, false)?;
            return Ok((y.ok_or_else(missing)?, saved));
        }
        let mut saved = self.until_activation(x, context)?;
        let activation = activation::gated(Activation::Silu, &saved.gate, &saved.up)?;
        let y = self.after_mlp(&saved.middle, &activation, context, &mut saved.z)?;
        Ok((y, self.rounded(saved)?))
    }

    /// What [`Block::forward_saving`] keeps, from the block's input; its output is not computed.
    pub(super) fn saved_again(&self, x: &Tensor, context: Context) -> Result<BlockSaved> {
        if self.is_fused(x, context) {
            return Ok(self.fused_forward(x, context, None, true)?.1);
        }
        self.rounded(self.until_activation(x, context)?)
    }

    fn until_activation(&self, x: &Tensor, context: Context) -> Result<BlockSaved> {
        let mut z = vec![None; NUM_LINEARS];
        let (q, k, v) = self.projections(x, context, &mut z)?;
        let attention = attention::forward(self.shape, None, &q, &k, &v, context.spans)?;
        let middle = self.after_attention(x, &attention.out, context, &mut z)?;
        let (gate, up) = self.gate_and_up(&middle, context, &mut z)?;
        Ok(BlockSaved { x: x.clone(), q, k, v, attention, middle, gate, up, z })
    }

    /// Gate and up in the type they are kept in.
    fn rounded(&self, saved: BlockSaved) -> Result<BlockSaved> {
        let weights = self.linears[GATE].weight.dtype();
        Ok(BlockSaved { gate: kept(saved.gate, weights)?, up: kept(saved.up, weights)?, ..saved })
    }

    /// The gradient with respect to the block's input, if wanted, from that of its output.
    pub(super) fn backward(
        &self,
        saved: BlockSaved,
        context: Context,
        dy: Tensor,
        wanted: BlockWanted,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        if self.is_fused(&saved.x, context) && wanted.room.is_some() && !self.parameters.any(wanted.parameters) {
            return self.fused_backward(saved, context, &dy, wanted, gradients);
        }
        let BlockSaved { x, q, k, v, attention, middle, gate, up, z } = saved;

        // inputs are computed anew only where a gradient needs them
        let needed = |places: &[usize]| places.iter().any(|&place| self.needs_input(place, context, wanted));
        let activation = needed(&[DOWN]).then(|| activation::gated(Activation::Silu, &gate, &up)).transpose()?;
        let d_activation =
            self.through(DOWN, activation.as_ref(), context, &dy, wanted, None, z[DOWN].as_ref(), gradients)?;
        drop(activation);
        let (d_gate, d_up) = activation::gated_backward(Activation::Silu, &gate, &up, d_activation)?;
        drop((gate, up));
        let normed = needed(&[GATE, UP]).then(|| self.post_attention_layernorm.forward(&middle)).transpose()?;
        let d_normed =
            self.through(GATE, normed.as_ref(), context, &d_gate, wanted, None, z[GATE].as_ref(), gradients)?;
        drop(d_gate);
        let d_normed =
            self.through(UP, normed.as_ref(), context, &d_up, wanted, Some(d_normed), z[UP].as_ref(), gradients)?;
        drop((d_up, normed));
        let norm = self.parameters.post_attention_layernorm;
        let (d_middle, weight) =
            self.post_attention_layernorm.backward(&middle, &d_normed, Some(dy), weight_of(wanted.parameters[norm]))?;
        gradients.parameters[norm] = weight.weight;
        drop((middle, d_normed));

        let d_attention =
            self.through(O, Some(&attention.out), context, &d_middle, wanted, None, z[O].as_ref(), gradients)?;
        let AttentionGradients { q: dq, k: dk, v: dv, .. } =
            attention::backward(self.shape, None, (&q, &k, &v), &attention, context.spans, &d_attention)?;
        drop((q, k, v, attention, d_attention));
        let (dq, dk) = context.rotation.apply_to_both(dq, dk, self.shape.head_dim, true)?;
        let normed = needed(&[Q, K, V]).then(|| self.input_layernorm.forward(&x)).transpose()?;
        let norm = self.parameters.input_layernorm;
        if !wanted.input && !wanted.parameters[norm] {
            for (place, dy) in [(Q, dq), (K, dk), (V, dv)] {
                self.weights_only(place, normed.as_ref(), context, &dy, wanted, z[place].as_ref(), gradients)?;
            }
            return Ok(None);
        }
        let d_normed = self.through(Q, normed.as_ref(), context, &dq, wanted, None, z[Q].as_ref(), gradients)?;
        let d_normed =
            self.through(K, normed.as_ref(), context, &dk, wanted, Some(d_normed), z[K].as_ref(), gradients)?;
        let d_normed =
            self.through(V, normed.as_ref(), context, &dv, wanted, Some(d_normed), z[V].as_ref(), gradients)?;
        drop((dq, dk, dv, normed));
        let (dx, weight) =
            self.input_layernorm.backward(&x, &d_normed, Some(d_middle), weight_of(wanted.parameters[norm]))?;
        gradients.parameters[norm] = weight.weight;
        Ok(Some(dx))
    }

    /// Backward through linear layer `place`: keeps the gradients of its weights and returns that of its input, added to `dx`.
    #[allow(clippy::too_many_arguments)]
    fn through(
        &self,
        place: usize,
        x: Option<&Tensor>,
        context: Context,
        dy: &Tensor,
        wanted: BlockWanted,
        dx: Option<Tensor>,
        z: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let _span = span(MODULES[place], Kind::Group);
        let (term, seed) = (self.term(context, place), self.seed(context, place));
        let of_linear = self.linears[place].backward(x, term, seed, dy, self.wanted(place, true, wanted), dx, z)?;
        let input = of_linear.input.clone();
        self.keep(place, of_linear, gradients);
        input.ok_or_else(missing)
    }

    /// As [`Block::through`] where no gradient of the input is wanted.
    #[allow(clippy::too_many_arguments)]
    fn weights_only(
        &self,
        place: usize,
        x: Option<&Tensor>,
        context: Context,
        dy: &Tensor,
        wanted: BlockWanted,
        z: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let _span = span(MODULES[place], Kind::Group);
        let (term, seed) = (self.term(context, place), self.seed(context, place));
        let of_linear = self.linears[place].backward(x, term, seed, dy, self.wanted(place, false, wanted), None, z)?;
        self.keep(place, of_linear, gradients);
        Ok(())
    }

    /// Whether the backward pass of linear layer `place` reads the layer's input.
    fn needs_input(&self, place: usize, context: Context, wanted: BlockWanted) -> bool {
        self.term(context, place).is_some() || wanted.parameters[self.parameters.linears[place].0]
    }

    fn wanted(&self, place: usize, input: bool, wanted: BlockWanted) -> Wanted {
        let (weight, bias) = self.parameters.linears[place];
        Wanted { input, weight: wanted.parameters[weight], bias: bias.is_some_and(|bias| wanted.parameters[bias]) }
    }

    fn keep(&self, place: usize, of_linear: LinearGradients, gradients: &mut Gradients) {
        let (weight, bias) = self.parameters.linears[place];
        gradients.terms[NUM_LINEARS * self.layer + place] = of_linear.term;
        gradients.parameters[weight] = of_linear.weight;
        if let Some(bias) = bias {
            gradients.parameters[bias] = of_linear.bias;
        }
    }
}

fn weight_of(weight: bool) -> NormWanted {
    NormWanted { weight, bias: false }
}

/// What a launch should have made is not there.
pub(super) fn missing() -> Error {
    Error::Device("something that was asked for was not computed".into())
}
