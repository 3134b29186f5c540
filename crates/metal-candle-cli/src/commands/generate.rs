//! `generate`: answers or continues prompts.

use crate::sampling::{SamplingArguments, generation_config, with_end_of_turn};

use crate::error::UserError;
use crate::input::{MAX_INPUT_BYTES, read_text, read_values, without_line_end};
use crate::kv_cache::CacheArguments;
use crate::matmul_precision::PrecisionArguments;
use crate::model_source::{AdaptedModelArguments, Loaded};
use crate::output::Output;
use crate::templates::{TemplateArguments, read_tools};
use anyhow::{Context, Result};
use clap::Args;
use metal_candle::Error;
use metal_candle::data::{ChatTemplate, Message, Tokenizer};
use metal_candle::inference::{Finish, Generation, GenerationConfig, Generator, KVCacheType};
use serde_json::{Map, Value, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Flags of `generate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct GenerateArguments {
    /// The text to answer or continue; `-` reads it from standard input.
    #[arg(long, short, allow_hyphen_values = true, required_unless_present = "prompts")]
    pub(crate) prompt: Option<String>,

    /// Answer each row of this JSONL file, `{"prompt": ...}` or `{"messages": [...]}`, in batches; `-` reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(crate) prompts: Option<PathBuf>,

    /// The system prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,

    /// Continue the prompt as text, without the model's chat template.
    #[arg(long)]
    pub(crate) raw: bool,

    /// Print the complete text at the end instead of streaming it.
    #[arg(long)]
    pub(crate) no_stream: bool,

    /// A JSON file with a list of the schemas of tools that the model may call.
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    pub(crate) tools: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) template: TemplateArguments,

    #[command(flatten)]
    pub(crate) cache: CacheArguments,

    #[command(flatten)]
    pub(crate) precision: PrecisionArguments,

    #[command(flatten)]
    pub(crate) sampling: SamplingArguments,
}

pub(crate) fn run(flags: &GenerateArguments, output: Output) -> Result<()> {
    let rows = rows(flags)?;
    let tools = read_tools(flags.tools.as_deref())?;
    let loaded = Loaded::new(&flags.model, flags.precision, output)?;
    let tokenizer = flags.template.tokenizer(&loaded.source, flags.model.adapter.as_deref())?;
    let config = generation_config(&flags.sampling, loaded.model.config());
    let is_templated = tokenizer.chat_template().is_some() && !flags.raw;
    let config = with_end_of_turn(config, Some(&tokenizer).filter(|_| is_templated));
    let mut prompts = Vec::with_capacity(rows.len());
    for row in rows {
        let line = row.line;
        let ids = row.ids(flags, tools.as_deref(), &tokenizer);
        prompts.push(ids.map_err(|error| of_line(flags, line, error))?);
    }
    let mut generator = loaded.generator(flags.cache.kv_cache)?.with_tokenizer(tokenizer);
    if flags.prompts.is_some() {
        return answer_all(flags, &mut generator, &prompts, &config, output);
    }
    let prompt = prompts.pop().unwrap_or_default();

    let streams = !output.json && !flags.no_stream;
    let mut unwritten = Ok(());
    let generation = generator.generate_with(&prompt, &config, |piece| {
        if streams {
            unwritten = Output::print_generated(&piece.text);
        }
        if unwritten.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    unwritten?;
    if output.json {
        Output::print_json(&as_json(&generation, &prompt))?;
        return Ok(());
    }
    if !streams {
        Output::print_generated(&generation.text)?;
    }
    Output::print("\n")?;
    output.note(speeds(&generation.finish));
    Ok(())
}

/// Answers all prompts in batches and prints the answers in order.
fn answer_all(
    flags: &GenerateArguments,
    generator: &mut Generator,
    prompts: &[Vec<u32>],
    config: &GenerationConfig,
    output: Output,
) -> Result<()> {
    let mut first = 0;
    // print answers after each part, so that they are not lost if the program is stopped
    for part in prompts.chunks(4 * Generator::MAX_BATCH_SIZE) {
        let generations = generator.generate_batch(part, std::slice::from_ref(config));
        let generations = generations.with_context(|| {
            let path = flags.prompts.as_deref().unwrap_or(Path::new("-"));
            format!("`{}`: rows {} to {}", path.display(), first + 1, first + part.len())
        })?;
        for (index, (generation, prompt)) in generations.iter().zip(part).enumerate() {
            if output.json {
                let mut object = as_json(generation, prompt);
                object["index"] = json!(first + index);
                Output::print_json(&object)?;
            } else {
                Output::print_generated(&format!("{}\n", generation.text))?;
            }
        }
        first += part.len();
    }
    Ok(())
}

/// A prompt and its line in the file.
struct Row {
    line: Option<usize>,
    content: Content,
    tools: Option<Vec<Value>>,
    variables: Map<String, Value>,
}

enum Content {
    Prompt(String),
    Messages(Vec<Message>),
}

fn rows(flags: &GenerateArguments) -> Result<Vec<Row>> {
    let plain = |text| Row { line: None, content: Content::Prompt(text), tools: None, variables: Map::new() };
    let Some(path) = &flags.prompts else {
        let text = match flags.prompt.as_deref() {
            Some("-") | None => without_line_end(read_text(Path::new("-"), MAX_INPUT_BYTES)?),
            Some(text) => text.to_owned(),
        };
        return Ok(vec![plain(text)]);
    };
    let (values, _) = read_values(path)?;
    let rows = values.into_iter().flat_map(|(line, value)| match value {
        Value::Array(list) => list.into_iter().map(|value| (line, value)).collect(),
        value => vec![(line, value)],
    });
    rows.map(|(line, value)| parse_row(line, value).map_err(|message| of_line(flags, Some(line), message.into())))
        .collect()
}

fn parse_row(line: usize, value: Value) -> std::result::Result<Row, UserError> {
    let wrong = |message: String| UserError::new(message);
    let Value::Object(mut map) = value else {
        return Err(wrong("expected an object with `prompt` or `messages`".into()));
    };
    let content = match (map.remove("prompt"), map.remove("messages")) {
        (Some(Value::String(text)), None) => Content::Prompt(text),
        (None, Some(messages)) | (Some(messages @ Value::Array(_)), None) => {
            let messages: Vec<Message> =
                serde_json::from_value(messages).map_err(|error| wrong(format!("`messages`: {error}")))?;
            // as in training
            let messages: std::result::Result<_, String> = messages.into_iter().map(Message::normalized).collect();
            Content::Messages(messages.map_err(|error| wrong(format!("`messages`: {error}")))?)
        }
        (Some(_), None) => return Err(wrong("`prompt`: expected text or a list of messages".into())),
        (Some(_), Some(_)) => return Err(wrong("expected one of `prompt` and `messages`, found both".into())),
        (None, None) => return Err(wrong("expected `prompt` or `messages`, found neither".into())),
    };
    let tools = match map.remove("tools") {
        None | Some(Value::Null) => None,
        Some(Value::Array(tools)) => Some(tools),
        Some(_) => return Err(wrong("`tools`: expected a list".into())),
    };
    let variables = match map.remove("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(variables)) => variables,
        Some(_) => return Err(wrong("`chat_template_kwargs`: expected an object".into())),
    };
    Ok(Row { line: Some(line), content, tools, variables })
}

impl Row {
    /// The tokens of the prompt, rendered by the chat template unless `--raw` is set or there is no template.
    fn ids(self, flags: &GenerateArguments, tools: Option<&[Value]>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let tools = self.tools.as_deref().or(tools);
        let system = || flags.system.as_deref().map(Message::system);
        let template = tokenizer.chat_template().filter(|_| !flags.raw);
        let messages = match (self.content, template) {
            (Content::Prompt(text), Some(_)) => system().into_iter().chain([Message::user(text)]).collect(),
            (Content::Messages(messages), Some(_)) => {
                let has_system = messages.first().is_some_and(|message| message.role() == "system");
                system().filter(|_| !has_system).into_iter().chain(messages).collect::<Vec<_>>()
            }
            (Content::Messages(_), None) => {
                return Err(UserError::new("`messages` need a chat template, but the model has none or --raw is set")
                    .with_hint("set one with --chat-template FILE")
                    .into());
            }
            (Content::Prompt(text), None) => {
                let flag = if flags.system.is_some() { "system" } else { "tools" };
                if flags.system.is_some() || tools.is_some() {
                    let message = "the model has no chat template, which this needs";
                    return Err(Error::Argument { name: flag.into(), message: message.into() }.into());
                }
                return Ok(tokenizer.encode(&text, true)?);
            }
        };
        match template {
            Some(template) => Ok(templated(tokenizer, template, &messages, tools, &self.variables)?),
            None => Ok(Vec::new()),
        }
    }
}

/// An error about a row, with file and line.
fn of_line(flags: &GenerateArguments, line: Option<usize>, error: anyhow::Error) -> anyhow::Error {
    match (&flags.prompts, line) {
        (Some(path), Some(line)) => error.context(format!("{}:{line}", path.display())),
        _ => error,
    }
}

impl Loaded {
    /// Creates a generator of the model with the adapter. The default type of the KV cache depends on the model.
    pub(crate) fn generator(&self, kv_cache: Option<KVCacheType>) -> metal_candle::Result<Generator> {
        let mut generator = Generator::new(self.model.clone());
        if let Some(kind) = kv_cache {
            generator = generator.with_kv_cache(kind)?;
        }
        match &self.adapter {
            Some(adapter) => Ok(generator.with_adapter(adapter.low_rank_updates()?)),
            None => Ok(generator),
        }
    }
}

/// The tokens of a conversation, up to the start of the assistant's answer.
pub(crate) fn templated(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&[Value]>,
    variables: &Map<String, Value>,
) -> metal_candle::Result<Vec<u32>> {
    let text = template.render(messages, tools, true, variables)?;
    tokenizer.encode(&text, false)
}

pub(crate) fn as_json(generation: &Generation, prompt_ids: &[u32]) -> Value {
    let finish = &generation.finish;
    json!({
        "text": generation.text,
        "tokens": generation.tokens,
        "log_probabilities": generation.log_probabilities,
        "finish_reason": finish.reason.name(),
        "prompt_ids": prompt_ids,
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "prompt_tokens_per_second": finish.prompt_tokens_per_second,
        "decode_tokens_per_second": finish.decode_tokens_per_second,
        "peak_memory_bytes": finish.peak_memory_bytes,
    })
}

/// One line with the speeds.
pub(crate) fn speeds(finish: &Finish) -> String {
    format!(
        "[{} tokens at {:.0} tokens/s, prompt of {} at {:.0} tokens/s; finish reason {}]",
        finish.generated_tokens,
        finish.decode_tokens_per_second,
        finish.prompt_tokens,
        finish.prompt_tokens_per_second,
        finish.reason.name().replace('_', " "),
    )
}
