//! Reads the sampling and stop settings that all generating routes share.

use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::served::Served;
use metal_candle::inference::GenerationConfig;
use serde_json::Value;

/// Maximum number of stop strings, and maximum size of each in bytes. Editors send more than OpenAI's four.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_BIASES: usize = 1024;
const MAX_STOP_IDS: usize = 128;

/// The generation configuration of a request, with defaults from the model's `generation_config.json`. `max_tokens` comes
/// from the route; the caller limits it to the context.
pub(crate) fn generation_config(
    fields: &Fields,
    served: &Served,
    max_tokens: usize,
) -> Result<GenerationConfig, ApiError> {
    let num_choices = fields.get("n").and_then(Value::as_i64).unwrap_or(1);
    if fields.integer("best_of", 0..=i64::MAX)?.is_some_and(|best_of| best_of > num_choices) {
        return Err(ApiError::unsupported("best_of", "`best_of`: this server returns all generated answers; use `n`"));
    }

    let mut sampling = served.sampling.clone();
    if let Some(temperature) = fields.number("temperature", 0.0..=2.0)? {
        sampling.temperature = temperature;
    }
    if let Some(top_p) = fields.number("top_p", 0.0..=1.0)? {
        sampling.top_p = top_p;
        // the smallest set that reaches 0 is the most likely token
        if top_p == 0.0 {
            (sampling.top_p, sampling.temperature) = (1.0, 0.0);
        }
    }
    if let Some(top_k) = fields.integer("top_k", -1..=i64::from(u32::MAX))? {
        sampling.top_k = usize::try_from(top_k).unwrap_or(0);
    }
    if let Some(min_p) = fields.number("min_p", 0.0..=1.0)? {
        sampling.min_p = min_p;
    }
    for name in ["repetition_penalty", "repeat_penalty"] {
        if let Some(penalty) = fields.number(name, 0.01..=10.0)? {
            sampling.repetition_penalty = penalty;
        }
    }
    // -1 means all tokens
    if let Some(window) = fields.integer("repeat_last_n", -1..=i64::from(u32::MAX))? {
        sampling.penalty_window = usize::try_from(window).ok();
    }
    sampling.presence_penalty = fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0);
    sampling.frequency_penalty = fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0);
    // any number is a seed; -1 means no seed in llama.cpp
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.filter(|seed| *seed != -1);
    sampling.seed = seed.map(|seed| seed as u64);
    for (token, bias) in logit_bias(fields, served)? {
        sampling.logit_bias.insert(token, bias);
    }

    let mut config = GenerationConfig::default().with_max_tokens(max_tokens).with_sampling(sampling);
    config.min_tokens = fields.count("min_tokens", 0, usize::MAX)?.unwrap_or(0);
    if config.min_tokens > max_tokens {
        let message =
            format!("`min_tokens`: expected at most {max_tokens}, the token limit, found {}", config.min_tokens);
        return Err(ApiError::field("min_tokens", message));
    }
    config.ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
    config.skip_special_tokens = fields.flag("skip_special_tokens")?.unwrap_or(true);
    config.stop_strings = stop_strings(fields, "stop")?;
    for (index, value) in fields.list("stop_token_ids", MAX_STOP_IDS)?.unwrap_or_default().iter().enumerate() {
        config.stop_ids.push(token_id(value, || format!("stop_token_ids[{index}]"), served)?);
    }
    Ok(config)
}

/// Reads the token limit of an answer; -1 means the rest of the context, as in llama.cpp. `None` if the field is absent.
///
/// # Errors
/// The value is not -1 and less than `least`.
pub(crate) fn most_tokens(fields: &Fields, name: &str, least: usize) -> Result<Option<usize>, ApiError> {
    match fields.integer(name, -1..=i64::MAX)? {
        None => Ok(None),
        Some(-1) => Ok(Some(usize::MAX)),
        Some(count) => match usize::try_from(count) {
            Ok(count) if count >= least => Ok(Some(count)),
            _ => fields.wrong(name, &format!("-1 or a whole number from {least}"), &count.into()),
        },
    }
}

/// Reads stop strings.
///
/// # Errors
/// There are too many, or one is empty or too long.
pub(crate) fn stop_strings(fields: &Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let texts = fields.texts(name, MAX_STOPS)?;
    if let Some(index) = texts.iter().position(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        let is_list = fields.get(name).is_some_and(Value::is_array);
        let path = if is_list { format!("{name}[{index}]") } else { name.to_owned() };
        let message = format!("`{path}`: expected 1 to {MAX_STOP_BYTES} bytes, found {}", texts[index].len());
        return Err(ApiError::field(path, message));
    }
    Ok(texts.into_iter().map(ToOwned::to_owned).collect())
}

fn logit_bias(fields: &Fields, served: &Served) -> Result<Vec<(u32, f32)>, ApiError> {
    let mut biases = Vec::new();
    // llama.cpp's format: pairs of token and bias, `false` for never
    if let Some(list) = fields.get("logit_bias").and_then(Value::as_array) {
        if list.len() > MAX_BIASES {
            return Err(ApiError::field("logit_bias", format!("`logit_bias`: expected at most {MAX_BIASES} entries")));
        }
        for (index, pair) in list.iter().enumerate() {
            let path = format!("logit_bias[{index}]");
            let Some([token, bias]) = pair.as_array().map(Vec::as_slice) else {
                return Err(ApiError::field(path.clone(), format!("`{path}`: expected a pair of token and bias")));
            };
            biases.push((token_id(token, || path.clone(), served)?, bias_of(bias, &path)?));
        }
        return Ok(biases);
    }
    let Some(map) = fields.object("logit_bias")? else { return Ok(biases) };
    if map.map().len() > MAX_BIASES {
        return Err(ApiError::field("logit_bias", format!("`logit_bias`: expected at most {MAX_BIASES} entries")));
    }
    for (name, value) in map.map() {
        let path = map.path(name);
        let id = name.parse::<u32>().ok().filter(|id| (*id as usize) < served.vocab_size);
        let id = id.ok_or_else(|| {
            ApiError::field("logit_bias", format!("`logit_bias`: expected token ids as names, found `{}`", short(name)))
        })?;
        biases.push((id, bias_of(value, &path)?));
    }
    Ok(biases)
}

fn bias_of(value: &Value, path: &str) -> Result<f32, ApiError> {
    match value {
        Value::Bool(false) => Ok(f32::NEG_INFINITY),
        value => match value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias)) {
            Some(-100.0) => Ok(f32::NEG_INFINITY),
            Some(bias) => Ok(bias as f32),
            None => Err(ApiError::field(path, format!("`{}`: expected a number from -100 to 100", short(path)))),
        },
    }
}

/// Reads a token id. `path` is called only for an error, because a prompt may contain a million ids.
pub(crate) fn token_id(value: &Value, path: impl FnOnce() -> String, served: &Served) -> Result<u32, ApiError> {
    let id = value.as_u64().filter(|id| (*id as usize) < served.vocab_size);
    id.map(|id| id as u32).ok_or_else(|| {
        let path = path();
        let message = format!("`{path}`: expected a token id below {}, found {}", served.vocab_size, describe(value));
        ApiError::field(path, message)
    })
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}
