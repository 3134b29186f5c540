//! The kinds of grammars that a request may name.

use serde_json::Value;

/// A set of texts that an answer must be in.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub(crate) enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts. Properties come in the order of the schema.
    JsonSchema(Value),
    /// Texts that match a regular expression as a whole.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark. Its first rule is `start`.
    Lark(String),
    /// A grammar in llama.cpp's notation. Its first rule is `root`.
    Gbnf(String),
}
