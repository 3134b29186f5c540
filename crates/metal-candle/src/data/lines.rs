//! Reads the records of a file one by one: the lines of a JSONL file, or the values of a JSON file.

use std::io::{self, BufRead};

/// Maximum size of a record, in bytes.
const MAX_RECORD_BYTES: usize = 64 << 20;

/// Maximum size of a skipped record, in bytes; after a longer one the rest of the file is not read.
const MAX_SKIPPED_BYTES: usize = 1 << 30;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// One record of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// The text of a JSON value, not yet parsed, and the line it starts in.
    Value { line: usize, bytes: Vec<u8> },
    /// A record that cannot be used, and why.
    Broken { line: usize, message: String },
}

/// Harmless irregularities of a file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Oddities {
    pub has_bom: bool,
    /// The first line that ends with CR LF.
    pub crlf_line: Option<usize>,
    /// The first empty line, and the number of empty lines.
    pub empty_lines: Option<(usize, usize)>,
    /// Whether the file is empty, apart from a byte order mark.
    pub is_empty: bool,
}

/// The state of the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Started,
    Ended,
}

/// Reads records, holding one at a time in memory.
pub(super) struct Records<R> {
    reader: R,
    is_json: bool,
    line: usize,
    state: State,
    is_in_array: bool,
    oddities: Oddities,
}

impl<R: BufRead> Records<R> {
    /// Reads a JSONL file, or with `is_json` a file with one JSON list or several JSON values.
    pub(super) fn new(reader: R, is_json: bool) -> Self {
        Self { reader, is_json, line: 0, state: State::New, is_in_array: false, oddities: Oddities::default() }
    }

    /// The irregularities of the part that has been read.
    pub(super) fn oddities(&self) -> &Oddities {
        &self.oddities
    }

    /// The next record; `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Record>> {
        if self.state == State::New {
            self.state = State::Started;
            if let Some(broken) = self.start()? {
                return Ok(Some(broken));
            }
        }
        match (self.state, self.is_json) {
            (State::Ended, _) => Ok(None),
            (_, true) => self.next_value(),
            (_, false) => self.next_line(),
        }
    }

    fn start(&mut self) -> io::Result<Option<Record>> {
        self.line = usize::from(self.is_json);
        let bytes = self.reader.fill_buf()?;
        if let Some(message) = other_format(bytes) {
            self.state = State::Ended;
            return Ok(Some(Record::Broken { line: 0, message }));
        }
        self.oddities.has_bom = bytes.starts_with(BOM);
        let skipped = if self.oddities.has_bom { BOM.len() } else { 0 };
        self.reader.consume(skipped);
        let bytes = self.reader.fill_buf()?;
        self.oddities.is_empty = bytes.is_empty();
        // a list, or objects that span lines, with any file extension
        let first_line = bytes.split(|&byte| byte == b'\n').find(|line| !line.trim_ascii().is_empty());
        if !self.is_json
            && first_line.is_some_and(|line| line.trim_ascii() == b"{" || line.trim_ascii().starts_with(b"["))
        {
            (self.is_json, self.line) = (true, 1);
        }
        Ok(None)
    }

    fn next_line(&mut self) -> io::Result<Option<Record>> {
        loop {
            let mut bytes = Vec::new();
            let mut num_bytes = 0;
            let mut is_at_end = true;
            loop {
                let buffer = self.reader.fill_buf()?;
                if buffer.is_empty() {
                    break;
                }
                is_at_end = false;
                let newline = buffer.iter().position(|&byte| byte == b'\n');
                let part = &buffer[..newline.unwrap_or(buffer.len())];
                num_bytes += part.len();
                if num_bytes <= MAX_RECORD_BYTES {
                    bytes.extend_from_slice(part);
                }
                let used = part.len() + usize::from(newline.is_some());
                self.reader.consume(used);
                // a device file may have no end
                if newline.is_some() || num_bytes > MAX_SKIPPED_BYTES {
                    break;
                }
            }
            if is_at_end {
                return Ok(None);
            }
            self.line += 1;
            let line = self.line;
            if num_bytes > MAX_SKIPPED_BYTES {
                self.state = State::Ended;
            }
            if num_bytes > MAX_RECORD_BYTES {
                return Ok(Some(too_long(line, num_bytes)));
            }
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
                self.oddities.crlf_line.get_or_insert(line);
            }
            if bytes.trim_ascii().is_empty() {
                let (_, count) = self.oddities.empty_lines.get_or_insert((line, 0));
                *count += 1;
                continue;
            }
            return Ok(Some(Record::Value { line, bytes }));
        }
    }

    fn next_value(&mut self) -> io::Result<Option<Record>> {
        let mut value = Value::default();
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(value.finish());
            }
            let mut used = 0;
            let mut is_complete = false;
            for &byte in buffer {
                if !value.is_begun() && (byte.is_ascii_whitespace() || byte == b',') {
                    used += 1;
                } else if !value.is_begun() && !self.is_in_array && byte == b'[' {
                    self.is_in_array = true;
                    used += 1;
                } else if !value.is_begun() && self.is_in_array && byte == b']' {
                    self.is_in_array = false;
                    used += 1;
                } else if value.ends_before(byte) {
                    is_complete = true;
                    break;
                } else {
                    value.add(byte, self.line);
                    used += 1;
                    is_complete = value.is_complete();
                }
                self.line += usize::from(byte == b'\n');
                if is_complete {
                    break;
                }
            }
            self.reader.consume(used);
            if value.num_bytes > MAX_SKIPPED_BYTES {
                self.state = State::Ended;
                return Ok(value.finish());
            }
            if is_complete {
                return Ok(value.finish());
            }
        }
    }
}

