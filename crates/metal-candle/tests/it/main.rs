//! Integration tests of the library.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::float_cmp, missing_docs, unreachable_pub)]

mod adapters_formats;
mod adapters_lora;
mod adapters_methods;
mod architecture;
mod data_chat;
mod data_files;
mod data_masks;
mod data_packing;
mod data_tokenizer;
mod decoder;
#[macro_use]
mod devices;
mod decoding_steps;
mod device_blocks;
mod distributed;
mod export;
mod families;
#[cfg(target_os = "linux")]
mod fuzz;
mod gguf;
mod golden;
#[cfg(feature = "hub")]
mod hub;
mod imports;
mod inference_arrivals;
mod inference_bits;
mod inference_generator;
mod inference_sampling;
mod inference_scheduler;
mod inference_speculation;
mod kv_cache_types;
mod loader_config;
mod loader_files;
mod loader_model;
mod long_sequences;
#[cfg(all(feature = "metal", target_os = "linux"))]
mod metal_budget;
mod mlx_export;
mod packed;
mod prefix_storage;
mod quick_start;
#[cfg(feature = "hub")]
mod stand_in_hub;
mod step;
mod tokenizer_folders;
mod training_gradients;
mod training_optimizer;
mod training_optimizer_runs;
mod training_resume;
mod training_trainer;
mod training_warnings;
