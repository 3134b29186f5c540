//! Adapters: LoRA and its file formats.
//!
//! An adapter is a set of low-rank terms for some linear layers of a model. It is passed to
//! [`Model::forward`](crate::Model::forward) beside the batch and never stored in the model, so that adapters are
//! swapped or dropped between two calls.

mod builder;
mod formats;
mod lora;
mod merge;
mod target;

pub use builder::LoRAAdapterBuilder;
pub use formats::SingleFileMetadata as CheckpointMetadata;
pub use lora::{LoRAAdapter, LoRAAdapterConfig, LoRAModule};
pub use target::TargetModule;

pub(crate) use formats::{load_single_file, save_single_file};
