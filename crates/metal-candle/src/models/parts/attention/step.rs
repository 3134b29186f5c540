//! The decode step of attention, on a device with kernels.

use super::super::linear::LinearLayer;
use super::super::norm::NormLayer;
use super::super::pass::missing;
use super::super::step::{Branch, Posts, Step, StepLinear, fits, is_rms_norm, norm_words};
use super::Attention;
use crate::error::Result;
use crate::models::description::{QkNormExtent, QkNormSpec};
use crate::models::kv_cache::KVCache;
use crate::ops::LowRankUpdates;
use crate::ops::gpu::{self, Arg, Grid, Word};
use crate::ops::rotary::Pairs;
use candle_core::{DType, Tensor};
use metal_candle_kernels::{AttentionShape, Mask};

impl Attention {
    /// Whether the decode kernels support this part.
    pub(in crate::models) fn can_step(&self, dtype: DType) -> bool {
        let has_bias = |layer: &LinearLayer| layer.linear.bias.is_some();
        let is_norm = |(norms, spec): &([NormLayer; 2], QkNormSpec)| {
            spec.extent != QkNormExtent::OwnHead && !spec.is_after_rotary && norms.iter().all(is_rms_norm)
        };
        let Self { spec, shape, inputs, output, .. } = self;
        inputs.iter().chain([output]).all(|layer| fits(layer, dtype))
            && inputs.iter().all(|layer| has_bias(layer) == has_bias(&inputs[0]))
            && !has_bias(output)
            && (output.in_features).is_multiple_of(8)
            && shape.head_dim.is_multiple_of(8)
            && shape.head_dim <= 256
            && (shape.mask == Mask::Causal || matches!(shape.mask, Mask::Window(size) if u32::try_from(size).is_ok()))
            && self.sinks.is_none()
            && self.qk_norm.as_ref().is_none_or(is_norm)
            && spec.clip.is_none()
    }

    /// Runs the part and adds its output to the stream. The keys and values of the tokens are written to the cache.
    pub(in crate::models) fn step(
        &self,
        branch: Branch,
        step: &Step,
        updates: Option<&LowRankUpdates>,
        cache: &KVCache,
    ) -> Result<()> {
        let layers = StepLinear::of_each(&self.inputs, self.spec.widths(), updates)?;
        if let Some(matmul) = &step.matmul {
            let x = step.normed(branch, matmul)?;
            step.multiply_together(&layers, x, [&step.q, &step.k, &step.v])?;
        } else {
            vector_projections(&layers, branch, step)?;
        }
        self.step_attention(&layers, step, cache.layer(self.layer))?;
        let output = StepLinear::of(&self.output, updates);
        step.finish_branch(&output, &step.attention, branch, step.posts(Posts::Output, None))
    }

    /// Applies biases, norms and rotation to q and k, and runs the attention of each row over its cache slot.
    fn step_attention(&self, layers: &[StepLinear; 3], step: &Step, (keys, values): (&Tensor, &Tensor)) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale, mask, soft_cap } = self.shape;
        let mut args = vec![Arg::In(&step.q), Arg::In(&step.k), Arg::In(&step.v)];
        args.extend(layers.iter().map(|layer| layer.bias.as_ref().map_or(Arg::None, Arg::In)));
        let norms = self.qk_norm.as_ref().map(|(norms, _)| norms);
        for index in 0..2 {
            let weight = norms.and_then(|norms| norms[index].norm.weight.as_ref());
            args.push(weight.map_or(Arg::None, Arg::In));
        }
        let table = self.rotary.map(|(table, _, _)| step.rotary.get(table).ok_or_else(missing)).transpose()?;
        args.extend(table.map_or([Arg::None, Arg::None], |(cosines, sines)| [Arg::In(cosines), Arg::In(sines)]));
        args.extend([Arg::In(&step.state), Arg::Out(keys), Arg::Out(values), Arg::Out(&step.attention)]);
        args.extend([&step.results, &step.counters, &step.posted].map(Arg::Out));
        let threads = step.threads.attention;
        let window = if let Mask::Window(window) = mask { window } else { 0 };
        let (pairs, is_adjacent) =
            self.rotary.map_or((0, false), |(_, pairs, dim)| (dim / 2, pairs == Pairs::Adjacent));
        let [_, offset, eps] = norm_words(norms.map(|norms| &norms[0]));
        let norm_kind = match &self.qk_norm {
            None => 0usize,
            Some((_, spec)) if spec.extent == QkNormExtent::Head => 1,
            Some(_) => 2,
        };
        let scaling = self.spec.query_scaling;
        let mut words: Vec<Word> = vec![
            step.rows.into(),
            heads.into(),
            kv_heads.into(),
            step.max_seq_len.into(),
            scale.into(),
            step.parts.into(),
            threads.min_keys().into(),
            window.into(),
            soft_cap.unwrap_or(0.0).into(),
            pairs.into(),
            is_adjacent.into(),
            layers[0].bias.is_some().into(),
            norm_kind.into(),
            eps,
            offset,
            scaling.map_or(0.0, |scaling| scaling.beta as f32).into(),
            scaling.map_or(0, |scaling| scaling.original_max_position_embeddings).into(),
        ];
        words.extend(step.cleared(Posts::Projections));
        debug_assert_eq!(head_dim, step.shape.heads[2]);
        let grid = Grid { groups: [heads / threads.heads, step.rows, step.parts], ..Grid::row(1, threads.count()) };
        gpu::launch(&step.shape.attention_kernel(threads), grid, &args, &words)
    }
}

/// Norm and projections in one launch of a matrix-vector kernel.
fn vector_projections(layers: &[StepLinear; 3], branch: Branch, step: &Step) -> Result<()> {
    let mut args = vec![Arg::In(&step.x), branch.weight()];
    for layer in layers {
        args.push(layer.weight()?);
    }
    args.extend(layers.iter().flat_map(StepLinear::update_args));
    args.extend([&step.q, &step.k, &step.v, &step.posted].map(Arg::Out));
    let [q, k, v] = layers.each_ref().map(|layer| layer.weight.dims()[0]);
    let ranks = layers.each_ref().map(StepLinear::rank);
    let mut words: Vec<Word> = vec![step.rows.into()];
    words.extend(norm_words(branch.before));
    words.extend([q, k].map(Word::from));
    words.extend(ranks.map(Word::from));
    words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
    words.extend(layers.iter().map(|layer| layer.weight.format_word()));
    words.extend(step.posts(Posts::Projections, Some(Posts::Down)));
    let warps = step.threads.projections / 32;
    let groups = ((q + k + v) / 2).div_ceil(warps) + Step::groups_of_a(&ranks, warps);
    let grid = Grid::row(groups * step.chunks(), step.threads.projections);
    gpu::launch(&step.kernel("decode_projections", &ranks), grid, &args, &words)
}
