//! `StarCoder2` (<https://arxiv.org/abs/2402.19173>, section 5.1): layer norms, an ungated MLP, and biases in all
//! linear layers.

use super::common::{activation, decoder, set_windows, sliding_window};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, FeedForwardSpec, NormSpec, PlainMlpSpec};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;
use crate::ops::norm::NormKind;

pub(super) const STARCODER2: Family = Family {
    model_type: "starcoder2",
    architecture: "Starcoder2ForCausalLM",
    defaults: Defaults {
        vocab_size: 49_152,
        hidden_size: 3072,
        intermediate_size: 12_288,
        num_hidden_layers: 30,
        num_attention_heads: 24,
        max_position_embeddings: 4096,
        norm_eps: ("norm_epsilon", 1e-5),
        tie_word_embeddings: true,
        num_key_value_heads: KeyValueHeads::Of(2),
        eos_token_ids: &[50_256],
        ..Defaults::BASE
    },
    describe: starcoder2,
};

fn starcoder2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let has_bias = keys.flag("use_bias")?.unwrap_or(true);
    config.attention_bias = has_bias;
    let mut description = decoder(config, keys)?;
    let size = sliding_window(keys, None)?;
    let is_sliding = vec![size.is_some(); config.num_hidden_layers];
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    description.norm = NormSpec { kind: NormKind::Layer, has_bias: true, ..description.norm };
    description.for_each_attention(|_, attention| attention.has_output_bias = has_bias);
    let mlp = PlainMlpSpec {
        inner: config.intermediate_size,
        activation: activation(keys, "hidden_act", Activation::GeluTanh)?,
        has_bias,
        names: ["c_fc", "c_proj"],
    };
    for layer in &mut description.layers {
        layer.feed_forward = FeedForwardSpec::Plain(mlp.clone());
    }
    Ok(description)
}
