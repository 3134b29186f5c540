//! Models: loads, describes, runs, quantizes and saves them, with their key/value cache.

mod batch;
mod block;
mod config;
mod config_file;
mod decoding;
mod description;
mod families;
mod generation_defaults;
mod gguf;
mod gradients;
mod importance;
mod initialize;
mod keys;
mod kv_cache;
mod layout;
mod loader;
mod memory;
mod mlx_export;
mod model;
mod packed;
mod parts;
mod quantize;
mod registry;
mod rows;
mod save;
mod step;
mod tensors;

#[cfg(feature = "hub")]
pub use crate::files::{DownloadProgress, Hub, HubName};
pub use crate::files::{SafetensorsFile, TensorEntry, check_finite, write_atomically, write_safetensors};
pub use crate::ops::KVCacheType;
pub use crate::ops::LowRankGradients;
pub use batch::Batch;
pub use config::ModelConfig;
pub(crate) use decoding::{Decoded, Decoding, DecodingRow, DecodingSampling};
pub use generation_defaults::GenerationDefaults;
pub(crate) use gguf::GgufNames;
pub use gguf::{ExportedTensor, GgufExport, QuantizationMixture};
pub use gradients::{GradientOf, Gradients, Parameters, TokenRows, Trainable};
pub use importance::Importance;
pub use kv_cache::{KVCache, KVCacheConfig};
pub use loader::{LoadProgress, ModelLoader};
pub use memory::StepMemory;
pub use metal_candle_kernels::MatmulPrecision;
pub use mlx_export::{MlxQuantization, save_mlx_model};
pub use model::Model;
pub use quantize::{Quantization, QuantizeProgress};
pub use registry::{LinearId, LinearInfo, ParameterSpec, Role};
pub use rows::Rows;
pub use save::{save_model, save_model_with};
pub use step::{LossOptions, Losses, Targets};

/// The name of [`Model`] in the first versions, which supported only Qwen2.
pub type Qwen = Model;
