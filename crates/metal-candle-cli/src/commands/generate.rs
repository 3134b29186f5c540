//! `generate`: text that continues a prompt.

use crate::args::{AdaptedModelArguments, SamplingArguments};
use crate::model_source::Loaded;
use crate::output::Output;
use crate::sampling::generation_config;
use anyhow::Result;
use clap::Args;
use metal_candle::Error;
use metal_candle::data::{ChatTemplate, Message, Tokenizer};
use metal_candle::inference::{Finish, Generation, Generator, Prompt};
use serde_json::{Map, Value, json};
use std::io::Read;
use std::ops::ControlFlow;

/// Flags of `generate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct GenerateArguments {
    /// The text to answer or continue; `-` reads it from standard input.
    #[arg(long, short, allow_hyphen_values = true)]
    pub(crate) prompt: String,

    /// System prompt, put before the prompt by the chat template.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,

    /// Continue the prompt as it is, without the model's chat template.
    #[arg(long)]
    pub(crate) raw: bool,

    /// Print the text when it is complete instead of piece by piece.
    #[arg(long)]
    pub(crate) no_stream: bool,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) sampling: SamplingArguments,
}

pub(crate) fn run(flags: &GenerateArguments, output: Output) -> Result<()> {
    let text = if flags.prompt == "-" { read_stdin()? } else { flags.prompt.clone() };
    let loaded = Loaded::new(&flags.model, output)?;
    let tokenizer = loaded.source.tokenizer()?;
    let config = generation_config(&flags.sampling, loaded.model.config());
    let prompt = match tokenizer.chat_template() {
        Some(template) if !flags.raw => {
            let system = flags.system.as_deref().map(Message::system);
            let messages: Vec<_> = system.into_iter().chain([Message::user(text)]).collect();
            templated(template, &tokenizer, &messages)?
        }
        None if flags.system.is_some() => {
            let message = "the model has no chat template to put it in";
            return Err(Error::Argument { name: "system".into(), message: message.into() }.into());
        }
        _ => Prompt::Text(text),
    };
    let mut generator = loaded.generator()?.with_tokenizer(tokenizer);

    let streams = !output.json && !flags.no_stream;
    let mut unwritten = Ok(());
    let generation = generator.generate_with(prompt, &config, |piece| {
        if streams {
            unwritten = Output::print(&piece.text);
        }
        if unwritten.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    unwritten?;
    if output.json {
        Output::print_json(&as_json(&generation))?;
        return Ok(());
    }
    if !streams {
        Output::print(&generation.text)?;
    }
    Output::print("\n")?;
    output.note(speeds(&generation.finish));
    Ok(())
}

impl Loaded {
    /// A generator of the model, with the adapter.
    pub(crate) fn generator(&self) -> metal_candle::Result<Generator> {
        let generator = Generator::new(self.model.clone());
        match &self.adapter {
            Some(adapter) => Ok(generator.with_adapter(adapter.terms()?)),
            None => Ok(generator),
        }
    }
}

/// The tokens of a conversation up to where the assistant's answer begins.
pub(crate) fn templated(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
) -> metal_candle::Result<Prompt> {
    let text = template.render(messages, None, true, &Map::new())?;
    Ok(Prompt::Ids(tokenizer.encode(&text, false)?))
}

pub(crate) fn as_json(generation: &Generation) -> Value {
    let finish = &generation.finish;
    json!({
        "text": generation.text,
        "tokens": generation.tokens,
        "log_probabilities": generation.log_probabilities,
        "finish_reason": finish.reason.name(),
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "prompt_tokens_per_second": finish.prompt_tokens_per_second,
        "decode_tokens_per_second": finish.decode_tokens_per_second,
        "peak_memory_bytes": finish.peak_memory_bytes,
    })
}

/// One line on how fast it went.
pub(crate) fn speeds(finish: &Finish) -> String {
    format!(
        "[{} tokens at {:.0} tokens/s after a prompt of {} at {:.0} tokens/s; ended by {}]",
        finish.generated_tokens,
        finish.decode_tokens_per_second,
        finish.prompt_tokens,
        finish.prompt_tokens_per_second,
        finish.reason.name().replace('_', " "),
    )
}

/// Standard input without the last line's end.
fn read_stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|source| Error::Read { path: "standard input".into(), source })?;
    let end = text.strip_suffix('\n').map_or(text.len(), |rest| rest.strip_suffix('\r').unwrap_or(rest).len());
    text.truncate(end);
    Ok(text)
}
