//! Constrained output: compiles a JSON schema, a regular expression or a grammar of a request to a mask over tokens.
//!
//! [`GrammarCompiler`] holds the vocabulary of a model. It turns a [`Grammar`] into a [`GrammarMask`], which restricts the tokens
//! of one sequence.

mod compiler;
mod error;
mod gbnf;
mod kind;
mod mask;
mod message;
mod request;
mod schema;
mod vocabulary;
#[cfg(test)]
pub(crate) mod walks;

pub(crate) use compiler::GrammarCompiler;
pub(crate) use error::GrammarError;
pub(crate) use kind::Grammar;
pub(crate) use mask::GrammarMask;
pub(crate) use schema::prepared as prepared_schema;
