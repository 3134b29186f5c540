//! Opens GGUF files of llama.cpp and reads their metadata and tensors
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3).

use super::gguf_header::{GgufTensor, GgufValue, Header};
use super::gguf_type::GgufType;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{BlockMatrix, MappedFile};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of files in a split model.
const MAX_FILES: u64 = 1000;

/// The bytes of the tensors.
#[derive(Debug)]
enum Content {
    File(Arc<MappedFile>),
    Memory(Vec<u8>),
}

/// A model in one or several GGUF files, mapped into memory.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    contents: Vec<Content>,
    metadata: BTreeMap<String, GgufValue>,
    /// The byte ranges of metadata values in the first file, including their types.
    encoded: BTreeMap<String, Range<usize>>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Whether `path` is a file with the extension `gguf`.
    pub fn is_named(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
    }

    /// Opens a file, and the other files of a split model in the same folder.
    ///
    /// # Errors
    /// A file cannot be read, is damaged, or is missing from a split model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let first = Header::read(path)?;
        let mut found = Self::empty(path);
        let count = match first.metadata.get("split.count") {
            Some(GgufValue::Integer(count)) => *count,
            _ => 1,
        };
        if count <= 1 {
            found.add(path, first)?;
            return Ok(found);
        }
        let count = u64::try_from(count).ok().filter(|&count| count <= MAX_FILES);
        let count =
            count.ok_or_else(|| Error::format(path, format!("expected at most {MAX_FILES} files of a split model")))?;
        for number in 1..=count {
            let part = part_of_split(path, number, count)?;
            let header = Header::read(&part)?;
            found.add(&part, header)?;
        }
        Ok(found)
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            contents: Vec::new(),
            metadata: BTreeMap::new(),
            encoded: BTreeMap::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// A file that has not been written yet: metadata and tensors, with the elements that are in memory.
    pub(crate) fn draft(
        path: &Path,
        metadata: BTreeMap<String, GgufValue>,
        tensors: impl Iterator<Item = (String, Vec<usize>, GgufType, Option<Vec<u8>>)>,
    ) -> Self {
        let mut draft = Self { metadata, ..Self::empty(path) };
        for (name, shape, kind, bytes) in tensors {
            let file = draft.contents.len();
            draft.contents.push(Content::Memory(bytes.unwrap_or_default()));
            draft.tensors.insert(name.clone(), GgufTensor { name, shape, ggml_type: kind.id(), file, start: 0 });
        }
        draft
    }

    fn add(&mut self, path: &Path, header: Header) -> Result<()> {
        let file = self.contents.len();
        if file == 0 {
            (self.metadata, self.encoded) = (header.metadata, header.encoded);
        }
        for mut tensor in header.tensors {
            tensor.file = file;
            let name = tensor.name.clone();
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::format(path, format!("expected one tensor `{name}`, found two")));
            }
        }
        self.contents.push(Content::File(Arc::new(header.map)));
        Ok(())
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of its files, in bytes.
    pub fn num_bytes(&self) -> usize {
        let len = |content: &Content| match content {
            Content::File(map) => map.len(),
            Content::Memory(bytes) => bytes.len(),
        };
        self.contents.iter().map(len).sum()
    }

    /// All metadata; for a split model, of the first file.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The bytes of a value in the file: its type, then the value.
    pub(crate) fn encoded(&self, key: &str) -> Option<&[u8]> {
        match self.contents.first()? {
            Content::File(map) => map.get(self.encoded.get(key)?.clone()),
            Content::Memory(_) => None,
        }
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &GgufTensor> {
        self.tensors.values()
    }

    /// The names of the weights, without tables of positions.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let is_table = |name: &&str| name.starts_with("rope_freqs.") || name.starts_with("rope_factors_");
        self.tensors.keys().map(String::as_str).filter(move |name| !is_table(name))
    }

    /// Releases the memory of a tensor of `num_bytes` to the operating system.
    pub(crate) fn release(&self, tensor: &GgufTensor, num_bytes: usize) {
        if let Content::File(map) = &self.contents[tensor.file] {
            map.release(tensor.start..tensor.start.saturating_add(num_bytes));
        }
    }

    /// The type names of its matrices, by descending number of elements.
    pub fn types(&self) -> Vec<String> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for tensor in self.tensors().filter(|tensor| tensor.shape.len() > 1) {
            let elements = tensor.shape.iter().fold(1_usize, |product, &size| product.saturating_mul(size));
            let count = counts.entry(tensor.ggml_type).or_default();
            *count = count.saturating_add(elements);
        }
        let mut types: Vec<_> = counts.into_iter().collect();
        types.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        types.into_iter().map(|(id, _)| GgufType::name_of(id)).collect()
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// The memory map of the file of `tensor`, and the byte range of the tensor, which has `num_bytes`.
    ///
    /// # Errors
    /// The tensor extends beyond the file, or is not in a file.
    pub(crate) fn bytes(&self, tensor: &GgufTensor, num_bytes: usize) -> Result<(&Arc<MappedFile>, Range<usize>)> {
        let Content::File(map) = &self.contents[tensor.file] else {
            return Err(Error::format(&self.path, format!("`{}` is not in a file", tensor.name)));
        };
        let end = tensor.start.checked_add(num_bytes).filter(|&end| end <= map.len());
        let end = end.ok_or_else(|| {
            let message = format!(
                "`{}`: expected {num_bytes} bytes at offset {}, found a file of {} bytes: download it again",
                tensor.name,
                tensor.start,
                map.len()
            );
            Error::format(map.path(), message)
        })?;
        Ok((map, tensor.start..end))
    }

    /// Dequantizes a tensor.
    ///
    /// # Errors
    /// Its type is not supported, its rows are not whole blocks, or it extends beyond the file.
    pub(crate) fn floats(&self, tensor: &GgufTensor) -> Result<Vec<f32>> {
        let wrong = |expected: &str| {
            let (name, shape, found) = (&tensor.name, &tensor.shape, GgufType::name_of(tensor.ggml_type));
            Error::format(
                &self.path,
                format!("`{name}`: expected {expected}, found `{found}` with the shape {shape:?}"),
            )
        };
        let kind = GgufType::from_id(tensor.ggml_type).ok_or_else(|| wrong("a supported type"))?;
        let num_bytes = kind.num_bytes(&tensor.shape).ok_or_else(|| wrong("rows of whole blocks"))?;
        let bytes = match &self.contents[tensor.file] {
            Content::File(_) => self.bytes(tensor, num_bytes).map(|(map, range)| &map[range])?,
            Content::Memory(bytes) => bytes.get(..num_bytes).ok_or_else(|| wrong("elements in memory"))?,
        };
        let GgufType::Blocks(format) = kind else {
            let dtype = kind.dtype().ok_or_else(|| wrong("a supported type"))?;
            let values = Tensor::from_raw_buffer(bytes, dtype, &tensor.shape, &Device::Cpu)?;
            return Ok(values.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?);
        };
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let rows = num_bytes.checked_div(format.row_bytes(columns).unwrap_or(0)).unwrap_or(0);
        let matrix = BlockMatrix::new(format, bytes, rows, columns).ok_or_else(|| wrong("rows of whole blocks"))?;
        let mut values = vec![0.0; rows * columns];
        for (row, to) in values.chunks_exact_mut(columns.max(1)).enumerate() {
            matrix.widen_row(row, 0..columns, to);
        }
        Ok(values)
    }

    fn wrong(&self, key: &str, expected: &str, found: &GgufValue) -> Error {
        Error::format(&self.path, format!("`{key}`: expected {expected}, found {}", found.kind()))
    }

    /// A string, if there is one.
    ///
    /// # Errors
    /// The value has a different type.
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
    /// The value has a different type.
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
    /// The value has a different type.
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
    /// The value has a different type.
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
    /// The value has a different type.
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
    /// The value has a different type.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(values) = self.list(key)? else { return Ok(None) };
        let texts = values.iter().map(|value| match value {
            GgufValue::Text(text) => Ok(text.as_str()),
            other => Err(self.wrong(key, "a list of strings", other)),
        });
        texts.collect::<Result<_>>().map(Some)
    }
}

