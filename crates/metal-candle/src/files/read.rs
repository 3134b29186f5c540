//! Reads text, JSON and lines with a limit on their size.

use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

/// Maximum size of a JSON file other than the weights, in bytes. The parsed values need about twenty times its size.
pub const MAX_SIDE_FILE_BYTES: u64 = 4 << 20;

/// Maximum size of a line of `metrics.jsonl`, in bytes.
pub const MAX_METRICS_LINE_BYTES: usize = 1 << 20;

/// Reads a file of at most `max_bytes`.
///
/// The size is checked before reading. Files that grow, pipes and devices are read up to the limit only.
///
/// # Errors
/// The file cannot be read, or is too large.
pub fn read_bounded(path: impl AsRef<Path>, max_bytes: u64) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
    if metadata.is_dir() {
        return Err(Error::format(path, "expected a file, found a folder"));
    }
    let too_large = |found: String| Error::format(path, format!("expected at most {max_bytes} bytes, found {found}"));
    if metadata.len() > max_bytes {
        return Err(too_large(metadata.len().to_string()));
    }
    let file = File::open(path).map_err(|e| Error::read(path, e))?;
    read_stream(file, path, max_bytes)
}

/// Reads a stream of at most `max_bytes`; errors call it `name`.
///
/// # Errors
/// The stream cannot be read, or is too long.
pub fn read_stream(stream: impl Read, name: impl AsRef<Path>, max_bytes: u64) -> Result<Vec<u8>> {
    let name = name.as_ref();
    let mut bytes = Vec::new();
    stream.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::read(name, e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(Error::format(name, format!("expected at most {max_bytes} bytes, found {} or more", bytes.len())));
    }
    Ok(bytes)
}

/// As [`read_bounded`]; `None` if there is no such file.
///
/// # Errors
/// The file exists but cannot be read, or is too large.
pub fn read_if_exists(path: impl AsRef<Path>, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    match read_bounded(path, max_bytes) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a UTF-8 file of at most `max_bytes`, without a byte order mark.
///
/// # Errors
/// The file cannot be read, is too large, or is not UTF-8.
pub fn read_text(path: impl AsRef<Path>, max_bytes: u64) -> Result<String> {
    let path = path.as_ref();
    text_of(read_bounded(path, max_bytes)?, path)
}

/// Reads a UTF-8 stream of at most `max_bytes`, without a byte order mark; errors call it `name`.
///
/// # Errors
/// As [`read_text`].
pub fn read_text_stream(stream: impl Read, name: impl AsRef<Path>, max_bytes: u64) -> Result<String> {
    let name = name.as_ref();
    text_of(read_stream(stream, name, max_bytes)?, name)
}

fn text_of(bytes: Vec<u8>, path: &Path) -> Result<String> {
    if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
        return Err(Error::format(path, "expected text in UTF-8, found UTF-16; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() + 1;
        Error::format(path, format!("expected text in UTF-8, found an invalid byte at offset {at}"))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// Checks that all integers of a JSON text fit into 64 bits; the parser would round larger ones.
///
/// # Errors
/// An integer does not fit.
pub fn check_integers(json: &str) -> std::result::Result<(), String> {
    let bytes = json.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at += 1;
                while bytes.get(at).is_some_and(|byte| *byte != b'"') {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                let len = bytes[at..].iter().position(|byte| !is_part(byte)).unwrap_or(bytes.len() - at);
                let number = &json[at..at + len];
                let is_whole = !number.contains(['.', 'e', 'E']);
                if is_whole && len > 18 && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                    let start = &number[..len.min(40)];
                    return Err(format!("the integer `{start}` does not fit into 64 bits: write it as a string"));
                }
                at += len;
            }
            _ => at += 1,
        }
    }
    Ok(())
}

/// Parses a JSON file of at most `max_bytes`, with at most 127 levels of nesting.
///
/// # Errors
/// The file cannot be read, is too large, or is not a valid `T`.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>, max_bytes: u64) -> Result<T> {
    let path = path.as_ref();
    let text = read_text(path, max_bytes)?;
    if text.trim().is_empty() {
        return Err(Error::format(path, "expected JSON, found an empty file"));
    }
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("expected JSON: {e}")))
}

/// Reads the lines of a file or stream, holding one line at a time in memory.
#[derive(Debug)]
pub struct BoundedLines<R> {
    reader: R,
    max_line_bytes: usize,
    line: Vec<u8>,
    number: usize,
}

