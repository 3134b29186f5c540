//! Saves a model as a folder of weights and configuration files.

use super::model::Model;
use crate::error::Result;
use crate::files::{create_folder, write_atomically, write_safetensors};
use std::path::Path;

/// Saves a model as a folder that transformers and [`ModelLoader`](super::ModelLoader) can load: `model.safetensors`,
/// `config.json` and `generation_config.json`.
///
/// Each file is replaced atomically, the weights first.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn save_model(model: &Model, folder: impl AsRef<Path>) -> Result<()> {
    save_model_with(model, folder, &[])
}

/// [`save_model`] with additional strings in the metadata of the weights.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn save_model_with(model: &Model, folder: impl AsRef<Path>, metadata: &[(&str, &str)]) -> Result<()> {
    let folder = folder.as_ref();
    create_folder(folder)?;
    let tensors = model.parameters().iter().map(|(name, weight)| Ok((name, weight.tensor()?)));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let metadata = [&[("format", "pt")], metadata].concat();
    write_safetensors(folder.join("model.safetensors"), &tensors, &metadata)?;
    write_atomically(folder.join("config.json"), |file| {
        file.write_all(model.config().to_json(model.dtype()).as_bytes())
    })?;
    write_atomically(folder.join("generation_config.json"), |file| {
        file.write_all(model.config().generation_to_json().as_bytes())
    })
}