/// The path of file `number` of a split model, from the path of another of its files.
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
    fn lists_have_a_limit() {
        let opened = |counts: &[u64]| {
            let mut bytes = [&b"GGUF\x03\0\0\0"[..], &[0; 8], &(counts.len() as u64).to_le_bytes()].concat();
            for (number, count) in (b'a'..).zip(counts) {
                bytes.extend(
                    [&1_u64.to_le_bytes()[..], &[number], &9_u32.to_le_bytes(), &[0; 4], &count.to_le_bytes()].concat(),
                );
                bytes.resize(bytes.len() + (*count).min(8) as usize, 0);
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            GgufFile::open(file.path()).map_err(|error| error.to_string())
        };
        assert!(opened(&[8, 8]).is_ok());
        for counts in [&[(1 << 24) + 1][..], &[8, (1 << 24) - 7], &[u64::MAX]] {
            let error = opened(counts).unwrap_err();
            assert!(error.contains("expected lists of at most 16777216 items"), "{error}");
        }
    }

    #[test]
    fn split_models_are_opened_by_any_of_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |number: u32| folder.path().join(format!("tiny-{number:05}-of-00002.gguf"));
        std::fs::write(path(1), part(0, "a.weight", 1.5)).unwrap();
        std::fs::write(path(2), part(1, "b.weight", 2.5)).unwrap();
        // either of the files can be opened
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