impl BoundedLines<BufReader<File>> {
    /// The lines of a file.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: impl AsRef<Path>, max_line_bytes: usize) -> io::Result<Self> {
        Ok(Self::new(BufReader::new(File::open(path)?), max_line_bytes))
    }
}

impl<R: BufRead> BoundedLines<R> {
    /// The lines of a stream, each of at most `max_line_bytes`.
    pub fn new(reader: R, max_line_bytes: usize) -> Self {
        Self { reader, max_line_bytes, line: Vec::new(), number: 0 }
    }

    /// The next line, including its line break, which only the last line may lack; `None` at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read, or the line is too long.
    pub fn next_line(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        let limit = self.max_line_bytes as u64;
        let read = self.reader.by_ref().take(limit.saturating_add(1)).read_until(b'\n', &mut self.line)?;
        self.number += 1;
        if read as u64 > limit {
            let message = format!("line {}: expected at most {limit} bytes, found more", self.number);
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        Ok((read > 0).then_some(&self.line))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    #[test]
    fn integers_beyond_64_bits_are_refused() {
        let check = super::check_integers;
        for fits in [
            "[-9223372036854775808, 18446744073709551615, 1e30, 123456789012345678901.5]",
            "\"99999999999999999999\\\"9\"",
        ] {
            assert_eq!(check(fits), Ok(()), "{fits}");
        }
        for large in ["{\"a\\\\\": 18446744073709551616}", "-9223372036854775809"] {
            assert!(check(large).is_err_and(|message| message.contains("64 bits")), "{large}");
        }
    }

    use super::{BoundedLines, read_bounded, read_if_exists, read_json, read_text, read_text_stream};
    use serde_json::Value;

    #[test]
    fn the_size_is_checked_before_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "\u{feff}{\"a\":1}").unwrap();
        assert_eq!(read_text(&path, 10).unwrap(), "{\"a\":1}");
        assert_eq!(read_json::<Value>(&path, 10).unwrap()["a"], 1);
        let message = read_bounded(&path, 9).unwrap_err().to_string();
        assert!(message.ends_with("expected at most 9 bytes, found 10"), "{message}");
        // a sparse file, which would take minutes to read
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let message = read_text(&path, 9).unwrap_err().to_string();
        assert!(message.contains("at most 9 bytes, found 1099511627776"), "{message}");
        assert!(read_if_exists(folder.path().join("y"), 9).unwrap().is_none());
        assert!(read_text(folder.path(), 9).unwrap_err().to_string().contains("found a folder"));
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_read_up_to_the_limit() {
        let message = read_bounded("/dev/zero", 1000).unwrap_err().to_string();
        assert!(message.contains("expected at most 1000 bytes, found 1001 or more"), "{message}");
        let mut lines = BoundedLines::open("/dev/zero", 1000).unwrap();
        assert!(lines.next_line().unwrap_err().to_string().contains("line 1: expected at most 1000 bytes"));
    }

    #[test]
    fn lines_and_streams_are_bounded() {
        let mut lines = BoundedLines::new(&b"ab\n\nabc\nd"[..], 4);
        for expected in [&b"ab\n"[..], b"\n", b"abc\n", b"d"] {
            assert_eq!(lines.next_line().unwrap(), Some(expected));
        }
        assert_eq!(lines.next_line().unwrap(), None);
        let mut lines = BoundedLines::new(&b"ab\nabcd\n"[..], 4);
        lines.next_line().unwrap();
        assert!(lines.next_line().unwrap_err().to_string().starts_with("line 2: expected at most 4 bytes"));
        assert_eq!(read_text_stream(&b"\xEF\xBB\xBFab"[..], "stream", 5).unwrap(), "ab");
        let message = read_text_stream(&b"ab"[..], "stream", 1).unwrap_err().to_string();
        assert!(message.contains("`stream` is not valid: expected at most 1 bytes"), "{message}");
    }

    #[test]
    fn other_encodings_and_deep_nesting_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, b"\xFF\xFE{\0}\0").unwrap();
        assert!(read_text(&path, 99).unwrap_err().to_string().contains("UTF-16"));
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        assert!(read_json::<Value>(&path, 1 << 20).unwrap_err().to_string().contains("recursion limit"));
    }
}
