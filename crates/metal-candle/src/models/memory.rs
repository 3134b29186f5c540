//! How much memory a training step takes: a walk through [`Model::loss_and_gradients`] with sizes in place of tensors. Each part
//! of a layer walks through itself.

use super::Model;
use super::gradients::Trainable;
use super::parts::linear::Extras;
use super::parts::pass::{Meter, StepSize};
use crate::error::Result;
use crate::ops::rotary::RotaryTable;
use crate::ops::{LowRankTerms, head};
use candle_core::DType;

/// The memory of a training step beside weights, adapter and optimizer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepMemory {
    /// Activations kept between the forward and the backward pass.
    pub kept: usize,
    /// Most of what the blocks hold for a moment beside that: values on their way, gradients of trained tensors.
    pub working: usize,
    /// Most of what the head holds beside what is kept: logits of a chunk and their gradients.
    pub head: usize,
    /// Most of all together.
    pub peak: usize,
}

impl Model {
    /// The memory that [`Model::loss_and_gradients`] takes on the CPU for a batch of `tokens` tokens of which `trained`
    /// have a target. Elsewhere it is an estimate.
    ///
    /// # Errors
    /// A trained parameter is not the model's.
    pub fn step_memory(
        &self,
        tokens: usize,
        trained: usize,
        trainable: Trainable,
        checkpointed_blocks: usize,
    ) -> Result<StepMemory> {
        let wanted = self.wanted(trainable.parameters)?;
        let lowest = self.lowest(trainable.terms, &wanted, trainable.parameters);
        let elements: Vec<usize> = self.parameters().iter().map(|(_, tensor)| tensor.elem_count()).collect();
        let dtype = self.activation_dtype();
        let size = StepSize {
            tokens,
            dtype,
            stream: tokens * self.config().hidden_size * dtype.size_in_bytes(),
            is_rounded: self.device().is_cpu() && self.dtype() != DType::F32,
            is_gathered: self.device().is_metal(),
            terms: trainable.terms,
            trained: &wanted,
            elements: &elements,
        };
        let blocks = self.inner.blocks.len();
        let first = lowest.block.unwrap_or(blocks);
        let mut meter = Meter::default();
        let scratch = self.scratch(tokens, trained, trainable.terms);
        // cosines and sines of the positions
        let rotated: usize = self.inner.rotary.iter().map(RotaryTable::dim).sum();
        meter.take(scratch + tokens * rotated * dtype.size_in_bytes());

        // the stream that enters the first block
        meter.take(size.stream);
        let mut kept = 0;
        for block in &self.inner.blocks {
            let keeps_everything = block.layer >= first && block.layer - first >= checkpointed_blocks;
            block.forward_memory(size, keeps_everything, &mut meter);
            if block.layer < first {
                meter.give(size.stream);
            } else {
                kept += size.stream + if keeps_everything { block.saved_memory(size) } else { 0 };
            }
        }

        let before_head = meter.now;
        let peak_of_blocks = std::mem::take(&mut meter.peak);
        meter.peak = meter.now;
        let row = self.config().hidden_size * dtype.size_in_bytes();
        if trained < tokens {
            meter.take(trained * row);
            meter.give(size.stream);
        }
        let stream = trained * row;
        meter.take(stream);
        let vocab = self.config().vocab_size;
        let chunk = head::chunk_rows(trained, vocab, &self.device().candle()).min(trained);
        let logits = chunk * vocab * dtype.size_in_bytes();
        let of_head = self.extras_of(self.head_id(), chunk, trainable.terms);
        let weight = self.embedding_weight_bytes();
        meter.take(logits);
        if wanted[self.head_parameter()] {
            meter.take(weight);
        }
        meter.touch(of_head.copies);
        meter.take(of_head.gradients);
        // gradients of single rows stay; those of the logits are picked from each chunk
        let float = DType::F32.size_in_bytes();
        let rows_of = |place| trainable.parameters.rows_of(place).map_or(0, |rows| rows.ids.len());
        let (rows, row_of_hidden) = (rows_of(self.head_parameter()), self.config().hidden_size * float);
        meter.touch(chunk * rows * float);
        meter.take(rows * row_of_hidden);
        // the gradient in parts, then put together
        let goes_down = lowest.block.is_some() || self.inner.norm.is_trained(&wanted);
        if goes_down {
            meter.take(stream);
            meter.give(logits);
            meter.touch(if chunk < trained { stream } else { 0 });
        } else {
            meter.give(logits);
        }
        meter.give(stream);
        let head = meter.peak - before_head;
        meter.peak = meter.peak.max(peak_of_blocks);
        if goes_down {
            // in place of the rows' gradient that of all tokens
            meter.take(stream);
            meter.give(2 * stream);
            if trained < tokens {
                meter.take(2 * size.stream);
                meter.give(size.stream + stream);
            }
            for block in self.inner.blocks[first..].iter().rev() {
                if block.layer - first < checkpointed_blocks {
                    block.saved_again_memory(size, &mut meter);
                }
                block.backward_memory(size, lowest.embedding || block.layer > first, &mut meter);
            }
            if lowest.embedding && wanted[self.embedding_parameter()] && !self.config().tie_word_embeddings {
                meter.take(weight);
            }
            if lowest.embedding && !self.config().tie_word_embeddings {
                meter.take(rows_of(self.embedding_parameter()) * row_of_hidden);
            }
            meter.touch(self.extras_of(self.embedding_id(), tokens, trainable.terms).gradients * 3);
        }
        let working = meter.peak.saturating_sub(kept);
        Ok(StepMemory { kept, working, head, peak: meter.peak })
    }

    /// The number of blocks that have a backward pass.
    ///
    /// # Errors
    /// A trained parameter is not the model's.
    pub fn trained_blocks(&self, trainable: Trainable) -> Result<usize> {
        let lowest = self.lowest(trainable.terms, &self.wanted(trainable.parameters)?, trainable.parameters);
        Ok(lowest.block.map_or(0, |block| self.inner.blocks.len() - block))
    }

    fn embedding_weight_bytes(&self) -> usize {
        self.config().vocab_size * self.config().hidden_size * DType::F32.size_in_bytes()
    }

    /// The packed left operand of the largest product.
    fn scratch(&self, tokens: usize, trained: usize, terms: Option<&LowRankTerms>) -> usize {
        if !self.device().is_cpu() {
            return 0;
        }
        let ranks = terms.into_iter().flat_map(LowRankTerms::iter).filter_map(|(_, term)| term.a.dim(0).ok());
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

    fn extras_of(&self, id: usize, tokens: usize, terms: Option<&LowRankTerms>) -> Extras {
        let linear = &self.linears()[id];
        Extras::new(terms, id, [linear.in_features, linear.out_features], tokens)
    }
}
