//! Computes the losses and gradients of a training step.

use super::block::{BlockNeedsGrad, BlockSaved};
use super::gradients::{Gradients, Parameters, Trainable};
use super::parts::pass::{Backward, Context};
use super::rows::gather_rows;
use super::{Batch, Model};
use crate::error::{Error, Result};
use crate::ops::adapters::BatchUpdates;
use crate::ops::fused::LowRankGradientBuffer;
use crate::ops::head::{self, HeadNeedsGrad};
use crate::ops::linear::LinearGradients;
use crate::ops::{LowRankUpdates, embedding, num_bytes};
use crate::profile::{Kind, span};
use candle_core::Tensor;
use metal_candle_kernels::Row;

/// The target of each token of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// The target token id of each token: `[tokens]`. Ignored where the weight is 0.
    pub ids: Vec<u32>,
    /// The weight of each token's loss: `[tokens]`, 0 where it is masked.
    pub weights: Vec<f32>,
}

/// The loss of each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Losses {
    /// The cross-entropy of each token in nats, times its weight: `[tokens]`, 0 where it is masked.
    pub rows: Vec<f32>,
}

/// Settings of a training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossOptions {
    /// The share of the target probability that is spread over the whole vocabulary, 0 to 1.
    pub label_smoothing: f32,
    /// The factor on all gradients.
    pub grad_scale: f32,
    /// The seed of dropout and noise in this step.
    pub dropout_seed: u64,
    /// The alpha of the noise on token embeddings, which is uniform within `alpha / sqrt(length * hidden)` for a
    /// sequence of `length` tokens (`NEFTune`, <https://arxiv.org/abs/2310.05914>, section 2); 0 for none.
    pub neftune_noise_alpha: f32,
    /// The number of blocks, starting with the first trained one, that save only their input for the backward pass and
    /// are recomputed there (<https://arxiv.org/abs/1604.06174>, section 4). The gradients are the same.
    pub checkpointed_blocks: usize,
}

impl Default for LossOptions {
    /// No smoothing, a factor of 1, seed 0, no noise, no checkpointed blocks.
    fn default() -> Self {
        Self {
            label_smoothing: 0.0,
            grad_scale: 1.0,
            dropout_seed: 0,
            neftune_noise_alpha: 0.0,
            checkpointed_blocks: 0,
        }
    }
}

/// The state that a block saves for its backward pass.
enum SavedBlock {
    Full(BlockSaved),
    Checkpoint(Tensor),
}

impl SavedBlock {
    fn num_bytes(&self) -> usize {
        match self {
            Self::Full(saved) => saved.num_bytes(),
            Self::Checkpoint(x) => num_bytes(x),
        }
    }
}

/// Where the backward pass can stop.
#[derive(Clone, Copy)]
pub(super) struct LowestTrained {
    /// The first block that must run backward, because it or the embedding has trained tensors.
    pub(super) block: Option<usize>,
    /// Whether the embedding, rows of it or its low-rank update are trained.
    pub(super) embedding: bool,
}

/// The rows of a batch that have a target, with their targets.
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

    /// The losses of all tokens, given those of these rows.
    fn losses(&self, tokens: usize, of_rows: &[f32]) -> Losses {
        let mut rows = vec![0.0; tokens];
        for (index, loss) in self.indices.iter().zip(of_rows) {
            rows[*index] = *loss;
        }
        Losses { rows }
    }

    /// The rows of `x: [tokens, width]`; `x` itself if all tokens have a target.
    fn gather(&self, x: &Tensor) -> Result<Tensor> {
        if self.indices.len() == x.dim(0)? { Ok(x.clone()) } else { gather_rows(x, &self.indices) }
    }

    /// The inverse of [`TrainedRows::gather`], for a gradient: 0 in the other rows.
    fn scatter(&self, dx: Tensor, tokens: usize) -> Result<Tensor> {
        if self.indices.len() == tokens {
            return Ok(dx);
        }
        head::scatter_rows(&dx, &self.indices, tokens)
    }
}

