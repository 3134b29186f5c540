//! Jais 2: Llama with layer norms, an ungated MLP with a squared `ReLU`, and biases in all linear layers.

use super::common::activation;
use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, FeedForwardSpec, NormSpec, PlainMlpSpec};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;

pub(super) const JAIS2: Family = Family {
    model_type: "jais2",
    architecture: "Jais2ForCausalLM",
    defaults: Defaults {
        vocab_size: 150_272,
        hidden_size: 3328,
        intermediate_size: 26_624,
        num_attention_heads: 26,
        max_position_embeddings: 8192,
        norm_eps: ("layer_norm_eps", 1e-5),
        attention_bias: true,
        eos_token_ids: &[150_024],
        ..Defaults::BASE
    },
    describe: jais2,
};

fn jais2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    description.norm = NormSpec { kind: NormKind::Layer, has_bias: true, ..description.norm };
    let mlp = PlainMlpSpec {
        inner: config.intermediate_size,
        activation: activation(keys, "hidden_act", Activation::Relu2)?,
        has_bias: keys.flag("mlp_bias")?.unwrap_or(true),
        names: ["up_proj", "down_proj"],
    };
    for layer in &mut description.layers {
        layer.feed_forward = FeedForwardSpec::Plain(mlp.clone());
    }
    Ok(description)
}
