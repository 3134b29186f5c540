//! Maps safetensors files into memory and checks their headers completely (<https://huggingface.co/docs/safetensors>).

use super::convert;
use super::foreign;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use metal_candle_kernels::MappedFile;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of the length field before the header.
const LENGTH_BYTES: usize = 8;
/// Maximum size of a header, in bytes, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Maximum number of tensors in a file; the largest published models have about 150,000 in all of their files.
const MAX_TENSORS: usize = 200_000;
/// Maximum number of dimensions in a tensor.
const MAX_RANK: usize = 16;

/// The dtypes of the format: name, bits per element and candle's dtype.
const DTYPES: &[(&str, u64, Option<DType>)] = &[
    ("F32", 32, Some(DType::F32)),
    ("F16", 16, Some(DType::F16)),
    ("BF16", 16, Some(DType::BF16)),
    ("F64", 64, Some(DType::F64)),
    ("U8", 8, Some(DType::U8)),
    ("U32", 32, Some(DType::U32)),
    ("I16", 16, Some(DType::I16)),
    ("I32", 32, Some(DType::I32)),
    ("I64", 64, Some(DType::I64)),
    ("BOOL", 8, None),
    ("I8", 8, None),
    ("U16", 16, None),
    ("U64", 64, None),
    ("C64", 64, None),
    ("F8_E4M3", 8, None),
    ("F8_E5M2", 8, None),
    ("F8_E8M0", 8, None),
    ("F8_E4M3FNUZ", 8, None),
    ("F8_E5M2FNUZ", 8, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("F4", 4, None),
];

/// A tensor in a [`SafetensorsFile`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Its dtype, as named by the format: `BF16`.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    candle: Option<DType>,
    bytes: Range<usize>,
}

impl TensorEntry {
    /// Its size in the file, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Its byte range in the file.
    pub(crate) fn byte_range(&self) -> Range<usize> {
        self.bytes.clone()
    }

    /// candle's dtype, if there is one.
    pub fn candle_dtype(&self) -> Option<DType> {
        self.candle
    }

    /// Whether it holds numbers that can be converted to f32, f16 or bf16.
    pub fn is_float(&self) -> bool {
        matches!(self.candle, Some(DType::F32 | DType::F16 | DType::BF16 | DType::F64))
    }
}

/// A safetensors file, mapped into memory, whose header has been checked against the file.
///
/// Offsets, sizes and names are valid. Tensors are read on demand.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Arc<MappedFile>,
    entries: Vec<TensorEntry>,
    numbers: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Maps `path` and checks its header.
    ///
    /// Replacing the file by renaming is safe while it is open. If it is truncated or overwritten in place, reading tensors
    /// returns errors afterwards.
    ///
    /// # Errors
    /// The file cannot be read, is empty, truncated or in a different format, or its header is inconsistent or does not match the
    /// file's size.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = metal_candle_kernels::map_file(path).map_err(|e| Error::read(path, e))?;
        let (entries, metadata) = parse(&map).map_err(|message| Error::format(path, message))?;
        let numbers = entries.iter().enumerate().map(|(number, entry)| (entry.name.clone(), number)).collect();
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), entries, numbers, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The map of the file.
    pub(crate) fn map(&self) -> &Arc<MappedFile> {
        &self.map
    }

    /// The tensors, by offset.
    pub fn entries(&self) -> &[TensorEntry] {
        &self.entries
    }

    /// The tensor `name`.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.numbers.get(name).map(|&number| &self.entries[number])
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of a tensor: little-endian, row-major.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.map[self.require(name)?.bytes.clone()])
    }

    /// The tensor `name` on the CPU, in the file's dtype.
    ///
    /// # Errors
    /// There is no such tensor, or candle has no such dtype.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.require(name)?;
        let dtype =
            entry.candle.ok_or_else(|| self.unusable(entry, "f32, f16, bf16, f64, u8, u32, i16, i32 or i64"))?;
        self.read(entry, |bytes| Ok(Tensor::from_raw_buffer(bytes, dtype, &entry.shape, &candle_core::Device::Cpu)?))
    }

    /// The tensor `name` on the CPU, converted to `dtype` (f32, f16 or bf16).
    ///
    /// # Errors
    /// There is no such tensor, its dtype is not f32, f16, bf16 or f64, or a finite value is too large for `dtype`.
    pub fn float_tensor(&self, name: &str, dtype: DType) -> Result<Tensor> {
        let entry = self.require(name)?;
        let Some(from) = entry.candle.filter(|_| entry.is_float()) else {
            return Err(self.unusable(entry, "f32, f16, bf16 or f64"));
        };
        self.read(entry, |bytes| {
            let converted = convert::from_bytes(bytes, from, dtype, &entry.shape)?;
            converted.ok_or_else(|| {
                let to = dtype.as_str();
                Error::format(
                    &self.path,
                    format!("tensor `{name}` has values too large for {to}: load it as bf16 or f32"),
                )
            })
        })
    }

    fn read(&self, entry: &TensorEntry, make: impl FnOnce(&[u8]) -> Result<Tensor>) -> Result<Tensor> {
        let tensor = make(&self.map[entry.bytes.clone()]);
        self.map.check().map_err(|error| Error::read(&self.path, error))?;
        self.map.release(entry.bytes.clone());
        tensor
    }

    fn require(&self, name: &str) -> Result<&TensorEntry> {
        self.entry(name).ok_or_else(|| Error::format(&self.path, format!("expected a tensor `{name}`, found none")))
    }

    fn unusable(&self, entry: &TensorEntry, expected: &str) -> Error {
        let (name, dtype) = (&entry.name, entry.dtype);
        Error::format(&self.path, format!("tensor `{name}`: expected {expected}, found dtype `{dtype}`"))
    }
}

