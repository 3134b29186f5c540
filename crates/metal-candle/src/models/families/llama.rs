//! Llama 2 and 3 (<https://arxiv.org/abs/2407.21783>, section 3.2), and the many models with the same architecture.

use super::common::decoder;
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    defaults: Defaults { max_position_embeddings: 2048, eos_token_ids: &[2], ..Defaults::BASE },
    describe: llama,
};

/// The plain decoder, with the biases that `attention_bias` and `mlp_bias` enable.
pub(super) fn llama(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    let has_mlp_bias = keys.flag("mlp_bias")?.unwrap_or(false);
    description.for_each_attention(|_, attention| attention.has_output_bias = attention.has_bias);
    description.for_each_gated_mlp(|mlp| mlp.has_bias = has_mlp_bias);
    Ok(description)
}
