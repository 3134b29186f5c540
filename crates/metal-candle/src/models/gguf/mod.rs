//! Models in GGUF files: their configuration and weights, read and written.

mod architecture;
mod config;
mod describe;
mod export;
mod llama_cpp;
mod metadata;
mod mixture;
mod names;
mod weights;

pub use export::{ExportedTensor, GgufExport};
pub(super) use mixture::Circumstances;
pub use mixture::QuantizationMixture;
pub(crate) use names::GgufNames;
pub(super) use weights::GgufWeights;
