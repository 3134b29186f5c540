//! Finds stop strings in streamed text.

/// Finds stop strings in a stream of pieces, including stop strings that straddle pieces.
///
/// Text that may be the start of a stop string is buffered, so the returned text never contains a part of a stop string.
#[derive(Debug, Clone)]
pub(super) struct StopMatcher {
    stop_strings: Vec<String>,
    held: String,
    /// Index of the stop string that was reached.
    found: Option<usize>,
}

/// The text released by a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Matched {
    /// The text that is not part of a stop string.
    pub(super) text: String,
    /// Whether a stop string follows it.
    pub(super) stopped: bool,
}

impl StopMatcher {
    /// Creates a matcher for these strings, which must not be empty.
    pub(super) fn new(stop_strings: Vec<String>) -> Self {
        Self { stop_strings, held: String::new(), found: None }
    }

    /// The stop string that was reached.
    pub(super) fn found(&self) -> Option<&str> {
        self.found.map(|index| self.stop_strings[index].as_str())
    }

    /// Adds a piece.
    pub(super) fn push(&mut self, piece: &str) -> Matched {
        self.held.push_str(piece);
        let starts =
            self.stop_strings.iter().enumerate().filter_map(|(index, stop)| Some((self.held.find(stop)?, index)));
        if let Some((start, index)) = starts.min() {
            self.found = Some(index);
            self.held.truncate(start);
            return Matched { text: std::mem::take(&mut self.held), stopped: true };
        }
        let kept = self.stop_strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        Matched { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Adds the last piece and also returns the buffered text.
    pub(super) fn finish(&mut self, piece: &str) -> Matched {
        let mut matched = self.push(piece);
        if !matched.stopped {
            matched.text.push_str(&std::mem::take(&mut self.held));
        }
        matched
    }
}

/// Length in bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The returned pieces, and whether a stop string was found.
    fn run(pieces: &[&str], stop_strings: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stop_strings.iter().map(ToString::to_string).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let matched = matcher.push(piece);
            out.push(matched.text);
            if matched.stopped {
                return (out, true);
            }
        }
        let matched = matcher.finish("");
        out.push(matched.text);
        (out, matched.stopped)
    }

    #[test]
    fn the_reached_string_is_returned() {
        let mut matcher = StopMatcher::new(vec!["three".into(), "two".into()]);
        assert_eq!(matcher.found(), None);
        assert!(!matcher.push("one tw").stopped && matcher.found().is_none());
        assert!(matcher.push("o three").stopped);
        assert_eq!(matcher.found(), Some("two"));
    }

    #[test]
    fn a_stop_string_across_three_pieces() {
        assert_eq!(run(&["a\n", "\n", "}b"], &["\n\n}"]), (vec!["a".into(), String::new(), String::new()], true));
    }

    #[test]
    fn an_incomplete_stop_string_is_released() {
        assert_eq!(run(&["ab", "ac", "ab"], &["abd"]), (["", "abac", "", "ab"].map(String::from).to_vec(), false));
    }

    #[test]
    fn the_first_of_several_stop_strings_applies() {
        assert_eq!(run(&["one two three"], &["three", "two"]), (vec!["one ".into()], true));
    }

    #[test]
    fn multibyte_characters_are_not_split() {
        // both start with the byte 0xC3
        assert_eq!(run(&["ä", "ü!"], &["ö"]), (["ä", "ü!", ""].map(String::from).to_vec(), false));
        assert_eq!(run(&["aé", "è"], &["éè"]), (vec!["a".into(), String::new()], true));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_text_before_the_stop_string(
            text in "[ab\u{e9}]{0,30}",
            stop_strings in proptest::collection::vec("[ab\u{e9}]{2,4}", 0..3),
            cuts in proptest::collection::vec(1usize..5, 30),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut rest = characters.as_slice();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.iter().collect::<String>());
                rest = after;
            }
            let mut matcher = StopMatcher::new(stop_strings.clone());
            let mut out = String::new();
            let mut stopped = false;
            for piece in pieces {
                let matched = matcher.push(&piece);
                out.push_str(&matched.text);
                stopped = matched.stopped;
                if stopped {
                    break;
                }
            }
            if !stopped {
                out.push_str(&matcher.finish("").text);
            }
            // the string that is completed first ends the text, at its start
            let end = stop_strings.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| at + stop.len())).min();
            prop_assert_eq!(stopped, end.is_some());
            prop_assert!(text.starts_with(&out));
            match end {
                None => prop_assert_eq!(out, text),
                Some(_) => prop_assert!(stop_strings.iter().all(|stop| !out.contains(stop.as_str()))),
            }
        }
    }
}
