//! Finds the assistant's turns in a rendered conversation.

use super::chat::{REASONING_KEYS, message_value, tools_value};
use super::jinja::{GENERATION_END, GENERATION_MARKS, GENERATION_START};
use super::marked::{Marker, Part, Strings, generation_ranges};
use super::message::with_call_ids;
use super::{ChatTemplate, Message};
use serde_json::{Map, Value};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

/// A text that no conversation contains: private-use characters at both ends.
const SENTINEL: &str = "\u{E0F7}0\u{E0F8}";
/// Maximum number of messages in a conversation whose boundaries are found by rendering each prefix.
const MAX_BEGINNINGS: usize = 64;

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct RenderedConversation {
    pub text: String,
    /// The trained byte ranges, in order: each requested turn with its end token.
    pub spans: Vec<Range<usize>>,
    /// Whether the template marks the spans with `{% generation %}`.
    pub has_marks: bool,
    /// The positions of messages in the text, if they can be found.
    strings: Option<Strings>,
    pub notes: BTreeSet<RenderNote>,
}

/// An irregularity of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RenderNote {
    LosesText,
    LosesCalls,
    LosesReasoning,
    WritesNone,
    ReplacesIds,
}

/// Finds turns in rendered conversations.
pub(super) struct SpanFinder<'a> {
    template: &'a ChatTemplate,
    /// Longest first.
    special_tokens: Vec<String>,
    /// Whether the template has a generation prompt.
    has_generation_prompt: bool,
    /// The text before an answer, for a template without a generation prompt; white space belongs to the answer.
    header: String,
    /// The special tokens that the template writes after an answer.
    end_tokens: Vec<String>,
}

/// A conversation converted for the template engine.
struct View<'a> {
    template: &'a ChatTemplate,
    messages: Vec<minijinja::Value>,
    tools: Option<minijinja::Value>,
    variables: &'a Map<String, Value>,
}

impl<'a> View<'a> {
    fn new(
        template: &'a ChatTemplate,
        messages: &[Message],
        tools: Option<&[Value]>,
        variables: &'a Map<String, Value>,
    ) -> Self {
        Self { template, messages: messages.iter().map(message_value).collect(), tools: tools_value(tools), variables }
    }

    fn render(&self, messages: &[minijinja::Value], add_generation_prompt: bool) -> crate::error::Result<String> {
        self.template.render_values(messages, self.tools.as_ref(), add_generation_prompt, self.variables)
    }

    /// Renders the first `count` messages; `None` if the template refuses them.
    fn prefix(&self, count: usize, add_generation_prompt: bool) -> Option<String> {
        self.render(&self.messages[..count], add_generation_prompt).ok()
    }

    /// The length of the first `count` messages, if their rendering is a prefix of the whole text.
    fn start_of(&self, text: &str, count: usize, add_generation_prompt: bool) -> Option<usize> {
        let prefix = self.prefix(count, add_generation_prompt)?;
        text.starts_with(prefix.as_str()).then_some(prefix.len())
    }

    /// Renders the conversation with the message at index `turn` replaced.
    fn with(&self, turn: usize, message: &Message) -> Option<String> {
        let mut messages = self.messages.clone();
        *messages.get_mut(turn)? = message_value(message);
        self.render(&messages, false).ok()
    }

    /// Whether the template prints `None` for null content of an answer.
    fn writes_none(&self, messages: &[Message], text: &str, turns: &[usize]) -> bool {
        let is_null = |message: &Message| message.get("content") == Some(&Value::Null);
        if !turns.iter().any(|&turn| is_null(&messages[turn])) {
            return false;
        }
        let filled = messages.iter().zip(&self.messages).map(|(message, value)| {
            if is_null(message) { message_value(&message.clone().with("content", "")) } else { value.clone() }
        });
        let filled = self.render(&filled.collect::<Vec<_>>(), false).unwrap_or_default();
        filled.matches("None").count() < text.matches("None").count()
    }

    /// The positions of the messages' strings in the text.
    fn strings(&self, messages: &[Message], text: &str) -> Option<Strings> {
        let attempts = [true, false].into_iter().map(|calls| {
            let marker = Marker::new(messages, calls);
            let marked: Vec<minijinja::Value> = marker.messages.iter().map(message_value).collect();
            marker.align(&self.render(&marked, false).ok()?, text)
        });
        attempts.flatten().next().map(|found| Strings::new(found, messages.len()))
    }

