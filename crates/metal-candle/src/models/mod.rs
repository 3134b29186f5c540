//! Models: configuration, weights, the decoder and its key/value cache.

mod batch;
mod config;
mod decoder;
mod families;
mod kv_cache;
mod loader;

pub use batch::Batch;
pub use config::ModelConfig;
pub use decoder::{Gradients, LinearInfo, LossOptions, Losses, Model, Rows, Targets, Trainable};
pub use kv_cache::{KVCache, KVCacheConfig};
pub use loader::ModelLoader;

/// The Qwen2 family: the decoder driven by a configuration of `model_type` `qwen2`.
pub type Qwen = Model;
