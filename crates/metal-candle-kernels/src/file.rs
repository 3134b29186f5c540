//! Files mapped into memory.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

/// The bytes of a file, mapped read-only.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

/// Maps `path` read-only; nothing is read until its bytes are looked at.
///
/// The file must stay as it is while it is mapped: if another process cuts it, the operating system ends this
/// one on the next look at the missing part. Files that are replaced by renaming are safe.
///
/// # Errors
/// `path` cannot be opened, or is not a regular file.
pub fn map_file(path: impl AsRef<Path>) -> io::Result<MappedFile> {
    let path = path.as_ref();
    // asked before opening, since opening a pipe would wait
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    // SAFETY: the map is read-only and private to this value, and its bytes are handed out as plain `u8`, for
    // which every bit pattern is valid. That the file is not changed meanwhile is asked of the caller above.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(MappedFile(map))
}

impl MappedFile {
    /// Gives the memory of a byte range back to the system; it is read again when it is looked at again.
    ///
    /// Without this, a file that was read once counts towards the memory of the process until it is unmapped.
    pub fn release(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.0.len() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the map is shared, read-only and backed by the file, so dropped pages come back with the
            // same bytes, and the range lies inside it.
            let advised = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.end - range.start)
            };
            // only memory is at stake, never the result
            drop(advised);
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_file_also_after_release() {
        let path = std::env::temp_dir().join(format!("metal-candle-map-{}", std::process::id()));
        let bytes: Vec<u8> = (0..20_000_u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map_file(&path).unwrap();
        assert_eq!(&map[..], &bytes[..]);
        map.release(100..15_000);
        map.release(0..1_000_000);
        assert_eq!(&map[..], &bytes[..]);
        drop(map);
        std::fs::write(&path, b"").unwrap();
        assert_eq!(map_file(&path).unwrap().len(), 0);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(map_file(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(map_file(std::env::temp_dir()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
