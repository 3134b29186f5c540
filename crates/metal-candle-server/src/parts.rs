//! Splits an answer into parts in order, for wire formats with a list of parts.

use crate::tools::Delta;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning(String),
    Text(String),
    Call { name: String, arguments: String },
}

/// A change by a delta, with the index of the part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Opened(usize),
    Grew(usize, String),
    Closed(usize),
}

/// The parts of an answer. Only the last part can be open.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    list: Vec<Part>,
    is_open: bool,
}

impl Parts {
    pub(crate) fn list(&self) -> &[Part] {
        &self.list
    }

    /// Whether a part is a call.
    pub(crate) fn has_calls(&self) -> bool {
        self.list.iter().any(|part| matches!(part, Part::Call { .. }))
    }

    /// Adds a delta.
    pub(crate) fn push(&mut self, delta: Delta) -> Vec<Change> {
        let mut changes = Vec::new();
        let (part, text) = match delta {
            Delta::Reasoning(text) => (Part::Reasoning(String::new()), text),
            Delta::Content(text) => (Part::Text(String::new()), text),
            Delta::CallStart { name, .. } => {
                self.open(Part::Call { name, arguments: String::new() }, &mut changes);
                return changes;
            }
            // ignore arguments without a call
            Delta::Arguments { text, .. } => match self.list.last() {
                Some(Part::Call { .. }) if self.is_open => {
                    (Part::Call { name: String::new(), arguments: String::new() }, text)
                }
                _ => return changes,
            },
        };
        let continues = self.is_open
            && self.list.last().is_some_and(|last| std::mem::discriminant(last) == std::mem::discriminant(&part));
        if !continues {
            self.open(part, &mut changes);
        }
        if let Some(Part::Reasoning(all) | Part::Text(all) | Part::Call { arguments: all, .. }) = self.list.last_mut() {
            all.push_str(&text);
        }
        if !text.is_empty() {
            changes.push(Change::Grew(self.list.len() - 1, text));
        }
        changes
    }

    /// Closes the last part.
    pub(crate) fn close(&mut self) -> Option<Change> {
        std::mem::take(&mut self.is_open).then(|| Change::Closed(self.list.len() - 1))
    }

    fn open(&mut self, part: Part, changes: &mut Vec<Change>) {
        changes.extend(self.close());
        self.list.push(part);
        self.is_open = true;
        changes.push(Change::Opened(self.list.len() - 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(index: usize, name: &str) -> Delta {
        Delta::CallStart { index, id: "call_x".into(), name: name.into() }
    }

    fn arguments(text: &str) -> Delta {
        Delta::Arguments { index: 0, text: text.into() }
    }

    #[test]
    fn parts_open_and_close_in_order() {
        let mut parts = Parts::default();
        let deltas = [
            arguments("lost"),
            Delta::Content("a".into()),
            Delta::Content("b".into()),
            start(0, "f"),
            arguments("{}"),
            start(1, "g"),
        ];
        let changes: Vec<Change> = deltas.into_iter().flat_map(|delta| parts.push(delta)).collect();
        let expected = [
            Change::Opened(0),
            Change::Grew(0, "a".into()),
            Change::Grew(0, "b".into()),
            Change::Closed(0),
            Change::Opened(1),
            Change::Grew(1, "{}".into()),
            Change::Closed(1),
            Change::Opened(2),
        ];
        assert_eq!(changes, expected);
        assert_eq!((parts.close(), parts.close()), (Some(Change::Closed(2)), None));
        let call = |name: &str, arguments: &str| Part::Call { name: name.into(), arguments: arguments.into() };
        assert_eq!(parts.list(), [Part::Text("ab".into()), call("f", "{}"), call("g", "")]);
    }
}
