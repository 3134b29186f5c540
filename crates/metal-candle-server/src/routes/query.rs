//! Reads names in URL paths and typed query parameters.

use crate::error::ApiError;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;

/// A name or id in a path.
#[derive(Debug)]
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = axum::extract::Path::<String>::from_request_parts(parts, state).await;
        name.map(|axum::extract::Path(name)| Self(name)).map_err(|_| ApiError::invalid("the path is not valid UTF-8"))
    }
}

/// The pairs of a query.
#[derive(Debug)]
pub(super) struct Query(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let pairs = axum::extract::Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        pairs.map(|axum::extract::Query(pairs)| Self(pairs)).map_err(|_| ApiError::invalid("the query is malformed"))
    }
}

impl Query {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All pairs.
    pub(super) fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// A whole number from `least` to `most`.
    pub(super) fn count(&self, name: &str, least: usize, most: usize) -> Result<Option<usize>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        match text.parse().ok().filter(|number| (least..=most).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(ApiError::field(name, format!("`{name}`: expected a whole number from {least} to {most}"))),
        }
    }

    /// One of these texts.
    pub(super) fn one_of(&self, name: &str, texts: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(found) = self.get(name) else { return Ok(None) };
        match texts.iter().find(|text| **text == found) {
            Some(text) => Ok(Some(text)),
            None => Err(ApiError::field(name, format!("`{name}`: expected {}", texts.join(" or ")))),
        }
    }
}
