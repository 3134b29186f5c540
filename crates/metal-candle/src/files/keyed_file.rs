//! Files that contain their whole key, for caches: a file of another key, or a damaged file, is never mistaken for the contents.

use super::read::read_bounded;
use super::write::{Access, write_contents};
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// The length of the key, after the magic bytes.
const LENGTH_BYTES: usize = 8;
/// The CRC-32C at the end.
const SUM_BYTES: usize = 4;

/// A kind of files: the magic bytes, the length of the key (8 bytes), the key, the contents, and a CRC-32C of all these
/// bytes. Numbers are little-endian.
#[derive(Debug)]
pub(crate) struct KeyedFile {
    pub(crate) magic: &'static [u8],
    pub(crate) access: Access,
}

/// A complete file whose checksum is right.
#[derive(Debug)]
pub(crate) struct Keyed {
    bytes: Vec<u8>,
    key_start: usize,
    key_len: usize,
}

impl Keyed {
    pub(crate) fn key(&self) -> &[u8] {
        &self.bytes[self.key_start..self.key_start + self.key_len]
    }

    pub(crate) fn contents(&self) -> &[u8] {
        &self.bytes[self.key_start + self.key_len..]
    }
}

impl KeyedFile {
    /// The size of a file.
    pub(crate) fn num_bytes(&self, key_len: usize, contents_len: usize) -> usize {
        [LENGTH_BYTES, key_len, contents_len, SUM_BYTES].into_iter().fold(self.magic.len(), usize::saturating_add)
    }

    /// Writes a file atomically; `write` writes its contents.
    ///
    /// # Errors
    /// The file cannot be written, or errors of `write`.
    pub(crate) fn save(&self, path: &Path, key: &[u8], write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        write_contents(path, self.access, |file| {
            let mut file = Summed { file, sum: 0 };
            let header = [self.magic, &(key.len() as u64).to_le_bytes(), key].concat();
            file.write_all(&header).map_err(|error| Error::write(path, error))?;
            write(&mut file)?;
            let sum = file.sum.to_le_bytes();
            file.write_all(&sum).map_err(|error| Error::write(path, error))
        })
    }

    /// Reads a file of at most `max_bytes`.
    ///
    /// # Errors
    /// The file cannot be read, is damaged or of another kind.
    pub(crate) fn load(&self, path: &Path, max_bytes: u64) -> Result<Keyed> {
        let mut bytes = read_bounded(path, max_bytes)?;
        let damaged = |message: &str| Err(Error::format(path, message));
        let Some(end) = bytes.len().checked_sub(SUM_BYTES) else {
            return damaged("expected a checksum, found no bytes");
        };
        let sum = bytes.split_off(end);
        if sum != crc32c::crc32c(&bytes).to_le_bytes() {
            return damaged("the checksum differs: the file is damaged");
        }
        let key_start = self.magic.len() + LENGTH_BYTES;
        match self.key_len(&bytes) {
            Some(key_len) if key_len <= bytes.len() - key_start => Ok(Keyed { bytes, key_start, key_len }),
            _ => damaged("expected a file of this kind and version, found another"),
        }
    }

    /// Reads only the key of a file, at most `max_bytes`, without checking the checksum.
    ///
    /// # Errors
    /// The file cannot be read, is of another kind, or the key is longer.
    pub(crate) fn load_key(&self, path: &Path, max_bytes: usize) -> Result<Vec<u8>> {
        let mut file = File::open(path).map_err(|error| Error::read(path, error))?;
        let mut header = vec![0; self.magic.len() + LENGTH_BYTES];
        file.read_exact(&mut header).map_err(|error| Error::read(path, error))?;
        let Some(length) = self.key_len(&header).filter(|length| *length <= max_bytes) else {
            return Err(Error::format(path, "expected a file of this kind and version, found another"));
        };
        let mut key = vec![0; length];
        file.read_exact(&mut key).map_err(|error| Error::read(path, error))?;
        Ok(key)
    }

    /// The length of the key according to the header.
    fn key_len(&self, bytes: &[u8]) -> Option<usize> {
        let (length, _) = bytes.strip_prefix(self.magic)?.split_first_chunk()?;
        usize::try_from(u64::from_le_bytes(*length)).ok()
    }
}

/// Computes the checksum of everything that is written.
struct Summed<'a> {
    file: &'a mut dyn Write,
    sum: u32,
}

impl Write for Summed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.sum = crc32c::crc32c_append(self.sum, &bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
