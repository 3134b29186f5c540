//! Whole files read with a limit on their size.

use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Most bytes of a file beside the weights that is kept as a tree of values, which takes some twenty times its memory.
pub const MAX_SIDE_FILE_BYTES: u64 = 4 << 20;

/// The bytes of a file of at most `max_bytes`.
///
/// The size is looked at before anything is read, and a file that grows, a pipe or a device is read no further than the limit.
///
/// # Errors
/// The file cannot be read, or is larger.
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
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::read(path, e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(too_large(format!("{} or more", bytes.len())));
    }
    Ok(bytes)
}

/// As [`read_bounded`]; `None` if there is no such file.
///
/// # Errors
/// The file is there but cannot be read, or is larger.
pub fn read_if_exists(path: impl AsRef<Path>, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    match read_bounded(path, max_bytes) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text of a UTF-8 file of at most `max_bytes`, without a byte order mark.
///
/// # Errors
/// The file cannot be read, is larger, or is not UTF-8.
pub fn read_text(path: impl AsRef<Path>, max_bytes: u64) -> Result<String> {
    let path = path.as_ref();
    let bytes = read_bounded(path, max_bytes)?;
    if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
        return Err(Error::format(path, "expected text in UTF-8, found UTF-16; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() + 1;
        Error::format(path, format!("expected text in UTF-8, found other bytes at byte {at}"))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// The value of a JSON file of at most `max_bytes`; values may be nested 127 deep.
///
/// # Errors
/// The file cannot be read, is larger, or does not hold what `T` expects.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>, max_bytes: u64) -> Result<T> {
    let path = path.as_ref();
    let text = read_text(path, max_bytes)?;
    if text.trim().is_empty() {
        return Err(Error::format(path, "expected JSON, found an empty file"));
    }
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("expected JSON: {e}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{read_bounded, read_if_exists, read_json, read_text};
    use serde_json::Value;

    #[test]
    fn the_limit_is_looked_at_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "\u{feff}{\"a\":1}").unwrap();
        assert_eq!(read_text(&path, 10).unwrap(), "{\"a\":1}");
        assert_eq!(read_json::<Value>(&path, 10).unwrap()["a"], 1);
        let message = read_bounded(&path, 9).unwrap_err().to_string();
        assert!(message.ends_with("expected at most 9 bytes, found 10"), "{message}");
        // sparse: reading it would take minutes
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let message = read_text(&path, 9).unwrap_err().to_string();
        assert!(message.contains("at most 9 bytes, found 1099511627776"), "{message}");
        assert!(read_if_exists(folder.path().join("y"), 9).unwrap().is_none());
        assert!(read_text(folder.path(), 9).unwrap_err().to_string().contains("found a folder"));
    }

    #[cfg(unix)]
    #[test]
    fn a_device_ends_at_the_limit() {
        let message = read_bounded("/dev/zero", 1000).unwrap_err().to_string();
        assert!(message.contains("expected at most 1000 bytes, found 1001 or more"), "{message}");
    }

    #[test]
    fn other_encodings_and_depth_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, b"\xFF\xFE{\0}\0").unwrap();
        assert!(read_text(&path, 99).unwrap_err().to_string().contains("UTF-16"));
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        assert!(read_json::<Value>(&path, 1 << 20).unwrap_err().to_string().contains("recursion limit"));
    }
}
