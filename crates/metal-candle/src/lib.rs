//! Fine-tune and run language models on a plain CPU, Apple Metal or NVIDIA CUDA.
//!
//! A [`Model`] is loaded by a [`ModelLoader`] and shared by whoever needs it; its weights never change. What varies is
//! passed along: the [`Batch`](models::Batch) of token sequences, the [`KVCache`](models::KVCache), the low-rank terms of a
//! [`LoRAAdapter`](training::LoRAAdapter). A [`Trainer`](training::Trainer) makes adapters (or trains all weights) from a
//! [`Dataset`](data::Dataset); a [`Generator`](inference::Generator) writes text with them.

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
