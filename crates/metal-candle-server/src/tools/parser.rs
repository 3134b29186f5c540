//! Splits the text of an answer into reasoning, content and tool calls while it is streamed.

use super::call::{Call, calls_of_json, object};
use super::json_scan::JsonScan;
use super::reasoning::{Part, Reasoning, ReasoningSplit, partial_suffix};
use super::request::Tool;
use super::syntax::{ARGS, CALL_ID, Form, ToolSyntax};
use super::xml::call_of_xml;
use crate::ids::new_id;

/// Longest name of a function.
const MAX_NAME: usize = 256;

/// A change of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Text for `reasoning_content`.
    Reasoning(String),
    /// Text for `content`.
    Content(String),
    /// The start of a call.
    CallStart {
        /// Index of the call in the answer.
        index: usize,
        /// `call_` and 24 letters and digits.
        id: String,
        /// The function.
        name: String,
    },
    /// Text of a call's arguments. All texts of a call form one JSON object.
    Arguments {
        /// Index of the call in the answer.
        index: usize,
        /// The text.
        text: String,
    },
}

/// Splits a streamed answer.
///
/// A call is reported when it is complete, so text that turns out not to be a call becomes content and nothing is lost. White
/// space around calls and reasoning is dropped.
#[derive(Debug, Clone)]
pub(crate) struct ToolParser {
    reasoning: Option<ReasoningSplit>,
    form: Option<Form>,
    tools: Vec<Tool>,
    parallel: bool,
    buffer: String,
    state: State,
    /// White space at the end of the text so far.
    blanks: String,
    is_start: bool,
    after_call: bool,
    calls: usize,
}

#[derive(Debug, Clone)]
enum State {
    /// Outside of calls.
    Content,
    /// The buffer starts with a call whose body is at `body`.
    Call { body: usize, scan: Option<(usize, JsonScan)>, end: Option<usize> },
}

/// The result of reading the body of a call.
enum Body {
    Incomplete,
    /// The buffer up to this byte is not a call.
    Wrong(usize),
    /// The buffer up to this byte contains calls.
    Calls(usize, Vec<Call>),
}

impl ToolParser {
    /// Creates a parser for an answer to `prompt`. Without `syntax` it finds no calls, without `reasoning` no reasoning.
    pub(crate) fn new(
        syntax: Option<&ToolSyntax>,
        reasoning: Option<&Reasoning>,
        prompt: &str,
        tools: &[Tool],
        parallel: bool,
    ) -> Self {
        let reasoning = reasoning.map(|markers| ReasoningSplit::new(markers.clone(), markers.is_open_after(prompt)));
        Self {
            reasoning,
            form: syntax.map(|syntax| syntax.form),
            tools: tools.to_vec(),
            parallel,
            buffer: String::new(),
            state: State::Content,
            blanks: String::new(),
            is_start: true,
            after_call: false,
            calls: 0,
        }
    }

