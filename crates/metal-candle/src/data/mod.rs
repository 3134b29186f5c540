//! Data: tokenizers, chat templates, datasets and packing.

mod chat;
mod dataset;
mod message;
mod packing;
mod python;
mod random;
mod stream_decoder;
mod tokenizer;

pub use chat::ChatTemplate;
pub use dataset::{Dataset, Sample, Source};
pub use message::Message;
pub use packing::{PackingLimits, batch_of, pack};
pub use random::Random;
pub use stream_decoder::StreamDecoder;
pub use tokenizer::{Encoding, Tokenizer};
