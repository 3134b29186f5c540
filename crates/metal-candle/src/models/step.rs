//! Losses and gradients: the training pass through the decoder.

use super::block::{BlockGradients, BlockSaved, BlockWanted, Context};
use super::decoder::{NUM_LINEARS, gather_rows};
use super::{Batch, Model};
use crate::error::{Error, Result};
use crate::ops::head::{self, HeadLoss};
use crate::ops::{LowRankTerms, num_bytes};
use candle_core::Tensor;
use metal_candle_kernels::Row;

/// What each token of a batch should be followed by.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// The wanted next token of each token: `[tokens]`. Ignored where the weight is 0.
    pub ids: Vec<u32>,
    /// The weight of each token's loss: `[tokens]`, 0 where it is masked.
    pub weights: Vec<f32>,
}

/// What gradients are wanted for; everything else is frozen.
#[derive(Debug, Clone, Copy)]
pub enum Trainable<'a> {
    /// The low-rank terms, which also take part in the forward pass.
    LowRank(&'a LowRankTerms),
    /// Every parameter of the model.
    All,
}

/// The loss of each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Losses {
    /// Weight times cross-entropy in nats of each token: `[tokens]`, 0 where it is masked.
    pub rows: Vec<f32>,
}

/// The gradients of `grad_scale * sum(losses.rows)`, f32, and nothing for frozen tensors.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// For [`Trainable::LowRank`] `2 n` holds the gradient of A and `2 n + 1` that of B of linear `n`;
    /// for [`Trainable::All`] entry `i` that of `model.parameters()[i]`.
    pub tensors: Vec<Option<Tensor>>,
    /// Bytes kept between the forward and the backward pass.
    pub saved_bytes: usize,
}

/// Settings of a training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossOptions {
    /// Share of the target taken from the wanted token and spread over the whole vocabulary, 0 to 1.
    pub label_smoothing: f32,
    /// Factor on all gradients.
    pub grad_scale: f32,
    /// Seed of the adapter's dropout in this step.
    pub dropout_seed: u64,
}

impl Default for LossOptions {
    /// No smoothing, a factor of 1, seed 0.
    fn default() -> Self {
        Self { label_smoothing: 0.0, grad_scale: 1.0, dropout_seed: 0 }
    }
}

/// The rows of a batch that have a target, and what each should predict.
struct TrainedRows {
    indices: Vec<usize>,
    rows: Vec<Row>,
}

impl TrainedRows {
    fn new(batch: &Batch, targets: &Targets) -> Result<Self> {
        let tokens = batch.num_tokens();
        if targets.ids.len() != tokens || targets.weights.len() != tokens {
            let found = (targets.ids.len(), targets.weights.len());
            return Err(Error::argument("targets", format!("expected {tokens} ids and weights, found {found:?}")));
        }
        let indices: Vec<usize> = (0..tokens).filter(|&i| targets.weights[i] != 0.0).collect();
        let rows =
            indices.iter().map(|&i| Row { target: targets.ids[i] as usize, weight: targets.weights[i] }).collect();
        Ok(Self { indices, rows })
    }

    /// The losses of these rows among those of all tokens.
    fn losses(&self, tokens: usize, of_rows: &[f32]) -> Losses {
        let mut rows = vec![0.0; tokens];
        for (index, loss) in self.indices.iter().zip(of_rows) {
            rows[*index] = *loss;
        }
        Losses { rows }
    }

    /// The rows' entries of `x: [tokens, width]`; `x` itself if they are all of them.
    fn gather(&self, x: &Tensor) -> Result<Tensor> {
        if self.indices.len() == x.dim(0)? { Ok(x.clone()) } else { gather_rows(x, &self.indices) }
    }

