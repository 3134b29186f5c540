//! Generates text: [`Generator`] for prompts and batches, [`Scheduler`] for continuous batching, and [`Sampler`].

mod adapter_set;
mod device_decoding;
mod divergence;
mod draft_gate;
mod draft_model;
mod drafter;
mod generation;
mod generator;
mod mask;
mod plan;
mod prefix_folder;
mod prefix_writer;
mod prompt_scores;
mod request;
mod sample_token;
mod sampler;
mod sampling;
mod scheduler;
mod scheduler_config;
mod sequence;
mod slots;
mod speculation;
mod stop;
#[cfg(feature = "async")]
mod stream;

pub use crate::models::{KVCache, KVCacheConfig, KVCacheType};
pub use divergence::{Adapted, Divergence};
pub use generation::{Finish, FinishReason, Generation, GenerationConfig, Piece, Prompt};
pub use generator::{Generator, Pieces};
pub use mask::{AllowedTokens, TokenMask};
pub use prefix_folder::PrefixStorage;
pub use prompt_scores::{mean_hidden_state, prompt_log_probabilities};
pub use request::{AdapterId, Event, Request, SequenceId, sample_seed};
pub use sample_token::sample_token;
pub use sampler::{Choice, Sampler};
pub use sampling::{SamplingConfig, SamplingStrategy};
pub use scheduler::Scheduler;
pub use scheduler_config::SchedulerConfig;
pub use speculation::Speculation;
#[cfg(feature = "async")]
pub use stream::PieceStream;
