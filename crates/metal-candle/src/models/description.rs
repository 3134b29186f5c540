//! Describes what a model computes, as data: a family converts the keys of a `config.json` to a [`Description`], and
//! the model is built from it. Every dense family is one combination of values of the fields below.

use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;
use crate::ops::rotary::RotarySpec;
use metal_candle_kernels::Mask;

/// Embedding, layers, final norm and head of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Description {
    pub(crate) embedding: EmbeddingSpec,
    pub(crate) layers: Vec<LayerSpec>,
    /// The kind of all norms of the residual stream, including the final one.
    pub(crate) norm: NormSpec,
    pub(crate) head: HeadSpec,
    /// The rotary tables, which layers refer to by index.
    pub(crate) rotary: Vec<RotarySpec>,
}

/// The token embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct EmbeddingSpec {
    /// The factor on the token embeddings.
    pub(crate) scale: f32,
}

/// The output head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct HeadSpec {
    /// The factor on the logits.
    pub(crate) scale: f32,
    /// The soft cap `c` of `c tanh(logit / c)`, applied after the factor.
    pub(crate) soft_cap: Option<f32>,
}

/// The kind of a norm, and which of its tensors a checkpoint contains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormSpec {
    pub(crate) kind: NormKind,
    pub(crate) eps: f64,
    pub(crate) has_weight: bool,
    pub(crate) has_bias: bool,
}

/// A layer: attention and a feed-forward part, each in a residual branch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerSpec {
    pub(crate) attention: AttentionSpec,
    pub(crate) feed_forward: FeedForwardSpec,
    pub(crate) norms: NormPlacement,
    /// Whether both parts read the same norm of the layer's input: `x + attention(n x) + feed_forward(n x)`.
    pub(crate) is_parallel: bool,
    /// The factor on both branches before they are added to the stream.
    pub(crate) residual_scale: f32,
}

/// The names of a layer's norms; `None` where there is no norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct NormPlacement {
    pub(crate) before_attention: Option<&'static str>,
    pub(crate) after_attention: Option<&'static str>,
    pub(crate) before_feed_forward: Option<&'static str>,
    pub(crate) after_feed_forward: Option<&'static str>,
}

impl NormPlacement {
    /// `x + f(norm(x))` for both parts.
    pub(crate) const PRE: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_feed_forward: Some("post_attention_layernorm"),
        after_feed_forward: None,
    };
    /// `x + norm(f(x))` for both parts.
    pub(crate) const POST: Self = Self {
        before_attention: None,
        after_attention: Some("post_attention_layernorm"),
        before_feed_forward: None,
        after_feed_forward: Some("post_feedforward_layernorm"),
    };
    /// `x + norm(f(norm(x)))` for both parts, with the names of Gemma 2.
    pub(crate) const SANDWICH: Self = Self {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_feed_forward: Some("pre_feedforward_layernorm"),
        after_feed_forward: Some("post_feedforward_layernorm"),
    };
}

/// Attention with grouped key/value heads.
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own")]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttentionSpec {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// The factor on the scores.
    pub(crate) scale: f32,
    pub(crate) mask: Mask,
    /// The soft cap `c` of `c tanh(score / c)`.
    pub(crate) soft_cap: Option<f32>,
    /// The maximum magnitude of the elements of q, k and v; larger ones are clamped.
    pub(crate) clip: Option<f32>,
    /// Whether each head has a sink logit.
    pub(crate) has_sinks: bool,
    /// Whether a checkpoint stores q, k and v as the rows of one tensor, `qkv_proj`.
    pub(crate) is_fused: bool,
    /// Whether q, k and v have a bias.
    pub(crate) has_bias: bool,
    pub(crate) has_output_bias: bool,
    pub(crate) qk_norm: Option<QkNormSpec>,
    /// The index of the rotary table; `None` for attention without positions.
    pub(crate) rotary: Option<usize>,
    pub(crate) query_scaling: Option<QueryScaling>,
}

/// The norms of q and k.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QkNormSpec {
    pub(crate) norm: NormSpec,
    pub(crate) extent: QkNormExtent,
    /// The names of the norms of q and of k.
    pub(crate) names: [&'static str; 2],
    pub(crate) is_after_rotary: bool,
}

/// The elements that a norm of q or k covers, and the shape of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkNormExtent {
    /// Each head separately, all with the same weight: `[head_dim]`.
    Head,
    /// Each head separately, with its own weight: `[heads, head_dim]`.
    OwnHead,
    /// All heads together: `[heads * head_dim]`.
    Width,
}

/// The factor `1 + beta ln(1 + floor(position / original))` on the queries of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QueryScaling {
    pub(crate) beta: f64,
    pub(crate) original_max_position_embeddings: usize,
}

impl QueryScaling {
    /// The factor of a position, rounded as in the reference implementation.
    pub(crate) fn factor(self, position: u32) -> f32 {
        let turns = (position as f32 / self.original_max_position_embeddings as f32).floor();
        1.0 + self.beta as f32 * (1.0 + turns).ln()
    }
}

/// The feed-forward part.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum FeedForwardSpec {
    /// `down(act(gate x) * up x)`.
    Gated(GatedMlpSpec),
    /// `down(act(up x))`.
    Plain(PlainMlpSpec),
}

/// The gated MLP.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GatedMlpSpec {
    pub(crate) inner: usize,
    pub(crate) activation: Activation,
    pub(crate) has_bias: bool,
    /// The path of its tensors, relative to the layer.
    pub(crate) path: &'static str,
    /// The names of its linear layers in a checkpoint.
    pub(crate) projections: GatedProjections,
}

/// How a checkpoint names the linear layers of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GatedProjections {
    /// Gate, up and down.
    Separate([&'static str; 3]),
    /// Gate and up as the rows of one tensor, and down.
    Fused([&'static str; 2]),
}

/// The MLP without a gate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlainMlpSpec {
    pub(crate) inner: usize,
    pub(crate) activation: Activation,
    pub(crate) has_bias: bool,
    /// The names of up and down.
    pub(crate) names: [&'static str; 2],
}

impl Description {
    /// Modifies the attention of each layer; `change` receives the layer's index.
    pub(crate) fn for_each_attention(&mut self, mut change: impl FnMut(usize, &mut AttentionSpec)) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            change(index, &mut layer.attention);
        }
    }

    /// Modifies the gated MLP of each layer that has one.
    pub(crate) fn for_each_gated_mlp(&mut self, mut change: impl FnMut(&mut GatedMlpSpec)) {
        for layer in &mut self.layers {
            if let FeedForwardSpec::Gated(mlp) = &mut layer.feed_forward {
                change(mlp);
            }
        }
    }
}
