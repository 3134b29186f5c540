//! [`Grammar`]: the kinds of grammars in requests.

use serde_json::Value;

/// The set of allowed answers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub(crate) enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that matches a schema. Properties are generated in the order of the schema.
    JsonSchema(Value),
    /// Texts that match a regular expression completely.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark. Its first rule is `start`.
    Lark(String),
    /// A grammar in llama.cpp's notation. Its first rule is `root`.
    Gbnf(String),
    /// A Lark grammar of the server, and the grammar that it refers to as `@answer`.
    Around(String, Box<Grammar>),
}