    /// The ranges in `{% generation %}` blocks, if the template has them.
    fn generation_ranges(&self, text: &str) -> Option<Vec<Range<usize>>> {
        if !self.template.has_generation_marks() {
            return None;
        }
        let mut variables = self.variables.clone();
        variables.insert(GENERATION_MARKS.into(), Value::Bool(true));
        let marked = self.template.render_values(&self.messages, self.tools.as_ref(), false, &variables).ok()?;
        generation_ranges(&marked, text, GENERATION_START, GENERATION_END).filter(|ranges| !ranges.is_empty())
    }
}

impl<'a> SpanFinder<'a> {
    pub(super) fn new(template: &'a ChatTemplate, special_tokens: Vec<String>) -> Self {
        let probe = [Message::user("a")];
        let render = |prompt| template.render(&probe, None, prompt, &Map::new()).ok();
        let bare = render(false);
        let has_generation_prompt = bare.is_none() || bare != render(true);
        let answer = [Message::user("a"), Message::assistant(SENTINEL)];
        let answer = template.render(&answer, None, false, &Map::new()).unwrap_or_default();
        let header = answer.strip_prefix(bare.unwrap_or_default().as_str()).and_then(|rest| rest.split_once(SENTINEL));
        let header =
            header.map(|(header, _)| header).filter(|header| !has_generation_prompt && !header.trim().is_empty());
        let header = header.unwrap_or_default().to_string();
        let end = super::turn_end::turn_end(template, &special_tokens);
        let end_tokens = [end.last, end.middle].into_iter().flatten().collect();
        Self { template, special_tokens, has_generation_prompt, header, end_tokens }
    }

    pub(super) fn template(&self) -> &ChatTemplate {
        self.template
    }

    /// Renders a conversation and finds `turns` in it: the text that the model has to generate after the prompt,
    /// including the token that ends the turn.
    ///
    /// If the template marks the answers with `{% generation %}`, the marks are used. Otherwise, a turn is the text between the
    /// renderings of the messages before it and of the messages including it, if both are prefixes of the whole text. This
    /// fails for templates that change earlier turns when later ones follow (for example, drop their reasoning); then a turn
    /// is found around its strings. Turns with the same text around their strings are analysed once, so the time is linear.
    pub(super) fn render(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
        turns: &[usize],
        mask_prompt: bool,
    ) -> Result<RenderedConversation, String> {
        let mut view = View::new(self.template, messages, tools, variables);
        let mut rendered = RenderedConversation::default();
        let with_ids;
        let mut messages = messages;
        rendered.text = match view.render(&view.messages, false) {
            Ok(text) => text,
            Err(error) => {
                with_ids = with_call_ids(messages).ok_or_else(|| error.to_string())?;
                messages = &with_ids;
                view = View::new(self.template, messages, tools, variables);
                rendered.notes.insert(RenderNote::ReplacesIds);
                view.render(&view.messages, false).map_err(|_| error.to_string())?
            }
        };
        let text = rendered.text.as_str();
        let strings = view.strings(messages, text);
        Self::check_lost(&view, messages, text, strings.as_ref(), turns, &mut rendered.notes)?;
        if mask_prompt {
            let spans = || self.spans(&view, messages, text, strings.as_ref(), turns);
            let num_answers = messages.iter().filter(|message| message.role() == "assistant").count();
            let marks = view.generation_ranges(text);
            rendered.has_marks = marks.is_some();
            rendered.spans = match marks {
                None => spans()?,
                Some(marks) if turns.len() == num_answers => marks,
                Some(marks) => overlapping(marks, &spans()?),
            };
        }
        if view.writes_none(messages, text, turns) {
            rendered.notes.insert(RenderNote::WritesNone);
        }
        rendered.strings = strings;
        Ok(rendered)
    }

