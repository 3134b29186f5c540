//! Writes TensorBoard event files: `TFRecord` frames around hand-encoded `Event` messages with scalars.
//!
//! A frame is the payload's length (u64), its masked CRC-32C, the payload and its masked CRC-32C, all
//! little-endian. Of the protocol buffer only the fields of a scalar are written: `wall_time` (1), `step` (2),
//! `file_version` (3), `summary` (5) with `value` (1), and of that `tag` (1) and `simple_value` (2).

use metal_candle::files::open_to_append;
use metal_candle::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes scalars to an event file.
#[derive(Debug)]
pub(crate) struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Creates the event file of a run folder; replaces an existing file.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: folder.to_path_buf(), source };
        for entry in std::fs::read_dir(folder).map_err(read)? {
            let path = entry.map_err(read)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("events.out.tfevents.") {
                std::fs::remove_file(&path).map_err(|source| Error::Write { path: path.clone(), source })?;
            }
        }
        let path = folder.join(format!("events.out.tfevents.{}.metal-candle", seconds_since_epoch() as u64));
        let file = open_to_append(&path)?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        let mut event = Vec::new();
        put_double(&mut event, 1, seconds_since_epoch());
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.write_record(&event)?;
        Ok(writer)
    }

    /// Adds values of one step.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            put_float(&mut entry, 2, *value as f32);
            put_bytes(&mut summary, 1, &entry);
        }
        let mut event = Vec::new();
        put_double(&mut event, 1, seconds_since_epoch());
        put_key(&mut event, 2, 0);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.write_record(&event)
    }

    fn write_record(&mut self, payload: &[u8]) -> Result<()> {
        let length = (payload.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(payload.len() + 16);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(&masked_crc(&length).to_le_bytes());
        frame.extend_from_slice(payload);
        frame.extend_from_slice(&masked_crc(payload).to_le_bytes());
        self.file
            .write_all(&frame)
            .and_then(|()| self.file.flush())
            .map_err(|source| Error::Write { path: self.path.clone(), source })
    }
}

/// CRC-32C, rotated and shifted as `TFRecord` requires.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn seconds_since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_key(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_float(out: &mut Vec<u8>, field: u64, value: f32) {
    put_key(out, field, 5);
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::{masked_crc, put_varint};

    #[test]
    fn crc_and_varint_follow_their_standards() {
        // RFC 3720, B.4: 32 zero bytes
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        // the frame of an 8-byte zero length
        assert_eq!(masked_crc(&[]), 0xa282_ead8);
        let mut out = Vec::new();
        put_varint(&mut out, 300);
        assert_eq!(out, [0xac, 0x02]);
    }
}
