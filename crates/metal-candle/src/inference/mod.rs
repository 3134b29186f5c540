//! Generation: sampling, streaming and the generator.

mod sampler;
mod sampling;

pub use crate::models::{KVCache, KVCacheConfig};
pub use sampler::{Choice, Sampler};
pub use sampling::{SamplingConfig, SamplingStrategy, sample_token};
