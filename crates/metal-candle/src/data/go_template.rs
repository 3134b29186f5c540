//! Converts a Jinja chat template to an Ollama template (Go's `text/template`) by rendering probe conversations.

use super::{ChatTemplate, Message};
use serde_json::Map;
use std::time::{Duration, SystemTime};

/// The texts that a chat template writes around the messages of a conversation that ends with a user message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GoTemplate {
    /// The start of a conversation without a system message.
    start: String,
    /// The texts around a system message; `None` if the template does not support one.
    system: Option<(String, String)>,
    /// Whether a user message right after a system message lacks its usual header.
    is_joined: bool,
    user: (String, String),
    assistant: (String, String),
    /// The generation prompt after the last message.
    prompt: String,
}

/// The texts of the probes, which no template contains.
const MARKS: [&str; 4] = ["\u{E0F7}0\u{E0F8}", "\u{E0F7}1\u{E0F8}", "\u{E0F7}2\u{E0F8}", "\u{E0F7}3\u{E0F8}"];

impl GoTemplate {
    /// Extracts the parts of `template`. `bos` is the token that programs add before the text, and is removed.
    ///
    /// # Errors
    /// Conversations are not a concatenation of the parts; the message names one.
    pub(super) fn of(template: &ChatTemplate, bos: Option<&str>) -> Result<Self, String> {
        let (early, late) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_hours(24 * 400));
        let question = [Message::user(MARKS[0])];
        let dates = [early, late].map(|time| render(&template.clone().with_clock(move || time), &question, true, bos));
        if dates[0] != dates[1] {
            return Err("the chat template writes the date".to_string());
        }
        let mut last = String::new();
        for is_natural in [true, false] {
            match Self::cut(template, bos, is_natural).and_then(|pieces| pieces.checked(template, bos)) {
                Ok(pieces) => return Ok(pieces),
                Err(message) => last = message,
            }
        }
        Err(last)
    }

    /// Splits the renderings of probes into parts. An ambiguous end of a turn is the rendering without a generation prompt if
    /// `is_natural`, else the common prefix of two renderings.
    fn cut(template: &ChatTemplate, bos: Option<&str>, is_natural: bool) -> Result<Self, String> {
        let [system, first, answer, second] = MARKS;
        let render = |messages: &[Message], prompt| render(template, messages, prompt, bos);
        let user = |text| Message::user(text);
        let one = split(&render(&[user(first)], true)?, &[first])?;
        let turns = [user(first), Message::assistant(answer), user(second)];
        let three = split(&render(&turns, true)?, &[first, answer, second])?;
        let (before, to_answer, to_user, after) = (&one[0], &three[1], &three[2], &one[1]);
        // the end of the last turn
        let end_of = |messages: &[Message], marks: &[&str]| {
            let text = render(messages, false).ok().filter(|_| is_natural)?;
            split(&text, marks).ok()?.pop()
        };
        let user_end = end_of(&turns[..1], &[first]).filter(|end| to_answer.starts_with(end) && after.starts_with(end));
        let user_end = user_end.unwrap_or_else(|| common_prefix(to_answer, after).to_string());
        let answer_end = end_of(&turns[..2], &[first, answer])
            .filter(|end| to_user.strip_prefix(end.as_str()).is_some_and(|user_start| before.ends_with(user_start)));
        let user_start = match &answer_end {
            Some(end) => to_user[end.len()..].to_string(),
            None => common_suffix(before, to_user).to_string(),
        };
        let mut pieces = Self {
            start: before[..before.len() - user_start.len()].to_string(),
            system: None,
            is_joined: false,
            assistant: (
                to_answer[user_end.len()..].to_string(),
                to_user[..to_user.len() - user_start.len()].to_string(),
            ),
            prompt: after[user_end.len()..].to_string(),
            user: (user_start, user_end),
        };
        let with_system = [Message::system(system), user(first)];
        let Ok(text) = render(&with_system, true) else { return Ok(pieces) };
        let Ok(parts) = split(&text, &[system, first]) else {
            // the template does not write the system message
            return if text.contains(system) { Err(irregular("a system message")) } else { Ok(pieces) };
        };
        // if the header of the first question is missing, the system message is part of the question
        let end = parts[1].strip_suffix(pieces.user.0.as_str());
        pieces.is_joined = end.is_none();
        pieces.system = Some((parts[0].clone(), end.unwrap_or(&parts[1]).to_string()));
        Ok(pieces)
    }

    /// Returns the parts if they reproduce the template's conversations of one to three turns.
    fn checked(self, template: &ChatTemplate, bos: Option<&str>) -> Result<Self, String> {
        let questions = ["What is 2 + 2?", "Why?\n\nTell me \"more\".", "{{ thanks }} <b>"];
        let answers = ["4", "Since 1 + 1 = 2.\n- so"];
        for num_turns in 1..=questions.len() {
            for has_system in [false, true] {
                if has_system && self.system.is_none() {
                    continue;
                }
                let mut messages: Vec<Message> = Vec::new();
                messages.extend(has_system.then(|| Message::system("Answer in one word.")));
                for (turn, question) in questions.iter().take(num_turns).enumerate() {
                    messages.push(Message::user(*question));
                    let answer = answers.get(turn).filter(|_| turn + 1 < num_turns);
                    messages.extend(answer.map(|text| Message::assistant(*text)));
                }
                if render(template, &messages, true, bos)? != self.text(&messages) {
                    let system = if has_system { " and a system message" } else { "" };
                    return Err(irregular(&format!("a conversation with {num_turns} questions{system}")));
                }
            }
        }
        Ok(self)
    }

    /// Whether the template writes system messages.
    pub(super) fn has_system(&self) -> bool {
        self.system.is_some()
    }

    /// Renders a conversation with the parts. A system message comes first.
    fn text(&self, messages: &[Message]) -> String {
        let system = messages.iter().find(|message| message.role() == "system");
        let mut text = match (system, &self.system) {
            (Some(message), Some((before, after))) => format!("{before}{}{after}", message.text()),
            _ => self.start.clone(),
        };
        for (index, message) in messages.iter().enumerate() {
            let is_last = index + 1 == messages.len();
            let (before, after) = match message.role() {
                "user" if self.is_joined && system.is_some() && index == 1 => ("", self.user.1.as_str()),
                "user" => (self.user.0.as_str(), self.user.1.as_str()),
                "assistant" => (self.assistant.0.as_str(), if is_last { "" } else { self.assistant.1.as_str() }),
                _ => continue,
            };
            text.extend([before, &message.text(), after]);
        }
        if messages.last().is_none_or(|message| message.role() != "assistant") {
            text += &self.prompt;
        }
        text
    }

    /// The template in Ollama's syntax. White space between the parts is removed by `{{-`.
    pub(super) fn source(&self) -> String {
        let start = constant(&self.start);
        let mut lines = Vec::new();
        if let Some((before, after)) = &self.system {
            let (before, after) = (constant(before), constant(after));
            lines.push(format!(
                "{{{{- if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
            ));
        } else if !start.is_empty() {
            lines.push(format!("{{{{- if true }}}}{start}{{{{ end }}}}"));
        }
        lines.push("{{- range $i, $_ := .Messages }}".to_string());
        lines.push("{{- $last := eq (len (slice $.Messages $i)) 1 }}".to_string());
        let mut before = constant(&self.user.0);
        if self.is_joined {
            before = format!("{{{{ if or (not $.System) (gt $i 1) }}}}{before}{{{{ end }}}}");
        }
        let after = constant(&self.user.1);
        let user = format!("{{{{- if eq .Role \"user\" }}}}{before}{{{{ .Content }}}}{after}");
        let (before, after) = (constant(&self.assistant.0), constant(&self.assistant.1));
        lines.push(format!(
            "{user}{{{{ else if eq .Role \"assistant\" }}}}{before}{{{{ .Content }}}}{{{{ if not $last }}}}{after}{{{{ end }}}}{{{{ end }}}}"
        ));
        let prompt = constant(&self.prompt);
        lines.push(format!("{{{{- if and $last (ne .Role \"assistant\") }}}}{prompt}{{{{ end }}}}"));
        lines.push("{{- end }}".to_string());
        lines.join("\n")
    }
}

