//! What all parts are given in a pass: the batch, what is trained, and where gradients go; and what the memory of a pass is
//! counted with.

use super::super::gradients::Gradients;
use super::inputs::InputSquares;
use crate::error::{Error, Result};
use crate::ops::LowRankTerms;
use crate::ops::adapters::Terms;
use crate::ops::attention::Spans;
use crate::ops::fused::{Factors, TermRoom};
use crate::ops::linear::add_scaled;
use crate::ops::rotary::Rotation;
use candle_core::{DType, Tensor};

/// What the layers of a model are given beside their input.
#[derive(Clone, Copy)]
pub(in crate::models) struct Context<'a> {
    /// The rotations of the batch's positions, by rotary table.
    pub(in crate::models) rotations: &'a [Rotation],
    /// The position of each token in its sequence.
    pub(in crate::models) positions: &'a [u32],
    pub(in crate::models) spans: &'a Spans,
    pub(in crate::models) terms: Terms<'a>,
    /// Whether no backward pass follows, so that on the CPU a row has the same bits alone and among others.
    pub(in crate::models) is_inference: bool,
    /// In training, the seed of this step's dropout.
    pub(in crate::models) dropout_seed: Option<u64>,
    /// In inference, where the squares of the inputs of linear layers are summed.
    pub(in crate::models) inputs: Option<&'a InputSquares>,
}

/// The backward pass of a layer: which gradients are required beside those of low-rank updates, and those that were computed.
pub(in crate::models) struct Backward<'a, 'g> {
    pub(in crate::models) context: Context<'a>,
    /// For each parameter of the model whether it is trained.
    pub(in crate::models) trained: &'a [bool],
    /// Room for the gradients of the low-rank updates, on a device that computes all of a layer in one launch.
    pub(in crate::models) room: Option<&'a TermRoom>,
    /// The tensors that such a launch reads.
    pub(in crate::models) factors: Vec<Factors<'a>>,
    pub(in crate::models) gradients: &'g mut Gradients,
}

impl Backward<'_, '_> {
    /// Adds the gradient of a parameter.
    pub(in crate::models) fn add(&mut self, parameter: Option<usize>, gradient: Option<Tensor>) -> Result<()> {
        let (Some(index), Some(gradient)) = (parameter, gradient) else { return Ok(()) };
        let sum = match self.gradients.parameters[index].take() {
            Some(sum) => add_scaled(sum, 1.0, &gradient)?,
            None => gradient,
        };
        self.gradients.parameters[index] = Some(sum);
        Ok(())
    }

    pub(in crate::models) fn is_trained(&self, parameter: Option<usize>) -> bool {
        parameter.is_some_and(|index| self.trained[index])
    }
}

/// The error of a launch that did not return a tensor it should have.
pub(in crate::models) fn missing() -> Error {
    Error::Bug("a kernel did not return the expected tensor".into())
}

/// Bytes in use, and the most that were.
#[derive(Debug, Default)]
pub(in crate::models) struct Meter {
    pub(in crate::models) now: usize,
    pub(in crate::models) peak: usize,
}

impl Meter {
    pub(in crate::models) fn take(&mut self, bytes: usize) {
        self.now += bytes;
        self.peak = self.peak.max(self.now);
    }

    pub(in crate::models) fn give(&mut self, bytes: usize) {
        self.now = self.now.saturating_sub(bytes);
    }

    /// Takes and gives back.
    pub(in crate::models) fn touch(&mut self, bytes: usize) {
        self.take(bytes);
        self.give(bytes);
    }
}

/// What the memory of a part depends on beside the part.
#[derive(Clone, Copy)]
pub(in crate::models) struct StepSize<'a> {
    pub(in crate::models) tokens: usize,
    /// The type of activations.
    pub(in crate::models) dtype: DType,
    /// Bytes of the residual stream.
    pub(in crate::models) stream: usize,
    /// Whether gate and up are saved in bf16.
    pub(in crate::models) is_rounded: bool,
    /// Whether the inputs of low-rank gradients live until the end of a layer, where one launch computes them.
    pub(in crate::models) is_gathered: bool,
    pub(in crate::models) terms: Option<&'a LowRankTerms>,
    pub(in crate::models) trained: &'a [bool],
    /// The elements of each parameter.
    pub(in crate::models) elements: &'a [usize],
}

impl StepSize<'_> {
    /// Bytes of activations of this width.
    pub(in crate::models) fn activations(&self, width: usize) -> usize {
        self.tokens * width * self.dtype.size_in_bytes()
    }

    /// Bytes of the gradient of a parameter, if it is trained.
    pub(in crate::models) fn gradient(&self, parameter: Option<usize>) -> usize {
        let trained = parameter.filter(|&index| self.trained[index]);
        trained.map_or(0, |index| self.elements[index] * DType::F32.size_in_bytes())
    }
}
