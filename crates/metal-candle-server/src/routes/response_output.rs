//! Builds the items of a response of `/v1/responses`, and their events.

use crate::answer::{Progress, Usage};
use crate::ids::new_id;
use crate::parts::{Change, Part, Parts};
use crate::served::Served;
use crate::tools::Delta;
use metal_candle::inference::FinishReason;
use serde_json::{Value, json};

/// An event, whose name is its `type`.
pub(super) type Event = Value;

/// The collected answer.
#[derive(Debug)]
pub(super) struct Output {
    parts: Parts,
    /// For each part, the id of its item and, for a call, the id of the call.
    ids: Vec<(String, String)>,
    shows_logprobs: bool,
    /// Log-probabilities of tokens that no event has included yet.
    pending: Vec<Value>,
    /// Log-probabilities of the tokens of each part.
    logprobs: Vec<Vec<Value>>,
    is_cut: bool,
}

impl Output {
    pub(super) fn new(shows_logprobs: bool) -> Self {
        let (parts, ids) = (Parts::default(), Vec::new());
        Self { parts, ids, shows_logprobs, pending: Vec::new(), logprobs: Vec::new(), is_cut: false }
    }

    /// Adds new text and returns its events.
    pub(super) fn push(&mut self, served: &Served, progress: &Progress) -> Vec<Event> {
        if self.shows_logprobs {
            self.pending.extend(progress.tokens.iter().map(|token| token.chat_form(served)));
        }
        let mut changes: Vec<Change> = Vec::new();
        for delta in progress.deltas.clone() {
            changes.extend(self.parts.push(delta));
        }
        let mut events: Vec<Event> = changes.into_iter().flat_map(|change| self.describe(change)).collect();
        if let Some(finish) = &progress.finish {
            events.extend(self.finish(finish.reason));
        }
        events
    }

    /// `completed`, or `incomplete` if the answer was truncated.
    pub(super) fn status(&self) -> &'static str {
        if self.is_cut { "incomplete" } else { "completed" }
    }

    /// All items.
    pub(super) fn items(&self) -> Value {
        (0..self.parts.list().len()).map(|index| self.item(index, self.status_of(index))).collect()
    }

    fn finish(&mut self, reason: FinishReason) -> Vec<Event> {
        self.is_cut = matches!(reason, FinishReason::MaxTokens | FinishReason::Length);
        let mut changes = Vec::new();
        // clients expect a message
        if self.parts.list().is_empty() {
            changes.extend(self.parts.push(Delta::Content(String::new())));
        }
        changes.extend(self.parts.close());
        changes.into_iter().flat_map(|change| self.describe(change)).collect()
    }

    /// Only the last item can be incomplete, except for calls, which are always complete.
    fn status_of(&self, index: usize) -> &'static str {
        let is_last = index + 1 == self.parts.list().len();
        let is_call = matches!(self.parts.list()[index], Part::Call { .. });
        if self.is_cut && is_last && !is_call { "incomplete" } else { "completed" }
    }

    fn item(&self, index: usize, status: &str) -> Value {
        let (id, call_id) = &self.ids[index];
        match &self.parts.list()[index] {
            Part::Text(_) => {
                json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": [self.content(index)]})
            }
            Part::Reasoning(_) => {
                json!({"id": id, "type": "reasoning", "summary": [], "status": status, "content": [self.content(index)]})
            }
            Part::Call { name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": arguments
            }),
        }
    }

    fn content(&self, index: usize) -> Value {
        match &self.parts.list()[index] {
            Part::Text(text) => {
                json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs[index]})
            }
            Part::Reasoning(text) => json!({"type": "reasoning_text", "text": text}),
            Part::Call { .. } => Value::Null,
        }
    }

    /// The events of a change.
    fn describe(&mut self, change: Change) -> Vec<Event> {
        match change {
            Change::Opened(index) => self.describe_opened(index),
            Change::Grew(index, text) => {
                let (id, part) = (&self.ids[index].0, &self.parts.list()[index]);
                let mut event = json!({"item_id": id, "output_index": index, "delta": text});
                let name = match part {
                    Part::Text(_) => {
                        event["content_index"] = 0.into();
                        event["logprobs"] = self.pending.clone().into();
                        self.logprobs[index].append(&mut self.pending);
                        "response.output_text.delta"
                    }
                    Part::Reasoning(_) => {
                        self.pending.clear();
                        event["content_index"] = 0.into();
                        "response.reasoning_text.delta"
                    }
                    Part::Call { .. } => {
                        self.pending.clear();
                        "response.function_call_arguments.delta"
                    }
                };
                event["type"] = name.into();
                vec![event]
            }
            Change::Closed(index) => self.describe_closed(index),
        }
    }

    fn describe_opened(&mut self, index: usize) -> Vec<Event> {
        let (prefix, part) = match &self.parts.list()[index] {
            Part::Text(_) => {
                ("msg_", Some(json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []})))
            }
            Part::Reasoning(_) => ("rs_", Some(json!({"type": "reasoning_text", "text": ""}))),
            Part::Call { .. } => ("fc_", None),
        };
        let id = new_id(prefix);
        self.ids.push((id.clone(), new_id("call_")));
        self.logprobs.push(Vec::new());
        let mut item = self.item(index, "in_progress");
        if part.is_some() {
            item["content"] = json!([]);
        } else {
            // the part may have grown before its events are created
            item["arguments"] = "".into();
        }
        let mut events = vec![json!({"type": "response.output_item.added", "output_index": index, "item": item})];
        if let Some(part) = part {
            events.push(json!({
                "type": "response.content_part.added", "item_id": id, "output_index": index, "content_index": 0, "part": part
            }));
        }
        events
    }

    fn describe_closed(&mut self, index: usize) -> Vec<Event> {
        if matches!(self.parts.list()[index], Part::Text(_)) {
            self.logprobs[index].append(&mut self.pending);
        }
        let id = &self.ids[index].0;
        let mut events = Vec::new();
        match &self.parts.list()[index] {
            Part::Text(text) => events.push(json!({
                "type": "response.output_text.done", "item_id": id, "output_index": index, "content_index": 0, "text": text,
                "logprobs": self.logprobs[index],
            })),
            Part::Reasoning(text) => events.push(json!({
                "type": "response.reasoning_text.done", "item_id": id, "output_index": index, "content_index": 0, "text": text
            })),
            Part::Call { name, arguments } => events.push(json!({
                "type": "response.function_call_arguments.done", "item_id": id, "output_index": index, "name": name,
                "arguments": arguments,
            })),
        }
        let part = self.content(index);
        if !part.is_null() {
            events.push(json!({
                "type": "response.content_part.done", "item_id": id, "output_index": index, "content_index": 0, "part": part
            }));
        }
        let item = self.item(index, self.status_of(index));
        events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item}));
        events
    }
}

/// The token counts in the format of this route.
pub(super) fn usage(usage: Usage) -> Value {
    let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = usage;
    json!({
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": prompt_tokens + completion_tokens,
    })
}
