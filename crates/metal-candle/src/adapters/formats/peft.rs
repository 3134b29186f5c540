//! Adapter folders of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

use super::peft_config::{self, describe};
use super::values::{self, Matrix, Naming};
use super::{CONFIG_FILE, make_folder};
use crate::adapters::lora::{LoRAAdapter, LoRAModule};
use crate::error::{Error, Result};
use crate::models::{JsonObject, Model, write_atomically, write_safetensors};
use std::path::Path;

const TENSOR_FILE: &str = "adapter_model.safetensors";

pub(super) struct Names;

impl Naming for Names {
    fn name(&self, module: &LoRAModule, matrix: Matrix) -> String {
        let leaf = if matrix == Matrix::A { "lora_A" } else { "lora_B" };
        format!("base_model.model.{}.{leaf}.weight", module.path)
    }

    fn transposed(&self) -> bool {
        false
    }
}

pub(super) fn load(model: &Model, folder: &Path, config: &JsonObject) -> Result<LoRAAdapter> {
    let layout = peft_config::layout(model, config)?;
    let path = folder.join(TENSOR_FILE);
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        let message = format!("`adapter_model.bin` in `{}`: save the adapter as safetensors", folder.display());
        return Err(Error::Unsupported(message));
    }
    let values = values::read(&path, &layout, &Names)?;
    LoRAAdapter::from_values(model, layout, values)
}

pub(super) fn save(adapter: &LoRAAdapter, folder: &Path) -> Result<()> {
    make_folder(folder)?;
    write_safetensors(folder.join(TENSOR_FILE), &named_tensors(adapter)?, &[("format", "pt")])?;
    let path = folder.join(CONFIG_FILE);
    let text = serde_json::to_vec_pretty(&describe(adapter)).map_err(|error| Error::format(&path, error))?;
    write_atomically(&path, |file| file.write_all(&text))
}

/// A and B of each module under the names of PEFT, in the order of the names.
pub(super) fn named_tensors(adapter: &LoRAAdapter) -> Result<Vec<(String, candle_core::Tensor)>> {
    let mut tensors = Vec::with_capacity(2 * adapter.modules().len());
    for module in adapter.modules() {
        let (a, b) = adapter.matrices(module)?;
        tensors.push((Names.name(module, Matrix::A), a));
        tensors.push((Names.name(module, Matrix::B), b));
    }
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    Ok(tensors)
}
