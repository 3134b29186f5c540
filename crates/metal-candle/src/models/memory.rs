//! Predicts the memory of a training step: runs through [`Model::loss_and_gradients`] with sizes instead of tensors.
//! Each part of a layer counts its own memory.

use super::Model;
use super::gradients::Trainable;
use super::parts::linear::ExtraMemory;
use super::parts::pass::{MemoryMeter, StepSize};
use crate::error::Result;
use crate::ops::gpu_blocks::scratch_len;
use crate::ops::rotary::RotaryTable;
use crate::ops::{LowRankUpdates, fused, head};
use candle_core::DType;

/// The memory of a training step besides weights, adapter and optimizer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepMemory {
    /// Activations saved between the forward and the backward pass.
    pub saved: usize,
    /// The peak temporary memory of the blocks besides that: activations, and gradients of trained tensors.
    pub working: usize,
    /// The peak memory of the head besides the saved activations: the logits of a chunk and their gradients.
    pub head: usize,
    /// The peak of everything together.
    pub peak: usize,
}

impl Model {
    /// The memory of [`Model::loss_and_gradients`] for a batch of `tokens` tokens, `trained` of which have a target. It
    /// is exact on the CPU and an estimate on other devices.
    ///
    /// # Errors
    /// A trained parameter is not part of the model.
    pub fn step_memory(
        &self,
        tokens: usize,
        trained: usize,
        trainable: Trainable,
        checkpointed_blocks: usize,
    ) -> Result<StepMemory> {
        let is_trained = self.trained_parameters(trainable.parameters)?;
        let lowest = self.lowest(trainable.low_rank, &is_trained, trainable.parameters);
        let elements: Vec<usize> = self.parameters().iter().map(|(_, tensor)| tensor.elem_count()).collect();
        let dtype = self.activation_dtype();
        let size = StepSize {
            tokens,
            dtype,
            stream: tokens * self.config().hidden_size * dtype.size_in_bytes(),
            is_rounded: self.device().is_cpu() && self.dtype() != DType::F32,
            is_gathered: trainable
                .low_rank
                .is_some_and(|updates| fused::gathers_gradients(updates, &self.device().candle(), dtype)),
            updates: trainable.low_rank,
            trained: &is_trained,
            elements: &elements,
        };
        let blocks = self.inner.blocks.len();
        let first = lowest.block.unwrap_or(blocks);
        let mut meter = MemoryMeter::default();
        let scratch = self.scratch(tokens, trained, trainable.low_rank);
        // cosines and sines of the positions
        let rotated: usize = self.inner.rotary.iter().map(RotaryTable::dim).sum();
        meter.allocate(scratch + tokens * rotated * dtype.size_in_bytes());

        // the stream that enters the first block
        meter.allocate(size.stream);
        let mut saved = 0;
        for block in &self.inner.blocks {
            let saves_all = block.layer >= first && block.layer - first >= checkpointed_blocks;
            block.forward_memory(size, saves_all, &mut meter);
            if block.layer < first {
                meter.free(size.stream);
            } else {
                saved += size.stream + if saves_all { block.saved_memory(size) } else { 0 };
            }
        }

        let before_head = meter.now;
        let peak_of_blocks = std::mem::take(&mut meter.peak);
        meter.peak = meter.now;
        let row = self.config().hidden_size * dtype.size_in_bytes();
        if trained < tokens {
            meter.allocate(trained * row);
            meter.free(size.stream);
        }
        let stream = trained * row;
        meter.allocate(stream);
        let vocab = self.config().vocab_size;
        let chunk = head::chunk_rows(trained, vocab, &self.device().candle()).min(trained);
        let logits = chunk * vocab * dtype.size_in_bytes();
        let of_head = self.extras_of(self.head_id(), chunk, trainable.low_rank);
        let weight = self.embedding_weight_bytes();
        meter.allocate(logits);
        if is_trained[self.head_parameter()] {
            meter.allocate(weight);
        }
        meter.allocate_temporarily(of_head.copies);
        meter.allocate(of_head.gradients);
        // gradients of single rows stay allocated; the gradients of their logits are gathered from each chunk
        let float = DType::F32.size_in_bytes();
        let rows_of = |index| trainable.parameters.rows_of(index).map_or(0, |rows| rows.ids.len());
        let (rows, row_of_hidden) = (rows_of(self.head_parameter()), self.config().hidden_size * float);
        meter.allocate_temporarily(chunk * rows * float);
        meter.allocate(rows * row_of_hidden);
        // the gradient of each chunk, then their concatenation
        let goes_down = lowest.block.is_some() || self.inner.norm.is_trained(&is_trained);
        if goes_down {
            meter.allocate(stream);
            meter.free(logits);
            meter.allocate_temporarily(if chunk < trained { stream } else { 0 });
        } else {
            meter.free(logits);
        }
        meter.free(stream);
        let head = meter.peak - before_head;
        meter.peak = meter.peak.max(peak_of_blocks);
        if goes_down {
            // the gradient of all tokens replaces that of the rows with a target
            meter.allocate(stream);
            meter.free(2 * stream);
            if trained < tokens {
                meter.allocate(2 * size.stream);
                meter.free(size.stream + stream);
            }
            for block in self.inner.blocks[first..].iter().rev() {
                if block.layer - first < checkpointed_blocks {
                    block.recompute_memory(size, &mut meter);
                }
                block.backward_memory(size, lowest.embedding || block.layer > first, &mut meter);
            }
            if lowest.embedding && is_trained[self.embedding_parameter()] && !self.config().tie_word_embeddings {
                meter.allocate(weight);
            }
            if lowest.embedding && !self.config().tie_word_embeddings {
                meter.allocate(rows_of(self.embedding_parameter()) * row_of_hidden);
            }
            meter.allocate_temporarily(self.extras_of(self.embedding_id(), tokens, trainable.low_rank).gradients * 3);
        }
        let working = meter.peak.saturating_sub(saved);
        Ok(StepMemory { saved, working, head, peak: meter.peak })
    }

