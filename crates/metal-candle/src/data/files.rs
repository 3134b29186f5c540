//! Reads the files of a dataset row by row and collects their problems.

use super::encode::{Details, EncodedRow, Encoder};
use super::lines::{Oddities, Record, Records};
use super::rows::{self, Schema};
use super::{DatasetOptions, Sample, Source, Tokenizer};
use crate::error::{DataProblem, Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of problems that are listed; the others are counted.
const MAX_PROBLEMS: usize = 1000;
/// The number of rows, and of bytes, that are read before they are tokenized in parallel.
const CHUNK_ROWS: usize = 256;
const CHUNK_BYTES: usize = 4 << 20;

/// A usable row.
pub(super) struct FileRow {
    pub sample: Sample,
    pub schema: Schema,
    pub details: Option<Details>,
}

/// The problems of the rows read so far.
#[derive(Debug, Default)]
pub(super) struct Problems {
    list: Vec<DataProblem>,
    num_left_out: usize,
}

impl Problems {
    pub(super) fn push(&mut self, path: &Path, line: usize, message: impl Into<String>) {
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(DataProblem { path: path.to_path_buf(), line, message: message.into() });
        } else {
            self.num_left_out += 1;
        }
    }

    /// All problems, with an entry for those that were only counted.
    pub(super) fn into_list(mut self) -> Vec<DataProblem> {
        if let (Some(last), 1..) = (self.list.last(), self.num_left_out) {
            let message = format!("{} more rows cannot be used", self.num_left_out);
            self.list.push(DataProblem { path: last.path.clone(), line: 0, message });
        }
        self.list
    }

    /// Returns `value` if there are no problems.
    pub(super) fn into_result<T>(self, value: T) -> Result<T> {
        match self.into_list() {
            problems if problems.is_empty() => Ok(value),
            problems => Err(Error::Data { problems }),
        }
    }
}

/// A harmless irregularity of a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum RowNote {
    Cut,
    Straddles,
    LacksEos,
    /// A message.
    Other(String),
}

/// Reads a file and passes each usable row to `keep`, in order. Returns notes; unusable rows are added to `problems`.
///
/// # Errors
/// The file cannot be read.
pub(super) fn read_rows(
    path: &Path,
    tokenizer: &Tokenizer,
    options: &DatasetOptions,
    with_details: bool,
    problems: &mut Problems,
    mut keep: impl FnMut(FileRow),
) -> Result<Vec<DataProblem>> {
    let encoder = Encoder::new(tokenizer, options, with_details);
    let shared_path = Arc::new(path.to_path_buf());
    let file = std::fs::File::open(path).map_err(|e| Error::read(path, e))?;
    let is_json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let mut records = Records::new(BufReader::with_capacity(1 << 16, file), is_json);
    let mut row_notes: BTreeMap<RowNote, (usize, usize)> = BTreeMap::new();
    let mut num_records = 0;
    loop {
        let chunk = read_chunk(&mut records).map_err(|e| Error::read(path, e))?;
        if chunk.is_empty() {
            break;
        }
        num_records += chunk.len();
        let rows: Vec<(usize, std::result::Result<EncodedRow, String>)> =
            chunk.into_par_iter().map(|record| encode(&encoder, record)).collect();
        for (line, row) in rows {
            let row = match row {
                Ok(row) => row,
                Err(message) => {
                    problems.push(path, line, message);
                    continue;
                }
            };
            let notes = [
                (RowNote::Cut, row.is_cut),
                (RowNote::Straddles, row.has_straddling_token),
                (RowNote::LacksEos, row.lacks_eos),
            ];
            let others = row.notes.into_iter().map(|note| (RowNote::Other(note), true));
            for (note, _) in notes.into_iter().chain(others).filter(|(_, is_so)| *is_so) {
                row_notes.entry(note).or_insert((line, 0)).1 += 1;
            }
            let source = Some(Source { path: Arc::clone(&shared_path), line });
            let sample = Sample { ids: row.ids, trained: row.trained, source };
            keep(FileRow { sample, schema: row.schema, details: row.details });
        }
    }
    if num_records == 0 {
        problems.push(path, 0, if records.oddities().is_empty { "the file is empty" } else { "the file has no rows" });
    }
    Ok(notes(&shared_path, records.oddities(), &row_notes, options))
}

