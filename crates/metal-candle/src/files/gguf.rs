//! GGUF files of llama.cpp: metadata and the places of tensors
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3).

use crate::error::{Error, Result};
use metal_candle_kernels::{BlockFormat, MappedFile, map_file};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 4] = b"GGUF";
/// Maximum number of dimensions of a tensor.
const MAX_DIMENSIONS: usize = 4;
/// Maximum number of files of a split model.
const MAX_FILES: u64 = 1000;
const DEFAULT_ALIGNMENT: u64 = 32;

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
    fn kind(&self) -> &'static str {
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
    /// The type of its elements, a number of `ggml_type`.
    pub ggml_type: u32,
    /// The index of the file that holds it.
    file: usize,
    /// Where its bytes begin in the file.
    start: usize,
}

/// A model in one or several GGUF files, mapped into memory.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    files: Vec<Arc<MappedFile>>,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Whether `path` is a file with the name of a GGUF file.
    pub fn is_named(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
    }

    /// Opens a file, and the other files of a split model beside it.
    ///
    /// # Errors
    /// A file cannot be read, is damaged, or is missing from a split model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let first = Header::read(path)?;
        let mut found =
            Self { path: path.to_path_buf(), files: Vec::new(), metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        let count = match first.metadata.get("split.count") {
            Some(GgufValue::Integer(count)) => *count,
            _ => 1,
        };
        if count <= 1 {
            found.metadata.clone_from(&first.metadata);
            found.add(path, first)?;
            return Ok(found);
        }
        let count = u64::try_from(count).ok().filter(|&count| count <= MAX_FILES);
        let count =
            count.ok_or_else(|| Error::format(path, format!("expected at most {MAX_FILES} files of a split model")))?;
        for number in 1..=count {
            let part = part_of_split(path, number, count)?;
            let header = Header::read(&part)?;
            if number == 1 {
                found.metadata.clone_from(&header.metadata);
            }
            found.add(&part, header)?;
        }
        Ok(found)
    }

    fn add(&mut self, path: &Path, header: Header) -> Result<()> {
        let file = self.files.len();
        for mut tensor in header.tensors {
            tensor.file = file;
            let name = tensor.name.clone();
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::format(path, format!("expected one tensor `{name}`, found two")));
            }
        }
        self.files.push(Arc::new(header.map));
        Ok(())
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of its files, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.files.iter().map(|file| file.len()).sum()
    }

    /// All metadata; that of the first file of a split model.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &GgufTensor> {
        self.tensors.values()
    }

    /// The names of the tensors that are weights, not tables of positions.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let is_table = |name: &&str| name.starts_with("rope_freqs.") || name.starts_with("rope_factors_");
        self.tensors.keys().map(String::as_str).filter(move |name| !is_table(name))
    }

    /// Gives the memory of a tensor that takes `num_bytes` back to the system.
    pub(crate) fn release(&self, tensor: &GgufTensor, num_bytes: usize) {
        self.files[tensor.file].release(tensor.start..tensor.start.saturating_add(num_bytes));
    }

    /// The names of the types of its matrices, those with the most elements first.
    pub fn types(&self) -> Vec<String> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for tensor in self.tensors().filter(|tensor| tensor.shape.len() > 1) {
            let elements = tensor.shape.iter().fold(1_usize, |product, &size| product.saturating_mul(size));
            let count = counts.entry(tensor.ggml_type).or_default();
            *count = count.saturating_add(elements);
        }
        let mut types: Vec<_> = counts.into_iter().collect();
        types.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        types.into_iter().map(|(id, _)| ggml_type_name(id)).collect()
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// The map of the file that holds `tensor`, and its bytes there if it takes `num_bytes`.
    ///
    /// # Errors
    /// The tensor ends after the file.
    pub(crate) fn bytes(&self, tensor: &GgufTensor, num_bytes: usize) -> Result<(&Arc<MappedFile>, Range<usize>)> {
        let map = &self.files[tensor.file];
        let end = tensor.start.checked_add(num_bytes).filter(|&end| end <= map.len());
        let end = end.ok_or_else(|| {
            let message = format!(
                "`{}`: expected {num_bytes} bytes from byte {} on, found a file of {} bytes: download it again",
                tensor.name,
                tensor.start,
                map.len()
            );
            Error::format(map.path(), message)
        })?;
        Ok((map, tensor.start..end))
    }

    fn wrong(&self, key: &str, expected: &str, found: &GgufValue) -> Error {
        Error::format(&self.path, format!("`{key}`: expected {expected}, found {}", found.kind()))
    }

    /// A string, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a string", other)),
        }
    }

    /// A whole number that is not negative, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value @ GgufValue::Integer(number)) => {
                let size =
                    usize::try_from(*number).map_err(|_| self.wrong(key, "a number that is not negative", value))?;
                Ok(Some(size))
            }
            Some(other) => Err(self.wrong(key, "a whole number", other)),
        }
    }

    /// A number, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Integer(number)) => Ok(Some(*number as f64)),
            Some(GgufValue::Float(number)) => Ok(Some(*number)),
            Some(other) => Err(self.wrong(key, "a number", other)),
        }
    }

    /// A boolean, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Flag(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, "a boolean", other)),
        }
    }

    /// A list, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn list(&self, key: &str) -> Result<Option<&[GgufValue]>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::List(values)) => Ok(Some(values)),
            Some(other) => Err(self.wrong(key, "a list", other)),
        }
    }

    /// The strings of a list, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        let texts = values.iter().map(|value| match value {
            GgufValue::Text(text) => Ok(text.as_str()),
            other => Err(self.wrong(key, "a list of strings", other)),
        });
        texts.collect::<Result<_>>().map(Some)
    }
}

