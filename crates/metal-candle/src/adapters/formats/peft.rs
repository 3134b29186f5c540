//! Adapter folders of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

use super::peft_config::{self, describe};
use super::values::{self, Naming, Part};
use super::{CONFIG_FILE, make_folder};
use crate::adapters::Start;
use crate::adapters::begin::subtracted_values;
use crate::adapters::layout::{Layout, LoRAModule, SavedParameter, parameter};
use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};
use crate::models::{JsonObject, Model, write_atomically, write_safetensors};
use candle_core::Tensor;
use std::path::Path;

const TENSOR_FILE: &str = "adapter_model.safetensors";

struct Names;

impl Naming for Names {
    fn name(&self, module: &LoRAModule, part: Part) -> String {
        let leaf = match (part, module.is_embedding()) {
            (Part::A, false) => "lora_A.weight",
            (Part::B, false) => "lora_B.weight",
            (Part::A, true) => "lora_embedding_A",
            (Part::B, true) => "lora_embedding_B",
            (Part::Magnitude, _) => "lora_magnitude_vector",
        };
        format!("base_model.model.{}.{leaf}", module.path)
    }

    fn saved(&self, saved: &SavedParameter) -> String {
        format!("base_model.model.{}", saved.name)
    }

    /// PEFT saves the weights of the embedding and the head with an adapter that targets the embedding.
    fn base(&self, module: &LoRAModule) -> Option<String> {
        module.layer.is_none().then(|| format!("base_model.model.{}.base_layer.weight", module.path))
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
    read_tensors(model, &path, layout)
}

/// The adapter whose tensors are in the file `path`.
pub(super) fn read(model: &Model, path: &Path, config: &JsonObject) -> Result<LoRAAdapter> {
    read_tensors(model, path, peft_config::layout(model, config)?)
}

fn read_tensors(model: &Model, path: &Path, (layout, start): (Layout, Option<Start>)) -> Result<LoRAAdapter> {
    let weight = |module: &LoRAModule| parameter(model, &format!("{}.weight", module.path));
    let values = values::read(path, &layout, &Names, weight)?;
    // what PEFT takes out of the weights when it loads such an adapter
    let subtracted = start.map_or(Ok(Vec::new()), |start| subtracted_values(model, &layout, start))?;
    LoRAAdapter::from_values(model, layout, values, subtracted)
}

pub(super) fn save(adapter: &LoRAAdapter, folder: &Path) -> Result<()> {
    let adapter = adapter.without_start()?;
    make_folder(folder)?;
    write_safetensors(folder.join(TENSOR_FILE), &named_tensors(&adapter)?, &[("format", "pt")])?;
    let path = folder.join(CONFIG_FILE);
    let text = serde_json::to_vec_pretty(&describe(&adapter)).map_err(|error| Error::format(&path, error))?;
    write_atomically(&path, |file| file.write_all(&text))
}

/// All tensors of an adapter that subtracts nothing under the names of PEFT, in the order of the names.
pub(super) fn named_tensors(adapter: &LoRAAdapter) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::with_capacity(2 * adapter.modules().len());
    for module in adapter.modules() {
        let (a, b) = adapter.matrices(module)?;
        tensors.push((Names.name(module, Part::A), a));
        tensors.push((Names.name(module, Part::B), b));
        if let Some(magnitudes) = adapter.magnitudes(module)? {
            tensors.push((Names.name(module, Part::Magnitude), magnitudes));
        }
    }
    for saved in adapter.saved_parameters() {
        tensors.push((Names.saved(saved), adapter.saved_tensor(saved)?));
    }
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    Ok(tensors)
}
