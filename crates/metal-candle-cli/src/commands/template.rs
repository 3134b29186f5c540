//! `template`: renders conversations with a chat template, as text, token ids and trained tokens.

use crate::error::UserError;
use crate::input;
use crate::model_source::ModelSource;
use crate::output::Output;
use crate::templates::{TemplateArguments, read_tools};
use anyhow::Result;
use clap::{ArgAction, Args};
use metal_candle::data::{DatasetOptions, Message, Sample, Tokenizer};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Flags of `template`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TemplateCommandArguments {
    /// A JSON file with a list of messages or a row with `messages`, and optionally `tools`, `chat_template_kwargs`,
    /// `chat_template` and `add_generation_prompt`; or a JSONL file of rows. `-` or no file reads standard input.
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,

    /// Use the tokenizer and chat template of this model: a folder, `nano`, or a Hub name.
    #[arg(long, default_value = "nano")]
    pub(crate) model: String,

    /// A JSON file with a list of tool schemas, for rows without `tools`.
    #[arg(long, value_name = "FILE")]
    pub(crate) tools: Option<PathBuf>,

    /// End the text at the start of the assistant's answer, for rows without `add_generation_prompt`.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false,
        default_missing_value = "true", action = ArgAction::Set)]
    pub(crate) add_generation_prompt: bool,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,
}

/// A conversation and its rendering options.
struct Row {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    variables: Map<String, Value>,
    chat_template: Option<String>,
    add_generation_prompt: bool,
    /// The row for training.
    value: Value,
}

/// A rendered conversation.
struct Rendered {
    text: String,
    ids: Vec<u32>,
    /// For each token whether it is trained, or why this is unknown.
    trained: Result<Vec<bool>, String>,
}

pub(crate) fn run(flags: &TemplateCommandArguments, output: Output) -> Result<()> {
    let source = ModelSource::find(&flags.model, output)?;
    let tools = read_tools(flags.tools.as_deref())?;
    let mut renderer = Renderer { own: flags.template.tokenizer(&source, None)?, source, given: None };
    let (values, is_batch) = input::read_values(&flags.file)?;
    let mut num_failed = 0;
    for (line, value) in values {
        let rendered = row(value, tools.as_ref(), flags.add_generation_prompt)
            .and_then(|row| renderer.render(&row).map_err(|error| crate::error::message(&error)));
        match rendered {
            Ok(rendered) if output.json => Output::print_json(&rendered.json(is_batch.then_some(line)))?,
            Ok(rendered) => Output::print_styled(rendered.shown(&renderer, is_batch.then_some(line))?)?,
            Err(message) if is_batch => {
                num_failed += 1;
                if output.json {
                    Output::print_json(&json!({ "line": line, "error": message }))?;
                } else {
                    Output::warn(format_args!("{}:{line}: {message}", flags.file.display()));
                }
            }
            Err(message) => {
                return Err(UserError::new(format!("`{}`: {message}", flags.file.display())).into());
            }
        }
    }
    if num_failed > 0 {
        let message = format!("`{}`: {num_failed} rows cannot be rendered", flags.file.display());
        return Err(UserError::new(message).into());
    }
    Ok(())
}

/// Parses a conversation: a list of messages, or a row with `messages`.
fn row(value: Value, tools: Option<&Vec<Value>>, add_generation_prompt: bool) -> Result<Row, String> {
    let mut value = match value {
        Value::Array(messages) => json!({ "messages": messages }),
        other => other,
    };
    let Some(map) = value.as_object_mut() else {
        return Err("expected a list of messages or an object with `messages`".into());
    };
    let messages = map.get("messages").ok_or("expected a list of messages or an object with `messages`")?;
    let messages = serde_json::from_value(messages.clone()).map_err(|error| format!("`messages`: {error}"))?;
    if let (None | Some(Value::Null), Some(tools)) = (map.get("tools"), tools) {
        map.insert("tools".into(), Value::Array(tools.clone()));
    }
    let tools = match map.get("tools") {
        None | Some(Value::Null) => None,
        Some(Value::Array(tools)) => Some(tools.clone()),
        Some(_) => return Err("`tools`: expected a list".into()),
    };
    let variables = match map.get("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(_) => return Err("`chat_template_kwargs`: expected an object".into()),
    };
    let chat_template = match map.remove("chat_template") {
        None | Some(Value::Null) => None,
        Some(Value::String(source)) => Some(source),
        Some(_) => return Err("`chat_template`: expected the text of a template".into()),
    };
    let add_generation_prompt = match map.remove("add_generation_prompt") {
        None | Some(Value::Null) => add_generation_prompt,
        Some(Value::Bool(flag)) => flag,
        Some(_) => return Err("`add_generation_prompt`: expected `true` or `false`".into()),
    };
    Ok(Row { messages, tools, variables, chat_template, add_generation_prompt, value })
}

