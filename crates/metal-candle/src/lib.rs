//! Fine-tune and run language models on Apple Metal, NVIDIA CUDA and the CPU.
//!
//! metal-candle loads the dense models of the common families (Qwen, Llama, Mistral, Gemma, Phi, SmolLM, OLMo, Granite, GLM,
//! Command R, StarCoder2) from safetensors and GGUF files, trains LoRA adapters or all weights, and generates text.
//!
//! # High level
//!
//! - [`ModelLoader`] loads a [`Model`], whose weights never change and which is cheap to clone.
//! - [`Tokenizer`](data::Tokenizer) and [`ChatTemplate`](data::ChatTemplate) turn text and conversations into token ids.
//! - [`Generator`](inference::Generator) generates one text, a stream or a batch;
//!   [`Scheduler`](inference::Scheduler) batches many sequences with different adapters.
//! - [`Datasets`](data::Datasets) reads training data; a [`Trainer`](training::Trainer) trains a
//!   [`LoRAAdapter`](training::LoRAAdapter) or a whole model on it.
//! - The crate `metal-candle-server` serves a model over HTTP, and `metal-candle-cli` is the program `metal-candle`.
//!
//! # Example: generate
//!
//! ```no_run
//! use metal_candle::data::Tokenizer;
//! use metal_candle::inference::{GenerationConfig, Generator};
//! use metal_candle::{Device, ModelLoader};
//!
//! # fn main() -> metal_candle::Result<()> {
//! let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load("my-model")?;
//! let mut generator = Generator::new(model).with_tokenizer(Tokenizer::from_folder("my-model")?);
//! let config = GenerationConfig::default().with_max_tokens(64);
//! println!("{}", generator.generate("fn main() {", &config)?.text);
//! # Ok(())
//! # }
//! ```
//!
//! # Example: fine-tune
//!
//! ```no_run
//! use metal_candle::data::{DatasetOptions, Datasets, SplitOptions, Tokenizer};
//! use metal_candle::training::{LoRAAdapter, TargetModule, Trainer, TrainingConfig};
//! use metal_candle::ModelLoader;
//!
//! # fn main() -> metal_candle::Result<()> {
//! let model = ModelLoader::new().load("my-model")?;
//! let tokenizer = Tokenizer::from_folder("my-model")?;
//! let data = Datasets::load("my-data", &tokenizer, &DatasetOptions::default(), &SplitOptions::default())?;
//! let adapter = LoRAAdapter::builder(&model).with_rank(16).with_target_modules([TargetModule::AllLinear]).build()?;
//! let trainer = Trainer::new(adapter, TrainingConfig::default())?;
//! trainer.train(&data.train)?;
//! trainer.lora_adapter().save("my-adapter")?; // a PEFT folder
//! # Ok(())
//! # }
//! ```
//!
//! # How it fits together
//!
//! What varies is an argument: the [`Batch`](models::Batch) of token sequences, the [`KVCache`](models::KVCache), the
//! low-rank updates of an adapter ([`LoRAAdapter::low_rank_updates`](training::LoRAAdapter::low_rank_updates)). So one
//! set of weights serves a trainer, many conversations and many adapters, and attaching an adapter copies nothing.
//! Batches are ragged: training rows, prompts and single decode steps are packed without padding. The backward pass is
//! explicit: each operation in [`ops`] has its forward and backward side by side, and no autograd graph is built.
//!
//! | Module | Contains |
//! | --- | --- |
//! | [`models`] | configurations, checkpoints, model families, KV cache, quantization |
//! | [`adapters`] | LoRA and its variants; the formats of PEFT, mlx-lm and GGUF |
//! | [`data`] | tokenizer, chat templates, datasets, packing |
//! | [`inference`] | sampling, generator, scheduler, token masks, drafts |
//! | [`training`] | trainer, optimizers, schedules, checkpoints, memory plans |
//! | [`ops`] | differentiable operations on every backend |
//! | [`files`] | bounded reads, atomic writes, safetensors, GGUF |
//! | [`profile`] | timings of operations |
//!
//! Results are checked against transformers and PEFT. Errors are one type, [`Error`], sorted by what a caller can do.
//!
//! # Feature flags
//!
//! | Feature | Effect |
//! | --- | --- |
//! | `async` (default) | `Generator::into_stream` returns a `futures` stream |
//! | `hub` | downloads models from the Hugging Face Hub |
//! | `metal` | Apple GPUs |
//! | `cuda` | NVIDIA GPUs; building needs `nvcc` |
//! | `nccl` | NCCL for training on several CUDA devices |

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

#[cfg(doctest)]
#[doc = include_str!("../../../docs/library.md")]
struct LibraryPage;
