//! Finds and checks the tensors that store one quantized matrix of a checkpoint.

use crate::error::{Error, Result};
use crate::files::{SafetensorsFile, Shards, TensorEntry};
use candle_core::DType;
use std::collections::BTreeMap;

/// The dtypes of scales.
pub(super) const FLOATS: &[&str] = &["F32", "F16", "BF16"];

/// A checked value, or the problem with its tensors.
pub(super) type Checked<T> = std::result::Result<T, String>;

/// `a / b` if it is a positive integer.
pub(super) fn whole_ratio(a: usize, b: usize) -> Option<usize> {
    (a > 0 && b > 0 && a.is_multiple_of(b)).then(|| a / b)
}

/// The tensors of a module in the files of a checkpoint.
#[derive(Debug)]
pub(super) struct Module<'a> {
    /// Its path in the files, such as `model.layers.0.mlp.up_proj`.
    pub(super) path: String,
    parts: BTreeMap<&'a str, Part<'a>>,
}

/// One of the tensors of a module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    file: &'a SafetensorsFile,
    entry: &'a TensorEntry,
}

impl<'a> Module<'a> {
    /// The module with these tensors, each given by its suffix after the module's path and its full name in the files.
    pub(super) fn new(shards: &'a Shards, tensors: impl Iterator<Item = (&'a str, &'a str)>) -> Option<Self> {
        let mut path = None;
        let mut parts = BTreeMap::new();
        for (part, name) in tensors {
            let (file, entry) = shards.get(name)?;
            path = name.strip_suffix(part)?.strip_suffix('.').map(String::from);
            parts.insert(part, Part { file, entry });
        }
        Some(Self { path: path?, parts })
    }

    /// The tensor with the suffix `part`, if there is one.
    pub(super) fn find(&self, part: &str) -> Option<Part<'a>> {
        self.parts.get(part).copied()
    }

    /// The tensors that quantize activations. They are not used here.
    pub(super) fn of_activations(&self) -> impl Iterator<Item = Part<'a>> {
        let names = ["input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "output_scale"];
        names.into_iter().filter_map(|name| self.find(name))
    }

    /// The tensor `part` with one of the dtypes, or the problem.
    pub(super) fn require(&self, part: &str, dtypes: &[&str]) -> Checked<Part<'a>> {
        let path = &self.path;
        let expected = dtypes.join(" or ");
        let Some(found) = self.find(part) else {
            return Err(format!("`{path}.{part}`: expected {expected} for a quantized matrix, found no such tensor"));
        };
        if dtypes.contains(&found.entry.dtype) {
            return Ok(found);
        }
        Err(format!("`{path}.{part}`: expected dtype {expected}, found {}", found.entry.dtype))
    }

    /// The matrix `part`, or the problem.
    pub(super) fn require_matrix(&self, part: &str, dtypes: &[&str]) -> Checked<(Part<'a>, [usize; 2])> {
        let found = self.require(part, dtypes)?;
        match found.entry.shape.as_slice() {
            &[rows, columns] => Ok((found, [rows, columns])),
            shape => Err(format!("`{}.{part}`: expected a matrix, found {shape:?}", self.path)),
        }
    }

    /// The tensor `part` with this shape, or the problem.
    pub(super) fn require_shape(&self, part: &str, dtypes: &[&str], shape: &[usize]) -> Checked<Part<'a>> {
        let found = self.require(part, dtypes)?;
        let other = &found.entry.shape;
        if other == shape {
            return Ok(found);
        }
        Err(format!("`{}.{part}`: expected {shape:?}, found {other:?}", self.path))
    }
}

impl<'a> Part<'a> {
    pub(super) fn name(self) -> &'a str {
        &self.entry.name
    }

    pub(super) fn dtype(self) -> &'a str {
        self.entry.dtype
    }

    pub(super) fn shape(self) -> &'a [usize] {
        &self.entry.shape
    }

    pub(super) fn num_bytes(self) -> usize {
        self.entry.num_bytes()
    }

    /// The dtype, if it is a dtype of weights.
    pub(super) fn float_dtype(self) -> Option<DType> {
        self.entry.candle_dtype().filter(|dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16))
    }

    /// The dtype, if it is f16 or bf16.
    pub(super) fn half_dtype(self) -> Option<DType> {
        self.float_dtype().filter(|dtype| *dtype != DType::F32)
    }

    /// The raw bytes of the elements.
    pub(super) fn bytes(self) -> &'a [u8] {
        &self.file.map()[self.entry.byte_range()]
    }

    /// The elements of a float tensor, row by row.
    pub(super) fn floats(self) -> Result<Vec<f32>> {
        Ok(self.file.float_tensor(self.name(), DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// An error about the contents of the tensor.
    pub(super) fn error(self, message: &str) -> Error {
        Error::format(self.file.path(), format!("`{}`: {message}", self.name()))
    }

    /// Finishes reading the tensor: fails if its file has changed since it was opened, and releases the pages that were
    /// read.
    pub(super) fn finish(self) -> Result<()> {
        self.file.map().check().map_err(|error| Error::read(self.file.path(), error))?;
        self.file.map().release(self.entry.byte_range());
        Ok(())
    }
}
