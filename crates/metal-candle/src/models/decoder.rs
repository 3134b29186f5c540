//! The decoder: one description-driven stack of blocks for all families.

use super::{Batch, KVCache, ModelConfig, families};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::LowRankTerms;
use candle_core::{DType, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// A model: immutable, shared weights. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ModelConfig,
    device: Device,
    dtype: DType,
    linears: Vec<LinearInfo>,
    parameters: Vec<(String, Tensor)>,
}

/// A linear layer of a model, known to adapters by its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearInfo {
    /// Path in the checkpoint without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// The block it is in.
    pub layer: usize,
    /// Last part of the path: `q_proj`.
    pub module: &'static str,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

/// The rows of a batch whose logits are wanted.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// Each token's.
    All,
    /// Those of the last token of each sequence.
    Last,
    /// Those of the tokens with these indices.
    Of(&'a [usize]),
}

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

impl Model {
    /// A model of these tensors, named as in a checkpoint of the family.
    ///
    /// # Errors
    /// All missing, unexpected and misshaped tensors, in one error.
    pub fn from_tensors(config: ModelConfig, tensors: HashMap<String, Tensor>, device: Device) -> Result<Self> {
        let _ = (config, tensors, device);
        Err(Error::Unsupported("from_tensors".into()))
    }

    /// Name and shape of every tensor a checkpoint of this configuration holds.
    pub fn parameter_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        families::qwen2::parameters(config)
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.inner.device
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// The dtype of activations: f32 on the CPU, else that of the weights.
    pub fn activation_dtype(&self) -> DType {
        if self.inner.device.is_cpu() { DType::F32 } else { self.inner.dtype }
    }

    /// The linear layers that an adapter can extend, by number.
    pub fn linears(&self) -> &[LinearInfo] {
        &self.inner.linears
    }

    /// Name and tensor of each parameter, in the order of [`Model::parameter_shapes`]; a tied head is not listed.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.inner.parameters
    }

    /// Logits of the wanted rows: `[rows, vocab_size]`, f32.
    ///
    /// With a cache, each sequence continues what its slot holds, and is added to it.
    ///
    /// # Errors
    /// A token id is out of range, the cache is full, or positions do not continue it.
    pub fn forward(
        &self,
        batch: &Batch,
        terms: Option<&LowRankTerms>,
        cache: Option<&mut KVCache>,
        rows: Rows,
    ) -> Result<Tensor> {
        let _ = (batch, terms, cache, rows);
        Err(Error::Unsupported("forward".into()))
    }

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
        let _ = (batch, targets, terms, label_smoothing);
        Err(Error::Unsupported("loss".into()))
    }

    /// The loss of each token and the gradients of `grad_scale * sum(rows)`.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        trainable: Trainable,
        options: LossOptions,
    ) -> Result<(Losses, Gradients)> {
        let _ = (batch, targets, trainable, options);
        Err(Error::Unsupported("loss_and_gradients".into()))
    }
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
