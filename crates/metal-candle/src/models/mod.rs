//! Models: configuration, weights, the decoder and its key/value cache.

mod batch;
mod block;
mod config;
mod convert;
mod decoder;
mod decoding;
mod decoding_threads;
mod families;
mod foreign;
mod fused_block;
mod generation_defaults;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod hub_transfer;
mod initialize;
mod json_object;
mod kv_cache;
mod loader;
mod memory;
mod safetensors_file;
mod saver;
mod shards;
mod step;

pub use crate::files::write_atomically;
pub use crate::ops::TermGradients;
pub use batch::Batch;
pub use config::ModelConfig;
pub use decoder::{LinearInfo, Model, Rows};
pub(crate) use decoding::{Decoded, Decoding, DecodingChoice, DecodingRow};
pub use generation_defaults::GenerationDefaults;
#[cfg(feature = "hub")]
pub use hub::{DownloadProgress, Hub, HubName};
pub(crate) use json_object::JsonObject;
pub use kv_cache::{KVCache, KVCacheConfig};
pub use loader::{LoadProgress, ModelLoader};
pub use memory::StepMemory;
pub use safetensors_file::{SafetensorsFile, TensorEntry};
pub use saver::{check_finite, save_model, write_safetensors};
pub use step::{GradientOf, Gradients, LossOptions, Losses, Parameters, Targets, TokenRows, Trainable};

/// The Qwen2 family: the decoder driven by a configuration of `model_type` `qwen2`.
pub type Qwen = Model;
