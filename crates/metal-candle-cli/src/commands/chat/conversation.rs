//! The state of a conversation and its slash commands.

use crate::error::UserError;
use anyhow::Result;
use metal_candle::Error;
use metal_candle::data::Message;
use metal_candle::files::write_atomically;
use metal_candle::inference::GenerationConfig;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Maximum size of a saved conversation, in bytes.
const MAX_CONVERSATION_BYTES: u64 = 64 << 20;

const HELP: &str = "\
/system TEXT      set the system prompt; without TEXT, remove it
/set NAME VALUE   max_tokens, seed, temperature, top_k, top_p, min_p, repetition_penalty,
                  presence_penalty or frequency_penalty; without NAME, show all
/retry            answer the last question again, with the next seed
/clear            start a new conversation with the same system prompt
/save FILE        save the conversation as one row of a dataset; /load FILE loads it
/tokens           show the number of tokens of the conversation, and the limit
/quit             quit (also Ctrl-D); Ctrl-C stops an answer";

/// What to do after a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Print this text.
    Say(String),
    /// Answer the last message.
    Answer,
    /// Print the number of tokens.
    CountTokens,
    /// End the conversation.
    Quit,
}

/// A conversation and its generation settings.
#[derive(Debug)]
pub(super) struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
    config: GenerationConfig,
    /// The file it was last saved to or loaded from.
    file: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    messages: Vec<Message>,
}

impl Conversation {
    pub(super) fn new(system: Option<String>, config: GenerationConfig) -> Self {
        Self { system, turns: Vec::new(), config, file: None }
    }

    /// All messages, the system prompt first.
    pub(super) fn messages(&self) -> Vec<Message> {
        let system = self.system.as_deref().map(Message::system);
        system.into_iter().chain(self.turns.iter().cloned()).collect()
    }

    pub(super) fn config(&self) -> &GenerationConfig {
        &self.config
    }

    /// Adds the answer to the last question.
    pub(super) fn answered(&mut self, text: String) {
        self.turns.push(Message::assistant(text));
    }

    /// Removes the last question after a failed answer.
    pub(super) fn take_back(&mut self) {
        if self.turns.last().is_some_and(|turn| turn.role() == "user") {
            self.turns.pop();
        }
    }

    /// Handles a line: a command if it starts with `/` and a letter, else a question (such as `// a comment`).
    pub(super) fn line(&mut self, line: &str) -> Result<Reply> {
        let Some(command) = line.strip_prefix('/').filter(|rest| rest.starts_with(char::is_alphabetic)) else {
            self.turns.push(Message::user(line));
            return Ok(Reply::Answer);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let said = match name {
            "help" => HELP.into(),
            "quit" | "exit" => return Ok(Reply::Quit),
            "tokens" => return Ok(Reply::CountTokens),
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                "the system prompt is set".into()
            }
            "clear" => {
                self.turns.clear();
                "started a new conversation".into()
            }
            "retry" => return self.retry(),
            "set" => self.set(rest)?,
            "save" => self.save(rest)?,
            "load" => self.load(rest)?,
            _ => {
                return Err(UserError::new(format!("there is no command `/{name}`"))
                    .with_hint("/help lists the commands")
                    .into());
            }
        };
        Ok(Reply::Say(said))
    }

    fn retry(&mut self) -> Result<Reply> {
        if self.turns.last().is_some_and(|turn| turn.role() == "assistant") {
            self.turns.pop();
        }
        if self.turns.is_empty() {
            return Err(UserError::new("there is no answer to retry").into());
        }
        self.config.sampling.seed = Some(self.config.sampling.seed.unwrap_or(0).wrapping_add(1));
        Ok(Reply::Answer)
    }

