//! Qwen2 and Qwen2.5 (<https://arxiv.org/abs/2412.15115>, section 2), and the dense models of Qwen3
//! (<https://arxiv.org/abs/2505.09388>, section 2).

use super::common::{decoder, layer_types, rms_norm, set_windows, sliding_window};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, KeyValueHeads, ModelConfig};
use crate::models::description::{Description, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: KeyValueHeads::Of(32),
    ..Defaults::BASE
};

pub(super) const QWEN2: Family =
    Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", defaults: DEFAULTS, describe: qwen2 };

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    defaults: Defaults { head_dim: Some(128), ..DEFAULTS },
    describe: qwen3,
};

fn qwen2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    // there is no key for it: the bias of q, k and v is part of the architecture
    config.attention_bias = true;
    let mut description = decoder(config, keys)?;
    if keys.flag("use_mrope")?.unwrap_or(false) {
        return Err(keys.unsupported("use_mrope", "multimodal rotary embedding"));
    }
    set_upper_windows(&mut description, config, keys)?;
    Ok(description)
}

fn qwen3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    let names = ["q_norm", "k_norm"];
    let norm = QkNormSpec { norm: rms_norm(config), extent: QkNormExtent::Head, names, is_after_rotary: false };
    description.for_each_attention(|_, attention| {
        attention.qk_norm = Some(norm);
        attention.has_output_bias = attention.has_bias;
    });
    set_upper_windows(&mut description, config, keys)?;
    Ok(description)
}

/// Windows from layer `max_window_layers` on if `use_sliding_window`, or in the layers that `layer_types` lists.
fn set_upper_windows(description: &mut Description, config: &ModelConfig, keys: &Keys) -> Result<()> {
    let is_used = keys.flag("use_sliding_window")?.unwrap_or(false);
    let size = sliding_window(keys, Some(4096))?.filter(|_| is_used);
    let first = keys.size("max_window_layers")?.unwrap_or(28);
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => (0..config.num_hidden_layers).map(|layer| size.is_some() && layer >= first).collect(),
    };
    set_windows(description, config, keys, &is_sliding, size)
}
