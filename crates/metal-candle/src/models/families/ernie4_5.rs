//! The dense models of ERNIE 4.5: Llama that rotates adjacent elements, with biases in all linear layers if `use_bias`.

use super::common::decoder;
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;
use crate::ops::rotary::Pairs;

pub(super) const ERNIE4_5: Family = Family {
    model_type: "ernie4_5",
    architecture: "Ernie4_5ForCausalLM",
    defaults: Defaults {
        vocab_size: 103_424,
        hidden_size: 1024,
        intermediate_size: 3072,
        num_hidden_layers: 18,
        num_attention_heads: 16,
        num_key_value_heads: KeyValueHeads::Of(2),
        head_dim: Some(128),
        max_position_embeddings: 131_072,
        norm_eps: ("rms_norm_eps", 1e-5),
        rope_theta: 500_000.0,
        tie_word_embeddings: true,
        eos_token_ids: &[2],
        ..Defaults::BASE
    },
    describe: ernie4_5,
};

fn ernie4_5(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let has_bias = keys.flag("use_bias")?.unwrap_or(false);
    config.attention_bias = has_bias;
    let mut description = decoder(config, keys)?;
    for table in &mut description.rotary {
        table.pairs = Pairs::Adjacent;
    }
    description.for_each_attention(|_, attention| attention.has_output_bias = has_bias);
    description.for_each_gated_mlp(|mlp| mlp.has_bias = has_bias);
    Ok(description)
}
