//! [`Digest`]: a SHA-256 of several values.

use super::saver::write_tensor;
use candle_core::Tensor;
use sha2::Sha256;
use std::io::{self, Write};

/// A SHA-256 of several values, each preceded by its length or shape, so that different values have different bytes.
pub(crate) struct Digest(Sha256);

impl Digest {
    /// `purpose` differs between digests of different kinds of values.
    pub(crate) fn new(purpose: &str) -> Self {
        let mut digest = Self(<Sha256 as sha2::Digest>::new());
        digest.add(purpose.as_bytes());
        digest
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.add_number(bytes.len() as u64);
        self.add_raw(bytes);
    }

    pub(crate) fn add_number(&mut self, number: u64) {
        self.add_raw(&number.to_le_bytes());
    }

    /// Adds dtype, shape and elements.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn add_tensor(&mut self, tensor: &Tensor) -> crate::error::Result<()> {
        self.add(tensor.dtype().as_str().as_bytes());
        self.add_number(tensor.rank() as u64);
        tensor.dims().iter().for_each(|&size| self.add_number(size as u64));
        // hashing does not fail
        drop(write_tensor(self, tensor)?);
        Ok(())
    }

    /// Adds bytes without their length.
    pub(crate) fn add_raw(&mut self, bytes: &[u8]) {
        sha2::Digest::update(&mut self.0, bytes);
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        sha2::Digest::finalize(self.0).into()
    }
}

impl Write for Digest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add_raw(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
