//! How much memory a training step takes: the walk through [`Model::loss_and_gradients`] with sizes in place of tensors.
//!
//! It follows `step.rs` and `block.rs` line by line; who changes what is alive there changes it here.

use super::Model;
use super::block::DOWN;
use super::decoder::NUM_LINEARS;
use super::step::Trainable;
use crate::error::Result;
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

/// Bytes in use, and the most that were.
#[derive(Debug, Default)]
struct Meter {
    now: usize,
    peak: usize,
}

impl Meter {
    fn take(&mut self, bytes: usize) {
        self.now += bytes;
        self.peak = self.peak.max(self.now);
    }

    fn give(&mut self, bytes: usize) {
        self.now -= bytes;
    }

    /// Takes and gives back.
    fn touch(&mut self, bytes: usize) {
        self.take(bytes);
        self.give(bytes);
    }
}

/// The sizes of the tensors of a block for a number of tokens, in bytes.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    queries: usize,
    keys: usize,
    inner: usize,
    /// Gate or up as they are kept.
    kept_inner: usize,
    log_sums: usize,
    /// Whether what the gradients of terms need stays until the end of a block, where they are made in one launch.
    is_gathered: bool,
}

impl Sizes {
    /// What a block keeps beside its input.
    fn kept(&self) -> usize {
        2 * self.queries + 2 * self.keys + self.log_sums + self.hidden + 2 * self.kept_inner
    }
}

/// What low-rank terms and trained weights of a block add, in bytes.
#[derive(Default, Clone, Copy)]
struct Extras {
    /// Gradients that stay until the end of the step.
    gradients: usize,
    /// The largest of the copies that dropout or magnitudes make in one layer.
    copies: usize,
    /// Whether the backward pass needs the input of `down_proj` again.
    needs_activation: bool,
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
        let sizes = self.sizes(tokens);
        let blocks = self.inner.blocks.len();
        let first = lowest.block.unwrap_or(blocks);
        let mut meter = Meter::default();
        let scratch = self.scratch(tokens, trained, trainable.terms);
        // cosines and sines of the positions
        meter.take(scratch + tokens * self.config().head_dim * self.activation_dtype().size_in_bytes());

        // the stream that enters the first block
        meter.take(sizes.hidden);
        let mut kept = 0;
        for layer in 0..blocks {
            let extras = self.extras(layer, tokens, trainable.terms, &wanted);
            let keeps_everything = layer >= first && layer - first >= checkpointed_blocks;
            forward(&mut meter, sizes, extras, keeps_everything);
            if layer < first {
                meter.give(sizes.hidden);
            } else {
                kept += sizes.hidden + if keeps_everything { sizes.kept() } else { 0 };
            }
        }

        let before_head = meter.now;
        let peak_of_blocks = std::mem::take(&mut meter.peak);
        meter.peak = meter.now;
        let row = self.config().hidden_size * self.activation_dtype().size_in_bytes();
        if trained < tokens {
            meter.take(trained * row);
            meter.give(sizes.hidden);
        }
        let stream = trained * row;
        meter.take(stream);
        let vocab = self.config().vocab_size;
        let chunk = head::chunk_rows(trained, vocab, &self.device().candle()).min(trained);
        let logits = chunk * vocab * self.activation_dtype().size_in_bytes();
        let of_head = self.extras_of(self.head_number(), chunk, trainable.terms);
        let weight = vocab * self.config().hidden_size * DType::F32.size_in_bytes();
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
        let goes_down = lowest.block.is_some() || wanted[self.norm_parameter()];
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
                meter.take(2 * sizes.hidden);
                meter.give(sizes.hidden + stream);
            }
            for layer in (first..blocks).rev() {
                let extras = self.extras(layer, tokens, trainable.terms, &wanted);
                if layer - first < checkpointed_blocks {
                    until_activation(&mut meter, sizes, extras);
                    round(&mut meter, sizes);
                }
                let norm = self.inner.blocks[layer].parameters.input_layernorm;
                backward(&mut meter, sizes, extras, lowest.embedding || layer > first || wanted[norm]);
            }
            if lowest.embedding && wanted[super::step::EMBEDDING_PARAMETER] && !self.config().tie_word_embeddings {
                meter.take(weight);
            }
            if lowest.embedding && !self.config().tie_word_embeddings {
                meter.take(rows_of(super::step::EMBEDDING_PARAMETER) * row_of_hidden);
            }
            meter.touch(self.extras_of(self.embedding_number(), tokens, trainable.terms).gradients * 3);
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

    fn sizes(&self, tokens: usize) -> Sizes {
        let config = self.config();
        let element = tokens * self.activation_dtype().size_in_bytes();
        let inner = config.intermediate_size * element;
        let is_rounded = self.device().is_cpu() && self.dtype() != DType::F32;
        Sizes {
            hidden: config.hidden_size * element,
            queries: config.num_attention_heads * config.head_dim * element,
            keys: config.num_key_value_heads * config.head_dim * element,
            inner,
            kept_inner: if is_rounded { inner / 2 } else { inner },
            log_sums: tokens * config.num_attention_heads * DType::F32.size_in_bytes(),
            is_gathered: self.device().is_metal(),
        }
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

    fn extras(&self, layer: usize, tokens: usize, terms: Option<&LowRankTerms>, wanted: &[bool]) -> Extras {
        let mut sum = Extras::default();
        for place in 0..NUM_LINEARS {
            let of_linear = self.extras_of(NUM_LINEARS * layer + place, tokens, terms);
            sum.gradients += of_linear.gradients;
            sum.copies = sum.copies.max(of_linear.copies);
        }
        let parameters = &self.inner.blocks[layer].parameters;
        let has_term = terms.is_some_and(|terms| terms.get(NUM_LINEARS * layer + DOWN).is_some());
        sum.needs_activation = has_term || wanted[parameters.linears[DOWN].0];
        let trained = parameters.places().filter(|&place| wanted[place]);
        let elements = trained.map(|place| self.parameters()[place].1.elem_count());
        sum.gradients += elements.sum::<usize>() * DType::F32.size_in_bytes();
        sum
    }

    fn extras_of(&self, number: usize, tokens: usize, terms: Option<&LowRankTerms>) -> Extras {
        let Some(term) = terms.and_then(|terms| terms.get(number)) else { return Extras::default() };
        let linear = &self.linears()[number];
        let float = DType::F32.size_in_bytes();
        let magnitudes = if term.magnitude.is_some() { linear.out_features } else { 0 };
        let gradients = (term.a.elem_count() + term.b.elem_count() + magnitudes) * float;
        let dropped = if term.dropout > 0.0 { tokens * linear.in_features * float } else { 0 };
        let scaled = if term.magnitude.is_some() { 3 * tokens * linear.out_features * float } else { 0 };
        Extras { gradients, copies: dropped + scaled, needs_activation: false }
    }
}