type Parsed = (Vec<TensorEntry>, BTreeMap<String, String>);

/// Parses and checks a header; the error describes what is wrong.
fn parse(file: &[u8]) -> std::result::Result<Parsed, String> {
    let (header, data_start) = split_header(file)?;
    let header: Header = serde_json::from_slice(header).map_err(|e| format!("the header is invalid: {e}"))?;
    let data_bytes = (file.len() - data_start) as u64;
    let mut names = HashSet::with_capacity(header.tensors.len());
    for (name, _) in &header.tensors {
        if !names.insert(name) {
            return Err(format!("tensor `{name}` is in the header twice"));
        }
    }
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut entries = Vec::with_capacity(tensors.len());
    let mut expected_begin = 0;
    for (name, tensor) in tensors {
        let (begin, end) = tensor.data_offsets;
        let (dtype, candle) = check_span(&name, &tensor)?;
        if begin < expected_begin {
            return Err(format!(
                "tensor `{name}` starts at byte {begin}, inside the previous tensor, which ends at byte {expected_begin}"
            ));
        }
        if begin > expected_begin {
            return Err(format!("bytes {expected_begin} to {begin}, before tensor `{name}`, belong to no tensor"));
        }
        if end > data_bytes {
            return Err(format!(
                "tensor `{name}` ends at byte {end}, but there are only {data_bytes}: the file is truncated, possibly by an interrupted download or copy"
            ));
        }
        expected_begin = end;
        let bytes = data_start + begin as usize..data_start + end as usize;
        entries.push(TensorEntry { name, dtype, shape: tensor.shape.0, candle, bytes });
    }
    if expected_begin != data_bytes {
        return Err(format!("the tensors end at byte {expected_begin}, but there are {data_bytes}"));
    }
    Ok((entries, header.metadata))
}

/// The JSON of the header, and the offset of the tensors' bytes.
fn split_header(file: &[u8]) -> std::result::Result<(&[u8], usize), String> {
    if file.is_empty() {
        return Err("the file is empty".to_string());
    }
    let foreign = || foreign::recognize(file);
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(foreign().unwrap_or_else(|| {
            let found = file.len();
            format!("expected a length of {LENGTH_BYTES} bytes first, found a file of {found}: it is truncated")
        }));
    };
    let length = u64::from_le_bytes(*length);
    if rest.first() != Some(&b'{') {
        return Err(foreign().unwrap_or_else(|| {
            if length == 0 {
                return "expected a safetensors header, found one of length 0".to_string();
            }
            "expected a safetensors header that starts with `{`, found other bytes: this is not a safetensors file"
                .to_string()
        }));
    }
    if length > MAX_HEADER_BYTES {
        return Err(format!("expected a header of at most {MAX_HEADER_BYTES} bytes, found a length field of {length}"));
    }
    let header = rest.get(..length as usize).ok_or_else(|| {
        let found = rest.len();
        format!("the header should be {length} bytes long, but only {found} follow: the file is truncated")
    })?;
    Ok((header, LENGTH_BYTES + header.len()))
}

/// Returns the dtype after checking that dtype and shape match the byte range in the header.
fn check_span(name: &str, tensor: &RawTensor) -> std::result::Result<(&'static str, Option<DType>), String> {
    let Some(&(dtype, bits, candle)) = DTYPES.iter().find(|(known, ..)| *known == tensor.dtype) else {
        return Err(format!("tensor `{name}` has the unknown dtype `{}`", tensor.dtype));
    };
    let (begin, end) = tensor.data_offsets;
    let shape = &tensor.shape.0;
    let Some(found) = end.checked_sub(begin) else {
        return Err(format!("tensor `{name}` starts at byte {begin} and ends before it, at byte {end}"));
    };
    let Some(total_bits) = element_count(shape).and_then(|count| count.checked_mul(bits)) else {
        return Err(format!("tensor `{name}`: the size of {dtype} {shape:?} overflows 64 bits"));
    };
    if !total_bits.is_multiple_of(8) {
        return Err(format!("tensor `{name}`: {dtype} {shape:?} does not fill whole bytes"));
    }
    let expected = total_bits / 8;
    if expected != found {
        return Err(format!("tensor `{name}`: {dtype} {shape:?} is {expected} bytes, but its offsets span {found}"));
    }
    Ok((dtype, candle))
}

struct Header {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Header, M::Error> {
        let mut tensors = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let strings: Option<BTreeMap<String, String>> =
                    map.next_value().map_err(|e| M::Error::custom(format!("`__metadata__`: {e}")))?;
                if metadata.replace(strings.unwrap_or_default()).is_some() {
                    return Err(M::Error::custom("`__metadata__` is given twice"));
                }
            } else {
                if tensors.len() == MAX_TENSORS {
                    return Err(M::Error::custom(format!("expected at most {MAX_TENSORS} tensors, found more")));
                }
                let tensor = map.next_value().map_err(|e| M::Error::custom(format!("tensor `{name}`: {e}")))?;
                tensors.push((name, tensor));
            }
        }
        Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a shape of at most {MAX_RANK} sizes")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut sequence: S) -> std::result::Result<Shape, S::Error> {
        let mut sizes = Vec::new();
        while let Some(size) = sequence.next_element::<usize>()? {
            if sizes.len() == MAX_RANK {
                return Err(S::Error::invalid_length(MAX_RANK + 1, &self));
            }
            sizes.push(size);
        }
        Ok(Shape(sizes))
    }
}

/// The number of elements of a tensor of shape `shape`; `None` if it overflows.
pub(crate) fn element_count(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size as u64))
}
