//! Texts and rows that commands take from a file or from standard input.

use anyhow::Result;
use metal_candle::Error;
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Most bytes of a text or a file of rows that is held in memory at once.
pub(crate) const MAX_INPUT_BYTES: u64 = 1 << 30;

/// The text of a file of at most `max_bytes`; `-` is standard input.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    let read_error = |source| Error::Read { path: path.to_path_buf(), source };
    let format = |message: String| Error::Format { path: path.to_path_buf(), message };
    let mut bytes = Vec::new();
    let limit = max_bytes.saturating_add(1);
    if path == Path::new("-") {
        std::io::stdin()
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Read { path: "standard input".into(), source })?;
    } else {
        let file = File::open(path).map_err(read_error)?;
        file.take(limit).read_to_end(&mut bytes).map_err(read_error)?;
    }
    if bytes.len() as u64 > max_bytes {
        return Err(format(format!("expected at most {max_bytes} bytes, found more")).into());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format(format!("expected UTF-8, found other bytes at byte {at}"))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// A text without the end of its last line.
pub(crate) fn without_line_end(mut text: String) -> String {
    let end = text.strip_suffix('\n').map_or(text.len(), |rest| rest.strip_suffix('\r').unwrap_or(rest).len());
    text.truncate(end);
    text
}

/// The JSON values of a file with the lines they begin at: one value over any number of lines, or one on each line. The flag
/// says whether there is one for each line.
pub(crate) fn read_values(path: &Path) -> Result<(Vec<(usize, Value)>, bool)> {
    let text = read_text(path, MAX_INPUT_BYTES)?;
    let is_jsonl = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
    if !is_jsonl && let Ok(value) = serde_json::from_str(&text) {
        return Ok((vec![(1, value)], false));
    }
    let mut values = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str(line).map_err(|error| Error::Format {
            path: path.to_path_buf(),
            message: format!("line {}: expected JSON: {error}", index + 1),
        })?;
        values.push((index + 1, value));
    }
    if values.is_empty() {
        return Err(Error::Format { path: path.to_path_buf(), message: "there is no row in it".into() }.into());
    }
    Ok((values, true))
}
