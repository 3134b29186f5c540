//! Reads the tensors of a file into the flat parameters of an adapter.

use super::source::TensorSource;
use crate::adapters::layout::{Layout, LoRAModule, SavedParameter};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// A part of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Magnitude,
}

/// The tensor names and layout of an adapter format.
pub(super) trait Naming {
    /// The name of the tensor of a part of a module.
    fn name(&self, module: &LoRAModule, part: Part) -> String;

    /// The name of the tensor of a fully trained parameter.
    ///
    /// `has_terms` is whether its module also has a low-rank update.
    fn saved(&self, saved: &SavedParameter, has_terms: bool) -> String;

    /// Whether A and B are stored transposed.
    fn transposed(&self) -> bool;
}

/// A tensor that is expected in a file, and the destination of its values.
struct Slot {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    transposed: bool,
}

fn slots(layout: &Layout, naming: &dyn Naming, replaced: &BTreeMap<String, Vec<f32>>) -> Vec<Slot> {
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
    for saved in layout.saved.iter().filter(|saved| !replaced.contains_key(&saved.name)) {
        let (name, shape) = (naming.saved(saved, false), saved.shape.clone());
        slots.push(Slot { name, shape, offset: saved.offset, transposed: false });
    }
    slots
}

/// Returns the parameters in the order of `layout`; one error lists all missing, unexpected and misshaped tensors.
///
/// `replaced` has the parameters that have been read already, and `known` their tensors in the file.
pub(super) fn read(
    file: &TensorSource,
    layout: &Layout,
    naming: &dyn Naming,
    replaced: &BTreeMap<String, Vec<f32>>,
    known: &BTreeSet<String>,
) -> Result<Vec<f32>> {
    let mut left: BTreeSet<&str> = file.names().filter(|name| !known.contains(*name)).collect();
    let mut problems = Vec::new();
    let mut found = Vec::new();
    for slot in slots(layout, naming, replaced) {
        let name = slot.name.as_str();
        left.remove(name);
        let Some(shape) = file.shape(name) else {
            problems.push(format!("`{name}` is missing"));
            continue;
        };
        if shape != slot.shape {
            problems.push(format!("`{name}`: expected shape {:?}, found {shape:?}", slot.shape));
        } else if let Some(dtype) = file.foreign_dtype(name) {
            problems.push(format!("`{name}`: expected f32, f16 or bf16, found {dtype}"));
        } else {
            let values = file.values(name)?;
            if values.iter().any(|value| !value.is_finite()) {
                problems.push(format!("`{name}` contains a value that is not finite"));
            }
            found.push((slot, values));
        }
    }
    problems.extend(left.into_iter().map(|name| format!("`{name}` is not expected")));
    if !problems.is_empty() {
        return Err(Error::Tensors { path: file.path().to_path_buf(), problems });
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
    for saved in &layout.saved {
        if let Some(values) = replaced.get(&saved.name) {
            parameters[saved.offset..saved.offset + values.len()].copy_from_slice(values);
        }
    }
    Ok(parameters)
}
