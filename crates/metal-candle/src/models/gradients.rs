//! Selects what is trained in a training step, and stores the gradients.

use crate::ops::fused::LowRankGradientBuffer;
use crate::ops::{LowRankGradients, LowRankUpdates};
use candle_core::Tensor;

/// The tensors to train. All others are frozen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trainable<'a> {
    /// The low-rank updates of an adapter. The forward pass uses them too.
    pub low_rank: Option<&'a LowRankUpdates>,
    /// Parameters of the model.
    pub parameters: Parameters<'a>,
}

/// Parameters of a model, by their index in [`Model::parameters`](super::Model::parameters).
#[derive(Debug, Clone, Copy, Default)]
pub enum Parameters<'a> {
    /// No parameters.
    #[default]
    None,
    /// These parameters.
    Of(&'a [usize]),
    /// These parameters, and single rows of others.
    WithRows(&'a [usize], &'a [TokenRows]),
    /// All parameters.
    All,
}

/// Rows of the embedding or the head that are trained while its other rows are frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRows {
    /// The index of the parameter in [`Model::parameters`](super::Model::parameters). The rows of an embedding with a
    /// tied head are rows of the head too.
    pub parameter: usize,
    /// The token ids, without duplicates.
    pub ids: Vec<u32>,
}

impl<'a> Parameters<'a> {
    pub(super) fn rows(self) -> &'a [TokenRows] {
        if let Self::WithRows(_, rows) = self { rows } else { &[] }
    }

    /// The trained rows of the parameter with this index.
    pub(super) fn rows_of(self, index: usize) -> Option<&'a TokenRows> {
        self.rows().iter().find(|rows| rows.parameter == index)
    }
}

impl<'a> Trainable<'a> {
    /// Trains only the low-rank updates.
    pub fn low_rank(updates: &'a LowRankUpdates) -> Self {
        Self { low_rank: Some(updates), parameters: Parameters::None }
    }

    /// Trains every parameter of the model.
    pub fn all() -> Self {
        Self { low_rank: None, parameters: Parameters::All }
    }
}

/// The gradients of `grad_scale * sum(losses.rows)`, f32, and `None` for frozen tensors.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// The gradients of low-rank updates, by layer id in [`Model::linears`](super::Model::linears).
    pub low_rank: Vec<Option<LowRankGradients>>,
    /// The gradients of parameters, by index in [`Model::parameters`](super::Model::parameters).
    pub parameters: Vec<Option<Tensor>>,
    /// The gradients of the trained rows of parameters, with the index of the parameter: `[rows, hidden]`.
    pub rows: Vec<(usize, Tensor)>,
    /// Bytes saved between the forward and the backward pass.
    pub saved_bytes: usize,
    /// The buffer that contains the gradients of all low-rank updates, on a device that gathers them.
    pub(crate) low_rank_buffer: Option<LowRankGradientBuffer>,
}

/// Selects one of [`Gradients`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientOf {
    /// A of the low-rank update of this layer.
    A(usize),
    /// B of the low-rank update of this layer.
    B(usize),
    /// The DoRA magnitudes of this layer.
    Magnitude(usize),
    /// The parameter with this index.
    Parameter(usize),
    /// The trained rows of the parameter with this index.
    Rows(usize),
}

impl Gradients {
    /// A gradient, if it was computed.
    pub fn get(&self, of: GradientOf) -> Option<&Tensor> {
        let update = |id: usize| self.low_rank.get(id).and_then(Option::as_ref);
        match of {
            GradientOf::A(id) => update(id).map(|update| &update.a),
            GradientOf::B(id) => update(id).map(|update| &update.b),
            GradientOf::Magnitude(id) => update(id).and_then(|update| update.magnitude.as_ref()),
            GradientOf::Parameter(index) => self.parameters.get(index).and_then(Option::as_ref),
            GradientOf::Rows(index) => self.rows.iter().find(|(found, _)| *found == index).map(|(_, rows)| rows),
        }
    }

    /// All gradients that were computed.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        let of_updates = self
            .low_rank
            .iter()
            .flatten()
            .flat_map(|update| [Some(&update.a), Some(&update.b), update.magnitude.as_ref()]);
        of_updates.flatten().chain(self.parameters.iter().flatten()).chain(self.rows.iter().map(|(_, rows)| rows))
    }
}
