//! Fine-tune and run language models on a plain CPU, Apple Metal or NVIDIA CUDA.
//!
//! A [`ModelLoader`] loads a [`Model`], whose weights never change, so any number of callers can share it. Calls pass the
//! state that changes: a [`Batch`](models::Batch) of token sequences, a [`KVCache`](models::KVCache), and the low-rank
//! updates of a [`LoRAAdapter`](training::LoRAAdapter). A [`Trainer`](training::Trainer) trains an adapter (or all weights)
//! on a [`Dataset`](data::Dataset). A [`Generator`](inference::Generator) generates text.

pub mod adapters;
pub mod data;
mod device;
mod error;
pub mod files;
pub mod inference;
pub mod models;
pub mod ops;
pub mod profile;
pub mod training;

pub use candle_core::DType;
pub use device::{Device, MemoryInUse};
pub use error::{DataProblem, Error, Result};
pub use models::{Model, ModelConfig, ModelLoader};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