/// The name of a `ggml_type`.
pub(crate) fn ggml_type_name(id: u32) -> String {
    const OTHERS: [(u32, &str); 21] = [
        (0, "f32"),
        (1, "f16"),
        (9, "q8_1"),
        (16, "iq2_xxs"),
        (17, "iq2_xs"),
        (18, "iq3_xxs"),
        (19, "iq1_s"),
        (21, "iq3_s"),
        (22, "iq2_s"),
        (24, "i8"),
        (25, "i16"),
        (26, "i32"),
        (27, "i64"),
        (28, "f64"),
        (29, "iq1_m"),
        (30, "bf16"),
        (34, "tq1_0"),
        (35, "tq2_0"),
        (40, "nvfp4"),
        (41, "q1_0"),
        (42, "q2_0"),
    ];
    if let Some(format) = BlockFormat::from_ggml_type(id) {
        return format.name().into();
    }
    OTHERS
        .iter()
        .find(|(known, _)| *known == id)
        .map_or_else(|| format!("unknown type {id}"), |(_, name)| (*name).into())
}

/// The path of a file of a split model, by the path of another.
fn part_of_split(path: &Path, number: u64, count: u64) -> Result<PathBuf> {
    let suffix = |number: u64| format!("-{number:05}-of-{count:05}.gguf");
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = (1..=count).find_map(|number| name.strip_suffix(&suffix(number)));
    let Some(stem) = stem else {
        let message =
            format!("this is one of {count} files of a split model: expected a name that ends in `{}`", suffix(1));
        return Err(Error::format(path, message));
    };
    Ok(path.with_file_name(format!("{stem}{}", suffix(number))))
}

/// What a file begins with.
struct Header {
    map: MappedFile,
    metadata: BTreeMap<String, GgufValue>,
    tensors: Vec<GgufTensor>,
}

impl Header {
    fn read(path: &Path) -> Result<Self> {
        let map = map_file(path).map_err(|error| Error::read(path, error))?;
        let (metadata, tensors) = parse(&map).map_err(|message| Error::format(path, message))?;
        map.check().map_err(|error| Error::read(path, error))?;
        Ok(Self { map, metadata, tensors })
    }
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8]) -> Parsed<(BTreeMap<String, GgufValue>, Vec<GgufTensor>)> {
    let mut reader = Reader { bytes, at: 0 };
    let magic = reader.take(4).map_err(|_| format!("expected a GGUF file, found {} bytes", bytes.len()))?;
    if magic != MAGIC {
        return Err("expected a GGUF file, which begins with `GGUF`, found other bytes".into());
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
    let mut metadata = BTreeMap::new();
    for _ in 0..num_values {
        let key = reader.text()?;
        let value_type = reader.u32()?;
        let value = reader.value(value_type, true).map_err(|message| format!("`{key}`: {message}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("expected one value of `{key}`, found two"));
        }
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
            format!("`{name}`: expected it within the file of {len} bytes, found it after the end: download it again")
        };
        tensor.start = start.ok_or_else(message)? as usize;
    }
    Ok((metadata, tensors))
}

/// Reads little-endian values. Memory that it takes is bounded by the length of the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("expected more, found the end of the file: download it again")?;
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
        // tokens of some vocabularies are parts of characters
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{GgufFile, GgufValue};
    use crate::files::gguf_testing::write;

    fn part(number: i128, name: &str, value: f32) -> Vec<u8> {
        let mut metadata = vec![("split.no", GgufValue::Integer(number)), ("split.count", GgufValue::Integer(2))];
        if number == 0 {
            metadata.push(("general.architecture", GgufValue::Text("llama".into())));
        }
        write(&metadata, &[(name, &[2], 0, [value, value].map(f32::to_le_bytes).concat())])
    }

    #[test]
    fn the_files_of_a_split_model_are_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = |number: u32| folder.path().join(format!("tiny-{number:05}-of-00002.gguf"));
        std::fs::write(path(1), part(0, "a.weight", 1.5)).unwrap();
        std::fs::write(path(2), part(1, "b.weight", 2.5)).unwrap();
        // by the name of any of them
        for number in [1, 2] {
            let file = GgufFile::open(path(number)).unwrap();
            assert_eq!(file.names().collect::<Vec<_>>(), ["a.weight", "b.weight"]);
            assert_eq!(file.text("general.architecture").unwrap(), Some("llama"));
            for (name, value) in [("a.weight", 1.5_f32), ("b.weight", 2.5)] {
                let (map, range) = file.bytes(file.tensor(name).unwrap(), 8).unwrap();
                assert_eq!(map[range], [value, value].map(f32::to_le_bytes).concat());
            }
            assert!(file.bytes(file.tensor("b.weight").unwrap(), 1 << 20).is_err());
        }
        std::fs::write(path(2), part(1, "a.weight", 2.5)).unwrap();
        let error = GgufFile::open(path(1)).unwrap_err().to_string();
        assert!(error.contains("expected one tensor `a.weight`, found two"), "{error}");
        std::fs::rename(path(1), folder.path().join("other.gguf")).unwrap();
        let error = GgufFile::open(folder.path().join("other.gguf")).unwrap_err().to_string();
        assert!(error.contains("one of 2 files of a split model"), "{error}");
        let error = GgufFile::open(path(2)).unwrap_err().to_string();
        assert!(error.contains("tiny-00001-of-00002.gguf"), "{error}");
    }
}