impl Model {
    /// The loss of each token, without gradients and without allocating a `[tokens, vocab_size]` tensor.
    ///
    /// # Errors
    /// Targets and batch differ in length, or an id is out of range.
    pub fn loss(
        &self,
        batch: &Batch,
        targets: &Targets,
        updates: Option<&LowRankUpdates>,
        label_smoothing: f32,
    ) -> Result<Losses> {
        let losses = self.device().step(|| self.losses(batch, targets, updates, label_smoothing))?;
        self.inner.files.finish_pass()?;
        Ok(losses)
    }

    fn losses(
        &self,
        batch: &Batch,
        targets: &Targets,
        updates: Option<&LowRankUpdates>,
        label_smoothing: f32,
    ) -> Result<Losses> {
        let trained = TrainedRows::new(batch, targets)?;
        self.check_positions(batch)?;
        self.check_updates(updates)?;
        let (mut x, rotations) = self.embed(batch, BatchUpdates::Same(updates), false)?;
        let spans = self.spans(batch, None, &x)?;
        let (rotations, positions) = (rotations.as_slice(), batch.positions());
        let context = Context {
            rotations,
            positions,
            spans: &spans,
            updates: BatchUpdates::Same(updates),
            is_inference: false,
            dropout_seed: None,
            inputs: None,
        };
        for block in &self.inner.blocks {
            x = block.forward(&x, context, None)?;
        }
        if trained.rows.is_empty() {
            return Ok(trained.losses(batch.num_tokens(), &[]));
        }
        let hidden = self.inner.norm.forward(&trained.gather(&x)?)?;
        let update = updates.and_then(|updates| updates.get(self.head_id()));
        let loss = head::loss(&hidden, &self.inner.head, update, None, &trained.rows, label_smoothing, None)?;
        Ok(trained.losses(batch.num_tokens(), &loss.rows()?))
    }

    /// The loss of each token and the gradients of `grad_scale * sum(rows)`.
    ///
    /// Nothing is computed or saved for frozen tensors, nor for blocks below the lowest trained one.
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
        let found = self.device().step(|| self.losses_and_gradients(batch, targets, trainable, options))?;
        self.inner.files.finish_pass()?;
        Ok(found)
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
        let Trainable { low_rank: updates, parameters } = trainable;
        self.check_updates(updates)?;
        let is_trained = self.trained_parameters(parameters)?;
        let lowest = self.lowest(updates, &is_trained, parameters);

        let forward = span("forward", Kind::Group);
        let (mut x, rotations) = self.embed(batch, BatchUpdates::Same(updates), false)?;
        if options.neftune_noise_alpha > 0.0 {
            x = embedding::add_noise(x, batch.offsets(), options.neftune_noise_alpha, options.dropout_seed)?;
        }
        let dropout_seed = Some(options.dropout_seed);
        let spans = self.spans(batch, None, &x)?;
        let (rotations, positions) = (rotations.as_slice(), batch.positions());
        let context = Context {
            rotations,
            positions,
            spans: &spans,
            updates: BatchUpdates::Same(updates),
            is_inference: false,
            dropout_seed,
            inputs: None,
        };
        let first = lowest.block.unwrap_or(self.inner.blocks.len());
        let mut saved_blocks: Vec<SavedBlock> = Vec::new();
        for block in &self.inner.blocks {
            x = if block.layer < first {
                block.forward(&x, context, None)?
            } else if block.layer - first < options.checkpointed_blocks {
                let y = block.forward(&x, context, None)?;
                saved_blocks.push(SavedBlock::Checkpoint(x));
                y
            } else {
                let (y, saved) = block.forward_saving(&x, context)?;
                saved_blocks.push(SavedBlock::Full(saved));
                y
            };
        }

