//! From tensors of a file to the flat parameters of an adapter.

use crate::adapters::lora::{Layout, LoRAModule};
use crate::error::{Error, Result};
use crate::models::SafetensorsFile;
use candle_core::DType;
use std::collections::BTreeSet;
use std::path::Path;

/// A or B.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrix {
    A,
    B,
}

/// How a file holds the matrices of an adapter.
pub(super) trait Naming {
    /// The tensor that holds a matrix.
    fn name(&self, module: &LoRAModule, matrix: Matrix) -> String;

    /// Whether it holds the transposed matrix.
    fn transposed(&self) -> bool;
}

/// The parameters in the order of `layout`; all tensors that are missing, unexpected or misshaped are told at once.
pub(super) fn read(path: &Path, layout: &Layout, naming: &dyn Naming) -> Result<Vec<f32>> {
    let file = SafetensorsFile::open(path)?;
    let mut left: BTreeSet<&str> = file.entries().iter().map(|entry| entry.name.as_str()).collect();
    let mut problems = Vec::new();
    let mut found = Vec::new();
    for module in &layout.modules {
        for (matrix, rows, columns, offset) in [
            (Matrix::A, module.rank, module.in_features, module.offset),
            (Matrix::B, module.out_features, module.rank, module.offset + module.num_a()),
        ] {
            let name = naming.name(module, matrix);
            left.remove(name.as_str());
            let Some(entry) = file.entry(&name) else {
                problems.push(format!("`{name}` is missing"));
                continue;
            };
            let expected = if naming.transposed() { [columns, rows] } else { [rows, columns] };
            if entry.shape != expected {
                problems.push(format!("`{name}`: expected shape {expected:?}, found {:?}", entry.shape));
            } else if !entry.is_float() {
                problems.push(format!("`{name}`: expected f32, f16 or bf16, found {}", entry.dtype));
            } else {
                let values = file.float_tensor(&name, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                if values.iter().any(|value| !value.is_finite()) {
                    problems.push(format!("`{name}` holds a value that is not finite"));
                }
                found.push((offset, columns, values));
            }
        }
    }
    problems.extend(left.into_iter().map(|name| format!("`{name}` is not expected")));
    if !problems.is_empty() {
        return Err(Error::Tensors { path: path.to_path_buf(), problems });
    }
    let mut parameters = vec![0.0; layout.num_parameters];
    for (offset, columns, values) in found {
        let target = &mut parameters[offset..offset + values.len()];
        if naming.transposed() {
            let rows = values.len() / columns.max(1);
            for (index, value) in target.iter_mut().enumerate() {
                *value = values[index % columns * rows + index / columns];
            }
        } else {
            target.copy_from_slice(&values);
        }
    }
    Ok(parameters)
}
