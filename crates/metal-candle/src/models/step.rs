//! Losses and gradients: the training pass through the decoder.

use super::block::{BlockSaved, BlockWanted};
use super::gradients::{Gradients, Parameters, Trainable};
use super::parts::pass::{Backward, Context};
use super::rows::gather_rows;
use super::{Batch, Model};
use crate::error::{Error, Result};
use crate::ops::adapters::Terms;
use crate::ops::fused::TermRoom;
use crate::ops::head::{self, HeadWanted};
use crate::ops::linear::LinearGradients;
use crate::ops::{LowRankTerms, embedding, num_bytes};
use crate::profile::{Kind, span};
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

/// The loss of each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Losses {
    /// Weight times cross-entropy in nats of each token: `[tokens]`, 0 where it is masked.
    pub rows: Vec<f32>,
}

/// Settings of a training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossOptions {
    /// Share of the target taken from the wanted token and spread over the whole vocabulary, 0 to 1.
    pub label_smoothing: f32,
    /// Factor on all gradients.
    pub grad_scale: f32,
    /// Seed of what is random in this step: dropout and noise.
    pub dropout_seed: u64,
    /// Noise on the embedded tokens, uniform within `alpha / sqrt(length * hidden)` for a sequence of `length` tokens
    /// (`NEFTune`, <https://arxiv.org/abs/2310.05914>, section 2); 0 for none.
    pub neftune_noise_alpha: f32,
    /// The number of blocks, from the first one trained, that keep nothing but their input for the backward pass and are
    /// computed anew there (<https://arxiv.org/abs/1604.06174>, section 4). The gradients are the same.
    pub checkpointed_blocks: usize,
}

impl Default for LossOptions {
    /// No smoothing, a factor of 1, seed 0, no noise, everything kept.
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

/// What a block keeps for its backward pass.
enum Kept {
    Everything(BlockSaved),
    Input(Tensor),
}

impl Kept {
    fn num_bytes(&self) -> usize {
        match self {
            Self::Everything(saved) => saved.num_bytes(),
            Self::Input(x) => num_bytes(x),
        }
    }
}

/// Where the backward pass ends.
#[derive(Clone, Copy)]
pub(super) struct Lowest {
    /// The first block that has something trained in it or below it.
    pub(super) block: Option<usize>,
    /// Whether something of the embedding is trained.
    pub(super) embedding: bool,
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
        head::spread_rows(&dx, &self.indices, tokens)
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
        let losses = self.device().step(|| self.losses(batch, targets, terms, label_smoothing))?;
        self.inner.files.finish_pass()?;
        Ok(losses)
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
        let (mut x, rotations) = self.embed(batch, Terms::Same(terms), false)?;
        let spans = self.spans(batch, None, &x)?;
        let (rotations, positions) = (rotations.as_slice(), batch.positions());
        let context = Context {
            rotations,
            positions,
            spans: &spans,
            terms: Terms::Same(terms),
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
        let term = terms.and_then(|terms| terms.get(self.head_id()));
        let loss = head::loss(&hidden, &self.inner.head, term, None, &trained.rows, label_smoothing, None)?;
        Ok(trained.losses(batch.num_tokens(), &loss.rows()?))
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
        let Trainable { terms, parameters } = trainable;
        self.check_terms(terms)?;
        let wanted = self.wanted(parameters)?;
        let lowest = self.lowest(terms, &wanted, parameters);

        let forward = span("forward", Kind::Group);
        let (mut x, rotations) = self.embed(batch, Terms::Same(terms), false)?;
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
            terms: Terms::Same(terms),
            is_inference: false,
            dropout_seed,
            inputs: None,
        };
        let first = lowest.block.unwrap_or(self.inner.blocks.len());
        let mut kept: Vec<Kept> = Vec::new();
        for block in &self.inner.blocks {
            x = if block.layer < first {
                block.forward(&x, context, None)?
            } else if block.layer - first < options.checkpointed_blocks {
                let y = block.forward(&x, context, None)?;
                kept.push(Kept::Input(x));
                y
            } else {
                let (y, saved) = block.forward_saving(&x, context)?;
                kept.push(Kept::Everything(saved));
                y
            };
        }

        drop(forward);
        let of_head = span("head", Kind::Group);
        let stream = trained.gather(&x)?;
        drop(x);
        let hidden = self.inner.norm.forward(&stream)?;
        let head = self.head_parameter();
        let wanted_of_head = HeadWanted {
            scale: options.grad_scale,
            input: lowest.block.is_some() || lowest.embedding || self.inner.norm.is_trained(&wanted),
            weight: wanted[head],
            rows: parameters.rows_of(head).map(|rows| rows.ids.as_slice()),
        };
        let of_terms = terms.and_then(|terms| terms.get(self.head_id()));
        let (smoothing, seed) = (options.label_smoothing, dropout_seed);
        let mut found =
            head::loss(&hidden, &self.inner.head, of_terms, seed, &trained.rows, smoothing, Some(wanted_of_head))?;
        drop(hidden);
        drop(of_head);
        let mut gradients = Gradients {
            terms: vec![None; self.linears().len()],
            parameters: vec![None; self.parameters().len()],
            rows: Vec::new(),
            saved_bytes: kept.iter().map(Kept::num_bytes).sum::<usize>() + num_bytes(&stream),
            room: None,
        };
        let LinearGradients { input, weight, term, .. } = std::mem::take(&mut found.gradients);
        let of_rows = found.gradient_of_rows.take();
        // the CPU learns the losses at the end, when the device has been given everything
        let losses = || -> Result<Losses> { Ok(trained.losses(batch.num_tokens(), &found.rows()?)) };
        gradients.terms[self.head_id()] = term;
        gradients.parameters[head] = weight;
        gradients.rows.extend(of_rows.map(|rows| (head, rows)));

