//! Fine-tune, run and serve language models on Apple Metal, NVIDIA CUDA or a plain CPU.

pub mod adapters;
pub mod data;
mod device;
mod error;
pub mod inference;
pub mod models;
pub mod ops;
pub mod training;

pub use device::Device;
pub use error::{DataProblem, Error, Result};
pub use models::{Model, ModelConfig, ModelLoader};
