//! Generation: sampling, streaming and the generator.

mod generation;
mod generator;
mod sampler;
mod sampling;
mod sequence;
mod stop;
#[cfg(feature = "async")]
mod stream;

pub use crate::models::{KVCache, KVCacheConfig};
pub use generation::{Finish, FinishReason, Generation, GenerationConfig, Piece, Prompt};
pub use generator::{Generator, Pieces};
pub use sampler::{Choice, Sampler};
pub use sampling::{SamplingConfig, SamplingStrategy, sample_token};
#[cfg(feature = "async")]
pub use stream::PieceStream;
