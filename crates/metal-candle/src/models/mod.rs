//! Models: configuration, weights, the decoder and its key/value cache.

mod batch;
mod block;
mod config;
mod decoder;
mod decoding;
mod decoding_threads;
mod families;
mod fused_block;
mod generation_defaults;
mod initialize;
mod kv_cache;
mod loader;
mod memory;
mod save;
mod step;

#[cfg(feature = "hub")]
pub use crate::files::{DownloadProgress, Hub, HubName};
pub use crate::files::{SafetensorsFile, TensorEntry, check_finite, write_atomically, write_safetensors};
pub use crate::ops::TermGradients;
pub use batch::Batch;
pub use config::ModelConfig;
pub use decoder::{LinearInfo, Model, Rows};
pub(crate) use decoding::{Decoded, Decoding, DecodingChoice, DecodingRow};
pub use generation_defaults::GenerationDefaults;
pub use kv_cache::{KVCache, KVCacheConfig};
pub use loader::{LoadProgress, ModelLoader};
pub use memory::StepMemory;
pub use save::save_model;
pub use step::{GradientOf, Gradients, LossOptions, Losses, Parameters, Targets, TokenRows, Trainable};

/// The Qwen2 family: the decoder driven by a configuration of `model_type` `qwen2`.
pub type Qwen = Model;
