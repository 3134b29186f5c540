//! Finds the strings of messages in a rendered conversation, by rendering it a second time with marks around each string.

use super::Message;
use super::chat::REASONING_KEYS;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ops::Range;

/// Private-use characters around the index of a string, and at the end of the string.
const NUMBER: char = '\u{E0F7}';
const OPEN: char = '\u{E0F8}';
const CLOSE: char = '\u{E0F9}';
/// Maximum size of an anchor, in bytes.
const MAX_ANCHOR_BYTES: usize = 40;
/// Longest tag at the edge of a string that is left outside the marks.
const MAX_TAG_BYTES: usize = 40;
/// Tags at which templates split an answer.
const REASONING_TAGS: [&str; 4] = ["<think>", "</think>", "[THINK]", "[/THINK]"];

/// The role of a string in its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Text,
    Reasoning,
    Call,
}

/// A string of a message and its range in the text; none if the text lacks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub message: usize,
    pub part: Part,
    pub range: Option<Range<usize>>,
}

/// The strings of messages in a text, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Strings {
    found: Vec<Found>,
    /// The message index and range of each string in the text, by start.
    pub sorted: Vec<(usize, Range<usize>)>,
    /// For each message, the range from its first string to its last.
    pub own: Vec<Option<Range<usize>>>,
}

impl Strings {
    pub(super) fn new(found: Vec<Found>, num_messages: usize) -> Self {
        let mut own: Vec<Option<Range<usize>>> = vec![None; num_messages];
        let mut sorted = Vec::with_capacity(found.len());
        for string in &found {
            let (Some(range), Some(own)) = (&string.range, own.get_mut(string.message)) else { continue };
            let whole = own.get_or_insert_with(|| range.clone());
            *whole = whole.start.min(range.start)..whole.end.max(range.end);
            sorted.push((string.message, range.clone()));
        }
        sorted.sort_by_key(|(_, range)| (range.start, range.end));
        Self { found, sorted, own }
    }

    /// The last bytes of the string that ends at `end`, to find it in another rendering.
    pub(super) fn anchor<'t>(&self, text: &'t str, end: usize) -> Option<&'t str> {
        let string = self.sorted.iter().rev().map(|(_, range)| range).find(|range| range.end == end)?;
        let mut from = string.start.max(end.saturating_sub(MAX_ANCHOR_BYTES));
        while !text.is_char_boundary(from) {
            from += 1;
        }
        text.get(from..end)
    }

    /// The end of the last string before a range, and the start of the first one after it.
    pub(super) fn around(&self, own: &Range<usize>, text_len: usize) -> Range<usize> {
        let before = self.sorted.partition_point(|(_, range)| range.start < own.start);
        let after = self.sorted.partition_point(|(_, range)| range.start < own.end);
        let start = self.sorted[..before].last().map_or(0, |(_, range)| range.end.min(own.start));
        start..self.sorted.get(after).map_or(text_len, |(_, range)| range.start)
    }

    /// Strings of other messages in a range.
    pub(super) fn foreign(&self, turn: usize, within: &Range<usize>) -> Vec<Range<usize>> {
        let first = self.sorted.partition_point(|(_, range)| range.start < within.start);
        let inside = self.sorted[first..].iter().take_while(|(_, range)| range.start < within.end);
        inside.filter(|(message, _)| *message != turn).map(|(_, range)| range.clone()).collect()
    }

    /// The messages with a string that the text lacks, and its role.
    pub(super) fn lost(&self) -> BTreeSet<(usize, Part)> {
        let lost = self.found.iter().filter(|string| string.range.is_none());
        lost.map(|string| (string.message, string.part)).collect()
    }
}

/// Messages with marks around their strings.
pub(super) struct Marker {
    pub messages: Vec<Message>,
    strings: Vec<(usize, Part)>,
}

impl Marker {
    /// Marks the text and reasoning of every message, and the strings of tool calls if `calls`.
    pub(super) fn new(messages: &[Message], calls: bool) -> Self {
        let mut marker = Self { messages: Vec::with_capacity(messages.len()), strings: Vec::new() };
        for (index, message) in messages.iter().enumerate() {
            let mut marked = message.clone();
            if let Some(Value::String(text)) = message.get("content") {
                marked = marked.with("content", marker.mark_content(index, text));
            }
            for key in REASONING_KEYS {
                if let Some(Value::String(text)) = message.get(key) {
                    marked = marked.with(key, marker.mark(index, Part::Reasoning, text));
                }
            }
            if calls && let Some(mut list) = message.get("tool_calls").cloned() {
                list.as_array_mut().into_iter().flatten().for_each(|call| marker.mark_call(index, call));
                marked = marked.with("tool_calls", list);
            }
            marker.messages.push(marked);
        }
        marker
    }

