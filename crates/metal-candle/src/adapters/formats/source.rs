//! The tensors of an adapter file: safetensors, or the zip file of `torch.save`.

use super::pickle_check::check_pickles;
use crate::error::{Error, Result};
use crate::files::SafetensorsFile;
use candle_core::pickle::PthTensors;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most bytes of a `.bin` file.
const MAX_PICKLE_BYTES: u64 = 8 << 30;

/// The tensors of an adapter file, by name.
pub(super) enum TensorSource {
    Safetensors(SafetensorsFile),
    Pickle(PathBuf, BTreeMap<String, Tensor>),
}

impl TensorSource {
    /// Opens a file. One whose name ends in `.bin` is read as a pickle of which only tensors are built and no code is run.
    pub(super) fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "bin") {
            return Ok(Self::Pickle(path.to_path_buf(), read_pickle(path)?));
        }
        Ok(Self::Safetensors(SafetensorsFile::open(path)?))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pickle(path, _) => path,
        }
    }

    /// The names of all tensors.
    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Safetensors(file) => Box::new(file.entries().iter().map(|entry| entry.name.as_str())),
            Self::Pickle(_, tensors) => Box::new(tensors.keys().map(String::as_str)),
        }
    }

    /// The shape of a tensor, if the file has it.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(file) => file.entry(name).map(|entry| entry.shape.as_slice()),
            Self::Pickle(_, tensors) => tensors.get(name).map(Tensor::dims),
        }
    }

    /// The dtype of a tensor, unless it is a float.
    pub(super) fn foreign_dtype(&self, name: &str) -> Option<&'static str> {
        match self {
            Self::Safetensors(file) => file.entry(name).filter(|entry| !entry.is_float()).map(|entry| entry.dtype),
            Self::Pickle(_, tensors) => {
                tensors.get(name).map(Tensor::dtype).filter(|dtype| !dtype.is_float()).map(|dtype| dtype.as_str())
            }
        }
    }

    /// The finite values of a tensor of this shape in f32, row by row; the inner error describes a tensor that is not as expected.
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
            Err(format!("`{name}` holds a value that is not finite"))
        })
    }

    /// The values of a tensor in f32, row by row.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = match self {
            Self::Safetensors(file) => file.float_tensor(name, DType::F32)?,
            Self::Pickle(path, tensors) => {
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
        // what follows the first line is a backtrace
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
        // checked before memory is taken: the pickle may claim any size
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
