//! Reads the rotary settings of a configuration, in the style of `rope_scaling` or of `rope_parameters`.

use crate::error::Result;
use crate::files::JsonObject;
use crate::models::config::ModelConfig;
use crate::models::keys::Keys;
use crate::ops::rotary::{Pairs, RotaryScaling, RotarySpec};
use serde_json::Value;
use std::ops::RangeInclusive;

/// The bases of rotary positions that are accepted.
pub(super) const THETAS: RangeInclusive<f64> = 1.0..=1e30;

/// How a family reads its rotary settings.
#[derive(Clone, Copy, Default)]
pub(super) struct RopeOptions {
    /// The layer type whose settings are read, in a family with one object of settings per layer type.
    pub(super) layer_type: Option<&'static str>,
    /// The default fraction of a head that is rotated; without it only whole heads are supported.
    pub(super) partial: Option<f64>,
    /// Alternative names of `longrope` scaling.
    pub(super) longrope_names: &'static [&'static str],
    /// The default of the top-level `original_max_position_embeddings`, which takes precedence over the key among the
    /// rotary settings.
    pub(super) original: Option<usize>,
}

/// The rotary settings of a configuration.
pub(super) struct RopeKeys {
    /// The object of rotary settings, and its key: `rope_scaling` or `rope_parameters`.
    rope: Option<(&'static str, JsonObject)>,
    pub(super) theta: f64,
    /// The fraction of a head that is rotated.
    pub(super) share: f64,
    /// `original_max_position_embeddings`; the top-level key takes precedence over the one among the settings.
    pub(super) original: usize,
    pub(super) scaling: RotaryScaling,
}

impl RopeKeys {
    /// Reads the settings, for one layer type if the options name one.
    pub(super) fn read(config: &ModelConfig, keys: &Keys, options: RopeOptions) -> Result<Self> {
        let mut found = None;
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(object) = keys.object(key)?.filter(|object| !object.map().is_empty()) {
                found = Some((key, object));
            }
        }
        let found_key = found.as_ref().map_or("partial_rotary_factor", |(key, _)| key);
        let is_nested = found.as_ref().is_some_and(|(_, object)| object.map().values().any(Value::is_object));
        let rope = match (found, options.layer_type) {
            (Some((key, object)), Some(kind)) if is_nested => object.object(kind)?.map(|object| (key, object)),
            (Some((key, _)), None) if is_nested => {
                return Err(keys.unsupported(key, "rotary settings that differ by layer"));
            }
            (found, None) => found,
            (Some(("rope_scaling", object)), Some(kind)) if object.get("rope_type").is_some() => {
                (kind == "full_attention").then_some(("rope_scaling", object))
            }
            (Some((key, _)), Some(_)) => {
                // transformers ignores these settings for every layer, and ignores scaling without `rope_type`
                keys.forget(key);
                None
            }
            (None, Some(_)) => None,
        };
        let number = |name: &str| match &rope {
            Some((_, object)) => object.number(name),
            None => Ok(None),
        };
        let beside = if options.layer_type == Some("sliding_attention") { None } else { keys.number("rope_theta")? };
        let theta = number("rope_theta")?.or(beside).unwrap_or(config.rope_theta);
        let share = number("partial_rotary_factor")?.or(keys.number("partial_rotary_factor")?);
        // for transformers, null is not an absent key: whole heads are rotated
        let default = options.partial.filter(|_| !keys.is_null("partial_rotary_factor"));
        let share = share.or(default).unwrap_or(1.0);
        if !THETAS.contains(&theta) {
            return Err(keys.wrong("rope_theta", "a number from 1 to 1e30", &Value::from(theta)));
        }
        if options.partial.is_none() && (share - 1.0).abs() >= f64::EPSILON {
            return Err(keys.unsupported(found_key, "a `partial_rotary_factor` other than 1"));
        }
        if !(share > 0.0 && share <= 1.0) {
            return Err(keys.wrong("partial_rotary_factor", "a number above 0 and at most 1", &Value::from(share)));
        }
        let beside = match options.layer_type {
            None => keys.size("original_max_position_embeddings")?.or(options.original),
            Some(_) => None,
        };
        let among = match &rope {
            Some((_, object)) => object.size("original_max_position_embeddings")?,
            None => None,
        };
        let original = beside.or(among).unwrap_or(config.max_position_embeddings);
        if original == 0 {
            let found = Value::from(0);
            return Err(keys.wrong("original_max_position_embeddings", "a whole number above 0", &found));
        }
        let mut settings = Self { rope, theta, share, original, scaling: RotaryScaling::Default };
        settings.scaling = settings.read_scaling(config, keys, options)?;
        Ok(settings)
    }

