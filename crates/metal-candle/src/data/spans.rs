//! Where the assistant's turns are in a rendered conversation.

use super::chat::{REASONING_KEYS, message_value, tools_value};
use super::{ChatTemplate, Message};
use minijinja::Value as TemplateValue;
use serde_json::{Map, Value};
use std::ops::Range;

/// A text that no conversation holds: private-use characters at both ends.
const SENTINEL: &str = "\u{E0F7}0\u{E0F8}";

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RenderedConversation {
    pub text: String,
    /// The bytes of each wanted turn, its end token included.
    pub spans: Vec<Range<usize>>,
}

/// Finds turns in what a template writes.
pub(super) struct SpanFinder<'a> {
    template: &'a ChatTemplate,
    /// Longest first.
    special_tokens: Vec<String>,
    /// Whether the template writes more when an answer is to follow.
    has_generation_prompt: bool,
}

/// A conversation in the template engine's form.
struct View<'a> {
    template: &'a ChatTemplate,
    messages: Vec<TemplateValue>,
    tools: Option<TemplateValue>,
    variables: &'a Map<String, Value>,
}

impl View<'_> {
    fn render(&self, messages: &[TemplateValue], add_generation_prompt: bool) -> crate::error::Result<String> {
        self.template.render_values(messages, self.tools.as_ref(), add_generation_prompt, self.variables)
    }

    /// The first `count` messages, if the template takes them.
    fn prefix(&self, count: usize, add_generation_prompt: bool) -> Option<String> {
        self.render(&self.messages[..count], add_generation_prompt).ok()
    }

    /// The conversation with another message in place of number `turn`.
    fn with(&self, turn: usize, message: &Message) -> Option<String> {
        let mut messages = self.messages.clone();
        *messages.get_mut(turn)? = message_value(message);
        self.render(&messages, false).ok().filter(|text| text.contains(SENTINEL))
    }
}

impl<'a> SpanFinder<'a> {
    pub(super) fn new(template: &'a ChatTemplate, special_tokens: Vec<String>) -> Self {
        let probe = [Message::user("a")];
        let render = |prompt| template.render(&probe, None, prompt, &Map::new()).ok();
        let has_generation_prompt = render(false).is_none_or(|text| Some(text) != render(true));
        Self { template, special_tokens, has_generation_prompt }
    }

    /// Renders a conversation and finds the `wanted` turns in it: what the model has to write after the prompt, up to and with the
    /// token that ends the turn.
    ///
    /// A turn lies between the rendering of the messages before it and that of the messages up to it, where both are a beginning of
    /// the whole. Templates that change earlier turns when later ones come (reasoning is dropped) break this; there the turn is
    /// what changes in the whole when the turn's text does.
    pub(super) fn render(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
        wanted: &[usize],
    ) -> Result<RenderedConversation, String> {
        let view = View {
            template: self.template,
            messages: messages.iter().map(message_value).collect(),
            tools: tools_value(tools),
            variables,
        };
        let text = view.render(&view.messages, false).map_err(|e| e.to_string())?;
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(wanted.len());
        for &turn in wanted {
            let span = self
                .span(&view, messages, &text, turn)
                .filter(|span| spans.last().is_none_or(|last| last.end <= span.start));
            spans.push(span.ok_or_else(|| {
                format!("the chat template hides where message {} begins and ends, so it cannot be trained", turn + 1)
            })?);
        }
        Ok(RenderedConversation { text, spans })
    }

    /// The bytes that each message takes in the whole; `None` for those that cannot be told from the one after.
    pub(super) fn boundaries(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
        text: &str,
    ) -> Vec<Option<usize>> {
        let view = View {
            template: self.template,
            messages: messages.iter().map(message_value).collect(),
            tools: tools_value(tools),
            variables,
        };
        (1..=messages.len())
            .map(|count| {
                if count == messages.len() {
                    return Some(text.len());
                }
                view.prefix(count, false).filter(|prefix| text.starts_with(prefix.as_str())).map(|prefix| prefix.len())
            })
            .collect()
    }

    fn span(&self, view: &View, messages: &[Message], text: &str, turn: usize) -> Option<Range<usize>> {
        let start = if self.has_generation_prompt {
            view.prefix(turn, true).filter(|prefix| text.starts_with(prefix.as_str())).map(|prefix| prefix.len())
        } else {
            None
        };
        let end = if turn + 1 == messages.len() {
            Some(text.len())
        } else {
            view.prefix(turn + 1, false).filter(|prefix| text.starts_with(prefix.as_str())).map(|prefix| prefix.len())
        };
        let span = if let (Some(start), Some(end)) = (start, end) {
            start..end
        } else {
            let changed = Self::changed(view, messages, text, turn)?;
            let start = start
                .or_else(|| self.after_header(view, text, turn, changed.start))
                .or_else(|| Self::after_space(view, text, turn, changed.start))
                .unwrap_or(changed.start);
            let end = end.unwrap_or_else(|| self.after_end_token(text, changed.end));
            start..end
        };
        let end = self.without_space_after_end_token(text, &span);
        (span.start < end).then_some(span.start..end)
    }

    /// What changes in the whole when the text of a turn does.
    fn changed(view: &View, messages: &[Message], text: &str, turn: usize) -> Option<Range<usize>> {
        let mut plain = messages.get(turn)?.clone().with("content", SENTINEL);
        let with_calls = plain.clone();
        plain.remove("tool_calls");
        for key in REASONING_KEYS {
            plain.remove(key);
        }
        let other = view.with(turn, &plain).or_else(|| view.with(turn, &with_calls))?;
        let start = common_prefix(text, &other);
        let end = text.len() - common_suffix(&text[start..], &other[start..]);
        Some(start..end)
    }

    /// The end of the generation prompt that stands before a turn's text, with nothing but text between the two.
    fn after_header(&self, view: &View, text: &str, turn: usize, text_start: usize) -> Option<usize> {
        let (bare, prompted) = (view.prefix(turn, false)?, view.prefix(turn, true)?);
        let header = prompted.strip_prefix(bare.as_str()).filter(|header| !header.is_empty())?;
        let before = &text[..text_start];
        let start = before.rfind(header)? + header.len();
        let between = &before[start..];
        (!self.special_tokens.iter().any(|token| between.contains(token.as_str()))).then_some(start)
    }

    /// The end of the messages before a turn, with nothing but white space between it and the turn's text: the model writes that too.
    fn after_space(view: &View, text: &str, turn: usize, text_start: usize) -> Option<usize> {
        let before = view.prefix(turn, false).filter(|prefix| text.starts_with(prefix.as_str()))?;
        let between = text.get(before.len()..text_start)?;
        between.trim().is_empty().then_some(before.len())
    }

    /// The end of the special token that follows a turn's text, white space between them aside.
    fn after_end_token(&self, text: &str, text_end: usize) -> usize {
        let rest = text[text_end..].trim_start();
        let token = self.special_tokens.iter().find(|token| rest.starts_with(token.as_str()));
        token.map_or(text_end, |token| text.len() - rest.len() + token.len())
    }

    fn without_space_after_end_token(&self, text: &str, span: &Range<usize>) -> usize {
        let Some(inside) = text.get(span.clone()) else { return span.start };
        let trimmed = inside.trim_end();
        let ends_with_token = self.special_tokens.iter().any(|token| trimmed.ends_with(token.as_str()));
        if ends_with_token { span.start + trimmed.len() } else { span.end }
    }
}

/// Bytes of the characters that both texts begin with.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}

/// Bytes of the characters that both texts end with.
fn common_suffix(a: &str, b: &str) -> usize {
    let same = a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}
