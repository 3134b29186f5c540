//! Runs one decoder layer, forward and backward: attention and a feed-forward part, each in a residual branch.

use super::gradients::Gradients;
use super::kv_cache::KVCache;
use super::parts::attention::{Attention, AttentionSaved};
use super::parts::feed_forward::{FeedForward, FeedForwardSaved};
use super::parts::input::Input;
use super::parts::pass::{Backward, Context, MemoryMeter, StepSize, missing};
use super::parts::step::{Branch, Step};
use super::parts::sublayer::{Sublayer, SublayerSaved};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::fused::{self, LowRankGradientBuffer};
use crate::ops::{LowRankUpdates, num_bytes};
use candle_core::{DType, Tensor};
use metal_candle_kernels::AttentionShape;
use std::ops::Range;

/// A decoder layer.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) layer: usize,
    pub(super) attention: Sublayer<Attention>,
    pub(super) feed_forward: Sublayer<FeedForward>,
    /// Whether both parts read the norm before attention and add their outputs to the same stream.
    pub(super) is_parallel: bool,
    /// The indices of its parameters.
    pub(super) parameters: Range<usize>,
}

/// The tensors of a block's forward pass that its backward pass reads.
pub(super) struct BlockSaved {
    x: Tensor,
    attention: SublayerSaved<AttentionSaved>,
    /// The stream between the parts; `None` if they are parallel.
    middle: Option<Tensor>,
    feed_forward: SublayerSaved<FeedForwardSaved>,
}

impl BlockSaved {
    pub(super) fn num_bytes(&self) -> usize {
        let streams = [Some(&self.x), self.middle.as_ref()];
        streams.into_iter().flatten().map(num_bytes).sum::<usize>()
            + self.attention.num_bytes()
            + self.feed_forward.num_bytes()
    }
}

/// The sizes that the decode kernels are compiled for. All blocks have the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeSizes {
    /// Query heads, key/value heads and the width of one.
    pub(super) heads: [usize; 3],
    pub(super) activation: Activation,
    /// The inner width of the MLPs.
    pub(super) inner: usize,
}

impl DecodeSizes {
    /// `None` if the decode kernels do not support a block, or if blocks differ.
    pub(super) fn new(blocks: &[Block], dtype: DType) -> Option<Self> {
        let mut kinds = blocks.iter().map(|block| {
            let FeedForward::Gated(mlp) = &block.feed_forward.part else { return None };
            let AttentionShape { heads, kv_heads, head_dim, .. } = block.attention.part.shape;
            block.can_step(dtype).then_some(([heads, kv_heads, head_dim], mlp.activation, mlp.inner))
        });
        let first @ Some((heads, activation, inner)) = kinds.next()? else { return None };
        kinds.all(|kind| kind == first).then_some(Self { heads, activation, inner })
    }
}

/// The gradients of a block that are required besides those of low-rank updates.
#[derive(Clone, Copy)]
pub(super) struct BlockNeedsGrad<'a> {
    pub(super) input: bool,
    /// Whether each parameter of the model is trained.
    pub(super) trained: &'a [bool],
    /// The buffer for the gradients of low-rank updates, on a device that computes those of a layer in one launch.
    pub(super) low_rank_buffer: Option<&'a LowRankGradientBuffer>,
}

impl Block {
    /// Whether one of the block's parameters is trained.
    pub(super) fn is_trained(&self, trained: &[bool]) -> bool {
        trained[self.parameters.clone()].contains(&true)
    }

    fn attention_input<'a>(&'a self, x: &'a Tensor) -> Input<'a> {
        Input::new(x, self.attention.before.as_ref())
    }

    /// The normed input, which parallel parts share.
    fn shared_input<'a>(&'a self, x: &'a Tensor) -> Result<Input<'a>> {
        let input = self.attention_input(x);
        let normed = Some(input.get()?);
        Ok(Input { normed, ..input })
    }

