//! Makes text of untrusted files safe to print.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Maximum number of characters in a line of a message.
const MAX_LINE_CHARS: usize = 2000;
/// Maximum number of lines in a message.
const MAX_LINES: usize = 200;

/// Whether `c` may control a terminal or mislead a reader.
fn is_unsafe(c: char) -> bool {
    // C0, DEL and C1; direction marks and overrides; line separators; invisible operators; tags
    (c.is_control() && !matches!(c, '\n' | '\t'))
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Escapes control characters (except newline and tab), direction overrides and invisible characters. Does not shorten.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |safe, c| safe.extend(c.escape_default()))
}

/// Escapes the same characters in a JSON text, with JSON escapes.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    escaped(json, |safe, c| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(safe, "\\u{unit:04x}");
        }
    })
}

/// Replaces each unsafe character with `escape`; borrows `text` if there is none.
fn escaped(text: &str, escape: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) {
            escape(&mut safe, c);
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// Prepares `text` for a message: escapes it like [`printable`], and shortens long lines and long texts.
pub fn sanitize(text: &str) -> String {
    let mut safe = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index == MAX_LINES {
            let _ = write!(safe, "\n... ({} more lines)", text.split('\n').count() - MAX_LINES);
            break;
        }
        if index > 0 {
            safe.push('\n');
        }
        match line.char_indices().nth(MAX_LINE_CHARS) {
            None => safe.push_str(&printable(line)),
            Some((end, _)) => {
                safe.push_str(&printable(&line[..end]));
                let _ = write!(safe, "... ({} more bytes)", line.len() - end);
            }
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::{printable, printable_json, sanitize};

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("\u{1b}]0;x\u{7}\r\u{9b}2J\u{202e}a\u{2066}\u{7f}"), {
            "\\u{1b}]0;x\\u{7}\\r\\u{9b}2J\\u{202e}a\\u{2066}\\u{7f}"
        });
        assert_eq!(printable_json("[\"\u{9b}\u{e0001}\"]"), "[\"\\u009b\\udb40\\udc01\"]");
        assert_eq!(printable("é\n\t日本 👩‍👩‍👧"), "é\n\t日本 👩‍👩‍👧");
    }

    #[test]
    fn long_messages_are_shortened() {
        let long = sanitize(&("é".repeat(100_000) + "\nb"));
        assert!(long.ends_with("é... (196000 more bytes)\nb") && long.len() < 5000, "{}", long.len());
        let many = sanitize(&"a\n".repeat(1000));
        assert!(many.ends_with("\na\n... (801 more lines)") && many.len() < 1000, "{}", many.len());
    }
}
