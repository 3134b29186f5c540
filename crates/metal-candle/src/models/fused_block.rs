//! A decoder block on Metal, in as few launches as its products allow; their number does not depend on the terms.

use super::block::{Block, BlockSaved, BlockWanted, Context, DOWN, GATE, K, O, Q, UP, V, missing};
use super::decoder::NUM_LINEARS;
use super::kv_cache::KVCache;
use super::step::Gradients;
use crate::error::Result;
use crate::ops::attention::{self, AttentionGradients};
use crate::ops::fused::{self, Factors, Layer};
use candle_core::Tensor;

impl Block {
    /// Whether the block runs this way.
    pub(super) fn is_fused(&self, x: &Tensor, context: Context) -> bool {
        let dtype = x.dtype();
        let is_training = context.dropout_seed.is_some();
        x.device().is_metal()
            && context.spans.has_tables(self.shape)
            && context.rotation.is_of_whole_heads(self.shape.head_dim)
            && [&self.input_layernorm, &self.post_attention_layernorm].iter().all(|norm| norm.is_plain_rms(dtype))
            && (0..NUM_LINEARS).all(|place| self.layer(context, place).is_plain(dtype, place <= V, is_training))
    }

    fn layer<'a>(&'a self, context: Context<'a>, place: usize) -> Layer<'a> {
        Layer { linear: &self.linears[place], term: self.term(context, place) }
    }

    fn layers<'a, const N: usize>(&'a self, context: Context<'a>, places: [usize; N]) -> [Layer<'a>; N] {
        places.map(|place| self.layer(context, place))
    }

    /// The block's output, unless its last product `is_last_skipped`, and what the backward pass needs.
    pub(super) fn fused_forward(
        &self,
        x: &Tensor,
        context: Context,
        cache: Option<&mut KVCache>,
        is_last_skipped: bool,
    ) -> Result<(Option<Tensor>, BlockSaved)> {
        let normed = self.input_layernorm.forward(x)?;
        let layers = self.layers(context, [Q, K, V]);
        let made = fused::products(&normed, &layers, true)?;
        drop(normed);
        fused::finish_qkv(context.rotation, &layers, &made)?;
        let mut z = made.z;
        let [q, k, v] = all_of(made.y)?;
        let attention = match cache {
            Some(cache) => {
                cache.append(self.layer, &k, &v, context.spans)?;
                attention::with_cache(self.shape, None, &q, cache.layer(self.layer), context.spans)?.into()
            }
            None => attention::forward(self.shape, None, &q, &k, &v, context.spans)?,
        };

        let o = self.layer(context, O);
        let made = fused::products(&attention.out, &[o], true)?;
        let [y] = all_of(made.y)?;
        let norm = &self.post_attention_layernorm;
        let (middle, normed) = fused::finish_stream(x, y, o, made.z[0].as_ref(), Some(norm))?;
        z.extend(made.z);
        let layers = self.layers(context, [GATE, UP]);
        let made = fused::products(normed.as_ref().unwrap_or(&middle), &layers, true)?;
        drop(normed);
        let activation = fused::finish_mlp(&layers, &made)?;
        z.extend(made.z);
        let [gate, up] = all_of(made.y)?;

        let down = self.layer(context, DOWN);
        let mut made = fused::products(&activation, &[down], !is_last_skipped)?;
        let y = match made.y.pop() {
            Some(y) => Some(fused::finish_stream(&middle, y, down, made.z[0].as_ref(), None)?.0),
            None => None,
        };
        z.extend(made.z);
        Ok((y, BlockSaved { x: x.clone(), q, k, v, attention, middle, gate, up, z }))
    }

    /// As [`Block::backward`], for a block none of whose parameters is trained.
    pub(super) fn fused_backward(
        &self,
        saved: BlockSaved,
        context: Context,
        dy: &Tensor,
        wanted: BlockWanted,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let BlockSaved { x, q, k, v, attention, middle, gate, up, z } = saved;
        let down = self.layer(context, DOWN);
        let (d_activation, dz_down) = fused::products_backward(&[down], &[dy], true)?;
        let (d_gate, d_up, activation) =
            fused::finish_mlp_backward((&gate, &up), made(d_activation)?, down, dz_down[0].as_ref())?;
        drop((gate, up));
        let layers = self.layers(context, [GATE, UP]);
        let (d_normed, dz_mlp) = fused::products_backward(&layers, &[&d_gate, &d_up], true)?;
        let norm = &self.post_attention_layernorm;
        let (d_middle, normed_middle) =
            fused::finish_norm_backward(norm, &middle, made(d_normed)?, dy, &layers, &dz_mlp)?;
        drop(middle);

        let o = self.layer(context, O);
        let (d_attention, dz_o) = fused::products_backward(&[o], &[&d_middle], true)?;
        let through = (o, dz_o[0].as_ref());
        let d_attention = made(d_attention)?;
        let AttentionGradients { q: dq, k: dk, v: dv, .. } = attention::backward_through(
            self.shape,
            None,
            (&q, &k, &v),
            &attention,
            context.spans,
            &d_attention,
            through,
        )?;
        drop((q, k, v, d_attention));
        let (dq, dk) = context.rotation.apply_to_both(dq, dk, self.shape.head_dim, true)?;
        let layers = self.layers(context, [Q, K, V]);
        let (d_normed, dz_qkv) = fused::products_backward(&layers, &[&dq, &dk, &dv], wanted.input)?;
        let norm = &self.input_layernorm;
        let (dx, normed) = match d_normed {
            Some(d_normed) => {
                let (dx, normed) = fused::finish_norm_backward(norm, &x, d_normed, &d_middle, &layers, &dz_qkv)?;
                (Some(dx), normed)
            }
            None => (None, norm.forward(&x)?),
        };

        let inputs = [&normed, &normed, &normed, &attention.out, &normed_middle, &normed_middle, &activation];
        let dys = [&dq, &dk, &dv, &d_middle, &d_gate, &d_up, dy];
        let dzs = dz_qkv.iter().chain(&dz_o).chain(&dz_mlp).chain(&dz_down);
        let factors: Vec<Factors> = inputs
            .into_iter()
            .zip(dys)
            .zip(z.iter().zip(dzs))
            .enumerate()
            .map(|(place, ((x, dy), (z, dz)))| Factors {
                number: NUM_LINEARS * self.layer + place,
                layer: self.layer(context, place),
                x,
                dy,
                z: z.as_ref(),
                dz: dz.as_ref(),
            })
            .collect();
        for (number, of_term) in fused::term_gradients(&factors, wanted.room.ok_or_else(missing)?)? {
            gradients.terms[number] = Some(of_term);
        }
        Ok(dx)
    }
}

fn made(gradient: Option<Tensor>) -> Result<Tensor> {
    gradient.ok_or_else(missing)
}

/// The results of a launch, whose number is known.
fn all_of<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| missing())
}