    fn spans(
        &self,
        view: &View,
        messages: &[Message],
        text: &str,
        strings: Option<&Strings>,
        turns: &[usize],
    ) -> Result<Vec<Range<usize>>, String> {
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        let mut known = HashMap::new();
        for &turn in turns {
            let own = strings.and_then(|strings| Some((strings, strings.own[turn].clone()?)));
            let last_end = spans.last().map_or(0, |last| last.end);
            let is_empty = messages[turn].text().trim().is_empty() && messages[turn].tool_calls().is_empty();
            let parts = match own {
                Some((strings, own)) => self.parts(view, text, turn, strings, &own, &mut known),
                None if is_empty => match self.between_starts(view, text, turn) {
                    Some(span) if last_end <= span.start => Some(vec![span]),
                    _ => continue,
                },
                None => self.span(view, messages, text, turn).map(|span| vec![span]),
            };
            let parts = parts.filter(|parts| parts.first().is_some_and(|part| last_end <= part.start));
            spans.extend(parts.ok_or_else(|| {
                format!(
                    "cannot find message {} in the text that the chat template writes, so it cannot be trained",
                    turn + 1
                )
            })?);
        }
        Ok(spans)
    }

    /// The ranges of a turn around its strings, without text of other messages between them.
    fn parts<'t>(
        &self,
        view: &View,
        text: &'t str,
        turn: usize,
        strings: &Strings,
        own: &Range<usize>,
        known: &mut HashMap<(&'t str, &'t str, bool), (usize, usize)>,
    ) -> Option<Vec<Range<usize>>> {
        let bounds = strings.around(own, text.len());
        let is_last = turn + 1 == view.messages.len();
        let key = (&text[bounds.start..own.start], &text[own.end..bounds.end], is_last);
        let (lead, trail) = *known.entry(key).or_insert_with(|| self.around(view, text, turn, strings, own, &bounds));
        let span = own.start - lead..own.end + trail;
        let foreign = strings.foreign(turn, &span);
        let mut parts = if foreign.is_empty() {
            vec![span.clone()]
        } else {
            self.without_foreign(view, text, turn, &span, &foreign)
                .unwrap_or_else(|| self.between_strings(view, text, turn, strings, &span, &foreign))
        };
        let last = parts.last_mut()?;
        last.end = self.without_space_after_end_token(text, last);
        parts.retain(|part| part.start < part.end);
        (!parts.is_empty()).then_some(parts)
    }

    /// The lengths of the text of a turn before its first string and after its last.
    fn around(
        &self,
        view: &View,
        text: &str,
        turn: usize,
        strings: &Strings,
        own: &Range<usize>,
        bounds: &Range<usize>,
    ) -> (usize, usize) {
        let in_lead = |at: &usize| (bounds.start..=own.start).contains(at);
        let prompted = self.has_generation_prompt.then(|| view.start_of(text, turn, true)).flatten().filter(in_lead);
        let start = prompted
            .or_else(|| self.after_tail(view, text, turn, strings, &(bounds.start..own.start)))
            .or_else(|| self.after_header(view, &text[..own.start], turn, bounds.start))
            .or_else(|| Self::after_space(view, text, turn, own.start).filter(in_lead))
            .unwrap_or(own.start);
        let in_trail = |at: &usize| (own.end..=bounds.end).contains(at);
        let count = turn + 1;
        let ended = if count == view.messages.len() { Some(text.len()) } else { view.start_of(text, count, false) };
        let tail = || self.before_next(view, text, turn, strings, own.end..bounds.end);
        let tail = if ended.is_some_and(|at| in_trail(&at)) { None } else { tail() };
        let limit = ended.filter(in_trail).or_else(|| tail.filter(|tail| tail.1).map(|tail| tail.0));
        let until = limit.unwrap_or(bounds.end);
        let end = self.end_in(&text[own.end..until]).map(|len| own.end + len);
        // the last message of a prefix may lack its end token
        let end = end.unwrap_or_else(|| match (limit, self.after_end_token(text, until)) {
            (Some(_), after) if after <= bounds.end => after,
            (Some(limit), _) => limit,
            (None, _) => tail.map_or(own.end, |tail| tail.0),
        });
        (own.start - start, end - own.end)
    }

    /// The turn without the one part that later messages insert into it: the text that its rendering as the last message lacks.
    fn without_foreign(
        &self,
        view: &View,
        text: &str,
        turn: usize,
        span: &Range<usize>,
        foreign: &[Range<usize>],
    ) -> Option<Vec<Range<usize>>> {
        let alone = view.prefix(turn + 1, false)?;
        let before = &text[..span.start];
        let alone = alone.strip_prefix(before)?;
        let whole = &text[span.clone()];
        let end = self.end_in(alone);
        let alone = &alone[..end.unwrap_or(alone.len())];
        let mut start = common_prefix(whole, alone);
        let rest = alone.len() - start;
        if common_suffix(&whole[start..], &alone[start..]) < rest {
            return None;
        }
        // equal text on both sides makes the start of the insertion ambiguous; do not start within a token
        let is_cut = |at: usize| {
            self.special_tokens.iter().any(|token| {
                let from = (at + 1).saturating_sub(token.len());
                (from..at).any(|from| alone.as_bytes()[from..].starts_with(token.as_bytes()))
            })
        };
        let added = whole.len() - alone.len();
        while start > 0 && (is_cut(start) || !whole.is_char_boundary(start)) {
            start -= 1;
            if !whole.is_char_boundary(start + added) || whole[start + added..] != alone[start..] {
                return None;
            }
        }
        let hole = span.start + start..span.start + start + added;
        let covers = |other: &Range<usize>| hole.start <= other.start && other.end <= hole.end;
        foreign.iter().all(covers).then(|| vec![span.start..hole.start, hole.end..span.end])
    }

    /// Returns an error if the template omits texts or calls of trained turns.
    fn check_lost(
        view: &View,
        messages: &[Message],
        text: &str,
        strings: Option<&Strings>,
        turns: &[usize],
        notes: &mut BTreeSet<RenderNote>,
    ) -> Result<(), String> {
        let lost = strings.map(Strings::lost).unwrap_or_default();
        // a template may write a call's numbers and none of its strings; this is the same for all turns
        let mut writes_calls = None;
        for &turn in turns {
            let message = &messages[turn];
            let is_lost = |part| lost.contains(&(turn, part));
            let (mut loses_text, mut loses_calls) = (is_lost(Part::Text), is_lost(Part::Call));
            let mut loses_all = strings.is_some_and(|strings| strings.own[turn].is_none());
            if strings.is_none() {
                let content = message.text();
                let answer = content.rsplit("</think>").next().unwrap_or_default().trim();
                loses_text = !text.contains(answer) && Self::changed(view, messages, text, turn).is_none();
                let names = message.tool_calls().iter().map(|call| call.get("function").unwrap_or(call).get("name"));
                loses_calls = names.flatten().filter_map(Value::as_str).any(|name| !text.contains(name));
                loses_all = (loses_text || answer.is_empty()) && (loses_calls || message.tool_calls().is_empty());
            }
            if loses_calls {
                loses_calls = !*writes_calls.get_or_insert_with(|| {
                    let mut other = message.clone();
                    other.remove("tool_calls");
                    view.with(turn, &other).is_some_and(|other| other != text)
                });
            }
            let lost = [
                (loses_text, RenderNote::LosesText, "text"),
                (loses_calls, RenderNote::LosesCalls, "tool calls"),
                (is_lost(Part::Reasoning), RenderNote::LosesReasoning, "reasoning"),
            ];
            for (_, note, what) in lost.into_iter().filter(|(is_lost, ..)| *is_lost) {
                if loses_all {
                    let turn = turn + 1;
                    return Err(format!("the chat template omits the {what} of message {turn}, which is trained"));
                }
                notes.insert(note);
            }
        }
        Ok(())
    }

    /// The byte offset of the end of each message in the rendered text; `None` if it cannot be separated from the next message.
    pub(super) fn boundaries(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        variables: &Map<String, Value>,
        rendered: &RenderedConversation,
    ) -> Vec<Option<usize>> {
        let view = View::new(self.template, messages, tools, variables);
        let text = rendered.text.as_str();
        let own = |index: usize| rendered.strings.as_ref().and_then(|strings| strings.own.get(index)?.clone());
        let mut known: HashMap<(&str, &str, &str), Option<usize>> = HashMap::new();
        (1..=messages.len())
            .map(|count| {
                if count == messages.len() {
                    return Some(text.len());
                }
                let between = match (own(count - 1), own(count)) {
                    (Some(before), Some(after)) if before.end <= after.start => Some(before.end..after.start),
                    _ => None,
                };
                let Some(between) = between else {
                    let is_short = messages.len() <= MAX_BEGINNINGS;
                    return is_short.then(|| view.start_of(text, count, false)).flatten();
                };
                let key = (messages[count - 1].role(), messages[count].role(), &text[between.clone()]);
                let offset = *known.entry(key).or_insert_with(|| {
                    let end = view.start_of(text, count, false).filter(|end| between.contains(end));
                    end.map(|end| end - between.start)
                });
                offset.map(|offset| between.start + offset)
            })
            .collect()
    }

    /// Finds a turn that has no strings.
    fn span(&self, view: &View, messages: &[Message], text: &str, turn: usize) -> Option<Range<usize>> {
        let start = if self.has_generation_prompt { view.start_of(text, turn, true) } else { None };
        let is_last = turn + 1 == messages.len();
        let end = if is_last { Some(text.len()) } else { view.start_of(text, turn + 1, false) };
        let span = if let (Some(start), Some(end)) = (start, end) {
            start..end
        } else {
            let changed = Self::changed(view, messages, text, turn)?;
            let start = start
                .or_else(|| self.after_header(view, &text[..changed.start], turn, 0))
                .or_else(|| Self::after_space(view, text, turn, changed.start))
                .unwrap_or(changed.start);
            let end = end.unwrap_or_else(|| self.after_end_token(text, changed.end));
            start..end
        };
        let end = self.without_space_after_end_token(text, &span);
        (span.start < end).then_some(span.start..end)
    }

    /// The range of the whole text that changes with the text of a turn.
    fn changed(view: &View, messages: &[Message], text: &str, turn: usize) -> Option<Range<usize>> {
        let mut plain = messages.get(turn)?.clone().with("content", SENTINEL);
        let with_calls = plain.clone();
        plain.remove("tool_calls");
        for key in REASONING_KEYS {
            plain.remove(key);
        }
        let with = |message| view.with(turn, message).filter(|text| text.contains(SENTINEL));
        let other = with(&plain).or_else(|| with(&with_calls))?;
        let start = common_prefix(text, &other);
        let end = text.len() - common_suffix(&text[start..], &other[start..]);
        Some(start..end)
    }

    /// Between the string before a turn and the turn: the end of the text that the template writes before it knows the turn.
    fn after_tail(
        &self,
        view: &View,
        text: &str,
        turn: usize,
        strings: &Strings,
        bounds: &Range<usize>,
    ) -> Option<usize> {
        let prompted = view.prefix(turn, self.has_generation_prompt)?;
        let anchor = strings.anchor(text, bounds.start)?;
        let tails = prompted.rmatch_indices(anchor).map(|(at, _)| &prompted[at + anchor.len()..]);
        let leads =
            tails.filter_map(|tail| text[bounds.clone()].strip_prefix(tail)?.strip_prefix(self.header.as_str()));
        // a short string may also occur in the header
        leads.map(|lead| bounds.end - lead.len()).max()
    }

    /// After the last string of a turn: the end of the text that the template writes if nothing follows, and whether all of that
    /// text was found.
    fn before_next(
        &self,
        view: &View,
        text: &str,
        turn: usize,
        strings: &Strings,
        bounds: Range<usize>,
    ) -> Option<(usize, bool)> {
        let alone = view.prefix(turn + 1, false)?;
        let anchor = strings.anchor(text, bounds.start)?;
        let tails = alone.rmatch_indices(anchor).map(|(at, _)| &alone[at + anchor.len()..]);
        let lens = tails.map(|tail| {
            let len = common_prefix(tail, &text[bounds.clone()]);
            // do not stop within a token that ends only the last turn
            let tokens = super::turn_end::tokens_in(tail, &self.special_tokens);
            let cut = tokens.into_iter().find(|(at, token)| (*at..at + token.len()).contains(&len));
            (cut.map_or(len, |(at, _)| at), len == tail.len())
        });
        lens.max().map(|(len, is_whole)| (bounds.start + len, is_whole))
    }

    /// Removes other messages' strings, and the text around them, from a span.
    fn between_strings(
        &self,
        view: &View,
        text: &str,
        turn: usize,
        strings: &Strings,
        span: &Range<usize>,
        foreign: &[Range<usize>],
    ) -> Vec<Range<usize>> {
        let own = || strings.sorted.iter().filter(|(message, _)| *message == turn).map(|(_, range)| range);
        let mut parts = Vec::new();
        let mut start = span.start;
        for other in foreign {
            let end = own().filter(|range| range.end <= other.start).map(|range| range.end).max();
            if let Some(end) = end.filter(|end| start < *end) {
                let after = self.before_next(view, text, turn, strings, end..other.start);
                parts.push(start..after.map_or(end, |(after, _)| after));
            }
            start = own().filter(|range| range.start >= other.end).map(|range| range.start).min().unwrap_or(span.end);
        }
        parts.push(start..span.end);
        parts
    }

    /// A turn between two renderings that are prefixes of the whole text.
    fn between_starts(&self, view: &View, text: &str, turn: usize) -> Option<Range<usize>> {
        let start = view.start_of(text, turn, true).filter(|_| self.has_generation_prompt)?;
        let is_last = turn + 1 == view.messages.len();
        let end = if is_last { Some(text.len()) } else { view.start_of(text, turn + 1, false) };
        let span = start..end.filter(|end| start < *end)?;
        let end = self.without_space_after_end_token(text, &span);
        (span.start < end).then_some(span.start..end)
    }

    /// The end of the generation prompt, or of its longest part, before a turn's first string, without an end token in between.
    fn after_header(&self, view: &View, before: &str, turn: usize, from: usize) -> Option<usize> {
        let (bare, prompted) = (view.prefix(turn, false)?, view.prefix(turn, true)?);
        let header = prompted.strip_prefix(bare.as_str()).filter(|header| !header.is_empty())?;
        let lead = before.get(from..)?;
        let cuts = header.match_indices(['\n', '>', ']']).map(|(at, end)| at + end.len());
        let mut cuts: Vec<usize> = cuts.chain([header.len()]).collect();
        cuts.dedup();
        cuts.into_iter().rev().find_map(|cut| {
            let start = lead.rfind(&header[..cut])? + cut;
            let tokens = if self.end_tokens.is_empty() { &self.special_tokens } else { &self.end_tokens };
            let is_open = |between: &str| !tokens.iter().any(|token| between.contains(token.as_str()));
            is_open(&lead[start..]).then_some(from + start)
        })
    }

    /// The end of the previous messages, if only white space separates it from the turn's text: the model generates it, too.
    fn after_space(view: &View, text: &str, turn: usize, text_start: usize) -> Option<usize> {
        let before = view.start_of(text, turn, false)?;
        let between = text.get(before..text_start)?;
        between.trim().is_empty().then_some(before)
    }

    /// The length up to the end of the first end token.
    fn end_in(&self, text: &str) -> Option<usize> {
        let ends = self.end_tokens.iter().filter_map(|token| Some(text.find(token.as_str())? + token.len()));
        ends.min()
    }

    /// The end of the end token that follows a turn's text, possibly after white space.
    fn after_end_token(&self, text: &str, text_end: usize) -> usize {
        let rest = text[text_end..].trim_start();
        let token = self.end_tokens.iter().find(|token| rest.starts_with(token.as_str()));
        token.map_or(text_end, |token| text.len() - rest.len() + token.len())
    }

    fn without_space_after_end_token(&self, text: &str, span: &Range<usize>) -> usize {
        let Some(inside) = text.get(span.clone()) else { return span.start };
        let trimmed = inside.trim_end();
        let ends_with_token = self.special_tokens.iter().any(|token| trimmed.ends_with(token.as_str()));
        if ends_with_token { span.start + trimmed.len() } else { span.end }
    }
}

/// The marks that overlap one of the spans; both are sorted.
fn overlapping(mut marks: Vec<Range<usize>>, spans: &[Range<usize>]) -> Vec<Range<usize>> {
    marks.retain(|mark| {
        let after = spans.partition_point(|span| span.end <= mark.start);
        spans.get(after).is_some_and(|span| span.start < mark.end)
    });
    marks
}

/// The length of the common prefix, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}

/// The length of the common suffix, in whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    let same = a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}