    /// Reads the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Delta> {
        let parts = match &mut self.reasoning {
            Some(split) => split.push(text),
            None => vec![Part::Text(text.to_string())],
        };
        let mut deltas = Vec::new();
        self.read(parts, &mut deltas);
        deltas
    }

    /// Ends the answer. `cut` is whether a limit ended it; a truncated call is content.
    pub(crate) fn finish(mut self, cut: bool) -> Vec<Delta> {
        let mut deltas = Vec::new();
        let rest = self.reasoning.take().and_then(ReasoningSplit::finish);
        self.read(rest.into_iter().collect(), &mut deltas);
        if self.is_done() {
            return deltas;
        }
        if !cut
            && let State::Call { body, end: Some(end), .. } = self.state
            && let Some(calls) = self.calls_of(&self.buffer[body..end])
        {
            // the call lacks only its closing marker
            self.buffer.drain(..end);
            self.add_calls(calls, &mut deltas);
        }
        let rest = std::mem::take(&mut self.buffer);
        self.add_content(&rest, &mut deltas);
        if !self.after_call && !self.blanks.is_empty() {
            push_content(std::mem::take(&mut self.blanks), &mut deltas);
        }
        deltas
    }

    /// Whether the answer is inside reasoning.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(ReasoningSplit::is_inside)
    }

    /// Whether a call was reported.
    pub(crate) fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Whether the answer is complete, because it has a call and may have only one. Further text is ignored.
    pub(crate) fn is_done(&self) -> bool {
        self.has_calls() && !self.parallel
    }

    fn read(&mut self, parts: Vec<Part>, deltas: &mut Vec<Delta>) {
        for part in parts {
            match part {
                Part::Reasoning(text) => deltas.push(Delta::Reasoning(text)),
                Part::Text(text) => {
                    self.buffer.push_str(&text);
                    while !self.is_done() && self.step(deltas) {}
                }
            }
        }
    }

    /// Reads a part of the buffer; `false` if it needs more text.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        let Some(form) = self.form else {
            let text = std::mem::take(&mut self.buffer);
            self.add_content(&text, deltas);
            return false;
        };
        if let State::Content = self.state {
            return self.find_call(form, deltas);
        }
        match self.body(form) {
            Body::Incomplete => false,
            Body::Wrong(end) => {
                let text: String = self.buffer.drain(..end).collect();
                self.state = State::Content;
                self.add_content(&text, deltas);
                true
            }
            Body::Calls(end, calls) => {
                self.buffer.drain(..end);
                self.add_calls(calls, deltas);
                true
            }
        }
    }

    /// Reads content up to the start of a call.
    fn find_call(&mut self, form: Form, deltas: &mut Vec<Delta>) -> bool {
        let call = |body| State::Call { body, scan: None, end: None };
        if form == Form::Bare && (self.is_start || self.after_call) {
            // the whole answer is a call, or several calls separated by semicolons
            let is_gap = |c: char| c.is_whitespace() || (self.after_call && c == ';');
            let rest = self.buffer.trim_start_matches(is_gap);
            if rest.is_empty() {
                return false;
            }
            if rest.starts_with('{') {
                let gap = self.buffer.len() - rest.len();
                self.blanks.push_str(&self.buffer[..gap]);
                self.buffer.drain(..gap);
                self.state = call(0);
                return true;
            }
        }
        let open = form.open();
        if let Some(start) = self.buffer.find(open) {
            let text: String = self.buffer.drain(..start).collect();
            self.add_content(&text, deltas);
            self.state = call(open.len());
            return true;
        }
        let rest = self.buffer.split_off(self.buffer.len() - partial_suffix(&self.buffer, open));
        let text = std::mem::replace(&mut self.buffer, rest);
        self.add_content(&text, deltas);
        false
    }

    fn body(&mut self, form: Form) -> Body {
        let State::Call { body, scan, end } = &mut self.state else { return Body::Incomplete };
        let buffer = self.buffer.as_str();
        if form == Form::Xml {
            return xml_body(buffer, *body, &self.tools);
        }
        if scan.is_none() {
            match start_of_json(form, &buffer[*body..]) {
                Ok(Some(start)) => *scan = Some((*body + start, JsonScan::default())),
                Ok(None) => return Body::Incomplete,
                Err(()) => return Body::Wrong((*body).max(1)),
            }
        }
        if let (Some((start, scan)), None) = (scan.as_mut(), end.as_ref()) {
            *end = scan.end(&buffer[*start..]).map(|length| *start + length);
        }
        let (Some(json_end), body) = (*end, *body) else { return Body::Incomplete };
        let mut end = json_end;
        if let Some(close) = form.close() {
            let rest = buffer[json_end..].trim_start();
            if !rest.starts_with(close) {
                return if close.starts_with(rest) { Body::Incomplete } else { Body::Wrong(json_end) };
            }
            end = buffer.len() - rest.len() + close.len();
        }
        match self.calls_of(&buffer[body..json_end]) {
            Some(calls) => Body::Calls(end, calls),
            None => Body::Wrong(end),
        }
    }

    /// The calls of a body without its markers.
    fn calls_of(&self, body: &str) -> Option<Vec<Call>> {
        let body = body.trim();
        match self.form? {
            Form::MistralArgs if !body.starts_with(['[', '{']) => {
                let (name, arguments) = body.split_once(ARGS)?;
                let name = name.split_once(CALL_ID).map_or(name, |(name, _)| name).trim();
                Some(vec![Call { name: name.to_string(), arguments: object(arguments)? }])
            }
            // answers other than calls may be JSON, too
            Form::Bare => {
                let is_marked = self.buffer.starts_with(Form::Bare.open());
                let is_tool = |call: &Call| is_marked || self.tools.iter().any(|tool| tool.name == call.name);
                calls_of_json(body).filter(|calls| calls.iter().all(is_tool))
            }
            _ => calls_of_json(body),
        }
    }

    fn add_calls(&mut self, calls: Vec<Call>, deltas: &mut Vec<Delta>) {
        let count = if self.parallel { calls.len() } else { 1 };
        for call in calls.into_iter().take(count) {
            let index = self.calls;
            self.calls += 1;
            deltas.push(Delta::CallStart { index, id: new_id("call_"), name: call.name });
            deltas.push(Delta::Arguments { index, text: call.arguments });
        }
        self.state = State::Content;
        self.blanks.clear();
        (self.is_start, self.after_call) = (false, true);
    }

    /// Adds content. Trailing white space is buffered until more text follows.
    fn add_content(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let length = text.trim_end().len();
        if length > 0 {
            let mut content = std::mem::take(&mut self.blanks);
            content.push_str(&text[..length]);
            push_content(content, deltas);
            (self.is_start, self.after_call) = (false, false);
        }
        self.blanks.push_str(&text[length..]);
    }
}