    /// The rotary table for the heads of `config`.
    pub(super) fn table(&self, config: &ModelConfig) -> RotarySpec {
        RotarySpec {
            dim: (config.head_dim as f64 * self.share) as usize,
            theta: self.theta,
            scaling: self.scaling.clone(),
            pairs: Pairs::Halves,
            max_position_embeddings: config.max_position_embeddings,
        }
    }

    /// Whether the configuration has rotary settings other than `rope_theta`.
    pub(super) fn is_given(&self) -> bool {
        self.rope.is_some()
    }

    /// The value of another numeric key among the settings.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>> {
        match &self.rope {
            Some((_, object)) => object.number(name),
            None => Ok(None),
        }
    }

    fn read_scaling(&self, config: &ModelConfig, keys: &Keys, options: RopeOptions) -> Result<RotaryScaling> {
        let Some((key, rope)) = &self.rope else { return Ok(RotaryScaling::Default) };
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        let kind = kind.unwrap_or("default");
        let kind = if options.longrope_names.contains(&kind) { "longrope" } else { kind };
        let original = self.original;
        let factor = |name: &str| -> Result<f64> {
            let value = rope.number(name)?.ok_or_else(|| rope.missing(name, "a number"))?;
            if value > 0.0 { Ok(value) } else { Err(rope.wrong(name, "a number above 0", &Value::from(value))) }
        };
        // transformers looks for `truncate` beside the layer types, where it never is, and reads null as false
        let truncate =
            options.layer_type.is_some() || rope.flag("truncate")?.unwrap_or(!rope.map().contains_key("truncate"));
        // transformers ignores a bound of zero
        let beta = |name: &str, default: f64| -> Result<f64> {
            Ok(rope.number(name)?.filter(|beta| *beta != 0.0).unwrap_or(default))
        };
        Ok(match kind {
            "default" => RotaryScaling::Default,
            "linear" => RotaryScaling::Linear { factor: factor("factor")? },
            "dynamic" => RotaryScaling::Dynamic { factor: factor("factor")? },
            "llama3" => RotaryScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: factor("low_freq_factor")?,
                high_freq_factor: factor("high_freq_factor")?,
                original_max_position_embeddings: original,
            },
            "yarn" => RotaryScaling::Yarn {
                factor: rope.number("factor")?,
                original_max_position_embeddings: original,
                beta_fast: beta("beta_fast", 32.0)?,
                beta_slow: beta("beta_slow", 1.0)?,
                truncate,
                attention_factor: rope.number("attention_factor")?,
                mscale: rope.number("mscale")?,
                mscale_all_dim: rope.number("mscale_all_dim")?,
            },
            "longrope" => {
                let pairs = ((config.head_dim as f64 * self.share) as usize).div_ceil(2);
                RotaryScaling::LongRope {
                    short_factor: factors(rope, "short_factor", pairs)?,
                    long_factor: factors(rope, "long_factor", pairs)?,
                    original_max_position_embeddings: original,
                    factor: rope.number("factor")?,
                    attention_factor: rope.number("attention_factor")?,
                }
            }
            other => return Err(keys.unsupported(key, &format!("rotary scaling of type `{other}`"))),
        })
    }
}

/// A list of positive numbers, one for each rotated pair.
fn factors(rope: &JsonObject, name: &str, pairs: usize) -> Result<Vec<f64>> {
    let expected = format!("a list of {pairs} numbers above 0, one for each rotated pair");
    let value = rope.get(name).ok_or_else(|| rope.missing(name, &expected))?;
    let list = value.as_array().filter(|list| list.len() == pairs);
    let list = list.ok_or_else(|| rope.wrong(name, &expected, value))?;
    let number = |value: &Value| {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| rope.wrong(name, &expected, value))
    };
    list.iter().map(number).collect()
}
