//! Writes models as GGUF files, quantized or dense.

use super::describe::GgufDescription;
use super::llama_cpp;
use super::mixture::QuantizationMixture;
use super::names::GgufNames;
use crate::error::{Error, Result};
use crate::files::{GgufField, GgufFile, GgufType, GgufValue, NewTensor, split, split_fields, write_gguf};
use crate::models::registry::{ParameterSpec, Role};
use crate::models::{Model, check_finite};
use crate::ops::Weight;
use candle_core::{DType, Device};
use half::{bf16, f16};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The number of elements that are converted at a time.
const ELEMENTS_AT_ONCE: usize = 1 << 23;

/// A model to write as a GGUF file.
#[derive(Debug)]
pub struct GgufExport<'a> {
    model: &'a Model,
    description: GgufDescription,
    tensors: Vec<ExportedTensor>,
    metadata: Vec<(String, GgufField)>,
}

/// A tensor to write.
#[derive(Debug, Clone)]
pub struct ExportedTensor {
    /// The name in the file: `blk.0.attn_q.weight`.
    pub name: String,
    /// The parameter that it contains, or a part of its rows, with the shape in the file.
    pub spec: ParameterSpec,
    /// The type of its elements in the file.
    pub kind: GgufType,
    /// The index of the parameter.
    parameter: usize,
    /// The first of its rows.
    start: usize,
}

impl<'a> GgufExport<'a> {
    /// An export in which every matrix has the type of its weight.
    ///
    /// # Errors
    /// GGUF has no architecture for the family, or cannot express something that the model computes: nothing is lost
    /// silently.
    pub fn new(model: &'a Model) -> Result<Self> {
        let config = model.config();
        let description = GgufDescription::new(config)?;
        let mut tensors = Vec::new();
        for (parameter, (spec, (_, weight))) in
            config.parameter_specs()?.into_iter().zip(model.parameters()).enumerate()
        {
            // vectors and the norms of each head are small, so they stay exact
            let is_matrix = spec.shape.len() == 2 && !matches!(spec.role, Role::Norm { .. });
            let kind = if is_matrix { type_of(weight) } else { GgufType::F32 };
            let parts = description.names.parts(&spec.name);
            let rows = spec.shape.first().map_or(0, |rows| rows / parts.len().max(1));
            for (index, name) in parts.into_iter().enumerate() {
                let mut spec = spec.clone();
                if let Some(of_part) = spec.shape.first_mut() {
                    *of_part = rows;
                }
                tensors.push(ExportedTensor { name, spec, kind, parameter, start: index * rows });
            }
        }
        Ok(Self { model, description, tensors, metadata: Vec::new() })
    }

    /// One sentence for each reason why llama.cpp does not load the file or computes something else.
    ///
    /// # Errors
    /// The configuration of the model is invalid.
    pub fn limits_of_llama_cpp(&self) -> Result<Vec<String>> {
        let config = self.model.config();
        Ok(llama_cpp::limits(self.description.names.architecture(), config, &config.describe()?))
    }

    /// Records the mixture that the model was quantized to in the metadata.
    #[must_use]
    pub fn with_mixture(mut self, mixture: QuantizationMixture) -> Self {
        self.put("general.file_type", GgufValue::Integer(mixture.file_type.into()));
        if matches!(mixture.base, GgufType::Blocks(_)) {
            self.put("general.quantization_version", GgufValue::Integer(2));
        }
        self
    }

