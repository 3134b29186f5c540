//! Losses and gradients: the training pass through the decoder.

use super::block::{BlockSaved, BlockWanted, Context};
use super::decoder::gather_rows;
use super::{Batch, Model};
use crate::error::{Error, Result};
use crate::ops::fused::TermRoom;
use crate::ops::head::{self, HeadWanted};
use crate::ops::linear::LinearGradients;
use crate::ops::norm::NormWanted;
use crate::ops::{LowRankTerms, TermGradients, embedding, num_bytes};
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

/// What gradients are wanted for; everything else is frozen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trainable<'a> {
    /// The low-rank terms, which also take part in the forward pass.
    pub terms: Option<&'a LowRankTerms>,
    /// Parameters of the model itself.
    pub parameters: Parameters<'a>,
}

/// Some of a model's parameters, by their place in [`Model::parameters`].
#[derive(Debug, Clone, Copy, Default)]
pub enum Parameters<'a> {
    /// None.
    #[default]
    None,
    /// These.
    Of(&'a [usize]),
    /// These, and single rows of others.
    WithRows(&'a [usize], &'a [TokenRows]),
    /// Each.
    All,
}

/// Rows of the embedding or of the head that are trained, while its other rows are frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRows {
    /// The place of the parameter in [`Model::parameters`]. Rows of an embedding with a tied head are rows of the head too.
    pub place: usize,
    /// The ids of the tokens, each once.
    pub ids: Vec<u32>,
}

impl<'a> Parameters<'a> {
    fn rows(self) -> &'a [TokenRows] {
        if let Self::WithRows(_, rows) = self { rows } else { &[] }
    }

    /// The trained rows of the parameter at `place`.
    pub(super) fn rows_of(self, place: usize) -> Option<&'a TokenRows> {
        self.rows().iter().find(|rows| rows.place == place)
    }
}

impl<'a> Trainable<'a> {
    /// The low-rank terms alone.
    pub fn low_rank(terms: &'a LowRankTerms) -> Self {
        Self { terms: Some(terms), parameters: Parameters::None }
    }

    /// Every parameter of the model.
    pub fn all() -> Self {
        Self { terms: None, parameters: Parameters::All }
    }
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
    /// By the number of the layer in [`Model::linears`].
    pub terms: Vec<Option<TermGradients>>,
    /// By the place in [`Model::parameters`].
    pub parameters: Vec<Option<Tensor>>,
    /// Of the trained rows of a parameter, by its place: `[rows, hidden]`.
    pub rows: Vec<(usize, Tensor)>,
    /// Bytes kept between the forward and the backward pass.
    pub saved_bytes: usize,
    /// What holds gradients of terms together, on a device that gathers them.
    pub(crate) room: Option<TermRoom>,
}

/// One of [`Gradients`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientOf {
    /// That of A of the term with this number.
    A(usize),
    /// That of B of the term with this number.
    B(usize),
    /// That of the magnitudes of the term with this number.
    Magnitude(usize),
    /// That of the parameter at this place.
    Parameter(usize),
    /// That of the trained rows of the parameter at this place.
    Rows(usize),
}

impl Gradients {
    /// One of the gradients, if it was computed.
    pub fn get(&self, of: GradientOf) -> Option<&Tensor> {
        let term = |number: usize| self.terms.get(number).and_then(Option::as_ref);
        match of {
            GradientOf::A(number) => term(number).map(|term| &term.a),
            GradientOf::B(number) => term(number).map(|term| &term.b),
            GradientOf::Magnitude(number) => term(number).and_then(|term| term.magnitude.as_ref()),
            GradientOf::Parameter(place) => self.parameters.get(place).and_then(Option::as_ref),
            GradientOf::Rows(place) => self.rows.iter().find(|(found, _)| *found == place).map(|(_, rows)| rows),
        }
    }

    /// All gradients that were computed.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        let of_terms =
            self.terms.iter().flatten().flat_map(|term| [Some(&term.a), Some(&term.b), term.magnitude.as_ref()]);
        of_terms.flatten().chain(self.parameters.iter().flatten()).chain(self.rows.iter().map(|(_, rows)| rows))
    }
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

