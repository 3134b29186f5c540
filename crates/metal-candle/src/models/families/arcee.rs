//! Arcee's foundation models (AFM): Llama with an ungated MLP and a squared `ReLU` (<https://arxiv.org/abs/2109.08668>,
//! section 3).

use super::common::activation;
use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, FeedForwardSpec, PlainMlpSpec};
use crate::models::keys::Keys;
use crate::ops::activation::Activation;

pub(super) const ARCEE: Family = Family {
    model_type: "arcee",
    architecture: "ArceeForCausalLM",
    defaults: Defaults {
        hidden_size: 2560,
        intermediate_size: 18_432,
        max_position_embeddings: 4096,
        norm_eps: ("rms_norm_eps", 1e-5),
        eos_token_ids: &[128_001],
        ..Defaults::BASE
    },
    describe: arcee,
};

fn arcee(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    let mlp = PlainMlpSpec {
        inner: config.intermediate_size,
        activation: activation(keys, "hidden_act", Activation::Relu2)?,
        has_bias: keys.flag("mlp_bias")?.unwrap_or(false),
        names: ["up_proj", "down_proj"],
    };
    for layer in &mut description.layers {
        layer.feed_forward = FeedForwardSpec::Plain(mlp.clone());
    }
    Ok(description)
}
