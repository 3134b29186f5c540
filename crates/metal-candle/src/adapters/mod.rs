//! Adapters: LoRA with its relatives, and their file formats.
//!
//! An adapter is a set of low-rank terms for some linear layers of a model. It is passed to
//! [`Model::forward`](crate::Model::forward) beside the batch and never stored in the model, so that adapters are
//! swapped or dropped between two calls.

mod builder;
mod formats;
mod initial_values;
mod initialization;
mod layout;
mod lora;
mod merge;
mod patterns;
mod random;
mod survival;
mod target;

pub use builder::{LoRAAdapterBuilder, LoRAAdapterConfig};
pub use formats::SingleFileMetadata as CheckpointMetadata;
pub use initialization::Start;
pub use layout::{LoRAModule, SavedParameter, TrainedBiases};
pub use lora::LoRAAdapter;
pub use survival::Survival;
pub use target::{ModuleName, TargetModule};

pub(crate) use formats::{load_single_file, save_single_file};