    /// Sets a metadata value, and replaces an existing one.
    pub fn put(&mut self, key: &str, value: GgufValue) {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.into(), value.into()));
    }

    /// Copies the metadata of another file unchanged, except values that follow from the model.
    pub fn copy_metadata(&mut self, file: &GgufFile) {
        let follows = |key: &str| {
            let is_own = self.description.metadata.iter().any(|(own, _)| own == key);
            is_own || key.starts_with("split.") || key == "general.alignment"
        };
        let copied: Vec<_> = file.metadata().keys().filter(|key| !follows(key)).cloned().collect();
        for key in copied {
            if let (None, Some(bytes)) = (self.metadata.iter().find(|(own, _)| *own == key), file.encoded(&key)) {
                self.metadata.push((key, GgufField::Encoded(bytes.to_vec())));
            }
        }
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[ExportedTensor] {
        &self.tensors
    }

    /// Writes the file, or several with at most `max_bytes` of tensors each, and returns their paths. `progress`
    /// receives the number of bytes of each tensor.
    ///
    /// # Errors
    /// A file cannot be written, or an element is not finite.
    pub fn write(&self, path: &Path, max_bytes: Option<u64>, mut progress: impl FnMut(usize)) -> Result<Vec<PathBuf>> {
        let mut new: Vec<NewTensor> = Vec::with_capacity(self.tensors.len());
        for (name, values) in &self.description.tables {
            new.push(NewTensor { name: name.clone(), shape: vec![values.len()], kind: GgufType::F32 });
        }
        for tensor in &self.tensors {
            new.push(NewTensor { name: tensor.name.clone(), shape: tensor.spec.shape.clone(), kind: tensor.kind });
        }
        let mut metadata: Vec<(String, GgufField)> = Vec::new();
        for (key, value) in &self.description.metadata {
            metadata.push((key.clone(), value.clone().into()));
        }
        metadata.retain(|(key, _)| !self.metadata.iter().any(|(own, _)| own == key));
        metadata.extend(self.metadata.iter().cloned());
        let files = split(path, &new, max_bytes)?;
        for (index, (path, range)) in files.iter().enumerate() {
            let mut fields = if index == 0 { metadata.clone() } else { Vec::new() };
            if files.len() > 1 {
                fields.extend(split_fields(index, files.len(), new.len()));
            }
            write_gguf(path, &fields, &new[range.clone()], |at, file| {
                let at = range.start + at;
                if let Some((_, values)) = self.description.tables.get(at) {
                    return put(file, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>(), path);
                }
                let tensor = &self.tensors[at - self.description.tables.len()];
                let (_, weight) = &self.model.parameters()[tensor.parameter];
                let num_bytes = write_tensor(self.description.names, tensor, weight, file, path)?;
                progress(num_bytes);
                Ok(())
            })?;
        }
        Ok(files.into_iter().map(|(path, _)| path).collect())
    }
}

/// The GGUF type that stores a weight without conversion.
fn type_of(weight: &Weight) -> GgufType {
    match weight.block_format() {
        Some(format) => GgufType::Blocks(format),
        None => GgufType::of_dtype(weight.dtype()).unwrap_or(GgufType::F32),
    }
}

/// Writes the elements of a parameter, and returns their number of bytes.
fn write_tensor(
    names: GgufNames,
    tensor: &ExportedTensor,
    weight: &Weight,
    file: &mut dyn Write,
    path: &Path,
) -> Result<usize> {
    let rows = tensor.spec.shape[0];
    let columns: usize = tensor.spec.shape[1..].iter().product();
    let is_interleaved = names.is_interleaved(&tensor.name);
    let unit = if is_interleaved { names.head_dim.max(1) } else { 1 };
    let at_once = (ELEMENTS_AT_ONCE / columns.max(1) / unit).max(1) * unit;
    let mut num_bytes = 0;
    for start in (0..rows).step_by(at_once) {
        let len = at_once.min(rows - start);
        let part = weight.narrow_rows(tensor.start + start, len)?;
        let mut bytes = if part.block_format().is_some() {
            part.block_bytes()?
        } else {
            let values = part.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?;
            check_finite(&tensor.spec.name, &values)?;
            let mut values = values.to_vec1::<f32>()?;
            let offset = names.offset(&tensor.spec);
            if offset != 0.0 {
                for value in &mut values {
                    *value += offset;
                }
            }
            encoded(&values, tensor.kind)
        };
        if is_interleaved {
            bytes = names.interleaved(&bytes, bytes.len() / len.max(1));
        }
        put(file, &bytes, path)?;
        num_bytes += bytes.len();
    }
    Ok(num_bytes)
}

/// Encodes elements in a dense type that stores them exactly.
fn encoded(values: &[f32], kind: GgufType) -> Vec<u8> {
    match kind {
        GgufType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        GgufType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        GgufType::F32 | GgufType::Blocks(_) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn put(file: &mut dyn Write, bytes: &[u8], path: &Path) -> Result<()> {
    file.write_all(bytes).map_err(|error| Error::write(path, error))
}
