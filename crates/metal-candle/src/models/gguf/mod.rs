//! Reads and writes models as GGUF files: configuration, tensors and quantization types.

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
pub(super) use mixture::MixtureContext;
pub use mixture::QuantizationMixture;
pub(crate) use names::GgufNames;
pub(super) use weights::GgufWeights;
