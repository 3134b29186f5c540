//! Saves an adapter as one safetensors file, and loads it.

use crate::adapters::{CheckpointMetadata, LoRAAdapter, load_single_file, save_single_file};
use crate::error::Result;
use crate::models::Model;
use std::path::Path;

/// Writes an adapter as one safetensors file: tensors named as PEFT names them, configuration and `metadata` in the
/// header. The file is replaced atomically.
///
/// # Errors
/// The file cannot be written.
pub fn save_checkpoint(
    adapter: &LoRAAdapter,
    path: impl AsRef<Path>,
    metadata: Option<&CheckpointMetadata>,
) -> Result<()> {
    save_single_file(adapter, path.as_ref(), metadata)
}

/// Loads an adapter from a file of [`save_checkpoint`].
///
/// # Errors
/// The file is missing or damaged or is not such a file, or tensors do not fit the model; all of them are listed.
pub fn load_checkpoint(model: &Model, path: impl AsRef<Path>) -> Result<(LoRAAdapter, CheckpointMetadata)> {
    load_single_file(model, path.as_ref())
}
