//! Separates the reasoning at the start of an answer from the rest.

use metal_candle::data::Tokenizer;

/// The markers around reasoning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reasoning {
    open: &'static str,
    close: &'static str,
    ids: [Option<u32>; 2],
}

impl Reasoning {
    /// The markers that a chat template uses.
    pub(crate) fn of(template: &str, tokenizer: &Tokenizer) -> Option<Self> {
        let known = [("<think>", "</think>"), ("[THINK]", "[/THINK]")];
        let (open, close) = known.into_iter().find(|(_, close)| template.contains(close))?;
        Some(Self { open, close, ids: [open, close].map(|marker| tokenizer.token_to_id(marker)) })
    }

    /// Whether a prompt ends inside reasoning, so that the answer starts there.
    pub(crate) fn is_open_after(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }

    /// The ids of the markers, which the decoder must not skip.
    pub(crate) fn marker_ids(&self) -> impl Iterator<Item = u32> {
        self.ids.into_iter().flatten()
    }

    /// The markers, with their ids if they are tokens.
    pub(super) fn markers(&self) -> [(&'static str, Option<u32>); 2] {
        [(self.open, self.ids[0]), (self.close, self.ids[1])]
    }
}

/// Splits streamed text.
#[derive(Debug, Clone)]
pub(super) struct ReasoningSplit {
    markers: Reasoning,
    state: State,
    buffer: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Only white space so far.
    Start,
    /// Inside reasoning, before or after its first text.
    Inside {
        is_started: bool,
    },
    /// After the reasoning, before other text.
    Between,
    After,
}

/// Text of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Reasoning(String),
    Text(String),
}

impl ReasoningSplit {
    pub(super) fn new(markers: Reasoning, is_open: bool) -> Self {
        let state = if is_open { State::Inside { is_started: false } } else { State::Start };
        Self { markers, state, buffer: String::new() }
    }

    pub(super) fn is_inside(&self) -> bool {
        matches!(self.state, State::Inside { .. })
    }

    pub(super) fn push(&mut self, text: &str) -> Vec<Part> {
        self.buffer.push_str(text);
        let mut parts = Vec::new();
        loop {
            match self.state {
                State::Start => {
                    let rest = self.buffer.trim_start();
                    if let Some(rest) = rest.strip_prefix(self.markers.open) {
                        self.buffer = rest.to_string();
                        self.state = State::Inside { is_started: false };
                    } else if self.markers.open.starts_with(rest) {
                        return parts;
                    } else {
                        self.state = State::After;
                    }
                }
                State::Inside { is_started } => {
                    let close = self.markers.close;
                    let end = self.buffer.find(close);
                    let held = end.unwrap_or_else(|| self.buffer.len() - partial_suffix(&self.buffer, close));
                    let text = &self.buffer[..held];
                    let from = if is_started { 0 } else { text.len() - text.trim_start().len() };
                    // buffer trailing white space, which may be the end of the reasoning
                    let to = text.trim_end().len();
                    if from < to {
                        parts.push(Part::Reasoning(text[from..to].to_string()));
                        self.state = State::Inside { is_started: true };
                    }
                    let Some(end) = end else {
                        self.buffer.drain(..to.max(from));
                        return parts;
                    };
                    self.buffer.drain(..end + close.len());
                    self.state = State::Between;
                }
                State::Between => {
                    let blanks = self.buffer.len() - self.buffer.trim_start().len();
                    self.buffer.drain(..blanks);
                    if self.buffer.is_empty() {
                        return parts;
                    }
                    self.state = State::After;
                }
                State::After => {
                    if !self.buffer.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut self.buffer)));
                    }
                    return parts;
                }
            }
        }
    }

    /// The buffered text.
    pub(super) fn finish(self) -> Option<Part> {
        let is_empty = self.buffer.is_empty();
        match self.state {
            State::Start | State::After => (!is_empty).then_some(Part::Text(self.buffer)),
            State::Inside { .. } => {
                let text = self.buffer.trim_end();
                (!text.trim_start().is_empty()).then(|| Part::Reasoning(text.to_string()))
            }
            State::Between => None,
        }
    }
}

/// The length of the longest suffix of `text` that is a proper prefix of `marker`.
pub(super) fn partial_suffix(text: &str, marker: &str) -> usize {
    let longest = text.len().min(marker.len() - 1);
    (1..=longest).rev().find(|&length| text.as_bytes().ends_with(&marker.as_bytes()[..length])).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn split(text: &str, cut: usize, is_open: bool) -> (String, String) {
        let markers = Reasoning { open: "<think>", close: "</think>", ids: [None; 2] };
        let mut split = ReasoningSplit::new(markers, is_open);
        let mut parts = split.push(&text[..cut]);
        parts.extend(split.push(&text[cut..]));
        parts.extend(split.finish());
        let (mut reasoning, mut other) = (String::new(), String::new());
        for part in parts {
            match part {
                Part::Reasoning(text) => reasoning += &text,
                Part::Text(text) => other += &text,
            }
        }
        (reasoning, other)
    }

    #[test]
    fn every_split_gives_the_same_parts() {
        for (text, is_open, reasoning, other) in [
            ("<think>\na < b\n\nso é </t\n</think>\n\nyes\n", false, "a < b\n\nso é </t", "yes\n"),
            ("a\n</think> <think>b</think>", true, "a", "<think>b</think>"),
            ("\n <thin", false, "", "\n <thin"),
            ("no <think>a</think>", false, "", "no <think>a</think>"),
            ("<think>\n cut ", false, "cut", ""),
            ("cut </thi", true, "cut </thi", ""),
            ("<think>\n\n</think>\n\n", false, "", ""),
            ("", false, "", ""),
        ] {
            for cut in (0..=text.len()).filter(|&cut| text.is_char_boundary(cut)) {
                assert_eq!(split(text, cut, is_open), (reasoning.to_string(), other.to_string()), "{text:?} at {cut}");
            }
        }
    }
}
