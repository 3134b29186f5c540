//! Reads and writes an adapter as one safetensors file: tensors with PEFT's names, the configuration in the metadata.

use super::config_file::{as_count, read_as};
use super::peft::{self, named_tensors};
use super::peft_config;
use crate::adapters::LoRAAdapter;
use crate::error::{Error, Result};
use crate::files::{JsonObject, SafetensorsFile, create_folder, write_safetensors};
use crate::models::Model;
use serde_json::{Value, json};
use std::path::Path;

/// The header entry with the configuration of the adapter.
const CONFIG_KEY: &str = "adapter_config";
/// The header entry with the caller's metadata.
const METADATA_KEY: &str = "training";

/// Optional metadata of a checkpoint file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SingleFileMetadata {
    /// Completed optimizer steps.
    pub step: Option<usize>,
    /// The current pass over the data, from 1.
    pub epoch: Option<usize>,
    /// Mean loss of the last step or evaluation, in nats per token.
    pub loss: Option<f64>,
    /// Anything else, as text.
    pub note: Option<String>,
}

impl SingleFileMetadata {
    fn to_json(&self) -> Value {
        json!({
            "step": self.step, "epoch": self.epoch, "loss": self.loss.map(|loss| loss.to_string()), "note": self.note,
        })
    }

    fn from_json(entry: &JsonObject) -> Result<Self> {
        Ok(Self {
            step: read_as(entry, "step", "a whole number", as_count)?,
            epoch: read_as(entry, "epoch", "a whole number", as_count)?,
            loss: read_as(entry, "loss", "a number as text", |value| value.as_str()?.parse().ok())?,
            note: entry.text("note")?.map(String::from),
        })
    }
}

pub(crate) fn save_single_file(
    adapter: &LoRAAdapter,
    path: &Path,
    metadata: Option<&SingleFileMetadata>,
) -> Result<()> {
    let adapter = adapter.without_start()?;
    let config = json!(peft_config::describe(&adapter)).to_string();
    let metadata = metadata.map(|metadata| metadata.to_json().to_string());
    let mut entries = vec![("format", "pt"), (CONFIG_KEY, config.as_str())];
    entries.extend(metadata.as_deref().map(|metadata| (METADATA_KEY, metadata)));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        create_folder(folder)?;
    }
    write_safetensors(path, &named_tensors(&adapter)?, &entries)
}

pub(crate) fn load_single_file(model: &Model, path: &Path) -> Result<(LoRAAdapter, SingleFileMetadata)> {
    let file = SafetensorsFile::open(path)?;
    let entry = |key: &str| file.metadata().get(key).map(|text| JsonObject::parse(text, path)).transpose();
    let Some(config) = entry(CONFIG_KEY)? else {
        return Err(Error::format(path, format!("the header has no entry `{CONFIG_KEY}`")));
    };
    let adapter = peft::read(model, path, &config)?;
    let metadata = entry(METADATA_KEY)?.map(|entry| SingleFileMetadata::from_json(&entry)).transpose()?;
    Ok((adapter, metadata.unwrap_or_default()))
}
