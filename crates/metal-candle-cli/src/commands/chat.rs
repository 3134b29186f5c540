//! `chat`: runs a conversation of several turns.

mod conversation;

use crate::sampling::{SamplingArguments, generation_config, with_end_of_turn};

use crate::commands::generate::{as_json, speeds, templated};
use crate::error::UserError;
use crate::interrupt;
use crate::kv_cache::CacheArguments;
use crate::matmul_precision::PrecisionArguments;
use crate::model_source::{AdaptedModelArguments, Loaded};
use crate::output::Output;
use crate::templates::{TemplateArguments, read_tools};
use anyhow::Result;
use clap::Args;
use conversation::{Conversation, Reply};
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::files::BoundedLines;
use metal_candle::inference::{FinishReason, Generator};
use metal_candle::{Error, files};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value};
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Maximum size of a line of standard input, in bytes.
const MAX_LINE_BYTES: usize = 64 << 20;
/// Maximum size of the history file, in bytes.
const MAX_HISTORY_BYTES: u64 = 16 << 20;

/// Flags of `chat`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ChatArguments {
    /// The system prompt.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// The file for the input history [default: `metal-candle/history.txt` in the user's data folder].
    #[arg(long, value_name = "FILE")]
    pub(crate) history: Option<PathBuf>,

    /// A JSON file with a list of the schemas of tools that the model may call.
    #[arg(long, value_name = "FILE")]
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

pub(crate) fn run(flags: &ChatArguments, output: Output) -> Result<()> {
    let loaded = Loaded::new(&flags.model, flags.precision, output)?;
    let tokenizer = flags.template.tokenizer(&loaded.source, flags.model.adapter.as_deref())?;
    let tools = read_tools(flags.tools.as_deref())?;
    let Some(template) = tokenizer.chat_template().cloned() else {
        return Err(UserError::new(format!("`{}` has no chat template", loaded.source.name))
            .with_hint("`generate --raw` continues text without one")
            .into());
    };
    let config = with_end_of_turn(generation_config(&flags.sampling, loaded.model.config()), Some(&tokenizer));
    config.validate()?;
    let mut chat = Chat {
        generator: loaded.generator(flags.cache.kv_cache)?.with_tokenizer(tokenizer.clone()),
        tokenizer,
        template,
        tools,
        conversation: Conversation::new(flags.system.clone(), config),
        output,
    };
    if std::io::stdin().is_terminal() {
        output.note(format_args!(
            "{}; /help lists the commands, /quit or Ctrl-D ends the conversation",
            loaded.source.name
        ));
        chat.talk(flags.history.clone().or_else(default_history).as_deref())
    } else {
        chat.read_lines()
    }
}

struct Chat {
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tools: Option<Vec<Value>>,
    conversation: Conversation,
    output: Output,
}

impl Chat {
    /// Reads turns from a terminal.
    fn talk(&mut self, history: Option<&Path>) -> Result<()> {
        let failed = |error: ReadlineError| Error::Read {
            path: "the terminal".into(),
            source: std::io::Error::other(error.to_string()),
        };
        let mut editor = DefaultEditor::new().map_err(failed)?;
        if let Some(history) = history {
            // the file is missing the first time
            if std::fs::metadata(history).is_ok_and(|found| found.is_file() && found.len() <= MAX_HISTORY_BYTES) {
                let _ = editor.load_history(history);
            }
        }
        interrupt::listen();
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(line.as_str());
                    if self.turn(&line)?.is_break() {
                        break;
                    }
                }
                Err(ReadlineError::Interrupted) => self.output.note("/quit or Ctrl-D ends the conversation"),
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(failed(error).into()),
            }
        }
        if let Some(history) = history {
            // rustyline writes the format, so let it write to a temporary file first
            let temporary = tempfile::tempdir()?;
            let saved = temporary.path().join("history");
            editor.save_history(&saved)?;
            let lines = files::read_bounded(&saved, MAX_HISTORY_BYTES)?;
            let folder = history.parent().map_or(Ok(()), files::create_folder);
            if let Err(error) = folder.and_then(|()| files::write_atomically(history, |file| file.write_all(&lines))) {
                Output::warn(format_args!("cannot save the input history: {error}"));
            } else if history.is_file() {
                // only the user may read it, as with rustyline
                std::fs::set_permissions(history, std::fs::metadata(&saved)?.permissions())?;
            }
        }
        Ok(())
    }

    /// Reads each line of standard input as a turn.
    fn read_lines(&mut self) -> Result<()> {
        let mut lines = BoundedLines::new(std::io::stdin().lock(), MAX_LINE_BYTES);
        let error = |source| Error::Read { path: "standard input".into(), source };
        while let Some(line) = lines.next_line().map_err(error)? {
            let line = std::str::from_utf8(line).map_err(|e| error(io::Error::new(io::ErrorKind::InvalidData, e)))?;
            if self.turn(line)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Handles one line: a command or a question. Errors in the input are printed, and the conversation continues.
    fn turn(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let done = match self.conversation.line(line) {
            Ok(Reply::Say(text)) => {
                self.output.note(text);
                Ok(())
            }
            Ok(Reply::CountTokens) => self.count_tokens(),
            Ok(Reply::Answer) => self.answer(),
            Ok(Reply::Quit) => return Ok(ControlFlow::Break(())),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => {}
            Err(error) if error.is::<std::io::Error>() => return Err(error),
            Err(error) if std::io::stdin().is_terminal() => {
                crate::error::report(&error);
            }
            Err(error) => return Err(error),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn count_tokens(&self) -> Result<()> {
        let text = self.template.render(&self.conversation.messages(), self.tools.as_deref(), false, &Map::new())?;
        let count = self.tokenizer.encode(&text, false)?.len();
        let context = self.generator.model().config().max_sequence_length();
        self.output.note(format_args!("{count} of {context} tokens"));
        Ok(())
    }

    fn answer(&mut self) -> Result<()> {
        let json = self.output.json;
        let mut unwritten = Ok(());
        let mut prompt_ids = Vec::new();
        interrupt::forget();
        let prompt = templated(
            &self.tokenizer,
            &self.template,
            &self.conversation.messages(),
            self.tools.as_deref(),
            &Map::new(),
        );
        let config = self.conversation.config();
        let generation = prompt.and_then(|prompt| {
            prompt_ids = prompt;
            self.generator.generate_with(&prompt_ids, config, |piece| {
                if !json {
                    unwritten = Output::print_generated(&piece.text);
                }
                if unwritten.is_err() || interrupt::is_asked() {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
        });
        unwritten?;
        interrupt::forget();
        let generation = match generation {
            Ok(generation) => generation,
            Err(error) => {
                self.conversation.take_back();
                return Err(error.into());
            }
        };
        if json {
            Output::print_json(&as_json(&generation, &prompt_ids))?;
        } else {
            Output::print("\n")?;
        }
        if generation.finish.reason == FinishReason::Cancelled || std::io::stdin().is_terminal() {
            self.output.note(speeds(&generation.finish));
        }
        self.conversation.answered(generation.text);
        Ok(())
    }
}

/// `metal-candle/history.txt` in the user's data folder.
fn default_history() -> Option<PathBuf> {
    let data = match std::env::var_os("XDG_DATA_HOME").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => std::env::home_dir()?.join(".local/share"),
    };
    Some(data.join("metal-candle/history.txt"))
}