    /// Marks the text between reasoning tags, which templates search for.
    fn mark_content(&mut self, message: usize, text: &str) -> String {
        let mut marked = String::with_capacity(text.len() + 16);
        let mut rest = text;
        loop {
            let tags = REASONING_TAGS.iter().filter_map(|tag| rest.find(tag).map(|start| (start, *tag)));
            let Some((start, tag)) = tags.min() else { break };
            let part = if tag.contains('/') { Part::Reasoning } else { Part::Text };
            marked.push_str(&self.mark(message, part, &rest[..start]));
            marked.push_str(tag);
            rest = &rest[start + tag.len()..];
        }
        marked.push_str(&self.mark(message, Part::Text, rest));
        marked
    }

    /// Marks a string inside its outer white space and tags, so that `trim` and `startswith` still work.
    fn mark(&mut self, message: usize, part: Part, text: &str) -> String {
        let mut core = text.trim();
        let is_tag = |tag: &str| tag.len() <= MAX_TAG_BYTES && !tag.contains(char::is_whitespace);
        if let Some(end) = core.strip_prefix('<').and_then(|rest| rest.find('>'))
            && is_tag(&core[..end + 2])
        {
            core = core[end + 2..].trim_start();
        }
        if core.ends_with('>')
            && let Some(start) = core.rfind('<')
            && is_tag(&core[start..])
        {
            core = core[..start].trim_end();
        }
        if core.is_empty() {
            return text.to_string();
        }
        let start = core.as_ptr() as usize - text.as_ptr() as usize;
        let number = self.strings.len();
        self.strings.push((message, part));
        format!("{}{NUMBER}{number}{OPEN}{core}{CLOSE}{}", &text[..start], &text[start + core.len()..])
    }

    fn mark_call(&mut self, message: usize, call: &mut Value) {
        let call = match call.get_mut("function") {
            Some(function) if function.is_object() => function,
            _ => call,
        };
        if let Some(Value::String(name)) = call.get_mut("name") {
            *name = self.mark(message, Part::Call, name);
        }
        if let Some(arguments) = call.get_mut("arguments").filter(|arguments| arguments.is_object()) {
            self.mark_leaves(message, arguments);
        }
    }

    fn mark_leaves(&mut self, message: usize, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.mark(message, Part::Call, text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_leaves(message, item)),
            Value::Object(map) => map.values_mut().for_each(|item| self.mark_leaves(message, item)),
            _ => {}
        }
    }

    /// Finds the strings in `text` with the help of the marked rendering; `None` if the two differ in more than the marks.
    pub(super) fn align(&self, marked: &str, text: &str) -> Option<Vec<Found>> {
        let unseen = self.strings.iter().map(|&(message, part)| Found { message, part, range: None });
        let mut found: Vec<Found> = unseen.collect();
        let mut plain = String::with_capacity(text.len());
        let mut open: Vec<(usize, usize)> = Vec::new();
        let mut rest = marked;
        while let Some(at) = rest.find([NUMBER, CLOSE]) {
            plain.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix(CLOSE) {
                rest = after;
                let (number, start) = open.pop()?;
                let range = &mut found.get_mut(number)?.range;
                // ignore later copies, such as the name of a call repeated above its answer
                *range = range.take().or(Some(start..plain.len()));
            } else {
                let (number, after) = rest.strip_prefix(NUMBER)?.split_once(OPEN)?;
                open.push((number.parse().ok()?, plain.len()));
                rest = after;
            }
        }
        plain.push_str(rest);
        (open.is_empty() && plain == text).then_some(found)
    }
}

/// The ranges between the marks of `{% generation %}`; `None` if the text without marks is not `text`.
pub(super) fn generation_ranges(marked: &str, text: &str, open: char, close: char) -> Option<Vec<Range<usize>>> {
    let mut ranges = Vec::new();
    let (mut plain, mut start, mut depth) = (String::with_capacity(text.len()), 0, 0_usize);
    for c in marked.chars() {
        if c == open {
            if depth == 0 {
                start = plain.len();
            }
            depth += 1;
        } else if c == close {
            depth = depth.checked_sub(1)?;
            if depth == 0 && start < plain.len() {
                ranges.push(start..plain.len());
            }
        } else {
            plain.push(c);
        }
    }
    (plain == text).then_some(ranges)
}
