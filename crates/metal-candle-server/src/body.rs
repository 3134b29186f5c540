//! Reads the JSON body of a request.

use crate::app::App;
use crate::error::ApiError;
use crate::foreign;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// Longest time to receive a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Larger bodies are parsed on a blocking thread.
const LARGE: usize = 64 << 10;

/// The JSON object in the body of a request.
#[derive(Debug)]
pub(crate) struct JsonBody(pub(crate) Value);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let media = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media = media.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") {
            let message = "expected the header `Content-Type: application/json`";
            return Err(ApiError::malformed(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let encoding = request.headers().get(header::CONTENT_ENCODING);
        if encoding.is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
            let message = "`Content-Encoding` is not supported; send the body as it is";
            return Err(ApiError::malformed(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let path = request.uri().path().to_owned();
        let bytes = read(request.into_body(), app.config.max_body_bytes).await?;
        let parse = |bytes: &[u8]| {
            serde_json::from_slice::<Value>(bytes)
                .map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))
        };
        let value = if bytes.len() > LARGE { app.compute(move || parse(&bytes)).await? } else { parse(&bytes)? };
        let Value::Object(map) = &value else {
            return Err(ApiError::invalid("expected a JSON object as the body"));
        };
        foreign::refuse(&path, map)?;
        app.load_named(&value).await?;
        Ok(Self(value))
    }
}

/// Reads the whole body, of at most `limit` bytes.
pub(crate) async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_slow = |_| {
        let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
        ApiError::malformed(StatusCode::REQUEST_TIMEOUT, message)
    };
    tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, limit)).await.map_err(too_slow)?.map_err(|error| {
        let is_too_long =
            std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("length limit"));
        if is_too_long {
            ApiError::too_large(format!("the body has more than {limit} bytes"))
        } else {
            ApiError::invalid("the body could not be read")
        }
    })
}
