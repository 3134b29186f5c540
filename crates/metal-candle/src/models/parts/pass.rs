//! The arguments that all parts share: the context of a forward pass, the state of a backward pass, and the sizes from
//! which memory is predicted.

use super::super::gradients::Gradients;
use super::inputs::InputSquares;
use crate::error::{Error, Result};
use crate::ops::LowRankUpdates;
use crate::ops::adapters::BatchUpdates;
use crate::ops::attention::Spans;
use crate::ops::fused::{GradientFactors, LowRankGradientBuffer};
use crate::ops::linear::add_scaled;
use crate::ops::rotary::Rotation;
use candle_core::{DType, Tensor};

/// The arguments of layers besides their input.
#[derive(Clone, Copy)]
pub(in crate::models) struct Context<'a> {
    /// The rotations of the batch's positions, for each rotary table.
    pub(in crate::models) rotations: &'a [Rotation],
    /// The position of each token in its sequence.
    pub(in crate::models) positions: &'a [u32],
    pub(in crate::models) spans: &'a Spans,
    pub(in crate::models) updates: BatchUpdates<'a>,
    /// Whether no backward pass follows. On the CPU the result of a row then does not depend on the other rows, bit for
    /// bit.
    pub(in crate::models) is_inference: bool,
    /// The seed of dropout in this training step; `None` outside training.
    pub(in crate::models) dropout_seed: Option<u64>,
    /// Sums the squares of the inputs of linear layers, in inference.
    pub(in crate::models) inputs: Option<&'a InputSquares>,
}

/// The state of a layer's backward pass: the required gradients besides those of low-rank updates, and the results.
pub(in crate::models) struct Backward<'a, 'g> {
    pub(in crate::models) context: Context<'a>,
    /// Whether each parameter of the model is trained.
    pub(in crate::models) trained: &'a [bool],
    /// The buffer for the gradients of low-rank updates, on a device that computes those of a layer in one launch.
    pub(in crate::models) low_rank_buffer: Option<&'a LowRankGradientBuffer>,
    /// The tensors from which such a launch computes gradients.
    pub(in crate::models) factors: Vec<GradientFactors<'a>>,
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

/// The error for a missing tensor, which only a bug can cause.
pub(in crate::models) fn missing() -> Error {
    Error::Bug("a kernel did not return the expected tensor".into())
}

/// Tracks the bytes in use and their peak.
#[derive(Debug, Default)]
pub(in crate::models) struct MemoryMeter {
    pub(in crate::models) now: usize,
    pub(in crate::models) peak: usize,
}

impl MemoryMeter {
    pub(in crate::models) fn allocate(&mut self, bytes: usize) {
        self.now += bytes;
        self.peak = self.peak.max(self.now);
    }

    pub(in crate::models) fn free(&mut self, bytes: usize) {
        self.now = self.now.saturating_sub(bytes);
    }

    /// Allocates and frees, which affects only the peak.
    pub(in crate::models) fn allocate_temporarily(&mut self, bytes: usize) {
        self.allocate(bytes);
        self.free(bytes);
    }
}

/// The sizes that the memory of a part depends on.
#[derive(Clone, Copy)]
pub(in crate::models) struct StepSize<'a> {
    pub(in crate::models) tokens: usize,
    /// The dtype of activations.
    pub(in crate::models) dtype: DType,
    /// The size of the residual stream, in bytes.
    pub(in crate::models) stream: usize,
    /// Whether gate and up are saved in bf16.
    pub(in crate::models) is_rounded: bool,
    /// Whether the inputs of low-rank gradients stay allocated until the end of a layer, because one launch computes
    /// them all.
    pub(in crate::models) is_gathered: bool,
    pub(in crate::models) updates: Option<&'a LowRankUpdates>,
    pub(in crate::models) trained: &'a [bool],
    /// The number of elements of each parameter.
    pub(in crate::models) elements: &'a [usize],
}

impl StepSize<'_> {
    /// The size of activations of this width, in bytes.
    pub(in crate::models) fn activations(&self, width: usize) -> usize {
        self.tokens * width * self.dtype.size_in_bytes()
    }

    /// The size of the gradient of a parameter in bytes; 0 if it is frozen.
    pub(in crate::models) fn gradient(&self, parameter: Option<usize>) -> usize {
        let trained = parameter.filter(|&index| self.trained[index]);
        trained.map_or(0, |index| self.elements[index] * DType::F32.size_in_bytes())
    }
}
