//! [`ApiError`]: the errors that clients receive, a status and OpenAI's error object.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::path::{MAIN_SEPARATOR, Path};
use std::time::Duration;

/// An error of a request.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) kind: &'static str,
    pub(crate) code: Option<&'static str>,
    /// The path of the field at fault, such as `messages[2].content`.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    /// When the client may retry.
    pub(crate) retry_after: Option<Duration>,
    /// Additional fields of the error object.
    pub(crate) extra: Box<[(&'static str, Value)]>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, kind, code: None, param: None, message, retry_after: None, extra: Box::default() }
    }

    /// 400: a field with a wrong value.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(message).with_param(param)
    }

    /// 400: an unsupported field.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::field(param, message).with_code("unsupported_value")
    }

    /// 400 without a field.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: the prompt and the answer do not fit the context.
    pub(crate) fn context(param: &str, prompt_tokens: usize, context: usize) -> Self {
        let message = format!(
            "the prompt is too long: it has {prompt_tokens} tokens; expected at most {}, for the context of {context} to hold one more",
            context.saturating_sub(1)
        );
        let mut error = Self::field(param, message).with_code("context_length_exceeded");
        error.extra = Box::new([("n_prompt_tokens", json!(prompt_tokens)), ("n_ctx", json!(context))]);
        error
    }

    /// 401: no key, or an unknown key.
    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).with_code("invalid_api_key")
    }

    /// 403.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 404.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    /// 404: no such model.
    pub(crate) fn no_such_model(name: &str) -> Self {
        let name: String = name.chars().take(200).collect();
        Self::not_found(format!("there is no model `{name}`; GET /v1/models lists the models"))
            .with_param("model")
            .with_code("model_not_found")
    }

    /// 409.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict_error", message)
    }

    /// 413.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message).with_code("request_too_large")
    }

    /// A different 4xx status for a malformed request.
    pub(crate) fn malformed(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// 429: the client's key is over a limit.
    pub(crate) fn rate_limit(message: impl Into<String>, retry_after: Duration) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        error.retry_after = Some(retry_after);
        error.with_code("rate_limit_exceeded")
    }

    /// 500: a failure of the server. The cause is logged and not sent to the client.
    pub(crate) fn server(cause: impl std::fmt::Display) -> Self {
        tracing::error!("{cause}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the server failed; see its log for the cause")
    }

    /// 503: `loading`, `queue_full`, `draining` or `timeout`.
    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message).with_code(code);
        error.retry_after = Some(Duration::from_secs(1));
        error
    }

    #[must_use]
    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    #[must_use]
    pub(crate) fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Renames fields for another format: each pair is a part of a path and its replacement.
    #[must_use]
    pub(crate) fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        for (from, to) in names {
            self.param = self.param.map(|param| param.replace(from, to));
            self.message = self.message.replace(from, to);
        }
        self
    }

    /// The value of the key `error`.
    pub(crate) fn object(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        let mut object = json!({"message": message, "type": kind, "param": param, "code": code});
        for (name, value) in &*self.extra {
            object[name] = value.clone();
        }
        object
    }
}

impl ApiError {
    /// A response with this error's status and the given body.
    pub(crate) fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // otherwise official clients retry
            StatusCode::CONFLICT => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

/// Shortens each absolute path in a message to its last part, because clients must not see paths of the server.
pub(crate) fn without_paths(message: &str) -> String {
    let last = |path: &str| path.rsplit(MAIN_SEPARATOR).next().unwrap_or_default().to_owned();
    let is_delimiter = |c: char| c.is_whitespace() || "\"'()".contains(c);
    // a path in backticks may contain spaces
    let parts = message.split('`').enumerate().map(|(index, part)| {
        if index % 2 == 1 && Path::new(part).is_absolute() {
            return last(part);
        }
        let words = part.split_inclusive(is_delimiter).map(|word| {
            if Path::new(word.trim_end_matches(is_delimiter)).is_absolute() { last(word) } else { word.to_owned() }
        });
        words.collect::<String>()
    });
    parts.collect::<Vec<_>>().join("`")
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(json!({"error": self.object()}))
    }
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    #[test]
    fn paths_are_removed_from_messages() {
        let found = super::without_paths("`/srv/my jobs/x.jsonl`: /a/b/c is 3/4 of `d`\n  (/e/f)");
        assert_eq!(found, "`x.jsonl`: c is 3/4 of `d`\n  (f)");
    }
}