        let _backward = span("backward", Kind::Group);
        let Some(d_hidden) = input else { return Ok((losses()?, gradients)) };
        let dx = self.norm_backward(&stream, &d_hidden, context, &wanted, &mut gradients)?;
        drop((stream, d_hidden));
        if let Some(terms) = terms.filter(|_| dx.device().is_metal()) {
            gradients.room = TermRoom::new(terms, self.embedding_id(), &dx)?;
        }
        let room = gradients.room.clone();
        let mut dx = Some(trained.scatter(dx, batch.num_tokens())?);
        for block in self.inner.blocks.iter().rev() {
            let (Some(kept), Some(dy)) = (kept.pop(), dx.take()) else { break };
            let saved = match kept {
                Kept::Everything(saved) => saved,
                Kept::Input(x) => {
                    let _span = span("forward again", Kind::Group);
                    block.saved_again(&x, context)?
                }
            };
            let input = lowest.embedding || block.layer > first;
            let wanted = BlockWanted { input, trained: &wanted, room: room.as_ref() };
            dx = block.backward(saved, context, dy, wanted, &mut gradients)?;
        }
        if let Some(dx) = dx.filter(|_| lowest.embedding) {
            self.embedding_backward(batch, trainable, &wanted, &dx, &mut gradients)?;
        }
        Ok((losses()?, gradients))
    }

    /// Back through the final norm: the gradient of the stream, added to nothing.
    fn norm_backward(
        &self,
        stream: &Tensor,
        d_hidden: &Tensor,
        context: Context,
        trained: &[bool],
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let mut pass = Backward { context, trained, room: None, factors: Vec::new(), gradients };
        self.inner.norm.backward(stream, d_hidden, None, &mut pass)
    }

    /// Adds the gradients of what is trained of the embedding, from that of its output.
    fn embedding_backward(
        &self,
        batch: &Batch,
        Trainable { terms, parameters }: Trainable,
        wanted: &[bool],
        dx: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let scale = self.inner.embedding_scale;
        if let Some(term) = terms.and_then(|terms| terms.get(self.embedding_id())) {
            gradients.terms[self.embedding_id()] =
                Some(embedding::term_backward(&self.inner.embedding, term, batch.ids(), dx, scale)?);
        }
        let place = self.embedding_parameter();
        if wanted[place] {
            // a tied head has left its part there
            let sum = gradients.parameters[place].take();
            let sum = sum.map_or_else(|| self.inner.embedding.zero_gradient(), Ok)?;
            gradients.parameters[place] = Some(embedding::backward(batch.ids(), dx, sum, scale)?);
        }
        if let Some(rows) = parameters.rows_of(place) {
            // a tied head has left its part here too
            let sum = gradients.rows.iter().position(|(found, _)| *found == place);
            let sum = sum.map(|index| gradients.rows.swap_remove(index).1);
            gradients.rows.push((place, embedding::rows_backward(batch.ids(), dx, &rows.ids, sum, scale)?));
        }
        Ok(())
    }

    /// For each parameter whether its gradient is wanted.
    pub(super) fn wanted(&self, parameters: Parameters) -> Result<Vec<bool>> {
        let count = self.parameters().len();
        let places = match parameters {
            Parameters::None => &[][..],
            Parameters::All => return Ok(vec![true; count]),
            Parameters::Of(places) | Parameters::WithRows(places, _) => places,
        };
        for rows in parameters.rows() {
            let is_whole = places.contains(&rows.place);
            if is_whole || ![self.embedding_parameter(), self.head_parameter()].contains(&rows.place) {
                let message = format!("rows of parameter {}: it is trained as a whole, or is no embedding", rows.place);
                return Err(Error::argument("parameters", message));
            }
        }
        let mut wanted = vec![false; count];
        for &place in places {
            let message = || format!("there is no parameter {place}, the model has {count}");
            *wanted.get_mut(place).ok_or_else(|| Error::argument("parameters", message()))? = true;
        }
        Ok(wanted)
    }

    /// How far down gradients have to go.
    pub(super) fn lowest(&self, terms: Option<&LowRankTerms>, wanted: &[bool], parameters: Parameters) -> Lowest {
        let numbers = || terms.into_iter().flat_map(LowRankTerms::iter).map(|(number, _)| number);
        let of_embedding =
            wanted[self.embedding_parameter()] || parameters.rows_of(self.embedding_parameter()).is_some();
        let embedding = of_embedding || numbers().any(|number| number == self.embedding_id());
        let of_terms = numbers().filter_map(|number| self.linears()[number].layer).min();
        let of_parameters = self.inner.blocks.iter().find(|block| block.is_trained(wanted)).map(|block| block.layer);
        let block = if embedding { Some(0) } else { of_terms.into_iter().chain(of_parameters).min() };
        Lowest { block, embedding }
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
            if let Some((a, b)) = &term.start {
                let rank = a.dim(0)?;
                if a.dims() != [rank, linear.in_features] || b.dims() != [linear.out_features, rank] {
                    let message =
                        format!("A {:?} and B {:?} at the start do not fit `{}`", a.dims(), b.dims(), linear.path);
                    return Err(Error::argument("terms", message));
                }
            }
            if let Some(magnitude) = &term.magnitude {
                let fits =
                    [&magnitude.m, &magnitude.weight_norms_squared].iter().all(|m| m.dims() == [linear.out_features]);
                if !fits {
                    let message = format!("the magnitudes do not fit `{}`", linear.path);
                    return Err(Error::argument("terms", message));
                }
            }
        }
        Ok(())
    }
}
