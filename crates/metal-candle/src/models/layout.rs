//! Registers the parameters and linear layers of a model, in the order of its checkpoints.

use super::description::Description;
use super::parts::attention::AttentionSlots;
use super::parts::feed_forward::FeedForwardSlots;
use super::registry::{LinearId, LinearInfo, NormSlot, ParameterSpec, Registry, Role};
use std::ops::Range;

/// The registered tensors of a layer.
#[derive(Debug)]
pub(super) struct LayerSlots {
    pub(super) attention: AttentionSlots,
    pub(super) feed_forward: FeedForwardSlots,
    pub(super) before_attention: Option<NormSlot>,
    pub(super) after_attention: Option<NormSlot>,
    pub(super) before_feed_forward: Option<NormSlot>,
    pub(super) after_feed_forward: Option<NormSlot>,
    /// The indices of its parameters.
    pub(super) parameters: Range<usize>,
}

/// Registers the parameters and linear layers of a model, in the order of its checkpoints.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) parameters: Vec<ParameterSpec>,
    pub(super) linears: Vec<LinearInfo>,
    pub(super) layers: Vec<LayerSlots>,
    pub(super) norm: NormSlot,
    /// The index of the embedding's parameter.
    pub(super) embedding: usize,
    /// The index of the head's parameter: that of the embedding if they are tied.
    pub(super) head: usize,
    pub(super) embedding_id: LinearId,
    pub(super) head_id: LinearId,
}

impl Layout {
    pub(super) fn new(description: &Description, [vocab, hidden]: [usize; 2], is_tied: bool) -> Self {
        let mut registry = Registry::default();
        let embedding = registry.parameter("model.embed_tokens.weight", vec![vocab, hidden], Role::Embedding);
        let mut layers = Vec::with_capacity(description.layers.len());
        for (index, layer) in description.layers.iter().enumerate() {
            registry.layer = Some(index);
            let first_parameter = registry.parameters.len();
            let attention = AttentionSlots::new(&layer.attention, &mut registry, hidden);
            let feed_forward = FeedForwardSlots::new(&layer.feed_forward, &mut registry, hidden);
            let mut norm =
                |name: Option<&str>| name.map(|name| registry.norm(name, description.norm, hidden, &[hidden]));
            let names = layer.norms;
            layers.push(LayerSlots {
                before_attention: norm(names.before_attention),
                before_feed_forward: norm(names.before_feed_forward),
                after_attention: norm(names.after_attention),
                after_feed_forward: norm(names.after_feed_forward),
                attention,
                feed_forward,
                parameters: first_parameter..registry.parameters.len(),
            });
        }
        registry.layer = None;
        let norm = registry.norm("model.norm", description.norm, hidden, &[hidden]);
        let head =
            if is_tied { embedding } else { registry.parameter("lm_head.weight", vec![vocab, hidden], Role::Matrix) };
        let embedding_id = registry.add_linear("model.embed_tokens".into(), "embed_tokens", [vocab, hidden], embedding);
        let head_id = registry.add_linear("lm_head".into(), "lm_head", [hidden, vocab], head);
        let Registry { parameters, linears, .. } = registry;
        Self { parameters, linears, layers, norm, embedding, head, embedding_id, head_id }
    }
}
