//! The flags `--chat-template`, `--template-var` and `--tools`.

use crate::error::UserError;
use crate::input;
use crate::model_source::ModelSource;
use crate::output::Output;
use crate::run_folder::recorded_template;
use crate::values::template_var;
use anyhow::Result;
use clap::Args;
use metal_candle::Error;
use metal_candle::data::Tokenizer;
use metal_candle::files::check_integers;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Maximum size of a template or of a file with tools, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The chat template and its variables.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Chat template")]
pub(crate) struct TemplateArguments {
    /// Use the chat template in this file [default: the one of the adapter's run, else the model's].
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,

    /// Set a variable of the template, such as `enable_thinking=false`; VALUE is JSON or else text. May be given more than
    /// once.
    #[arg(long, value_name = "NAME=VALUE", value_parser = template_var)]
    pub(crate) template_var: Vec<String>,
}

impl TemplateArguments {
    /// The tokenizer of a model with the chat template of these flags, else of the run of `adapter` or the model, else its own.
    pub(crate) fn tokenizer(&self, source: &ModelSource, adapter: Option<&Path>) -> Result<Tokenizer> {
        let recorded = match adapter {
            Some(adapter) => recorded_template(adapter)?,
            None => recorded_template(source.folder())?,
        };
        let file = self.chat_template.clone().or(recorded.chat_template);
        let flags: Vec<&str> = self.template_var.iter().map(String::as_str).collect();
        let recorded: Vec<&str> = recorded.template_var.iter().map(String::as_str).collect();
        with_template(source, file.as_deref(), &[recorded, flags].concat())
    }
}

/// The tokenizer of a model with the template in `file`, or else its own, with variables; the last value of a variable
/// applies.
pub(crate) fn with_template(source: &ModelSource, file: Option<&Path>, variables: &[&str]) -> Result<Tokenizer> {
    let tokenizer = source.tokenizer()?;
    if file.is_none() && variables.is_empty() {
        return Ok(tokenizer);
    }
    let template = match file {
        Some(path) => {
            let template = source.template(input::read_text(path, MAX_FILE_BYTES)?);
            Some(template.map_err(|error| match error {
                Error::Template(message) => Error::Format { path: path.to_path_buf(), message },
                other => other,
            })?)
        }
        None => tokenizer.chat_template().cloned(),
    };
    let Some(mut template) = template else {
        return Err(UserError::new(format!("`--template-var`: `{}` has no chat template", source.name))
            .with_hint("set one with --chat-template FILE")
            .into());
    };
    for text in variables {
        let text = template_var(text).map_err(|error| UserError::new(format!("`--template-var`: {error}")))?;
        let Some((name, value)) = text.split_once('=') else { continue };
        if !template.sources().iter().any(|(_, source)| source.contains(name)) {
            Output::warn(format_args!("`--template-var`: the chat template does not use `{name}`"));
        }
        let value = variable_value(name, value)?;
        template = template.with_variable(name, &value);
    }
    Ok(tokenizer.with_chat_template(Some(template)))
}

/// The value of a variable: JSON, Python's `True`, `False` and `None`, or else the text itself.
fn variable_value(name: &str, text: &str) -> Result<Value> {
    match text {
        "True" => Ok(Value::Bool(true)),
        "False" => Ok(Value::Bool(false)),
        "None" => Ok(Value::Null),
        _ => match serde_json::from_str(text) {
            Ok(value) => {
                check_integers(text).map_err(|error| UserError::new(format!("`--template-var {name}`: {error}")))?;
                Ok(value)
            }
            Err(error) if text.starts_with(['[', '{', '"']) => {
                Err(UserError::new(format!("`--template-var {name}`: `{text}` is not JSON: {error}")).into())
            }
            Err(_) => Ok(Value::String(text.to_owned())),
        },
    }
}

/// Reads the JSON schemas of tools: a list, or an object with a list at `tools`.
pub(crate) fn read_tools(path: Option<&Path>) -> Result<Option<Vec<Value>>> {
    let Some(path) = path else { return Ok(None) };
    let text = input::read_text(path, MAX_FILE_BYTES)?;
    let format = |message: String| Error::Format { path: path.to_path_buf(), message };
    let value: Value = serde_json::from_str(&text).map_err(|error| format(format!("expected JSON: {error}")))?;
    check_integers(&text).map_err(format)?;
    let list = match value {
        Value::Array(list) => list,
        Value::Object(mut map) => match map.remove("tools") {
            Some(Value::Array(list)) => list,
            _ => return Err(format("expected a list of tools, found an object without one at `tools`".into()).into()),
        },
        _ => return Err(format("expected a list of tools, found another value".into()).into()),
    };
    if let Some(index) = list.iter().position(|tool| !tool.is_object()) {
        return Err(format(format!("tool {}: expected an object with the tool's JSON schema", index + 1)).into());
    }
    Ok((!list.is_empty()).then_some(list))
}
