//! From tensors of a file to the flat parameters of an adapter.

use crate::adapters::layout::{Layout, LoRAModule, SavedParameter};
use crate::error::{Error, Result};
use crate::models::SafetensorsFile;
use candle_core::{DType, Tensor};
use std::collections::BTreeSet;
use std::path::Path;

/// A part of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Magnitude,
}

/// How a file holds the parts of an adapter.
pub(super) trait Naming {
    /// The tensor that holds a part of a module.
    fn name(&self, module: &LoRAModule, part: Part) -> String;

    /// The tensor that holds a parameter that is trained as a whole.
    fn saved(&self, saved: &SavedParameter) -> String;

    /// The tensor that may hold a copy of the weight that a module extends.
    fn base(&self, module: &LoRAModule) -> Option<String>;

    /// Whether A and B are held transposed.
    fn transposed(&self) -> bool;
}

/// A tensor that is expected in a file, and where its values go.
struct Slot {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    transposed: bool,
}

fn slots(layout: &Layout, naming: &dyn Naming) -> Vec<Slot> {
    let mut slots = Vec::new();
    for module in &layout.modules {
        for (part, rows, columns, offset) in [
            (Part::A, module.rank, module.in_features, module.offset),
            (Part::B, module.out_features, module.rank, module.offset + module.num_a()),
        ] {
            let transposed = naming.transposed();
            let shape = if transposed { vec![columns, rows] } else { vec![rows, columns] };
            slots.push(Slot { name: naming.name(module, part), shape, offset, transposed });
        }
        if module.use_dora {
            let (name, offset) = (naming.name(module, Part::Magnitude), module.magnitude_offset());
            slots.push(Slot { name, shape: vec![module.out_features], offset, transposed: false });
        }
    }
    for saved in &layout.saved {
        let (name, shape) = (naming.saved(saved), saved.shape.clone());
        slots.push(Slot { name, shape, offset: saved.offset, transposed: false });
    }
    slots
}

/// The parameters in the order of `layout`; all tensors that are missing, unexpected or misshaped are told at once.
///
/// `weight` gives the weight that a module extends, for the copies that some files hold of it.
pub(super) fn read<'a>(
    path: &Path,
    layout: &Layout,
    naming: &dyn Naming,
    weight: impl Fn(&LoRAModule) -> Result<&'a Tensor>,
) -> Result<Vec<f32>> {
    let file = SafetensorsFile::open(path)?;
    let mut left: BTreeSet<&str> = file.entries().iter().map(|entry| entry.name.as_str()).collect();
    let mut problems = Vec::new();
    let mut found = Vec::new();
    for slot in slots(layout, naming) {
        let name = slot.name.as_str();
        left.remove(name);
        let Some(entry) = file.entry(name) else {
            problems.push(format!("`{name}` is missing"));
            continue;
        };
        if entry.shape != slot.shape {
            problems.push(format!("`{name}`: expected shape {:?}, found {:?}", slot.shape, entry.shape));
        } else if !entry.is_float() {
            problems.push(format!("`{name}`: expected f32, f16 or bf16, found {}", entry.dtype));
        } else {
            let values = file.float_tensor(name, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            if values.iter().any(|value| !value.is_finite()) {
                problems.push(format!("`{name}` holds a value that is not finite"));
            }
            found.push((slot, values));
        }
    }
    for module in &layout.modules {
        let Some(name) = naming.base(module).filter(|name| left.remove(name.as_str())) else { continue };
        let weight = weight(module)?;
        if !file.entry(&name).is_some_and(|entry| entry.is_float() && entry.shape == weight.dims())
            || !is_same(&file.float_tensor(&name, weight.dtype())?, weight)?
        {
            problems.push(format!("`{name}` is not the weight of this model"));
        }
    }
    problems.extend(left.into_iter().map(|name| format!("`{name}` is not expected")));
    if !problems.is_empty() {
        return Err(Error::Tensors { path: path.to_path_buf(), problems });
    }
    let mut parameters = vec![0.0; layout.num_parameters];
    for (slot, values) in found {
        let target = &mut parameters[slot.offset..slot.offset + values.len()];
        if slot.transposed {
            let (columns, rows) = (slot.shape[0], slot.shape[1]);
            for (index, value) in target.iter_mut().enumerate() {
                *value = values[index % columns * rows + index / columns];
            }
        } else {
            target.copy_from_slice(&values);
        }
    }
    Ok(parameters)
}

fn is_same(left: &Tensor, right: &Tensor) -> Result<bool> {
    let values = |tensor: &Tensor| -> Result<Vec<f32>> {
        let tensor = tensor.to_device(&candle_core::Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    };
    Ok(values(left)? == values(right)?)
}