/// The place of the embedding in [`Model::parameters`].
pub(super) const EMBEDDING_PARAMETER: usize = 0;

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
        let (mut x, rotation) = self.embed(batch, terms)?;
        let spans = self.spans(batch, None, &x)?;
        let context = Context { rotation: &rotation, spans: &spans, terms, dropout_seed: None };
        for block in &self.inner.blocks {
            x = block.forward(&x, context, None)?;
        }
        if trained.rows.is_empty() {
            return Ok(trained.losses(batch.num_tokens(), &[]));
        }
        let hidden = self.inner.norm.forward(&trained.gather(&x)?)?;
        let term = terms.and_then(|terms| terms.get(self.head_number()));
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
        let Trainable { terms, parameters } = trainable;
        self.check_terms(terms)?;
        let wanted = self.wanted(parameters)?;
        let lowest = self.lowest(terms, &wanted, parameters);

        let forward = span("forward", Kind::Group);
        let (mut x, rotation) = self.embed(batch, terms)?;
        if options.neftune_noise_alpha > 0.0 {
            x = embedding::add_noise(x, batch.offsets(), options.neftune_noise_alpha, options.dropout_seed)?;
        }
        let dropout_seed = Some(options.dropout_seed);
        let spans = self.spans(batch, None, &x)?;
        let context = Context { rotation: &rotation, spans: &spans, terms, dropout_seed };
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
            input: lowest.block.is_some() || lowest.embedding || wanted[self.norm_parameter()],
            weight: wanted[head],
            rows: parameters.rows_of(head).map(|rows| rows.ids.as_slice()),
        };
        let of_terms = terms.and_then(|terms| terms.get(self.head_number()));
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
        gradients.terms[self.head_number()] = term;
        gradients.parameters[head] = weight;
        gradients.rows.extend(of_rows.map(|rows| (head, rows)));

        let _backward = span("backward", Kind::Group);
        let Some(d_hidden) = input else { return Ok((losses()?, gradients)) };
        let norm = self.norm_parameter();
        let wanted_of_norm = NormWanted { weight: wanted[norm], bias: false };
        let (dx, d_norm) = self.inner.norm.backward(&stream, &d_hidden, None, wanted_of_norm)?;
        gradients.parameters[norm] = d_norm.weight;
        drop((stream, d_hidden));
        if let Some(terms) = terms.filter(|_| dx.device().is_metal()) {
            gradients.room = TermRoom::new(terms, self.embedding_number(), &dx)?;
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
            let wanted = BlockWanted { input, parameters: &wanted, room: room.as_ref() };
            dx = block.backward(saved, context, dy, wanted, &mut gradients)?;
        }
        if let Some(dx) = dx.filter(|_| lowest.embedding) {
            self.embedding_backward(batch, trainable, &wanted, &dx, &mut gradients)?;
        }
        Ok((losses()?, gradients))
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
        if let Some(term) = terms.and_then(|terms| terms.get(self.embedding_number())) {
            gradients.terms[self.embedding_number()] =
                Some(embedding::term_backward(&self.inner.embedding, term, batch.ids(), dx, 1.0)?);
        }
        let place = EMBEDDING_PARAMETER;
        if wanted[place] {
            // a tied head has left its part there
            let sum = gradients.parameters[place].take();
            let sum = sum.map_or_else(|| self.inner.embedding.zero_gradient(), Ok)?;
            gradients.parameters[place] = Some(embedding::backward(batch.ids(), dx, sum, 1.0)?);
        }
        if let Some(rows) = parameters.rows_of(place) {
            // a tied head has left its part here too
            let sum = gradients.rows.iter().position(|(found, _)| *found == place);
            let sum = sum.map(|index| gradients.rows.swap_remove(index).1);
            gradients.rows.push((place, embedding::rows_backward(batch.ids(), dx, &rows.ids, sum, 1.0)?));
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
            if is_whole || ![EMBEDDING_PARAMETER, self.head_parameter()].contains(&rows.place) {
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
        let of_embedding = wanted[EMBEDDING_PARAMETER] || parameters.rows_of(EMBEDDING_PARAMETER).is_some();
        let embedding = of_embedding || numbers().any(|number| number == self.embedding_number());
        let of_terms = numbers().filter_map(|number| self.linears()[number].layer).min();
        let of_parameters =
            self.inner.blocks.iter().find(|block| block.parameters.any(wanted)).map(|block| block.layer);
        let block = if embedding { Some(0) } else { of_terms.into_iter().chain(of_parameters).min() };
        Lowest { block, embedding }
    }

    pub(super) fn norm_parameter(&self) -> usize {
        self.parameters().len() - if self.config().tie_word_embeddings { 1 } else { 2 }
    }

    pub(super) fn head_parameter(&self) -> usize {
        if self.config().tie_word_embeddings { EMBEDDING_PARAMETER } else { self.parameters().len() - 1 }
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