/// A block's forward pass: its input is there before and after, its output after.
fn forward(meter: &mut Meter, sizes: Sizes, extras: Extras, keeps_everything: bool) {
    let Sizes { hidden, inner, .. } = sizes;
    if keeps_everything {
        until_activation(meter, sizes, extras);
    } else {
        // q, k, v and the result of attention are given back before the gated part
        let of_attention = 2 * sizes.queries + 2 * sizes.keys + sizes.log_sums;
        meter.take(hidden.max(sizes.queries) + of_attention);
        meter.touch(extras.copies);
        meter.give(hidden.max(sizes.queries) + of_attention);
        meter.take(2 * hidden + 2 * inner);
        meter.touch(extras.copies);
        meter.give(hidden);
    }
    meter.take(inner);
    meter.touch(extras.copies);
    meter.take(hidden);
    meter.give(inner);
    if keeps_everything {
        round(meter, sizes);
    } else {
        meter.give(2 * inner + hidden);
    }
}

/// From a block's input to gate and up.
fn until_activation(meter: &mut Meter, sizes: Sizes, extras: Extras) {
    let Sizes { hidden, queries, keys, inner, log_sums, .. } = sizes;
    meter.take(hidden);
    meter.touch(extras.copies);
    meter.take(queries + 2 * keys);
    meter.give(hidden);
    meter.take(queries + log_sums);
    // the stream after attention, and its norm
    meter.take(2 * hidden);
    meter.take(2 * inner);
    meter.touch(extras.copies);
    meter.give(hidden);
}

/// Gate and up are kept in a smaller type.
fn round(meter: &mut Meter, Sizes { inner, kept_inner, .. }: Sizes) {
    if kept_inner < inner {
        for _ in 0..2 {
            meter.take(kept_inner);
            meter.give(inner);
        }
    }
}

/// A block's backward pass: what it kept and the gradient of its output are there before, the gradient of its input after.
fn backward(meter: &mut Meter, sizes: Sizes, extras: Extras, has_input: bool) {
    let Sizes { hidden, queries, keys, inner, kept_inner, log_sums, is_gathered } = sizes;
    let gathered = if is_gathered { inner + 2 * hidden } else { 0 };
    let activation = if extras.needs_activation && !is_gathered { inner } else { 0 };
    meter.take(gathered + activation + inner);
    meter.touch(extras.copies);
    meter.take(extras.gradients);
    meter.give(activation);
    // the gradient of gate takes the place of that of the activation
    meter.take(inner);
    meter.give(2 * kept_inner);
    meter.take(2 * hidden);
    meter.touch(extras.copies);
    meter.give(2 * inner + hidden);
    // the stream after attention and the gradient of its norm
    meter.give(2 * hidden);
    meter.take(queries);
    meter.touch(extras.copies);
    // the gradients of q, k and v; those of k and v by query head
    meter.take(queries + 2 * keys);
    meter.give(2 * queries + 2 * keys + log_sums + queries);
    meter.take(hidden);
    if has_input {
        meter.take(hidden);
        meter.touch(extras.copies);
        meter.give(hidden);
    }
    meter.give(hidden + queries + 2 * keys);
    // the input; without a gradient of it that of the output too
    meter.give(gathered + if has_input { hidden } else { 2 * hidden });
}
