//! Finds the end of a JSON value in streamed text, and the text of its parts.

use serde::de::{DeserializeOwned, IgnoredAny};

/// The state inside a JSON object or list.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonScan {
    /// The number of bytes read.
    read: usize,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl JsonScan {
    /// The end of the object or list at the start of `text`, once it is complete. Each call passes the whole text so far.
    pub(super) fn end(&mut self, text: &str) -> Option<usize> {
        let bytes = text.as_bytes();
        while let Some(byte) = bytes.get(self.read) {
            self.read += 1;
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_string => self.is_escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.read);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// The keys of a JSON object with the texts of their values; `None` if `text` is not a JSON object.
pub(super) fn fields(text: &str) -> Option<Vec<(String, &str)>> {
    let mut rest = text.trim().strip_prefix('{')?.trim_start();
    let mut fields = Vec::new();
    while !rest.starts_with('}') {
        let (key, after): (String, _) = value(rest)?;
        let after = after.trim_start().strip_prefix(':')?.trim_start();
        let (IgnoredAny, end) = value(after)?;
        fields.push((key, after[..after.len() - end.len()].trim_end()));
        rest = next(end, '}')?;
    }
    rest.strip_prefix('}')?.trim().is_empty().then_some(fields)
}

/// The texts of the values of a JSON list; `None` if `text` is not a JSON list.
pub(super) fn items(text: &str) -> Option<Vec<&str>> {
    let mut rest = text.trim().strip_prefix('[')?.trim_start();
    let mut items = Vec::new();
    while !rest.starts_with(']') {
        let (IgnoredAny, end) = value(rest)?;
        items.push(rest[..rest.len() - end.len()].trim_end());
        rest = next(end, ']')?;
    }
    rest.strip_prefix(']')?.trim().is_empty().then_some(items)
}

/// The rest of the text from the next value or the closing bracket.
fn next(text: &str, close: char) -> Option<&str> {
    let text = text.trim_start();
    match text.strip_prefix(',') {
        Some(rest) => Some(rest.trim_start()).filter(|rest| !rest.starts_with(close)),
        None => Some(text).filter(|text| text.starts_with(close)),
    }
}

/// The first value of a text, and the text after it.
fn value<T: DeserializeOwned>(text: &str) -> Option<(T, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<T>();
    let value = values.next()?.ok()?;
    let end = values.byte_offset();
    Some((value, text.get(end..)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn an_object_ends_at_its_bracket() {
        let text = r#"{"a": "}\"{", "b": [{"c": "\\"}, 1]} tail}"#;
        let end = text.len() - " tail}".len();
        for cut in 1..text.len() {
            if text.is_char_boundary(cut) {
                let mut scan = JsonScan::default();
                let first = scan.end(&text[..cut]);
                assert_eq!(first.or_else(|| scan.end(text)), Some(end), "{cut}");
            }
        }
    }

    #[test]
    fn parts_preserve_their_text() {
        let fields = fields(r#" { "a" :1.50 , "b":{"x" : [ 1 ,2]}, "c": "\u00e9" } "#).unwrap();
        let expected = [("a".to_string(), "1.50"), ("b".into(), r#"{"x" : [ 1 ,2]}"#), ("c".into(), r#""\u00e9""#)];
        assert_eq!(fields, expected);
        assert_eq!(items("[ {} , [1] ]").unwrap(), ["{}", "[1]"]);
        assert!(super::fields("{}").unwrap().is_empty() && items("[]").unwrap().is_empty());
        for wrong in
            ["", "{", "[]", r#"{"a"}"#, r#"{"a":1,}"#, r#"{"a":1}x"#, r#"{"a":1 "b":2}"#, "{a:1}", r#"{"a":01}"#]
        {
            assert!(super::fields(wrong).is_none(), "{wrong}");
        }
        assert!(items("[1,]").is_none() && items("[1").is_none() && items("[1 2]").is_none());
        assert!(super::fields(&(r#"{"a":"#.to_string() + &"[".repeat(100_000))).is_none());
    }
}