        drop(forward);
        let of_head = span("head", Kind::Group);
        let stream = trained.gather(&x)?;
        drop(x);
        let hidden = self.inner.norm.forward(&stream)?;
        let head = self.head_parameter();
        let head_needs_grad = HeadNeedsGrad {
            scale: options.grad_scale,
            input: lowest.block.is_some() || lowest.embedding || self.inner.norm.is_trained(&is_trained),
            weight: is_trained[head],
            rows: parameters.rows_of(head).map(|rows| rows.ids.as_slice()),
        };
        let of_updates = updates.and_then(|updates| updates.get(self.head_id()));
        let (smoothing, seed) = (options.label_smoothing, dropout_seed);
        let mut found =
            head::loss(&hidden, &self.inner.head, of_updates, seed, &trained.rows, smoothing, Some(head_needs_grad))?;
        drop(hidden);
        drop(of_head);
        let mut gradients = Gradients {
            low_rank: vec![None; self.linears().len()],
            parameters: vec![None; self.parameters().len()],
            rows: Vec::new(),
            saved_bytes: saved_blocks.iter().map(SavedBlock::num_bytes).sum::<usize>() + num_bytes(&stream),
            low_rank_buffer: None,
        };
        let LinearGradients { input, weight, update, .. } = std::mem::take(&mut found.gradients);
        let of_rows = found.gradient_of_rows.take();
        // the losses are copied to the CPU at the end, after everything has been launched
        let losses = || -> Result<Losses> { Ok(trained.losses(batch.num_tokens(), &found.rows()?)) };
        gradients.low_rank[self.head_id()] = update;
        gradients.parameters[head] = weight;
        gradients.rows.extend(of_rows.map(|rows| (head, rows)));

