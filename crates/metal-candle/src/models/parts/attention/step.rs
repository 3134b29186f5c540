//! Attention in a single-token step on a device with kernels.

use super::super::linear::LinearLayer;
use super::super::norm::NormLayer;
use super::super::pass::missing;
use super::super::step::{Step, fits, layer_args};
use super::Attention;
use crate::error::Result;
use crate::models::kv_cache::KVCache;
use crate::ops::LowRankTerms;
use crate::ops::gpu::{self, Arg, Grid};
use candle_core::{DType, Tensor};
use metal_candle_kernels::{AttentionShape, Mask};

impl Attention {
    /// Whether the kernels of a step run this part.
    pub(in crate::models) fn can_step(&self, dtype: DType) -> bool {
        let [q, k, v] = self.inputs.as_slice() else { return false };
        let has_bias = |layer: &LinearLayer| layer.linear.bias.is_some();
        let Self { spec, shape, output, .. } = self;
        [q, k, v, output].iter().all(|layer| fits(layer, dtype))
            && has_bias(k) == has_bias(q)
            && has_bias(v) == has_bias(q)
            && !has_bias(output)
            && (output.in_features).is_multiple_of(8)
            && shape.head_dim.is_multiple_of(8)
            && shape.head_dim <= 128
            && shape.mask == Mask::Causal
            && shape.soft_cap.is_none()
            && self.sinks.is_none()
            && self.qk_norm.is_none()
            && spec.clip.is_none()
            && spec.query_scaling.is_none()
            && spec.rotary == Some(0)
            && self.is_whole_rotary
    }

    /// Adds attention to the stream; the keys and values of the tokens are written to the cache.
    pub(in crate::models) fn step(
        &self,
        norm: &NormLayer,
        step: &Step,
        terms: Option<&LowRankTerms>,
        cache: &KVCache,
    ) -> Result<()> {
        let cached = cache.layer(self.layer);
        if step.shape.is_wide {
            self.wide_projections(norm, step, terms, cached)?;
            self.step_attention(step, cached)?;
            return step.multiply(&self.output, &step.attention, (&step.x, 1.0), terms);
        }
        self.narrow_projections(norm, step, terms, cached)?;
        self.step_attention(step, cached)?;
        step.add_linear(&self.output, &step.attention, terms)
    }

    fn step_inputs(&self) -> Result<[&LinearLayer; 3]> {
        let [q, k, v] = self.inputs.as_slice() else { return Err(missing()) };
        Ok([q, k, v])
    }

    /// Norm, projections and rotation in one launch.
    fn narrow_projections(
        &self,
        norm: &NormLayer,
        step: &Step,
        terms: Option<&LowRankTerms>,
        (keys, values): (&Tensor, &Tensor),
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let layers = self.step_inputs()?;
        let [q, k, v] = layers.map(|layer| layer_args(layer, terms));
        let mut args = vec![Arg::In(&step.x), norm.norm.weight.as_ref().map_or(Arg::None, Arg::In)];
        for layer in layers {
            args.extend([Arg::In(layer.linear.weight.dense()?), layer.linear.bias.as_ref().map_or(Arg::None, Arg::In)]);
        }
        args.extend([q.0, q.1, k.0, k.1, v.0, v.1]);
        let (cosines, sines) = step.rotary.first().ok_or_else(missing)?;
        args.extend([Arg::In(cosines), Arg::In(sines), Arg::In(&step.state)]);
        args.extend([Arg::Out(&step.q), Arg::Out(keys), Arg::Out(values)]);
        let words = [
            step.rows.into(),
            (norm.norm.eps as f32).into(),
            heads.into(),
            kv_heads.into(),
            (head_dim / 2).into(),
            step.max_seq_len.into(),
            layers[0].linear.bias.is_some().into(),
            q.2.into(),
            k.2.into(),
            v.2.into(),
            q.3.into(),
            k.3.into(),
            v.3.into(),
        ];
        let groups = (heads + 2 * kv_heads) * (head_dim / 2) / (step.threads.projections / 32);
        let grid = Grid::row(groups * step.chunks(), step.threads.projections);
        gpu::launch(&step.kernel("decode_projections"), grid, &args, &words)
    }

    /// The same by products of matrices.
    fn wide_projections(
        &self,
        norm: &NormLayer,
        step: &Step,
        terms: Option<&LowRankTerms>,
        (keys, values): (&Tensor, &Tensor),
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (layers, wide) = (self.step_inputs()?, step.wide()?);
        norm.norm.forward_into(&step.x, &wide.normed)?;
        for (layer, y) in layers.into_iter().zip([&step.q, &wide.k, &wide.v]) {
            step.multiply(layer, &wide.normed, (y, 0.0), terms)?;
        }
        let (cosines, sines) = step.rotary.first().ok_or_else(missing)?;
        let mut args = vec![Arg::In(&wide.k), Arg::In(&wide.v)];
        args.extend(layers.map(|layer| layer.linear.bias.as_ref().map_or(Arg::None, Arg::In)));
        args.extend([Arg::In(cosines), Arg::In(sines), Arg::In(&step.state)]);
        args.extend([Arg::Out(&step.q), Arg::Out(keys), Arg::Out(values)]);
        let (half, has_bias) = (head_dim / 2, layers[0].linear.bias.is_some());
        let words = [step.rows, heads, kv_heads, half, step.max_seq_len, usize::from(has_bias)].map(Into::into);
        let grid = Grid::elements(step.rows * (heads + 2 * kv_heads) * half);
        gpu::launch(&step.kernel("decode_rotate"), grid, &args, &words)
    }

    /// Attention of each row over its slot of the cache.
    fn step_attention(&self, step: &Step, (keys, values): (&Tensor, &Tensor)) -> Result<()> {
        let AttentionShape { heads, kv_heads, scale, .. } = self.shape;
        let args = [Arg::In(&step.q), Arg::In(keys), Arg::In(values), Arg::In(&step.state), Arg::Out(&step.attention)];
        let words = [step.rows.into(), heads.into(), kv_heads.into(), step.max_seq_len.into(), scale.into()];
        let grid = Grid::plane((heads, step.rows), step.threads.attention);
        gpu::launch(&step.kernel("decode_attention"), grid, &args, &words)
    }
}
