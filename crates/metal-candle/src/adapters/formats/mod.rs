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
    /// A file is missing or damaged, tensors do not fit the model (all of them are listed), or the adapter is of a
    /// kind that is unknown here.
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
        Err(Error::format(config_path, "neither `peft_type` (PEFT) nor `lora_parameters` (mlx-lm) is there"))
    }

    /// Writes a folder as PEFT does: `adapter_config.json` and `adapter_model.safetensors`. What a start subtracts (PiSSA,
    /// OLoRA) is written as [`LoRAAdapter::without_start`] has it, so that the folder fits the unchanged weights.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        peft::save(self, folder.as_ref())
    }

    /// Writes a folder as mlx-lm does: `adapter_config.json` and `adapters.safetensors`. mlx-lm has one rank and one scale:
    /// smaller matrices are padded with zeros, and other scales become a factor of B, so that the function is the same.
    ///
    /// # Errors
    /// A file cannot be written, or mlx-lm cannot hold the adapter: it has low-rank terms only (no modules that are trained
    /// as a whole, no rows of tokens, no biases), and none of a tied embedding or head.
    pub fn save_mlx(&self, folder: impl AsRef<Path>) -> Result<()> {
        mlx::save(self, folder.as_ref())
    }

    /// Writes a GGUF file that llama.cpp reads with `--lora`. It has one alpha: other scales become a factor of B, so that the
    /// function is the same.
    ///
    /// # Errors
    /// The file cannot be written, GGUF has no architecture for the model, or llama.cpp cannot hold the adapter: it has low-rank
    /// terms only, no magnitudes of DoRA, and none of a tied embedding or head.
    pub fn save_gguf(&self, path: impl AsRef<Path>) -> Result<()> {
        gguf::save(self, path.as_ref())
    }
}
