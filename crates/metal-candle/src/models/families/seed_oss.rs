//! Seed-OSS: Llama with biases of q, k and v.

use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;

pub(super) const SEED_OSS: Family = Family {
    model_type: "seed_oss",
    architecture: "SeedOssForCausalLM",
    defaults: Defaults {
        vocab_size: 155_136,
        intermediate_size: 27_648,
        num_hidden_layers: 64,
        num_attention_heads: 80,
        num_key_value_heads: KeyValueHeads::Of(8),
        head_dim: Some(128),
        max_position_embeddings: 524_288,
        attention_bias: true,
        eos_token_ids: &[2],
        ..Defaults::BASE
    },
    describe: seed_oss,
};

fn seed_oss(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    let has_output_bias = keys.flag("attention_out_bias")?.unwrap_or(false);
    description.for_each_attention(|_, attention| attention.has_output_bias = has_output_bias);
    Ok(description)
}
