//! Parses the header of a GGUF file: metadata, and the names, shapes and offsets of tensors.

use crate::error::{Error, Result};
use metal_candle_kernels::{MappedFile, map_file};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Maximum number of dimensions in a tensor.
const MAX_DIMENSIONS: usize = 4;
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
/// Most items of all lists together. An item of one byte takes as much memory as any value, so a file of some gigabytes could
/// take all memory.
const MAX_ITEMS: u64 = 1 << 24;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// An unsigned or signed integer of any width.
    Integer(i128),
    /// A float of 32 or 64 bits.
    Float(f64),
    /// A boolean.
    Flag(bool),
    /// A UTF-8 string.
    Text(String),
    /// A list of values of one type.
    List(Vec<GgufValue>),
}

impl GgufValue {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Flag(_) => "a boolean",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
        }
    }
}

/// A tensor of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Its shape: the last dimension is contiguous, unlike in the file.
    pub shape: Vec<usize>,
    /// The type of its elements: an id in `enum ggml_type`.
    pub ggml_type: u32,
    /// The index of its file.
    pub(super) file: usize,
    /// The offset of its bytes in the file.
    pub(super) start: usize,
}

/// The header of a file.
pub(super) struct Header {
    pub(super) map: MappedFile,
    pub(super) metadata: BTreeMap<String, GgufValue>,
    /// The byte range of each metadata value, including its type.
    pub(super) encoded: BTreeMap<String, Range<usize>>,
    pub(super) tensors: Vec<GgufTensor>,
}

impl Header {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let map = map_file(path).map_err(|error| Error::read(path, error))?;
        let (metadata, encoded, tensors) = parse(&map).map_err(|message| Error::format(path, message))?;
        map.check().map_err(|error| Error::read(path, error))?;
        Ok(Self { map, metadata, encoded, tensors })
    }
}

type Parsed<T> = std::result::Result<T, String>;

type Parts = (BTreeMap<String, GgufValue>, BTreeMap<String, Range<usize>>, Vec<GgufTensor>);

fn parse(bytes: &[u8]) -> Parsed<Parts> {
    let mut reader = Reader { bytes, at: 0, items_left: MAX_ITEMS };
    let magic = reader.take(4).map_err(|_| format!("expected a GGUF file, found {} bytes", bytes.len()))?;
    if magic != MAGIC {
        return Err("expected a GGUF file, which starts with `GGUF`, found other bytes".into());
    }
    let version = reader.u32()?;
    match version {
        2 | 3 => {}
        _ if version.swap_bytes() <= 3 => {
            return Err("expected a little-endian GGUF file, found a big-endian one".into());
        }
        _ => return Err(format!("expected GGUF version 2 or 3, found version {version}: convert the model again")),
    }
    let (num_tensors, num_values) = (reader.u64()?, reader.u64()?);
    let (mut metadata, mut encoded) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..num_values {
        let key = reader.text()?;
        let start = reader.at;
        let value_type = reader.u32()?;
        let value = reader.value(value_type, true).map_err(|message| format!("`{key}`: {message}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("expected one value of `{key}`, found two"));
        }
        encoded.insert(key, start..reader.at);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(GgufValue::Integer(alignment)) => u64::try_from(*alignment)
            .ok()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| format!("`general.alignment`: expected a power of two, found {alignment}"))?,
        Some(other) => return Err(format!("`general.alignment`: expected a whole number, found {}", other.kind())),
    };
    let mut tensors = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..num_tensors {
        let tensor = reader.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!("expected one tensor `{}`, found two", tensor.name));
        }
        tensors.push(tensor);
    }
    let data = (reader.at as u64).next_multiple_of(alignment);
    for tensor in &mut tensors {
        let offset = tensor.start as u64;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "`{}`: expected an offset that is a multiple of {alignment}, found {offset}",
                tensor.name
            ));
        }
        let start = data.checked_add(offset).filter(|&start| start <= bytes.len() as u64);
        let message = || {
            let (name, len) = (&tensor.name, bytes.len());
            format!(
                "`{name}`: expected an offset within the file of {len} bytes, found one beyond its end: download it again"
            )
        };
        tensor.start = start.ok_or_else(message)? as usize;
    }
    Ok((metadata, encoded, tensors))
}

/// Reads little-endian values. Allocations are bounded by the length of the file and the number of items of lists.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    items_left: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("unexpected end of the file: download it again")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Parsed<String> {
        let len = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(len)?;
        // in some vocabularies, tokens are parts of characters
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, value_type: u32, may_be_list: bool) -> Parsed<GgufValue> {
        Ok(match value_type {
            0 => GgufValue::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => GgufValue::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => GgufValue::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => GgufValue::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => GgufValue::Integer(self.u32()?.into()),
            5 => GgufValue::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => GgufValue::Float(f32::from_le_bytes(self.array()?).into()),
            7 => GgufValue::Flag(u8::from_le_bytes(self.array()?) != 0),
            8 => GgufValue::Text(self.text()?),
            9 if may_be_list => {
                let (item_type, count) = (self.u32()?, self.u64()?);
                let left = self.items_left.checked_sub(count);
                self.items_left =
                    left.ok_or_else(|| format!("expected lists of at most {MAX_ITEMS} items, found more ({count})"))?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(item_type, false)?);
                }
                GgufValue::List(values)
            }
            10 => GgufValue::Integer(self.u64()?.into()),
            11 => GgufValue::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => GgufValue::Float(f64::from_le_bytes(self.array()?)),
            9 => return Err("expected a list of numbers or strings, found a list of lists".into()),
            other => return Err(format!("expected a type from 0 to 12, found {other}")),
        })
    }

    fn tensor(&mut self) -> Parsed<GgufTensor> {
        let name = self.text()?;
        let num_dimensions = self.u32()? as usize;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(format!("`{name}`: expected at most {MAX_DIMENSIONS} dimensions, found {num_dimensions}"));
        }
        let mut shape = Vec::with_capacity(num_dimensions);
        for _ in 0..num_dimensions {
            let size = self.u64()?;
            shape.push(usize::try_from(size).map_err(|_| format!("`{name}`: a dimension of {size} is too large"))?);
        }
        shape.reverse();
        let ggml_type = self.u32()?;
        let start = self.u64()?;
        let start = usize::try_from(start).map_err(|_| format!("`{name}`: an offset of {start} is too large"))?;
        Ok(GgufTensor { name, shape, ggml_type, file: 0, start })
    }
}