fn read_chunk<R: std::io::BufRead>(records: &mut Records<R>) -> std::io::Result<Vec<Record>> {
    let (mut chunk, mut num_bytes) = (Vec::new(), 0);
    while chunk.len() < CHUNK_ROWS && num_bytes < CHUNK_BYTES {
        let Some(record) = records.next()? else { break };
        if let Record::Value { bytes, .. } = &record {
            num_bytes += bytes.len();
        }
        chunk.push(record);
    }
    Ok(chunk)
}

fn encode(encoder: &Encoder, record: Record) -> (usize, std::result::Result<EncodedRow, String>) {
    match record {
        Record::Broken { line, message } => (line, Err(message)),
        Record::Value { line, bytes } => (line, encode_bytes(encoder, &bytes)),
    }
}

fn encode_bytes(encoder: &Encoder, bytes: &[u8]) -> std::result::Result<EncodedRow, String> {
    let text =
        std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 from byte {} of the row on", e.valid_up_to() + 1))?;
    let value = serde_json::from_str(text).map_err(|e| {
        if let Some(message) = dialect(text) {
            return message;
        }
        let message = e.to_string();
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
        let place = if e.line() == 1 { format!("column {}", e.column()) } else { format!("line {} of it", e.line()) };
        format!("not valid JSON: {message} ({place})")
    })?;
    crate::files::check_integers(text)?;
    let (schema, row) = rows::parse(value)?;
    encoder.encode(schema, row)
}

/// Explains why a text is not JSON if Python's `json` accepts it, or if it contains several values.
fn dialect(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let (mut at, mut is_in_string) = (0, false);
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    while at < bytes.len() {
        let rest = &bytes[at..];
        match (is_in_string, rest[0]) {
            (true, b'\\') => match unit(at) {
                Some(0xD800..=0xDBFF) if unit(at + 6).is_some_and(|low| (0xDC00..=0xDFFF).contains(&low)) => at += 11,
                Some(code @ 0xD800..=0xDFFF) => {
                    return Some(format!(
                        "not valid JSON: `\\u{code:04x}` (column {}) is an unpaired surrogate, half a character such as an \
                        emoji: remove it",
                        at + 1
                    ));
                }
                _ => at += 1,
            },
            (_, b'"') => is_in_string = !is_in_string,
            (false, b'N' | b'I') => {
                let name = ["NaN", "Infinity"].into_iter().find(|name| rest.starts_with(name.as_bytes()))?;
                return Some(format!(
                    "not valid JSON: `{name}` (column {}) is not a JSON number; write `null`",
                    at + 1
                ));
            }
            _ => {}
        }
        at += 1;
    }
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>();
    let first = values.next()?.ok()?;
    let end = values.byte_offset();
    let is_another = values.next().is_some_and(|next| next.is_ok_and(|next| next.is_object()));
    (first.is_object() && is_another)
        .then(|| format!("several JSON values on one line, the second at column {}; put each on its own line", end + 1))
}

fn notes(
    path: &Arc<PathBuf>,
    oddities: &Oddities,
    row_notes: &BTreeMap<RowNote, (usize, usize)>,
    options: &DatasetOptions,
) -> Vec<DataProblem> {
    let mut notes = Vec::new();
    let mut add = |line: usize, message: String| notes.push(DataProblem { path: path.to_path_buf(), line, message });
    if oddities.has_bom {
        add(1, "the file starts with a byte order mark, which is skipped".into());
    }
    if let Some(line) = oddities.crlf_line {
        add(line, "lines end with CR LF from here on".into());
    }
    if let Some((line, count)) = oddities.empty_lines {
        let lines = if count == 1 { "an empty line".into() } else { format!("the first of {count} empty lines") };
        add(line, format!("{lines}, skipped"));
    }
    for (note, &(line, count)) in row_notes {
        let rows = if count == 1 { "this row".into() } else { format!("the first of {count} rows that") };
        add(
            line,
            match note {
                RowNote::Cut => {
                    let max_tokens = options.max_tokens.unwrap_or(usize::MAX);
                    format!("{rows} is truncated to {max_tokens} tokens").replace("that is", "that are")
                }
                RowNote::Straddles if count == 1 => {
                    "this row has a token that straddles the edge of an answer and is not trained".into()
                }
                RowNote::Straddles => {
                    format!("{rows} have a token that straddles the edge of an answer and is not trained")
                }
                RowNote::Other(what) if count == 1 => format!("this row: {what}"),
                RowNote::Other(what) => format!("the first of {count} rows: {what}"),
                RowNote::LacksEos => {
                    let verb = if count == 1 { "ends" } else { "end" };
                    format!("{rows} {verb} without an end-of-text token, because the tokenizer has none")
                }
            },
        );
    }
    notes
}
