//! The feed-forward part of a layer: dispatches to the gated or the plain MLP.

use super::super::description::FeedForwardSpec;
use super::super::kv_cache::KVCache;
use super::super::registry::Registry;
use super::super::tensors::Tensors;
use super::gated_mlp::{GatedMlp, GatedMlpSaved, GatedMlpSlots};
use super::input::{Input, Output};
use super::pass::{Backward, Context, MemoryMeter, StepSize, missing};
use super::plain_mlp::{PlainMlp, PlainMlpSaved, PlainMlpSlots};
use super::sublayer::{Part, Saved};
use crate::error::Result;
use candle_core::Tensor;

/// The registered tensors of a feed-forward part.
#[derive(Debug)]
pub(in crate::models) enum FeedForwardSlots {
    Gated(GatedMlpSlots),
    Plain(PlainMlpSlots),
}

impl FeedForwardSlots {
    pub(in crate::models) fn new(spec: &FeedForwardSpec, registry: &mut Registry, hidden: usize) -> Self {
        match spec {
            FeedForwardSpec::Gated(spec) => Self::Gated(GatedMlpSlots::new(spec, registry, hidden)),
            FeedForwardSpec::Plain(spec) => Self::Plain(PlainMlpSlots::new(spec, registry, hidden)),
        }
    }
}

/// The feed-forward part of a layer.
#[derive(Debug)]
pub(in crate::models) enum FeedForward {
    Gated(GatedMlp),
    Plain(PlainMlp),
}

/// The tensors that its backward pass reads.
pub(in crate::models) enum FeedForwardSaved {
    Gated(GatedMlpSaved),
    Plain(PlainMlpSaved),
}

impl Saved for FeedForwardSaved {
    fn num_bytes(&self) -> usize {
        match self {
            Self::Gated(saved) => saved.num_bytes(),
            Self::Plain(saved) => saved.num_bytes(),
        }
    }
}

impl FeedForward {
    pub(in crate::models) fn new(spec: &FeedForwardSpec, slots: &FeedForwardSlots, tensors: &Tensors) -> Result<Self> {
        match (spec, slots) {
            (FeedForwardSpec::Gated(spec), FeedForwardSlots::Gated(slots)) => {
                Ok(Self::Gated(GatedMlp::new(spec, slots, tensors)?))
            }
            (FeedForwardSpec::Plain(spec), FeedForwardSlots::Plain(slots)) => {
                Ok(Self::Plain(PlainMlp::new(spec, slots, tensors)?))
            }
            _ => Err(missing()),
        }
    }

    /// Bytes saved for backward, besides the input.
    pub(in crate::models) fn saved_memory(&self, size: StepSize) -> usize {
        match self {
            Self::Gated(part) => part.saved_memory(size),
            Self::Plain(part) => part.saved_memory(size),
        }
    }
}

impl Part for FeedForward {
    type Saved = FeedForwardSaved;

    fn forward<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        cache: Option<&mut KVCache>,
    ) -> Result<Output<'a>> {
        match self {
            Self::Gated(part) => part.forward(input, residual, context, cache),
            Self::Plain(part) => part.forward(input, residual, context, cache),
        }
    }

    fn forward_saving<'a>(
        &'a self,
        input: &Input,
        residual: Option<&Tensor>,
        context: Context<'a>,
        skips_output: bool,
    ) -> Result<(Option<Output<'a>>, FeedForwardSaved)> {
        match self {
            Self::Gated(part) => {
                let (output, saved) = part.forward_saving(input, residual, context, skips_output)?;
                Ok((output, FeedForwardSaved::Gated(saved)))
            }
            Self::Plain(part) => {
                let (output, saved) = part.forward_saving(input, residual, context, skips_output)?;
                Ok((output, FeedForwardSaved::Plain(saved)))
            }
        }
    }

    fn backward<'a>(
        &'a self,
        input: &Input,
        saved: FeedForwardSaved,
        dy: &Tensor,
        carry: Tensor,
        needs_input: bool,
        pass: &mut Backward<'a, '_>,
    ) -> Result<Option<Tensor>> {
        match (self, saved) {
            (Self::Gated(part), FeedForwardSaved::Gated(saved)) => {
                part.backward(input, saved, dy, carry, needs_input, pass)
            }
            (Self::Plain(part), FeedForwardSaved::Plain(saved)) => {
                part.backward(input, saved, dy, carry, needs_input, pass)
            }
            _ => Err(missing()),
        }
    }

    fn forward_memory(&self, size: StepSize, is_saving: bool, skips_output: bool, meter: &mut MemoryMeter) {
        match self {
            Self::Gated(part) => part.forward_memory(size, is_saving, skips_output, meter),
            Self::Plain(part) => part.forward_memory(size, is_saving, skips_output, meter),
        }
    }

    fn backward_memory(&self, size: StepSize, needs_input: bool, meter: &mut MemoryMeter) -> usize {
        match self {
            Self::Gated(part) => part.backward_memory(size, needs_input, meter),
            Self::Plain(part) => part.backward_memory(size, needs_input, meter),
        }
    }
}
