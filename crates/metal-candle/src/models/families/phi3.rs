//! Phi-3, Phi-3.5 and Phi-4 (<https://arxiv.org/abs/2404.14219>, section 2).

use super::common::{decoder_with_rotary, set_windows, sliding_window};
use super::family::Family;
use super::rotary::RopeOptions;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, GatedProjections};
use crate::models::keys::Keys;

pub(super) const PHI3: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    defaults: Defaults {
        vocab_size: 32_064,
        hidden_size: 3072,
        intermediate_size: 8192,
        max_position_embeddings: 4096,
        norm_eps: ("rms_norm_eps", 1e-5),
        eos_token_ids: &[32_000],
        ..Defaults::BASE
    },
    describe: phi3,
};

/// Old files use other names for `longrope`.
const ROPE: RopeOptions =
    RopeOptions { layer_type: None, partial: Some(1.0), longrope_names: &["su", "yarn"], original: Some(4096) };

/// q, k and v are one tensor, and so are gate and up. As in PEFT, an adapter has one A for all rows of such a tensor.
fn phi3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    config.attention_bias = false;
    let mut description = decoder_with_rotary(config, keys, ROPE)?;
    let size = sliding_window(keys, None)?;
    let is_sliding = vec![size.is_some(); config.num_hidden_layers];
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    description.for_each_attention(|_, attention| attention.is_fused = true);
    description.for_each_gated_mlp(|mlp| mlp.projections = GatedProjections::Fused(["gate_up_proj", "down_proj"]));
    Ok(description)
}