        let _backward = span("backward", Kind::Group);
        let Some(d_hidden) = input else { return Ok((losses()?, gradients)) };
        let dx = self.norm_backward(&stream, &d_hidden, context, &is_trained, &mut gradients)?;
        drop((stream, d_hidden));
        if let Some(updates) = updates {
            gradients.low_rank_buffer = LowRankGradientBuffer::new(updates, self.embedding_id(), &dx)?;
        }
        let low_rank_buffer = gradients.low_rank_buffer.clone();
        let mut dx = Some(trained.scatter(dx, batch.num_tokens())?);
        for block in self.inner.blocks.iter().rev() {
            let (Some(saved), Some(dy)) = (saved_blocks.pop(), dx.take()) else { break };
            let saved = match saved {
                SavedBlock::Full(saved) => saved,
                SavedBlock::Checkpoint(x) => {
                    let _span = span("forward again", Kind::Group);
                    block.recompute_saved(&x, context)?
                }
            };
            let input = lowest.embedding || block.layer > first;
            let needs_grad = BlockNeedsGrad { input, trained: &is_trained, low_rank_buffer: low_rank_buffer.as_ref() };
            dx = block.backward(saved, context, dy, needs_grad, &mut gradients)?;
        }
        if let Some(dx) = dx.filter(|_| lowest.embedding) {
            self.embedding_backward(batch, trainable, &is_trained, &dx, &mut gradients)?;
        }
        Ok((losses()?, gradients))
    }

    /// The backward pass of the final norm: the gradient with respect to the stream.
    fn norm_backward(
        &self,
        stream: &Tensor,
        d_hidden: &Tensor,
        context: Context,
        trained: &[bool],
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let mut pass = Backward { context, trained, low_rank_buffer: None, factors: Vec::new(), gradients };
        self.inner.norm.backward(stream, d_hidden, None, &mut pass)
    }

    /// Adds the gradients of the embedding's trained tensors, from that of its output.
    fn embedding_backward(
        &self,
        batch: &Batch,
        Trainable { low_rank: updates, parameters }: Trainable,
        is_trained: &[bool],
        dx: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let scale = self.inner.embedding_scale;
        if let Some(update) = updates.and_then(|updates| updates.get(self.embedding_id())) {
            gradients.low_rank[self.embedding_id()] =
                Some(embedding::low_rank_backward(&self.inner.embedding, update, batch.ids(), dx, scale)?);
        }
        let index = self.embedding_parameter();
        if is_trained[index] {
            // a tied head has already added its gradient
            let sum = gradients.parameters[index].take();
            let sum = sum.map_or_else(|| self.inner.embedding.zero_gradient(), Ok)?;
            gradients.parameters[index] = Some(embedding::backward(batch.ids(), dx, sum, scale)?);
        }
        if let Some(rows) = parameters.rows_of(index) {
            // a tied head has already added the gradients of its rows
            let sum = gradients.rows.iter().position(|(found, _)| *found == index);
            let sum = sum.map(|index| gradients.rows.swap_remove(index).1);
            gradients.rows.push((index, embedding::rows_backward(batch.ids(), dx, &rows.ids, sum, scale)?));
        }
        Ok(())
    }

    /// Whether each parameter is trained as a whole.
    pub(super) fn trained_parameters(&self, parameters: Parameters) -> Result<Vec<bool>> {
        let count = self.parameters().len();
        let indices = match parameters {
            Parameters::None => &[][..],
            Parameters::All => return Ok(vec![true; count]),
            Parameters::Of(indices) | Parameters::WithRows(indices, _) => indices,
        };
        for rows in parameters.rows() {
            let is_whole = indices.contains(&rows.parameter);
            if is_whole || ![self.embedding_parameter(), self.head_parameter()].contains(&rows.parameter) {
                let message = format!(
                    "parameter {}: only an embedding or head that is not trained as a whole can have trained rows",
                    rows.parameter
                );
                return Err(Error::argument("parameters", message));
            }
        }
        let mut is_trained = vec![false; count];
        for &index in indices {
            let message = || format!("expected indices below the number of parameters, {count}, found {index}");
            *is_trained.get_mut(index).ok_or_else(|| Error::argument("parameters", message()))? = true;
        }
        Ok(is_trained)
    }

    /// The lowest block that gradients must reach.
    pub(super) fn lowest(
        &self,
        updates: Option<&LowRankUpdates>,
        is_trained: &[bool],
        parameters: Parameters,
    ) -> LowestTrained {
        let ids = || updates.into_iter().flat_map(LowRankUpdates::iter).map(|(id, _)| id);
        let of_embedding =
            is_trained[self.embedding_parameter()] || parameters.rows_of(self.embedding_parameter()).is_some();
        let embedding = of_embedding || ids().any(|id| id == self.embedding_id());
        let of_updates = ids().filter_map(|id| self.linears()[id].layer).min();
        let of_parameters =
            self.inner.blocks.iter().find(|block| block.is_trained(is_trained)).map(|block| block.layer);
        let block = if embedding { Some(0) } else { of_updates.into_iter().chain(of_parameters).min() };
        LowestTrained { block, embedding }
    }

    /// Checks that each low-rank update fits its linear layer.
    pub(super) fn check_updates(&self, updates: Option<&LowRankUpdates>) -> Result<()> {
        for (id, update) in updates.into_iter().flat_map(LowRankUpdates::iter) {
            let Some(linear) = self.linears().get(id) else {
                let message =
                    format!("expected ids below the number of linear layers, {}, found {id}", self.linears().len());
                return Err(Error::argument("updates", message));
            };
            let rank = update.a.dim(0)?;
            if update.a.dims() != [rank, linear.in_features] || update.b.dims() != [linear.out_features, rank] {
                let (expected, path) = ((linear.in_features, linear.out_features), &linear.path);
                let (a, b) = (update.a.dims(), update.b.dims());
                let message =
                    format!("A {a:?} and B {b:?} do not fit `{path}` with (in_features, out_features) = {expected:?}");
                return Err(Error::argument("updates", message));
            }
            if let Some((a, b)) = &update.initial_factors {
                let rank = a.dim(0)?;
                if a.dims() != [rank, linear.in_features] || b.dims() != [linear.out_features, rank] {
                    let message = format!(
                        "the initial factors A {:?} and B {:?} do not fit `{}`",
                        a.dims(),
                        b.dims(),
                        linear.path
                    );
                    return Err(Error::argument("updates", message));
                }
            }
            if let Some(magnitude) = &update.magnitude {
                let fits =
                    [&magnitude.m, &magnitude.weight_norms_squared].iter().all(|m| m.dims() == [linear.out_features]);
                if !fits {
                    let message = format!("the DoRA magnitudes do not fit `{}`", linear.path);
                    return Err(Error::argument("updates", message));
                }
            }
        }
        Ok(())
    }
}
