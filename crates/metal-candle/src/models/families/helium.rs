//! Helium: Llama that rotates adjacent elements, without a bias of the output projection.

use super::family::Family;
use super::llama::llama;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;
use crate::ops::rotary::Pairs;

pub(super) const HELIUM: Family = Family {
    model_type: "helium",
    architecture: "HeliumForCausalLM",
    defaults: Defaults {
        vocab_size: 48_000,
        hidden_size: 2560,
        intermediate_size: 7040,
        num_hidden_layers: 24,
        num_attention_heads: 20,
        num_key_value_heads: KeyValueHeads::Of(20),
        head_dim: Some(128),
        max_position_embeddings: 4096,
        norm_eps: ("rms_norm_eps", 1e-8),
        rope_theta: 100_000.0,
        eos_token_ids: &[2],
        ..Defaults::BASE
    },
    describe: helium,
};

fn helium(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = llama(config, keys)?;
    for table in &mut description.rotary {
        table.pairs = Pairs::Adjacent;
    }
    description.for_each_attention(|_, attention| attention.has_output_bias = false);
    Ok(description)
}
