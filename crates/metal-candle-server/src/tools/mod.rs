//! Reads the tools of a request, parses tool calls in generated text, and constrains calls to the tools' schemas.
//!
//! [`ToolRequest`] holds the tool fields of a request. [`ToolSyntax`] is the syntax of calls in the model's chat template.
//! [`ToolParser`] splits an answer into reasoning, content and calls; [`tools_grammar`] restricts the answer to valid calls.

mod call;
mod grammar;
mod json_scan;
mod parser;
mod reasoning;
mod request;
#[cfg(test)]
mod round_trips;
mod syntax;
mod xml;

pub(crate) use grammar::tools_grammar;
pub(crate) use parser::{Delta, ToolParser};
pub(crate) use reasoning::Reasoning;
pub(crate) use request::{MAX_TOOLS, ToolChoice, ToolRequest};
pub(crate) use syntax::ToolSyntax;
