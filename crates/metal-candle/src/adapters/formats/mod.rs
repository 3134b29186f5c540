//! Reads and writes adapters in the formats of PEFT, mlx-lm and llama.cpp (GGUF), and as one file.

mod config_file;
mod gguf;
mod mlx;
mod peft;
mod peft_config;
mod pickle_check;
mod refusal;
mod replaced;
mod single;
mod source;
mod text_part;
mod values;

pub use single::SingleFileMetadata;
pub(crate) use single::{load_single_file, save_single_file};

use super::lora::LoRAAdapter;
use crate::error::{Error, Result};
use crate::files::{GgufFile, JsonObject};
use crate::models::Model;
use config_file::CONFIG_FILE;
use std::path::Path;

impl LoRAAdapter {
    /// Reads an adapter: a folder of PEFT or mlx-lm, a GGUF file, or a file of
    /// [`save_checkpoint`](crate::training::save_checkpoint).
    ///
    /// # Errors
    /// A file is missing or damaged, tensors do not fit the model (all of them are listed), or the kind of adapter is not
    /// supported.
    pub fn load(model: &Model, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if GgufFile::is_named(path) {
            return gguf::load(model, path);
        }
        if path.is_file() {
            return Ok(load_single_file(model, path)?.0);
        }
        let config_path = path.join(CONFIG_FILE);
        let config = JsonObject::read(&config_path)?;
        if config.get("peft_type").is_some() {
            return peft::load(model, path, &config);
        }
        let is_mlx = ["fine_tune_type", "lora_parameters", "num_layers", "lora_layers"]
            .iter()
            .any(|key| config.get(key).is_some());
        if is_mlx {
            return mlx::load(model, path, &config);
        }
        Err(Error::format(
            config_path,
            "expected the key `peft_type` (PEFT) or `lora_parameters` (mlx-lm), found neither",
        ))
    }

    /// Writes a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`. An adapter that subtracts its initial
    /// update (PiSSA, OLoRA) is converted with [`LoRAAdapter::without_start`], so that the folder fits the unchanged weights.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        peft::save(self, folder.as_ref())
    }

    /// Writes an mlx-lm folder: `adapter_config.json` and `adapters.safetensors`. mlx-lm has one rank and one scale per
    /// adapter, so smaller matrices are padded with zeros and other scales are multiplied into B. The result is equivalent.
    ///
    /// # Errors
    /// A file cannot be written, or mlx-lm does not support the adapter: it supports low-rank updates only (no fully trained
    /// modules, token rows or biases), and none of a tied embedding or head.
    pub fn save_mlx(&self, folder: impl AsRef<Path>) -> Result<()> {
        mlx::save(self, folder.as_ref())
    }

    /// Writes a GGUF file that llama.cpp loads with `--lora`. It has one alpha, so other scales are multiplied into B. The
    /// result is equivalent.
    ///
    /// # Errors
    /// The file cannot be written, GGUF has no architecture for the model, or llama.cpp does not support the adapter: it
    /// supports low-rank updates only, without DoRA magnitudes, and none of a tied embedding or head.
    pub fn save_gguf(&self, path: impl AsRef<Path>) -> Result<()> {
        gguf::save(self, path.as_ref())
    }
}