fn push_content(text: String, deltas: &mut Vec<Delta>) {
    match deltas.last_mut() {
        Some(Delta::Content(content)) => content.push_str(&text),
        _ => deltas.push(Delta::Content(text)),
    }
}

/// The start of the JSON in a body; `None` if it has not arrived yet, an error if there is no JSON.
fn start_of_json(form: Form, body: &str) -> Result<Option<usize>, ()> {
    let rest = body.trim_start();
    let blanks = body.len() - rest.len();
    let is_json = |text: &str| match (text.is_empty(), text.starts_with(['{', '['])) {
        (true, _) => Ok(None),
        (_, true) => Ok(Some(body.len() - text.len())),
        _ => Err(()),
    };
    // lists of calls are accepted in this format, too
    let is_list =
        rest.starts_with('{') || (rest.starts_with('[') && !ARGS.starts_with(rest) && !rest.starts_with("[A"));
    if form != Form::MistralArgs || is_list {
        return is_json(rest);
    }
    let is_name = |text: &str| text.len() <= MAX_NAME && !text.contains(['{', '\n', '"']);
    match rest.find(ARGS) {
        Some(at) if at > 0 && is_name(&rest[..at]) => is_json(rest[at + ARGS.len()..].trim_start()),
        None if is_name(rest) => Ok(None),
        _ => Err(()),
    }
    .map(|start| start.filter(|&start| start >= blanks))
}

fn xml_body(buffer: &str, body: usize, tools: &[Tool]) -> Body {
    const FUNCTION: &str = "<function=";
    let close = Form::Xml.close().unwrap_or_default();
    let text = buffer[body..].trim_start();
    if !text.starts_with(FUNCTION) {
        return if FUNCTION.starts_with(text) { Body::Incomplete } else { Body::Wrong(body) };
    }
    // a value may contain the marker as text
    let is_end = |at: &usize| buffer[body..*at].trim_end().ends_with("</function>");
    let Some(end) = buffer.match_indices(close).map(|(at, _)| at).filter(|at| *at >= body).find(is_end) else {
        return Body::Incomplete;
    };
    match call_of_xml(&buffer[body..end], tools) {
        Some(call) => Body::Calls(end + close.len(), vec![call]),
        None => Body::Wrong(end + close.len()),
    }
}