/// An incomplete JSON value.
#[derive(Default)]
struct Value {
    line: usize,
    bytes: Vec<u8>,
    num_bytes: usize,
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl Value {
    fn is_begun(&self) -> bool {
        self.num_bytes > 0
    }

    /// Whether a value other than a list or object ends before this byte.
    fn ends_before(&self, byte: u8) -> bool {
        self.is_begun() && self.depth == 0 && !self.is_in_string && matches!(byte, b',' | b']' | b'\n' | b'{' | b'[')
    }

    fn is_complete(&self) -> bool {
        self.depth == 0 && !self.is_in_string && matches!(self.bytes.first(), Some(b'{' | b'['))
    }

    fn add(&mut self, byte: u8, line: usize) {
        if !self.is_begun() {
            self.line = line;
        }
        self.num_bytes += 1;
        if self.num_bytes <= MAX_RECORD_BYTES {
            self.bytes.push(byte);
        }
        match byte {
            _ if self.is_escaped => self.is_escaped = false,
            b'\\' if self.is_in_string => self.is_escaped = true,
            b'"' => self.is_in_string = !self.is_in_string,
            b'{' | b'[' if !self.is_in_string => self.depth += 1,
            b'}' | b']' if !self.is_in_string => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    fn finish(self) -> Option<Record> {
        if self.num_bytes > MAX_RECORD_BYTES {
            return Some(too_long(self.line, self.num_bytes));
        }
        self.is_begun().then_some(Record::Value { line: self.line, bytes: self.bytes })
    }
}

/// The first bytes of other file formats, with advice; the first match applies.
const MAGIC: [(&[u8], &str); 24] = [
    (b"\x1F\x8B", "a gzip file; unpack it with `gzip -dc FILE > NEW.jsonl`"),
    (b"\x28\xB5\x2F\xFD", "a zstd file; unpack it with `zstd -dc FILE > NEW.jsonl`"),
    (b"\xFD7zXZ\0", "an xz file; unpack it with `xz -dc FILE > NEW.jsonl`"),
    (b"BZh", "a bzip2 file; unpack it with `bzip2 -dc FILE > NEW.jsonl`"),
    (b"\x04\x22\x4D\x18", "an lz4 file; unpack it with `lz4 -dc FILE > NEW.jsonl`"),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),
    (b"7z\xBC\xAF\x27\x1C", "a 7z file; unpack it with `7z x FILE`"),
    (
        b"PAR1",
        "a Parquet file; convert it with `pandas.read_parquet(FILE).to_json(NEW, orient=\"records\", lines=True)` in Python",
    ),
    (b"ARROW1", ARROW),
    (b"\xFF\xFF\xFF\xFF", ARROW),
    (b"SQLite format 3\0", "an SQLite database; export its rows as JSON lines"),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"\xFF\xFE\0\0", UTF32),
    (b"\0\0\xFE\xFF", UTF32),
    (b"\xFF\xFE", UTF16),
    (b"\xFE\xFF", UTF16),
    (b"{\0", UTF16),
    (b"[\0", UTF16),
    (b"\0{", UTF16),
    (b"\0[", UTF16),
];
const ZIP: &str = "a zip file; unpack it with `unzip FILE`";
const ARROW: &str = "an Arrow file; convert it with `datasets.Dataset.from_file(FILE).to_json(NEW)` in Python";
const PICKLE: &str = "a Python pickle; write its rows as JSON lines in Python";
const UTF16: &str = "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl`";
const UTF32: &str = "UTF-32; convert it with `iconv -f UTF-32 -t UTF-8 FILE > NEW.jsonl`";

/// Recognizes a file of a different format by its first bytes, and returns advice.
fn other_format(bytes: &[u8]) -> Option<String> {
    let known = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, found)| *found);
    let is_binary = || bytes.iter().take(1024).any(|&byte| byte == 0);
    match known.or_else(|| is_binary().then_some("binary data")) {
        Some(found) => Some(format!("expected JSON lines in UTF-8, found {found}")),
        None => text_format(bytes),
    }
}

