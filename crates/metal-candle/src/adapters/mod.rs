//! Creates, loads, saves and merges adapters: LoRA, rsLoRA, DoRA and others.
//!
//! An adapter is a set of low-rank updates of linear layers. It is an argument of
//! [`Model::forward`](crate::Model::forward) and never stored in the model, so callers can swap or drop adapters between
//! two calls.

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
