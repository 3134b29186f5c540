//! `EXAONE` 4 (<https://arxiv.org/abs/2507.11407>, section 2.1): norms after the parts, and norms of q and k. Models
//! with sliding windows have rotary positions only in the layers with a window.

use super::common::{decoder, layer_types, rms_norm, set_windows, sliding_by_pattern, sliding_window};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, NormPlacement, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;

pub(super) const EXAONE4: Family = Family {
    model_type: "exaone4",
    architecture: "Exaone4ForCausalLM",
    defaults: Defaults {
        vocab_size: 102_400,
        intermediate_size: 16_384,
        max_position_embeddings: 2048,
        norm_eps: ("rms_norm_eps", 1e-5),
        num_key_value_heads: KeyValueHeads::Of(32),
        eos_token_ids: &[2],
        ..Defaults::BASE
    },
    describe: exaone4,
};

fn exaone4(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    config.attention_bias = false;
    let mut description = decoder(config, keys)?;
    let size = sliding_window(keys, Some(4096))?;
    // with `layer_types`, it may be a string such as `LLLG`
    keys.contains("sliding_window_pattern");
    let is_sliding = match (layer_types(config, keys)?, size) {
        (Some(is_sliding), _) => is_sliding,
        (None, None) => vec![false; config.num_hidden_layers],
        (None, Some(_)) => sliding_by_pattern(config, keys, 4)?,
    };
    set_windows(&mut description, config, keys, &is_sliding, size)?;
    let names = ["q_norm", "k_norm"];
    let norm = QkNormSpec { norm: rms_norm(config), extent: QkNormExtent::Head, names, is_after_rotary: false };
    description.for_each_attention(|layer, attention| {
        attention.qk_norm = Some(norm);
        let is_sliding = is_sliding.get(layer).copied().unwrap_or(false);
        attention.rotary = (size.is_none() || is_sliding).then_some(0);
    });
    for layer in &mut description.layers {
        layer.norms = NormPlacement::POST;
    }
    Ok(description)
}
