//! What is trained of a model, and its gradients.

use crate::ops::fused::TermRoom;
use crate::ops::{LowRankTerms, TermGradients};
use candle_core::Tensor;

/// What is trained; everything else is frozen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trainable<'a> {
    /// The low-rank terms, which also take part in the forward pass.
    pub terms: Option<&'a LowRankTerms>,
    /// Parameters of the model itself.
    pub parameters: Parameters<'a>,
}

/// Some of a model's parameters, by their place in [`Model::parameters`](super::Model::parameters).
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
    /// The place of the parameter in [`Model::parameters`](super::Model::parameters). Rows of an embedding with a tied head are rows of the head too.
    pub place: usize,
    /// The ids of the tokens, each once.
    pub ids: Vec<u32>,
}

impl<'a> Parameters<'a> {
    pub(super) fn rows(self) -> &'a [TokenRows] {
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

/// The gradients of `grad_scale * sum(losses.rows)`, f32, and nothing for frozen tensors.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// By the number of the layer in [`Model::linears`](super::Model::linears).
    pub terms: Vec<Option<TermGradients>>,
    /// By the place in [`Model::parameters`](super::Model::parameters).
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