    /// The opposite of [`TrainedRows::gather`] for a gradient: 0 in the other rows.
    fn scatter(&self, dx: Tensor, tokens: usize) -> Result<Tensor> {
        if self.indices.len() == tokens {
            return Ok(dx);
        }
        let indices: Vec<u32> = self.indices.iter().map(|&i| i as u32).collect();
        let zeros = Tensor::zeros((tokens, dx.dim(1)?), dx.dtype(), dx.device())?;
        Ok(zeros.index_add(&Tensor::new(indices, dx.device())?, &dx, 0)?)
    }
}

impl Model {
    /// The loss of each token, without gradients; no `[tokens, vocab_size]` tensor is made.
    ///
    /// # Errors
    /// Targets and batch differ in length, or an id is out of range.
    pub fn loss(
        &self,
        batch: &Batch,
        targets: &Targets,
        terms: Option<&LowRankTerms>,
        label_smoothing: f32,
    ) -> Result<Losses> {
        self.device().step(|| self.losses(batch, targets, terms, label_smoothing))
    }

    fn losses(
        &self,
        batch: &Batch,
        targets: &Targets,
        terms: Option<&LowRankTerms>,
        label_smoothing: f32,
    ) -> Result<Losses> {
        let trained = TrainedRows::new(batch, targets)?;
        self.check_positions(batch)?;
        self.check_terms(terms)?;
        let (mut x, rotation) = self.embed(batch)?;
        let context = Context { rotation: &rotation, offsets: batch.offsets(), terms, dropout_seed: None };
        for block in &self.inner.blocks {
            x = block.forward(&x, context, None)?;
        }
        if trained.rows.is_empty() {
            return Ok(trained.losses(batch.num_tokens(), &[]));
        }
        let hidden = self.inner.norm.forward(&trained.gather(&x)?)?;
        let loss = head::loss(&hidden, &self.inner.head, &trained.rows, label_smoothing, None)?;
        Ok(trained.losses(batch.num_tokens(), &loss.rows))
    }