fn irregular(what: &str) -> String {
    format!(
        "the chat template writes {what} in a way that an Ollama template of fixed texts around messages cannot reproduce"
    )
}

/// Renders a conversation without the BOS token that programs add.
fn render(template: &ChatTemplate, messages: &[Message], prompt: bool, bos: Option<&str>) -> Result<String, String> {
    let text = template.render(messages, None, prompt, &Map::new()).map_err(|error| error.to_string())?;
    Ok(bos.and_then(|bos| text.strip_prefix(bos)).map(str::to_string).unwrap_or(text))
}

/// Splits a text at the marks, each of which must occur once, in this order.
fn split(text: &str, marks: &[&str]) -> Result<Vec<String>, String> {
    let (mut parts, mut rest) = (Vec::new(), text);
    for mark in marks {
        let (before, after) = rest.split_once(mark).ok_or_else(|| irregular("a message"))?;
        parts.push(before.to_string());
        rest = after;
    }
    parts.push(rest.to_string());
    let is_once = parts.iter().all(|part| !MARKS.iter().any(|mark| part.contains(mark)));
    is_once.then_some(parts).ok_or_else(|| irregular("a message"))
}

fn common_prefix<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.char_indices().zip(b.chars()).take_while(|((_, a), b)| a == b);
    &a[..same.last().map_or(0, |((at, c), _)| at + c.len_utf8())]
}

fn common_suffix<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.char_indices().rev().zip(b.chars().rev()).take_while(|((_, a), b)| a == b);
    &a[same.last().map_or(a.len(), |((at, _), _)| at)..]
}

/// Quotes a part if its characters have a meaning in templates or Modelfiles.
fn constant(text: &str) -> String {
    if !text.contains(['{', '}', '"']) {
        return text.to_string();
    }
    let escaped = text.chars().map(|c| match c {
        '\\' => "\\\\".to_string(),
        '\n' => "\\n".to_string(),
        '"' | '{' | '}' => format!("\\u{:04x}", c as u32),
        c if c.is_control() => format!("\\u{:04x}", c as u32),
        c => c.to_string(),
    });
    format!("{{{{ \"{}\" }}}}", escaped.collect::<String>())
}
