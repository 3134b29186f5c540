//! Opens a checkpoint of one or several safetensors files as one set of named tensors.

use super::read::read_text;
use super::safetensors::{SafetensorsFile, TensorEntry};
use crate::error::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

/// Largest accepted index, in bytes.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Maximum number of misplaced tensors that are searched for in the other shards; a message lists fewer.
const MAX_SEARCHED: usize = 100;
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The tensors of a checkpoint, and the file of each.
#[derive(Debug)]
pub(crate) struct Shards {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// The file of each tensor, by name.
    tensors: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens a safetensors file, an index of shards, or a folder with one of them.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
        let file = if metadata.is_dir() { find_in_folder(path)? } else { path.to_path_buf() };
        if file.extension().is_some_and(|extension| extension == "json") {
            return Self::open_index(&file);
        }
        let opened = SafetensorsFile::open(&file)?;
        let tensors = opened.entries().iter().map(|entry| (entry.name.clone(), 0)).collect();
        Ok(Self { path: file, files: vec![opened], tensors })
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index = Index::read(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let names = index.shard_names(path)?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let missing: Vec<&str> = names.iter().copied().filter(|name| !folder.join(name).exists()).collect();
        if !missing.is_empty() {
            let list = missing.join("`, `");
            return Err(Error::format(path, format!("of {} shards these are missing: `{list}`", names.len())));
        }
        let files = names.iter().map(|name| SafetensorsFile::open(folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut tensors: BTreeMap<String, usize> = BTreeMap::new();
        let mut problems = Vec::new();
        for (tensor, shard) in &index.weight_map {
            // the names are sorted
            let expected = names.binary_search(&shard.as_str()).ok().filter(|&n| files[n].entry(tensor).is_some());
            let Some(number) = expected else {
                let search = problems.len() < MAX_SEARCHED;
                let found = files.iter().take(if search { files.len() } else { 0 });
                let found = found.enumerate().find(|(_, file)| file.entry(tensor).is_some()).map(|(number, _)| number);
                let found = found.map_or("nowhere".to_string(), |number| format!("in `{}`", names[number]));
                problems.push(format!("`{tensor}`: expected in `{shard}`, found {found}"));
                continue;
            };
            if tensors.insert(tensor.clone(), number).is_some() {
                problems.push(format!("`{tensor}`: expected once in the index, found twice"));
            }
        }
        for (number, file) in files.iter().enumerate() {
            for entry in file.entries() {
                if *tensors.entry(entry.name.clone()).or_insert(number) != number {
                    let (name, other) = (&entry.name, names[number]);
                    problems.push(format!("`{name}`: expected in one shard, found also in `{other}`"));
                }
            }
        }
        if !problems.is_empty() {
            problems.sort();
            return Err(Error::Tensors { path: path.to_path_buf(), problems });
        }
        Ok(Self { path: path.to_path_buf(), files, tensors })
    }

    /// The file, or the index.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor `name`, and its file.
    pub(crate) fn get(&self, name: &str) -> Option<(&SafetensorsFile, &TensorEntry)> {
        let file = &self.files[*self.tensors.get(name)?];
        Some((file, file.entry(name)?))
    }
}

/// Whether the name of a shard is a path inside the folder of the index.
fn is_inside(name: &str) -> bool {
    let only_names = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    !name.is_empty() && only_names && !name.contains(['\\', ':', '\0'])
}

/// Finds the weights in a folder: `model.safetensors`, else an index, else the only safetensors file.
fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(single);
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::read(folder, e))? {
        let entry = entry.map_err(|e| Error::read(folder, e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let ending = |suffix: &str| names.iter().filter(|name| name.ends_with(suffix)).collect::<Vec<_>>();
    let indexes = ending(INDEX_SUFFIX);
    let named = format!("model{INDEX_SUFFIX}");
    if indexes.contains(&&named) {
        return Ok(folder.join(named));
    }
    let mut files = ending(".safetensors");
    files.retain(|name| !name.contains("adapter"));
    match (indexes.as_slice(), files.as_slice()) {
        ([index], _) => Ok(folder.join(index)),
        ([], [file]) => Ok(folder.join(file)),
        ([], []) => Err(Error::read(folder, io::Error::new(ErrorKind::NotFound, nothing_found(&names)))),
        (several, _) if several.len() > 1 => Err(ambiguous(folder, several)),
        (_, several) => Err(ambiguous(folder, several)),
    }
}

fn ambiguous(folder: &Path, names: &[&String]) -> Error {
    let list = names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join("`, `");
    Error::format(folder, format!("expected one checkpoint, found several: pass one of `{list}`"))
}

fn nothing_found(names: &[String]) -> String {
    let has = |suffix: &str| names.iter().any(|name| name.ends_with(suffix));
    let hint = if has("adapter_model.safetensors") || has("adapter_config.json") {
        "; it contains an adapter, which must be passed together with its base model"
    } else if has(".bin") || has(".pt") || has(".pth") {
        "; it contains PyTorch files: convert them to safetensors first"
    } else if has(".gguf") {
        "; it contains a GGUF file: use the safetensors files of the model"
    } else {
        ""
    };
    format!("the folder contains neither `model.safetensors` nor an index of shards{hint}")
}

/// The names of the files in an index of shards (`model.safetensors.index.json`), sorted.
///
/// # Errors
/// The file cannot be read, is not an index, or names a file outside its folder.
pub fn shard_names(index: impl AsRef<Path>) -> Result<BTreeSet<String>> {
    let path = index.as_ref();
    Index::read(path)?.shard_names(path)
}

/// An index of shards: the shard of each tensor.
struct Index {
    weight_map: Vec<(String, String)>,
}

impl Index {
    fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, MAX_INDEX_BYTES)?;
        let index: Self = serde_json::from_str(&text).map_err(|e| {
            let expected = "expected weights, an index of shards or a folder with them; read as an index of shards";
            Error::format(path, format!("{expected}: {e}"))
        })?;
        if index.weight_map.is_empty() {
            return Err(Error::format(path, "`weight_map`: expected the shard of each tensor, found none"));
        }
        Ok(index)
    }

    /// The names of the shards, sorted; `path` is the file of the index.
    fn shard_names(&self, path: &Path) -> Result<BTreeSet<String>> {
        let names: BTreeSet<String> = self.weight_map.iter().map(|(_, shard)| shard.clone()).collect();
        match names.iter().find(|name| !is_inside(name)) {
            Some(name) => {
                Err(Error::format(path, format!("shard `{name}`: expected a file in the folder of the index")))
            }
            None => Ok(names),
        }
    }
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a `weight_map`")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Index, M::Error> {
        let mut weight_map = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "weight_map" {
                let pairs: Pairs = map.next_value().map_err(|e| M::Error::custom(format!("`weight_map`: {e}")))?;
                if weight_map.replace(pairs.0).is_some() {
                    return Err(M::Error::custom("`weight_map` is given twice"));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        let weight_map = weight_map.ok_or_else(|| M::Error::custom("there is no `weight_map`"))?;
        Ok(Index { weight_map })
    }
}

/// An object of strings that preserves duplicate keys.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Pairs, M::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry::<String, String>()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}