    fn set(&mut self, rest: &str) -> Result<String> {
        let sampling = &self.config.sampling;
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            if !rest.is_empty() {
                return Err(UserError::new("expected `/set NAME VALUE`").with_hint("/help lists the commands").into());
            }
            return Ok(format!(
                "max_tokens {}, seed {}, temperature {}, top_k {}, top_p {}, min_p {}, repetition_penalty {}, \
                 presence_penalty {}, frequency_penalty {}",
                self.config.max_tokens,
                sampling.seed.unwrap_or(0),
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            ));
        };
        let value = value.trim();
        let mut config = self.config.clone();
        let sampling = &mut config.sampling;
        match name {
            "max_tokens" => config.max_tokens = parse(name, value)?,
            "seed" => sampling.seed = Some(parse(name, value)?),
            "temperature" => sampling.temperature = parse(name, value)?,
            "top_k" => sampling.top_k = parse(name, value)?,
            "top_p" => sampling.top_p = parse(name, value)?,
            "min_p" => sampling.min_p = parse(name, value)?,
            "repetition_penalty" => sampling.repetition_penalty = parse(name, value)?,
            "presence_penalty" => sampling.presence_penalty = parse(name, value)?,
            "frequency_penalty" => sampling.frequency_penalty = parse(name, value)?,
            _ => {
                return Err(UserError::new(format!("there is no setting `{name}`"))
                    .with_hint("/help lists the commands")
                    .into());
            }
        }
        config.validate()?;
        self.config = config;
        Ok(format!("{name} is {value}"))
    }

    fn save(&mut self, file: &str) -> Result<String> {
        let path = Path::new(named(file)?);
        if path.is_file() && self.file.as_deref() != Some(path) {
            return Err(UserError::new(format!("`{file}` exists and is not overwritten"))
                .with_hint("choose another name, or /load the file first")
                .into());
        }
        let row = serde_json::to_string(&Row { messages: self.messages() })? + "\n";
        write_atomically(path, |file| file.write_all(row.as_bytes()))?;
        self.file = Some(path.to_path_buf());
        Ok(format!("saved {} messages to {file}", self.messages().len()))
    }

    fn load(&mut self, file: &str) -> Result<String> {
        let path = Path::new(named(file)?);
        let text = metal_candle::files::read_text(path, MAX_CONVERSATION_BYTES)?;
        let row: Row = serde_json::from_str(text.trim())
            .map_err(|error| Error::Format { path: path.to_path_buf(), message: error.to_string() })?;
        let mut messages = row.messages;
        let has_system = messages.first().is_some_and(|message| message.role() == "system");
        self.system = has_system.then(|| messages.remove(0).text());
        self.turns = messages;
        self.file = Some(path.to_path_buf());
        Ok(format!("loaded {} messages from {file}", self.messages().len()))
    }
}

fn named(file: &str) -> Result<&str> {
    if file.is_empty() { Err(UserError::new("expected a file name").into()) } else { Ok(file) }
}

fn parse<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| UserError::new(format!("`{name}`: expected a number, found `{value}`")).into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::{Conversation, Reply};
    use metal_candle::inference::GenerationConfig;

    fn roles(conversation: &Conversation) -> Vec<String> {
        conversation.messages().iter().map(|message| message.role().to_owned()).collect()
    }

    #[test]
    fn questions_answers_and_retries() {
        let mut chat = Conversation::new(Some("be brief".into()), GenerationConfig::default());
        assert!(chat.line("/retry").is_err());
        assert_eq!(chat.line("hello /help").unwrap(), Reply::Answer);
        chat.take_back();
        assert_eq!(chat.line("/// Adds two numbers.").unwrap(), Reply::Answer);
        chat.answered("hi".into());
        assert_eq!(roles(&chat), ["system", "user", "assistant"]);
        let seed = chat.config().sampling.seed.unwrap_or(0);
        assert_eq!(chat.line("/retry").unwrap(), Reply::Answer);
        assert_eq!(roles(&chat), ["system", "user"]);
        assert_eq!(chat.config().sampling.seed, Some(seed + 1));
        chat.take_back();
        assert_eq!(roles(&chat), ["system"]);
        chat.line("/system").unwrap();
        assert!(roles(&chat).is_empty());
        assert_eq!(chat.line("/quit").unwrap(), Reply::Quit);
        assert!(chat.line("/nothing").is_err());
    }

    #[test]
    fn settings_are_checked() {
        let mut chat = Conversation::new(None, GenerationConfig::default());
        chat.line("/set temperature 0.2").unwrap();
        assert!((chat.config().sampling.temperature - 0.2).abs() < 1e-12);
        for wrong in ["/set temperature -1", "/set temperature x", "/set heat 3", "/set top_p", "/set max_tokens 0"] {
            assert!(chat.line(wrong).is_err(), "{wrong}");
        }
        assert!((chat.config().sampling.temperature - 0.2).abs() < 1e-12);
        let Reply::Say(shown) = chat.line("/set").unwrap() else { panic!("expected a text") };
        assert!(shown.contains("temperature 0.2"), "{shown}");
    }

    #[test]
    fn saved_conversations_are_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat.jsonl");
        let mut chat = Conversation::new(Some("s".into()), GenerationConfig::default());
        chat.line("a \"b\"\u{e9}").unwrap();
        chat.answered("c".into());
        chat.line(&format!("/save {}", file.display())).unwrap();
        chat.line(&format!("/save {}", file.display())).unwrap();
        let mut other = Conversation::new(None, GenerationConfig::default());
        other.line("x").unwrap();
        // files of other origin are not overwritten
        assert!(other.line(&format!("/save {}", file.display())).is_err());
        other.line(&format!("/load {}", file.display())).unwrap();
        assert_eq!(other.messages(), chat.messages());
        assert!(other.line("/load").is_err());
        std::fs::write(&file, "{\"messages\": 3}").unwrap();
        assert!(other.line(&format!("/load {}", file.display())).is_err());
        assert_eq!(other.messages(), chat.messages());
    }
}
