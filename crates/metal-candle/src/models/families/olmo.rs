//! `OLMo` (<https://arxiv.org/abs/2402.00838>, section 2): layer norms without weights, and clipped q, k and v. `OLMo`
//! 2 (<https://arxiv.org/abs/2501.00656>, section 2) and 3: norms after the parts, and norms over all heads of q and k.

use super::common::{decoder, decoder_with_windows, layer_types, rms_norm, set_windows, sliding_window, soft_cap};
use super::family::Family;
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, NormPlacement, NormSpec, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;
use crate::ops::norm::NormKind;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 50_304,
    max_position_embeddings: 2048,
    norm_eps: ("rms_norm_eps", 1e-5),
    eos_token_ids: &[50_279],
    ..Defaults::BASE
};

pub(super) const OLMO: Family =
    Family { model_type: "olmo", architecture: "OlmoForCausalLM", defaults: DEFAULTS, describe: olmo };

pub(super) const OLMO2: Family =
    Family { model_type: "olmo2", architecture: "Olmo2ForCausalLM", defaults: DEFAULTS, describe: olmo2 };

pub(super) const OLMO3: Family = Family {
    model_type: "olmo3",
    architecture: "Olmo3ForCausalLM",
    defaults: Defaults { rope_theta: 500_000.0, ..DEFAULTS },
    describe: olmo3,
};

fn olmo(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    const EPS: f64 = 1e-5;
    config.rms_norm_eps = EPS;
    let mut description = decoder(config, keys)?;
    description.norm = NormSpec { kind: NormKind::Layer, eps: EPS, has_weight: false, has_bias: false };
    let clip = soft_cap(keys, "clip_qkv", None)?;
    description.for_each_attention(|_, attention| {
        attention.clip = clip;
        attention.has_output_bias = attention.has_bias;
    });
    Ok(description)
}

fn olmo2(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    set_norms(&mut description, config);
    Ok(description)
}

/// Three of four layers have a window; only the others have scaled positions.
fn olmo3(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let is_sliding = match layer_types(config, keys)? {
        Some(is_sliding) => is_sliding,
        None => (1..=config.num_hidden_layers).map(|layer| !layer.is_multiple_of(4)).collect(),
    };
    let mut description = decoder_with_windows(config, keys, &is_sliding, ("", 500_000.0))?;
    set_norms(&mut description, config);
    set_windows(&mut description, config, keys, &is_sliding, sliding_window(keys, Some(4096))?)?;
    Ok(description)
}

fn set_norms(description: &mut Description, config: &ModelConfig) {
    let names = ["q_norm", "k_norm"];
    let norm = QkNormSpec { norm: rms_norm(config), extent: QkNormExtent::Width, names, is_after_rotary: false };
    description.for_each_attention(|_, attention| {
        attention.qk_norm = Some(norm);
        attention.has_output_bias = attention.has_bias;
    });
    for layer in &mut description.layers {
        layer.norms = NormPlacement::POST;
    }
}