    /// The block's output. Keys and values of the tokens are added to the cache, if given.
    pub(super) fn forward(&self, x: &Tensor, context: Context, cache: Option<&mut KVCache>) -> Result<Tensor> {
        if self.is_parallel {
            let input = self.shared_input(x)?;
            let (y, _) = self.attention.forward(&input, x, None, context, cache)?;
            return Ok(self.feed_forward.forward(&input, &y, None, context, None)?.0);
        }
        let norm = self.feed_forward.before.as_ref();
        let (middle, normed) = self.attention.forward(&self.attention_input(x), x, norm, context, cache)?;
        let input = Input { stream: &middle, norm, normed };
        Ok(self.feed_forward.forward(&input, &middle, None, context, None)?.0)
    }

    /// [`Block::forward`], with the tensors for the backward pass.
    pub(super) fn forward_saving(&self, x: &Tensor, context: Context) -> Result<(Tensor, BlockSaved)> {
        let (y, saved) = self.saving(x, context, false)?;
        Ok((y.ok_or_else(missing)?, saved))
    }

    /// Recomputes what [`Block::forward_saving`] saves from the block's input, without the output.
    pub(super) fn recompute_saved(&self, x: &Tensor, context: Context) -> Result<BlockSaved> {
        Ok(self.saving(x, context, true)?.1)
    }

    fn saving(&self, x: &Tensor, context: Context, skips_output: bool) -> Result<(Option<Tensor>, BlockSaved)> {
        let input = if self.is_parallel { self.shared_input(x)? } else { self.attention_input(x) };
        let norm = self.feed_forward.before.as_ref();
        let (stream, attention) = self.attention.forward_saving(&input, x, norm, context, false)?;
        let (middle, normed) = stream.ok_or_else(missing)?;
        let input = if self.is_parallel { input } else { Input { stream: &middle, norm, normed } };
        let (stream, feed_forward) = self.feed_forward.forward_saving(&input, &middle, None, context, skips_output)?;
        drop(input);
        let middle = (!self.is_parallel).then_some(middle);
        Ok((stream.map(|(y, _)| y), BlockSaved { x: x.clone(), attention, middle, feed_forward }))
    }

    /// The gradient with respect to the block's input, if required, from the gradient of its output.
    pub(super) fn backward(
        &self,
        saved: BlockSaved,
        context: Context,
        dy: Tensor,
        needs_grad: BlockNeedsGrad,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let BlockNeedsGrad { input: needs_input, trained, low_rank_buffer } = needs_grad;
        let mut pass = Backward { context, trained, low_rank_buffer, factors: Vec::new(), gradients };
        let needs_input = needs_input || self.attention.trains_norm(trained);
        let BlockSaved { x, attention, middle, feed_forward } = saved;
        let dx = if let Some(middle) = middle {
            let input = Input::new(&middle, self.feed_forward.before.as_ref());
            let carry = dy.clone();
            let d_middle = self.feed_forward.backward(&input, feed_forward, &dy, carry, true, &mut pass)?;
            let d_middle = d_middle.ok_or_else(missing)?;
            drop((dy, middle));
            let (input, carry) = (self.attention_input(&x), d_middle.clone());
            self.attention.backward(&input, attention, &d_middle, carry, needs_input, &mut pass)?
        } else {
            let (input, carry) = (self.attention_input(&x), dy.force_contiguous()?);
            let dx = self.feed_forward.backward(&input, feed_forward, &dy, carry, needs_input, &mut pass)?;
            let carry = dx.unwrap_or_else(|| dy.clone());
            self.attention.backward(&input, attention, &dy, carry, needs_input, &mut pass)?
        };
        if let (Some(low_rank_buffer), false) = (pass.low_rank_buffer, pass.factors.is_empty()) {
            for (id, of_update) in fused::low_rank_gradients(&pass.factors, low_rank_buffer)? {
                pass.gradients.low_rank[id] = Some(of_update);
            }
        }
        Ok(dx)
    }