/// Recognizes tables, XML and YAML by their first line, and returns advice.
fn text_format(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
    let mut lines = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let line = lines.next()?;
    // a JSONL file may start with an invalid line
    if lines.any(|line| line.starts_with(b"{") && line.len() > 1) {
        return None;
    }
    let is_column = |cell: &[u8]| {
        let cell = cell.trim_ascii();
        let cell = cell.strip_prefix(b"\"").and_then(|cell| cell.strip_suffix(b"\"")).unwrap_or(cell);
        !cell.is_empty() && cell.iter().all(|&byte| byte.is_ascii_alphabetic() || byte == b'_' || byte == b' ')
    };
    let is_header = |separator: u8| line.contains(&separator) && line.split(|&byte| byte == separator).all(is_column);
    let convert = "in Python";
    if is_header(b',') {
        let call = "pandas.read_csv(FILE).to_json(NEW, orient=\"records\", lines=True)";
        return Some(format!("expected JSON lines, found a CSV table; convert it with `{call}` {convert}"));
    }
    if is_header(b'\t') || is_header(b';') {
        let call = "pandas.read_csv(FILE, sep=None, engine=\"python\").to_json(NEW, orient=\"records\", lines=True)";
        return Some(format!("expected JSON lines, found a TSV or CSV table; convert it with `{call}` {convert}"));
    }
    line.starts_with(b"<").then(|| "expected JSON lines, found XML or HTML; write its rows as JSON lines".into())
}

fn too_long(line: usize, found: usize) -> Record {
    Record::Broken { line, message: format!("expected at most {MAX_RECORD_BYTES} bytes, found {found}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn records(bytes: &[u8], is_json: bool) -> (Vec<(usize, String)>, Oddities) {
        // a small buffer, so that records straddle its end
        let mut records = Records::new(io::BufReader::with_capacity(5, bytes), is_json);
        let mut found = Vec::new();
        while let Some(record) = records.next().unwrap() {
            match record {
                Record::Value { line, bytes } => found.push((line, String::from_utf8(bytes).unwrap())),
                Record::Broken { line, message } => found.push((line, format!("broken: {message}"))),
            }
        }
        (found, records.oddities().clone())
    }

    #[test]
    fn lines_are_counted_past_empty_ones() {
        let (found, oddities) = records(b"\xEF\xBB\xBF{\"a\":1}\n\n  \r\n{\"b\":2}\r\n{\"c\":3}", false);
        assert_eq!(found, [(1, "{\"a\":1}".into()), (4, "{\"b\":2}".into()), (5, "{\"c\":3}".into())]);
        let expected = Oddities { has_bom: true, crlf_line: Some(3), empty_lines: Some((2, 2)), is_empty: false };
        assert_eq!(oddities, expected);
        assert!(records(b"", false).1.is_empty);
        assert!(records(b"\xEF\xBB\xBF", true).1.is_empty);
    }

    #[test]
    fn values_of_a_list_are_found_over_lines() {
        let (found, _) = records(b"[\n {\"a\": \"}],[\\\"\"},\n\n {\"b\": [1,\n2]}, 5,\n\"x,y\"]\n", true);
        let values = ["{\"a\": \"}],[\\\"\"}", "{\"b\": [1,\n2]}", "5", "\"x,y\""];
        assert_eq!(found, [2, 4, 5, 6].into_iter().zip(values.map(String::from)).collect::<Vec<_>>());
        assert_eq!(records(b"{\n}\n{}", true).0, [(1, "{\n}".into()), (3, "{}".into())]);
        assert_eq!(records(b"[{\"a\": [1", true).0, [(1, "{\"a\": [1".into())]);
        assert_eq!(records(b"[]", true).0, []);
        // with any file extension
        assert_eq!(records(b"{\n\"a\":1}\n{\n}\n", false).0, [(1, "{\n\"a\":1}".into()), (3, "{\n}".into())]);
        assert_eq!(records(b"[{},\n{}]", false).0, [(1, "{}".into()), (2, "{}".into())]);
    }

    #[test]
    fn other_encodings_are_reported() {
        let (found, _) = records(b"\xFF\xFE{\0}\0\n\0{\0}\0", false);
        assert!(found.len() == 1 && found[0].1.contains("found UTF-16"), "{found:?}");
        // a buffer of five bytes is enough to recognize them
        for (bytes, name) in [
            (&b"\x1F\x8B\x08"[..], "gzip"),
            (b"PAR1\x15", "Parquet"),
            (b"PK\x03\x04a", "zip"),
            (b"\0\0\0\0\0", "binary"),
        ] {
            let (found, _) = records(bytes, false);
            assert!(found.len() == 1 && found[0].0 == 0 && found[0].1.contains(name), "{found:?}");
        }
        for (bytes, name) in [(&b"prompt,completion\na,b\n"[..], "CSV"), (b"a\tb\n", "TSV"), (b"<a>", "XML")] {
            assert!(other_format(bytes).is_some_and(|message| message.contains(name)), "{name}");
        }
        assert_eq!(other_format(b"{\"a\": 1}\n"), None);
        assert_eq!(other_format(b"true,"), None);
        assert_eq!(other_format(b"prompt, completion\n{\"a\": 1}\n"), None);
    }
}
