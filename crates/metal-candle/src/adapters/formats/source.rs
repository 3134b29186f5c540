//! Reads the tensors of an adapter file: safetensors, or the zip file of `torch.save`.

use super::pickle_check::check_pickles;
use crate::error::{Error, Result};
use crate::files::SafetensorsFile;
use candle_core::pickle::PthTensors;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Maximum size of a `.bin` file, in bytes.
const MAX_PICKLE_BYTES: u64 = 8 << 30;

/// The tensors of an adapter file, by name. Names in an adapter of a multimodal model are mapped to the text model.
pub(super) struct TensorSource {
    stored: Stored,
    /// The name in the file of each name in the text model.
    names: BTreeMap<String, String>,
}

enum Stored {
    Safetensors(SafetensorsFile),
    Pickle(PathBuf, BTreeMap<String, Tensor>),
}

impl Stored {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Safetensors(file) => Box::new(file.entries().iter().map(|entry| entry.name.as_str())),
            Self::Pickle(_, tensors) => Box::new(tensors.keys().map(String::as_str)),
        }
    }
}

/// Maps a tensor name of the text part of a multimodal model to its name in the text model.
fn name_in_text_model(name: &str) -> String {
    for (part, own) in [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head", "lm_head"),
    ] {
        if let Some((before, after)) = name.split_once(part) {
            return format!("{before}{own}{after}");
        }
    }
    name.to_string()
}

impl TensorSource {
    /// Opens a file. A `.bin` file is read as a pickle; only tensors are created and no code is executed.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let stored = if path.extension().is_some_and(|extension| extension == "bin") {
            Stored::Pickle(path.to_path_buf(), read_pickle(path)?)
        } else {
            Stored::Safetensors(SafetensorsFile::open(path)?)
        };
        let names = stored.names().map(|name| (name_in_text_model(name), name.to_string())).collect();
        Ok(Self { stored, names })
    }

    pub(super) fn path(&self) -> &Path {
        match &self.stored {
            Stored::Safetensors(file) => file.path(),
            Stored::Pickle(path, _) => path,
        }
    }

    /// The names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    fn in_file<'a>(&'a self, name: &'a str) -> &'a str {
        self.names.get(name).map_or(name, String::as_str)
    }

    /// The shape of a tensor; none if the file does not have it.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        let name = self.names.get(name)?;
        match &self.stored {
            Stored::Safetensors(file) => file.entry(name).map(|entry| entry.shape.as_slice()),
            Stored::Pickle(_, tensors) => tensors.get(name).map(Tensor::dims),
        }
    }

    /// The dtype of a tensor; none if it is a float.
    pub(super) fn foreign_dtype(&self, name: &str) -> Option<&'static str> {
        let name = self.names.get(name)?;
        match &self.stored {
            Stored::Safetensors(file) => file.entry(name).filter(|entry| !entry.is_float()).map(|entry| entry.dtype),
            Stored::Pickle(_, tensors) => {
                tensors.get(name).map(Tensor::dtype).filter(|dtype| !dtype.is_float()).map(|dtype| dtype.as_str())
            }
        }
    }

    /// Returns the values of a tensor in f32, row-major, after checking its shape and dtype and that it is finite; the inner
    /// error describes what is wrong with it.
    pub(super) fn checked_values(&self, name: &str, shape: &[usize]) -> Result<std::result::Result<Vec<f32>, String>> {
        let found = self.shape(name).unwrap_or_default();
        if found != shape {
            return Ok(Err(format!("`{name}`: expected shape {shape:?}, found {found:?}")));
        }
        if let Some(dtype) = self.foreign_dtype(name) {
            return Ok(Err(format!("`{name}`: expected f32, f16 or bf16, found {dtype}")));
        }
        let values = self.values(name)?;
        Ok(if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(format!("`{name}` contains a value that is not finite"))
        })
    }

    /// The values of a tensor in f32, row-major.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let name = self.in_file(name);
        let tensor = match &self.stored {
            Stored::Safetensors(file) => file.float_tensor(name, DType::F32)?,
            Stored::Pickle(path, tensors) => {
                let tensor = tensors.get(name).ok_or_else(|| Error::format(path, format!("has no tensor `{name}`")))?;
                tensor.to_dtype(DType::F32)?
            }
        };
        Ok(tensor.flatten_all()?.to_vec1()?)
    }
}

fn read_pickle(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let expected = "expected the zip file of `torch.save` with tensors only";
    let advice = "`torch.save` it again by name, or as safetensors";
    let wrong = |error: candle_core::Error| {
        // a backtrace follows the first line
        let text = error.to_string();
        Error::format(path, format!("{expected}: {}; {advice}", text.lines().next().unwrap_or_default()))
    };
    let size = std::fs::metadata(path).map_err(|source| Error::read(path, source))?.len();
    if size > MAX_PICKLE_BYTES {
        return Err(Error::format(path, format!("expected at most {MAX_PICKLE_BYTES} bytes, found {size}")));
    }
    check_pickles(path)?;
    let file = PthTensors::new(path, None).map_err(wrong)?;
    let mut tensors = BTreeMap::new();
    for (name, info) in file.tensor_infos() {
        // check before allocating: the pickle may claim any size
        let bytes = info
            .layout
            .shape()
            .dims()
            .iter()
            .try_fold(info.dtype.size_in_bytes(), |bytes, size| bytes.checked_mul(*size))
            .filter(|bytes| *bytes as u64 <= size);
        if bytes.is_none() {
            return Err(Error::format(path, format!("tensor `{name}` is larger than the file: it is truncated")));
        }
        let tensor = file.get(name).map_err(wrong)?;
        let tensor = tensor.ok_or_else(|| Error::format(path, format!("tensor `{name}` has no values")))?;
        tensors.insert(name.clone(), tensor);
    }
    if tensors.is_empty() {
        return Err(Error::format(path, format!("{expected}, found none at its top level; {advice}")));
    }
    Ok(tensors)
}