    /// The number of blocks that have a backward pass.
    ///
    /// # Errors
    /// A trained parameter is not part of the model.
    pub fn trained_blocks(&self, trainable: Trainable) -> Result<usize> {
        let lowest =
            self.lowest(trainable.low_rank, &self.trained_parameters(trainable.parameters)?, trainable.parameters);
        Ok(lowest.block.map_or(0, |block| self.inner.blocks.len() - block))
    }

    fn embedding_weight_bytes(&self) -> usize {
        self.config().vocab_size * self.config().hidden_size * DType::F32.size_in_bytes()
    }

    /// The packed left operand of the largest product; on a GPU, the largest part of a quantized matrix that is dequantized
    /// for a product.
    fn scratch(&self, tokens: usize, trained: usize, updates: Option<&LowRankUpdates>) -> usize {
        if !self.device().is_cpu() {
            return self.dequantized_len().unwrap_or(0) * self.activation_dtype().size_in_bytes();
        }
        let ranks = updates.into_iter().flat_map(LowRankUpdates::iter).filter_map(|(_, update)| update.a.dim(0).ok());
        let widest = self.linears().iter().filter(|linear| linear.layer.is_some());
        let widest = widest.map(|linear| linear.in_features.max(linear.out_features)).max().unwrap_or(0);
        let depth = widest + ranks.max().unwrap_or(0);
        let of_blocks = metal_candle_kernels::packed_bytes(tokens, depth);
        let vocab = self.config().vocab_size;
        of_blocks.max(metal_candle_kernels::packed_bytes(
            head::chunk_rows(trained, vocab, &self.device().candle()).min(trained),
            vocab,
        ))
    }

    /// The maximum number of weights that are dequantized at a time on a GPU; `None` without quantized weights.
    pub(super) fn dequantized_len(&self) -> Option<usize> {
        let weights = [&self.inner.head.linear.weight].into_iter();
        let weights = weights.chain(self.parameters().iter().map(|(_, weight)| weight));
        weights.filter(|weight| weight.block_format().is_some()).map(|weight| scratch_len(weight.dims())).max()
    }

    fn extras_of(&self, id: usize, tokens: usize, updates: Option<&LowRankUpdates>) -> ExtraMemory {
        let linear = &self.linears()[id];
        ExtraMemory::new(updates, id, [linear.in_features, linear.out_features], tokens)
    }
}
