//! Writes GGUF files (version 3).

use super::gguf_header::{DEFAULT_ALIGNMENT, GgufValue, MAGIC};
use super::gguf_type::GgufType;
use super::write::{Access, write_contents};
use crate::error::{Error, Result};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const VERSION: u32 = 3;
const ALIGNMENT: usize = DEFAULT_ALIGNMENT as usize;

/// A metadata value to write.
#[derive(Debug, Clone)]
pub(crate) enum GgufField {
    /// Integers are written as `u32`, or as `i32`, `u64` or `i64` if they do not fit; integers in lists as `i32`. Floats are
    /// written as `f32`.
    Value(GgufValue),
    /// The encoded type and value from another file.
    Encoded(Vec<u8>),
}

impl From<GgufValue> for GgufField {
    fn from(value: GgufValue) -> Self {
        Self::Value(value)
    }
}

/// A tensor to write.
#[derive(Debug, Clone)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    /// The last dimension is contiguous.
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: GgufType,
}

impl NewTensor {
    fn num_bytes(&self) -> Result<usize> {
        self.kind.num_bytes(&self.shape).ok_or_else(|| {
            let (kind, len) = (self.kind.name(), self.kind.block_len());
            Error::argument(&self.name, format!("expected rows of blocks of {len} ({kind}), found {:?}", self.shape))
        })
    }
}

/// Writes a GGUF file. `write` is called with the index of each tensor in order and writes its elements.
///
/// The file is replaced atomically: readers see the old file or the new one, even after a crash.
///
/// # Errors
/// The file cannot be written, `write` fails, or the rows of a tensor are not whole blocks.
pub(crate) fn write_gguf(
    path: &Path,
    metadata: &[(String, GgufField)],
    tensors: &[NewTensor],
    mut write: impl FnMut(usize, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let header = header(metadata, tensors)?;
    let sizes = tensors.iter().map(NewTensor::num_bytes).collect::<Result<Vec<_>>>()?;
    write_contents(path, Access::Shared, |file| {
        let written = |done: io::Result<()>| done.map_err(|error| Error::write(path, error));
        written(file.write_all(&header))?;
        for (index, num_bytes) in sizes.iter().enumerate() {
            let mut counted = Counted { file, num_bytes: 0 };
            write(index, &mut counted)?;
            if counted.num_bytes != *num_bytes {
                return Err(Error::Bug(format!(
                    "`{}`: expected {num_bytes} bytes, found {}",
                    tensors[index].name, counted.num_bytes
                )));
            }
            written(file.write_all(&[0; ALIGNMENT][..num_bytes.next_multiple_of(ALIGNMENT) - num_bytes]))?;
        }
        Ok(())
    })
}

/// Splits a model into files with at most `max_bytes` of tensors each, or one file at `path`, and returns the path and
/// range of tensors of each.
///
/// The files are named as by llama.cpp: `NAME-00001-of-00003.gguf`.
pub(crate) fn split(
    path: &Path,
    tensors: &[NewTensor],
    max_bytes: Option<u64>,
) -> Result<Vec<(PathBuf, std::ops::Range<usize>)>> {
    let Some(max_bytes) = max_bytes else { return Ok(vec![(path.to_path_buf(), 0..tensors.len())]) };
    let mut ranges = Vec::new();
    let (mut start, mut bytes) = (0, 0_u64);
    for (index, tensor) in tensors.iter().enumerate() {
        let own = tensor.num_bytes()? as u64;
        if index > start && bytes.saturating_add(own) > max_bytes {
            ranges.push(start..index);
            (start, bytes) = (index, 0);
        }
        bytes = bytes.saturating_add(own);
    }
    ranges.push(start..tensors.len());
    if let [range] = ranges.as_slice() {
        return Ok(vec![(path.to_path_buf(), range.clone())]);
    }
    let count = ranges.len();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let name = |index: usize| path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1));
    Ok(ranges.into_iter().enumerate().map(|(index, range)| (name(index), range)).collect())
}

/// The metadata of a file of a split model.
pub(crate) fn split_fields(index: usize, count: usize, num_tensors: usize) -> Vec<(String, GgufField)> {
    let short = |value: usize| [&2_u32.to_le_bytes()[..], &(value as u16).to_le_bytes()].concat();
    let long = |value: usize| [&5_u32.to_le_bytes()[..], &(value as i32).to_le_bytes()].concat();
    vec![
        ("split.no".into(), GgufField::Encoded(short(index))),
        ("split.count".into(), GgufField::Encoded(short(count))),
        ("split.tensors.count".into(), GgufField::Encoded(long(num_tensors))),
    ]
}

struct Counted<'a> {
    file: &'a mut dyn Write,
    num_bytes: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.num_bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The header of a file, up to the first tensor.
fn header(metadata: &[(String, GgufField)], tensors: &[NewTensor]) -> Result<Vec<u8>> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, field) in metadata {
        put_text(&mut bytes, key);
        match field {
            GgufField::Encoded(encoded) => bytes.extend(encoded),
            GgufField::Value(value) => {
                bytes.extend(type_of(value, false).to_le_bytes());
                put_value(&mut bytes, value, false);
            }
        }
    }
    let mut offset = 0_usize;
    for tensor in tensors {
        put_text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            bytes.extend((*size as u64).to_le_bytes());
        }
        bytes.extend(tensor.kind.id().to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.num_bytes()?).next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(bytes)
}

fn type_of(value: &GgufValue, is_item: bool) -> u32 {
    match value {
        GgufValue::Integer(_) if is_item => 5,
        GgufValue::Integer(number) if u32::try_from(*number).is_ok() => 4,
        GgufValue::Integer(number) if i32::try_from(*number).is_ok() => 5,
        GgufValue::Integer(number) if u64::try_from(*number).is_ok() => 10,
        GgufValue::Integer(_) => 11,
        GgufValue::Float(_) => 6,
        GgufValue::Flag(_) => 7,
        GgufValue::Text(_) => 8,
        GgufValue::List(_) => 9,
    }
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue, is_item: bool) {
    match value {
        GgufValue::Integer(number) => {
            let len = if matches!(type_of(value, is_item), 4 | 5) { 4 } else { 8 };
            bytes.extend(&number.to_le_bytes()[..len]);
        }
        GgufValue::Float(number) => bytes.extend((*number as f32).to_le_bytes()),
        GgufValue::Flag(flag) => bytes.push(u8::from(*flag)),
        GgufValue::Text(text) => put_text(bytes, text),
        GgufValue::List(values) => {
            bytes.extend(values.first().map_or(5, |value| type_of(value, true)).to_le_bytes());
            bytes.extend((values.len() as u64).to_le_bytes());
            for value in values {
                put_value(bytes, value, true);
            }
        }
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
