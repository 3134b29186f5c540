//! Registers the names, shapes and roles of parameters, and the linear layers that adapters extend, when a model is
//! built.

use super::description::NormSpec;
use crate::ops::norm::NormKind;

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSpec {
    /// The name in a checkpoint: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape, `[out_features, in_features]` for a linear layer.
    pub shape: Vec<usize>,
    /// How the model uses it.
    pub role: Role,
}

/// How a model uses a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The token embedding, which may also be the head.
    Embedding,
    /// The matrix of a linear layer.
    Matrix,
    /// The bias of a linear layer or of a norm, or another vector that is initialized to 0.
    Bias,
    /// The weight of a norm.
    Norm {
        /// Whether the norm multiplies by `1 + weight`, so that the weight is initialized to 0 instead of 1.
        is_offset: bool,
    },
}

/// The index of a linear layer among [`super::Model::linears`].
pub type LinearId = usize;

/// A linear layer of a model. Adapters refer to it by its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearInfo {
    /// Path in the checkpoint without `.weight`: `model.layers.0.self_attn.q_proj`, `model.embed_tokens`, `lm_head`.
    pub path: String,
    /// The block that contains it; `None` for the embedding and the head.
    pub layer: Option<usize>,
    /// Last part of the path: `q_proj`.
    pub module: &'static str,
    /// Width of its input; for the embedding the size of the vocabulary.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// The index of its weight among [`super::Model::parameters`].
    pub weight: usize,
}

/// The registered ids of a linear layer and its tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearSlot {
    pub(super) id: LinearId,
    /// The index of the weight's parameter.
    pub(super) weight: usize,
    pub(super) bias: Option<usize>,
    pub(super) name: &'static str,
}

/// The registered ids of a norm's tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormSlot {
    pub(super) spec: NormSpec,
    /// The number of elements that are normalized together.
    pub(super) width: usize,
    pub(super) weight: Option<usize>,
    pub(super) bias: Option<usize>,
}

/// The registry that parts add their tensors to.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) parameters: Vec<ParameterSpec>,
    pub(super) linears: Vec<LinearInfo>,
    pub(super) layer: Option<usize>,
}

impl Registry {
    /// The path of `name` in the layer that is being registered.
    pub(super) fn path(&self, name: &str) -> String {
        match self.layer {
            Some(layer) => format!("model.layers.{layer}.{name}"),
            None => name.to_string(),
        }
    }

    /// Adds a parameter of the current layer, and returns its index.
    pub(super) fn parameter(&mut self, name: &str, shape: Vec<usize>, role: Role) -> usize {
        self.parameters.push(ParameterSpec { name: self.path(name), shape, role });
        self.parameters.len() - 1
    }

    /// Adds a linear layer at `folder.name` with its parameters.
    pub(super) fn linear(
        &mut self,
        folder: &str,
        name: &'static str,
        [in_features, out_features]: [usize; 2],
        has_bias: bool,
    ) -> LinearSlot {
        let path = format!("{folder}.{name}");
        let weight = self.parameter(&format!("{path}.weight"), vec![out_features, in_features], Role::Matrix);
        let bias = has_bias.then(|| self.parameter(&format!("{path}.bias"), vec![out_features], Role::Bias));
        let id = self.add_linear(self.path(&path), name, [in_features, out_features], weight);
        LinearSlot { id, weight, bias, name }
    }

    /// Adds a linear layer whose weight has been registered.
    pub(super) fn add_linear(
        &mut self,
        path: String,
        module: &'static str,
        sizes: [usize; 2],
        weight: usize,
    ) -> LinearId {
        let ([in_features, out_features], layer) = (sizes, self.layer);
        self.linears.push(LinearInfo { path, layer, module, in_features, out_features, weight });
        self.linears.len() - 1
    }

    /// Adds a norm over runs of `width` elements, with a weight of this shape.
    pub(super) fn norm(&mut self, name: &str, spec: NormSpec, width: usize, shape: &[usize]) -> NormSlot {
        let role = Role::Norm { is_offset: matches!(spec.kind, NormKind::Rms { offset } if offset != 0.0) };
        let weight = spec.has_weight.then(|| self.parameter(&format!("{name}.weight"), shape.to_vec(), role));
        let bias = spec.has_bias.then(|| self.parameter(&format!("{name}.bias"), shape.to_vec(), Role::Bias));
        NormSlot { spec, width, weight, bias }
    }
}
