//! [`GrammarError`]: the error of a grammar that cannot be compiled.

/// Why a grammar was not compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum GrammarError {
    /// The grammar is invalid, not supported or too complex: status 400.
    #[error("{0}")]
    Invalid(String),
    /// Too many other grammars are compiling: status 503.
    #[error("too many grammars are compiling; try again later")]
    Busy,
}
