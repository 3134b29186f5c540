//! Errors of compiling a grammar.

/// A grammar that was not compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum GrammarError {
    /// The grammar is wrong, not supported or too complex: status 400.
    #[error("{0}")]
    Invalid(String),
    /// Other grammars are compiling: status 503.
    #[error("too many grammars are compiling; try again later")]
    Busy,
}