    /// The loss of each token and the gradients of `grad_scale * sum(rows)`.
    ///
    /// Nothing is computed or kept for frozen tensors, nor for blocks below the lowest low-rank term.
    ///
    /// # Errors
    /// As [`Model::loss`]; also if no token has a target.
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        trainable: Trainable,
        options: LossOptions,
    ) -> Result<(Losses, Gradients)> {
        self.device().step(|| self.losses_and_gradients(batch, targets, trainable, options))
    }

    fn losses_and_gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        trainable: Trainable,
        options: LossOptions,
    ) -> Result<(Losses, Gradients)> {
        let trained = TrainedRows::new(batch, targets)?;
        if trained.rows.is_empty() {
            return Err(Error::argument("targets", "no token of the batch has a target"));
        }
        self.check_positions(batch)?;
        let (terms, weights) = match trainable {
            Trainable::LowRank(terms) => (Some(terms), false),
            Trainable::All => (None, true),
        };
        self.check_terms(terms)?;
        let lowest = terms.and_then(|terms| terms.iter().next()).map_or(0, |(number, _)| number / NUM_LINEARS);

        let (mut x, rotation) = self.embed(batch)?;
        let dropout_seed = Some(options.dropout_seed);
        let context = Context { rotation: &rotation, offsets: batch.offsets(), terms, dropout_seed };
        let mut saved: Vec<BlockSaved> = Vec::new();
        for block in &self.inner.blocks {
            if block.layer < lowest {
                x = block.forward(&x, context, None)?;
            } else {
                let (y, of_block) = block.forward_saving(&x, context)?;
                saved.push(of_block);
                x = y;
            }
        }

        let stream = trained.gather(&x)?;
        drop(x);
        let hidden = self.inner.norm.forward(&stream)?;
        let wanted = head::Wanted { scale: options.grad_scale, weight: weights };
        let HeadLoss { rows, hidden: d_hidden, weight: d_head } =
            head::loss(&hidden, &self.inner.head, &trained.rows, options.label_smoothing, Some(wanted))?;
        let losses = trained.losses(batch.num_tokens(), &rows);
        let saved_bytes = saved.iter().map(BlockSaved::num_bytes).sum::<usize>() + num_bytes(&stream);

        let d_hidden = d_hidden.ok_or_else(|| Error::argument("targets", "no token of the batch has a target"))?;
        let zeros = head::zeros_like(&stream)?.to_dtype(stream.dtype())?;
        let (dx, d_norm) = self.inner.norm.backward(&stream, &d_hidden, zeros, weights)?;
        let mut dx = Some(trained.scatter(dx, batch.num_tokens())?);

        let mut of_blocks: Vec<BlockGradients> = Vec::new();
        of_blocks.resize_with(self.inner.blocks.len(), BlockGradients::default);
        for block in self.inner.blocks.iter().rev() {
            let (Some(saved), Some(dy)) = (saved.pop(), dx.take()) else { break };
            let wanted = BlockWanted { input: weights || block.layer > lowest, weights };
            dx = block.backward(saved, context, dy, wanted, &mut of_blocks[block.layer])?;
        }
        let tensors = if weights {
            self.parameter_gradients(batch, of_blocks, dx, d_norm, d_head)?
        } else {
            let terms = of_blocks.into_iter().flat_map(|block| block.terms);
            terms.flat_map(|term| term.map_or([None, None], |(a, b)| [Some(a), Some(b)])).collect()
        };
        Ok((losses, Gradients { tensors, saved_bytes }))
    }

    /// The gradients of all parameters in the order of [`Model::parameters`].
    fn parameter_gradients(
        &self,
        batch: &Batch,
        of_blocks: Vec<BlockGradients>,
        dx: Option<Tensor>,
        d_norm: Option<Tensor>,
        d_head: Option<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut by_name = std::collections::HashMap::new();
        let tied = self.config().tie_word_embeddings;
        let (mut d_embedding, d_head) = if tied { (d_head, None) } else { (None, d_head) };
        if let Some(dx) = dx {
            let sum = d_embedding.take().map_or_else(|| head::zeros_like(&self.inner.embedding), Ok)?;
            d_embedding = Some(head::embed_backward(batch.ids(), &dx, sum)?);
        }
        by_name.insert("model.embed_tokens.weight".to_string(), d_embedding);
        by_name.insert("model.norm.weight".to_string(), d_norm);
        by_name.insert("lm_head.weight".to_string(), d_head);
        for (layer, block) in of_blocks.into_iter().enumerate() {
            let path = format!("model.layers.{layer}");
            by_name.insert(format!("{path}.input_layernorm.weight"), block.input_layernorm);
            by_name.insert(format!("{path}.post_attention_layernorm.weight"), block.post_attention_layernorm);
            for (place, (weight, bias)) in block.linears.into_iter().enumerate() {
                let path = &self.linears()[NUM_LINEARS * layer + place].path;
                by_name.insert(format!("{path}.weight"), weight);
                by_name.insert(format!("{path}.bias"), bias);
            }
        }
        Ok(self.parameters().iter().map(|(name, _)| by_name.remove(name).flatten()).collect())
    }

    /// Whether each term fits the linear layer of its number.
    pub(super) fn check_terms(&self, terms: Option<&LowRankTerms>) -> Result<()> {
        for (number, term) in terms.into_iter().flat_map(LowRankTerms::iter) {
            let Some(linear) = self.linears().get(number) else {
                let message = format!("there is no linear layer {number}, the model has {}", self.linears().len());
                return Err(Error::argument("terms", message));
            };
            let rank = term.a.dim(0)?;
            if term.a.dims() != [rank, linear.in_features] || term.b.dims() != [linear.out_features, rank] {
                let (expected, path) = ((linear.in_features, linear.out_features), &linear.path);
                let (a, b) = (term.a.dims(), term.b.dims());
                let message = format!("A {a:?} and B {b:?} do not fit `{path}` with (in, out) {expected:?}");
                return Err(Error::argument("terms", message));
            }
        }
        Ok(())
    }
}
