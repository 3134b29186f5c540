//! `POST /v1/embeddings`: returns the mean of a text's last hidden states, normalized to length 1.

use crate::app::{App, remaining_context};
use crate::auth::Client;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::fields::{Fields, describe};
use crate::sampling::token_id;
use crate::served::Served;
use axum::extract::State;
use axum::{Extension, Json};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use metal_candle::inference::{KVCacheType, mean_hidden_state};
use metal_candle::models::Model;
use metal_candle::ops::LowRankUpdates;
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum number of texts in a request, as in OpenAI.
const MAX_INPUTS: usize = 2048;

/// Embeds texts.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let fields = Fields::of_body(&body)?;
    fields.refuse(&["dimensions", "truncate_prompt_tokens"])?;
    let target = app.target(&fields)?;
    let is_base64 = fields.one_of("encoding_format", &["float", "base64"])? == Some("base64");
    let inputs = inputs(&fields, &app.served)?;
    let served = app.served.clone();
    let encoded =
        app.compute(move || inputs.iter().map(|input| input.encode(&served)).collect::<Result<Vec<_>, _>>()).await?;
    let num_tokens: usize = encoded.iter().map(Vec::len).sum();
    for ids in &encoded {
        remaining_context("input", ids.len(), app.served.context)?;
    }
    app.keys.charge(&client, num_tokens).inspect_err(|_| app.metrics.reject("rate_limit"))?;
    let mut data = Vec::with_capacity(encoded.len());
    for (index, ids) in encoded.into_iter().enumerate() {
        let (adapter, kv_cache) = (target.adapter.clone(), app.config.kv_cache);
        let embed = move |model: &Model| {
            let terms = adapter.as_ref().map(|adapter| &adapter.terms);
            embedding(model, terms, &ids, kv_cache)
        };
        let mean = app.engine.run(embed).await?.map_err(ApiError::server)?;
        let embedding: Value = if is_base64 {
            let bytes: Vec<u8> = mean.iter().flat_map(|value| value.to_le_bytes()).collect();
            BASE64_STANDARD.encode(bytes).into()
        } else {
            mean.into()
        };
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let usage = json!({"prompt_tokens": num_tokens, "total_tokens": num_tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": target.name, "usage": usage})))
}

enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

impl Input {
    fn encode(&self, served: &Served) -> Result<Vec<u32>, ApiError> {
        let ids = match self {
            Self::Tokens(ids) => ids.clone(),
            Self::Text(text) => served.encode(&served.control.disarm(text, false), true)?,
        };
        if ids.is_empty() {
            return Err(ApiError::field("input", "`input`: expected at least one token, found none"));
        }
        Ok(ids)
    }
}

fn inputs(fields: &Fields, served: &Served) -> Result<Vec<Input>, ApiError> {
    let tokens = |list: &[Value], path: &str| -> Result<Input, ApiError> {
        let ids = list.iter().enumerate().map(|(index, value)| token_id(value, || format!("{path}[{index}]"), served));
        Ok(Input::Tokens(ids.collect::<Result<_, _>>()?))
    };
    match fields.get("input") {
        Some(Value::String(text)) => Ok(vec![Input::Text(text.clone())]),
        Some(Value::Array(list)) if !list.is_empty() && list.iter().all(Value::is_number) => {
            Ok(vec![tokens(list, "input")?])
        }
        Some(Value::Array(list)) if (1..=MAX_INPUTS).contains(&list.len()) => {
            let one = |(index, value): (usize, &Value)| match value {
                Value::String(text) => Ok(Input::Text(text.clone())),
                Value::Array(ids) => tokens(ids, &format!("input[{index}]")),
                other => {
                    let message =
                        format!("`input[{index}]`: expected text or a list of tokens, found {}", describe(other));
                    Err(ApiError::field(format!("input[{index}]"), message))
                }
            };
            list.iter().enumerate().map(one).collect()
        }
        found => {
            let found = found.map_or("none".into(), describe);
            let message = format!("`input`: expected text, or a list of 1 to {MAX_INPUTS} texts, found {found}");
            Err(ApiError::field("input", message))
        }
    }
}

/// The mean of the last hidden states of a text, normalized to length 1.
fn embedding(
    model: &Model,
    terms: Option<&LowRankUpdates>,
    ids: &[u32],
    kv_cache: Option<KVCacheType>,
) -> metal_candle::Result<Vec<f32>> {
    let mean = mean_hidden_state(model, terms, ids, kv_cache)?;
    let length = mean.iter().map(|value| value * value).sum::<f32>().sqrt();
    Ok(if length > 0.0 { mean.iter().map(|value| value / length).collect() } else { mean })
}
