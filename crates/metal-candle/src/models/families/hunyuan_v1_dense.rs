//! The dense models of Hunyuan: Llama with norms of q and k after the rotation.

use super::common::{decoder, rms_norm};
use super::family::Family;
use super::rotary::{RopeKeys, RopeOptions, THETAS};
use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::{Description, QkNormExtent, QkNormSpec};
use crate::models::keys::Keys;
use crate::ops::rotary::RotaryScaling;
use serde_json::Value;

pub(super) const HUNYUAN: Family = Family {
    model_type: "hunyuan_v1_dense",
    architecture: "HunYuanDenseV1ForCausalLM",
    defaults: Defaults {
        vocab_size: 290_943,
        max_position_embeddings: 2048,
        norm_eps: ("rms_norm_eps", 1e-5),
        eos_token_ids: &[2],
        ..Defaults::BASE
    },
    describe: hunyuan,
};

fn hunyuan(config: &mut ModelConfig, keys: &Keys) -> Result<Description> {
    let mut description = decoder(config, keys)?;
    // released files have this key, which has no effect
    keys.flag("use_qk_norm")?;
    let names = ["query_layernorm", "key_layernorm"];
    let norm = QkNormSpec { norm: rms_norm(config), extent: QkNormExtent::Head, names, is_after_rotary: true };
    description.for_each_attention(|_, attention| {
        attention.qk_norm = Some(norm);
        attention.has_output_bias = attention.has_bias;
    });
    set_fixed_base(&mut description, config, keys)?;
    Ok(description)
}

/// With `alpha`, `dynamic` scaling multiplies the base by `alpha^(d / (d - 2))` at every length.
fn set_fixed_base(description: &mut Description, config: &mut ModelConfig, keys: &Keys) -> Result<()> {
    let rope = RopeKeys::read(config, keys, RopeOptions::default())?;
    let Some(alpha) = rope.number("alpha")?.filter(|alpha| *alpha != 0.0) else { return Ok(()) };
    for table in &mut description.rotary {
        if !matches!(table.scaling, RotaryScaling::Dynamic { .. }) {
            continue;
        }
        if alpha < 1.0 || table.dim < 4 {
            let expected = "a number of at least 1, and heads of at least 4 elements";
            return Err(keys.wrong("alpha", expected, &Value::from(alpha)));
        }
        let dim = table.dim as f64;
        table.theta *= alpha.powf(dim / (dim - 2.0));
        if !THETAS.contains(&table.theta) {
            let expected = "a number that makes a base of at most 1e30";
            return Err(keys.wrong("alpha", expected, &Value::from(alpha)));
        }
        table.scaling = RotaryScaling::Default;
        config.length_factor = 1.0;
    }
    Ok(())
}