    /// Whether the decode kernels support this block.
    fn can_step(&self, dtype: DType) -> bool {
        let FeedForward::Gated(mlp) = &self.feed_forward.part else { return false };
        !self.is_parallel
            && Branch::new(&self.attention).is_some()
            && Branch::new(&self.feed_forward).is_some()
            && self.attention.part.can_step(dtype)
            && mlp.can_step(dtype)
    }

    /// Runs the block in a decode step. The stream is updated in place.
    pub(super) fn step(&self, step: &Step, updates: Option<&LowRankUpdates>, cache: &KVCache) -> Result<()> {
        let FeedForward::Gated(mlp) = &self.feed_forward.part else { return Err(missing()) };
        self.attention.part.step(Branch::new(&self.attention).ok_or_else(missing)?, step, updates, cache)?;
        mlp.step(Branch::new(&self.feed_forward).ok_or_else(missing)?, step, updates)
    }

    /// Counts the memory of the forward pass. The input is allocated before and after it, the output after it.
    pub(super) fn forward_memory(&self, size: StepSize, is_saving: bool, meter: &mut MemoryMeter) {
        self.attention.forward_memory(size, is_saving, false, meter);
        self.feed_forward.forward_memory(size, is_saving, false, meter);
        meter.free(if is_saving && !self.is_parallel { 0 } else { size.stream });
    }

    /// Counts the memory of [`Block::recompute_saved`].
    pub(super) fn recompute_memory(&self, size: StepSize, meter: &mut MemoryMeter) {
        self.attention.forward_memory(size, true, false, meter);
        self.feed_forward.forward_memory(size, true, true, meter);
        meter.free(if self.is_parallel { size.stream } else { 0 });
    }

    /// Bytes saved for backward, besides the input.
    pub(super) fn saved_memory(&self, size: StepSize) -> usize {
        let outputs = self.attention.saved_output(size) + self.feed_forward.saved_output(size);
        let middle = if self.is_parallel { 0 } else { size.stream };
        self.attention.part.saved_memory(size) + self.feed_forward.part.saved_memory(size) + outputs + middle
    }

    /// Counts the memory of the backward pass. The saved tensors, the input and the gradient of the output are
    /// allocated before it, and the gradient of the input after it, if required.
    pub(super) fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) {
        let needs_input = needs_input || self.attention.trains_norm(size.trained);
        let copies = if self.is_parallel { size.stream } else { 0 };
        meter.allocate(copies);
        let mut gathered = self.feed_forward.backward_memory(size, needs_input || !self.is_parallel, meter);
        meter.free(size.stream);
        gathered += self.attention.backward_memory(size, needs_input, meter);
        let last = if needs_input { 0 } else { size.stream };
        meter.free(gathered + copies + last + if self.is_parallel { 0 } else { size.stream });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::DecodeSizes;
    use crate::models::{Model, ModelConfig, families};
    use crate::{DType, Device};
    use serde_json::json;
    use std::path::Path;

    /// The documents name the families that have no kernels for single-token steps, with their default features.
    #[test]
    fn documents_name_the_families_without_steps() {
        let has_no_step = |family: &&str| {
            let config = json!({
                "model_type": family, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
                "pad_token_id": null, "num_local_experts": 0, "layer_types": ["full_attention", "full_attention"]
            });
            let config = ModelConfig::from_json_str(&config.to_string()).unwrap();
            let model = Model::repeated_pattern(config, 1, DType::F32, Device::CPU).unwrap();
            let has_step = DecodeSizes::new(&model.inner.blocks, DType::F32).is_some();
            !has_step || !crate::models::parts::step::is_rms_norm(&model.inner.norm)
        };
        let names = families::names();
        let mut without: Vec<&str> = names.split("`, `").filter(has_no_step).collect();
        without.sort_unstable();
        let expected = format!("`{}`", without.join("`, `"));
        for name in ["cuda.md", "metal.md"] {
            let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name));
            let words = text.unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words.contains(&expected), "{name} does not list {expected}");
        }
    }
}