struct Renderer {
    source: ModelSource,
    /// The tokenizer with the template of the flags or the model.
    own: Tokenizer,
    /// The source of the last template in a row, and the tokenizer with it.
    given: Option<(String, Tokenizer)>,
}

impl Renderer {
    fn tokenizer(&mut self, row: &Row) -> Result<Tokenizer> {
        let Some(source) = &row.chat_template else { return Ok(self.own.clone()) };
        if let Some((known, tokenizer)) = &self.given
            && known == source
        {
            return Ok(tokenizer.clone());
        }
        let template = self.source.template(source.clone())?;
        let tokenizer = self.own.clone().with_chat_template(Some(template));
        self.given = Some((source.clone(), tokenizer.clone()));
        Ok(tokenizer)
    }

    fn render(&mut self, row: &Row) -> Result<Rendered> {
        let tokenizer = self.tokenizer(row)?;
        let Some(template) = tokenizer.chat_template() else {
            return Err(UserError::new(format!("`{}` has no chat template", self.source.name))
                .with_hint("set one with --chat-template FILE")
                .into());
        };
        let text = template.render(&row.messages, row.tools.as_deref(), row.add_generation_prompt, &row.variables)?;
        let ids = tokenizer.encode(&text, false)?;
        let trained = trained(row, &tokenizer, &ids);
        Ok(Rendered { text, ids, trained })
    }
}

/// For each token whether it is trained; a generation prompt at the end is not.
fn trained(row: &Row, tokenizer: &Tokenizer, ids: &[u32]) -> Result<Vec<bool>, String> {
    if !row.messages.iter().any(|message| message.role() == "assistant") {
        return Ok(vec![false; ids.len()]);
    }
    let sample = Sample::from_row(row.value.clone(), tokenizer, &DatasetOptions::default());
    let mut sample = sample.map_err(|error| error.to_string())?;
    if !ids.starts_with(&sample.ids) {
        return Err("training normalizes the row, which changes the text; `data check` shows it".into());
    }
    sample.trained.resize(ids.len(), false);
    Ok(sample.trained)
}

impl Rendered {
    fn json(&self, line: Option<usize>) -> Value {
        let mut object = json!({ "text": self.text, "ids": self.ids, "trained": self.trained.as_ref().ok() });
        if let Some(line) = line {
            object["line"] = json!(line);
        }
        if let Err(reason) = &self.trained {
            object["not_trained_because"] = json!(reason);
        }
        object
    }

    /// The text with trained spans in brackets, then the ids.
    fn shown(&self, renderer: &Renderer, line: Option<usize>) -> Result<String> {
        let mut shown = line.map_or_else(String::new, |line| format!("line {line}\n"));
        match &self.trained {
            Ok(trained) => {
                let sample = Sample { ids: self.ids.clone(), trained: trained.clone(), source: None };
                shown.push_str(&super::data::shown(&sample, &renderer.own, super::data::is_coloured())?);
            }
            Err(_) => shown.push_str(&metal_candle::files::printable(&self.text)),
        }
        let ids: Vec<String> = self.ids.iter().map(u32::to_string).collect();
        let num_trained = match &self.trained {
            Ok(trained) => format!("{} trained", trained.iter().filter(|trained| **trained).count()),
            Err(reason) => format!("not trained: {}", metal_candle::files::sanitize(reason)),
        };
        Ok(format!("{shown}\n[{} tokens, {num_trained}]\n{}\n", ids.len(), ids.join(" ")))
    }
}
