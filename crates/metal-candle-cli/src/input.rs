//! Reads texts and rows from files or standard input.

use anyhow::Result;
use metal_candle::{Error, files};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Maximum size in bytes of a text or a file of rows, which is read into memory.
pub(crate) const MAX_INPUT_BYTES: u64 = 1 << 30;

/// Reads a text file of at most `max_bytes`; `-` is standard input.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    if path == Path::new("-") {
        return Ok(files::read_text_stream(std::io::stdin().lock(), "standard input", max_bytes)?);
    }
    Ok(files::read_text(path, max_bytes)?)
}

/// Returns a path that can be read more than once: `path`, or for a pipe or device a copy in a temporary folder, which exists
/// as long as the second value.
pub(crate) fn rereadable(path: &Path) -> Result<(PathBuf, Option<TempDir>)> {
    if !is_stream(path) {
        return Ok((path.to_path_buf(), None));
    }
    let bytes = files::read_bounded(path, MAX_INPUT_BYTES)?;
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join(path.file_name().unwrap_or("data".as_ref()));
    files::write_atomically(&copy, |file| file.write_all(&bytes))?;
    Ok((copy, Some(folder)))
}

/// Whether a path is a pipe, a device or a socket, which can be read only once.
pub(crate) fn is_stream(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Removes the final line break.
pub(crate) fn without_line_end(mut text: String) -> String {
    let end = text.strip_suffix('\n').map_or(text.len(), |rest| rest.strip_suffix('\r').unwrap_or(rest).len());
    text.truncate(end);
    text
}

/// The JSON values of a file and the lines they start at: one value over any number of lines, or one value per line. The flag
/// is true for one value per line.
pub(crate) fn read_values(path: &Path) -> Result<(Vec<(usize, Value)>, bool)> {
    let text = read_text(path, MAX_INPUT_BYTES)?;
    let is_jsonl = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
    let format = |message: String| Error::Format { path: path.to_path_buf(), message };
    if !is_jsonl && let Ok(value) = serde_json::from_str(&text) {
        files::check_integers(&text).map_err(format)?;
        return Ok((vec![(1, value)], false));
    }
    let mut values = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = |message: String| format(format!("line {}: {message}", index + 1));
        let value = serde_json::from_str(line).map_err(|error| place(format!("expected JSON: {error}")))?;
        files::check_integers(line).map_err(place)?;
        values.push((index + 1, value));
    }
    if values.is_empty() {
        return Err(format("expected rows, found none".into()).into());
    }
    Ok((values, true))
}
