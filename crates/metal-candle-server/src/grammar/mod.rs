//! Compiles a JSON schema, regular expression or grammar of a request to a mask over tokens, for constrained output.
//!
//! [`GrammarCompiler`] holds the vocabulary of a model. It compiles a [`Grammar`] to a [`GrammarMask`], which restricts the
//! tokens of one sequence.

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
