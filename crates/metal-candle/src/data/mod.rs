//! Prepares training data and prompts: tokenizers, chat templates, datasets and packing.

mod chat;
mod dataset;
mod encode;
mod files;
mod gguf_bpe;
mod gguf_metadata;
#[cfg(test)]
mod gguf_metadata_tests;
mod gguf_pre_names;
mod gguf_pre_tokenizer;
mod gguf_scores;
mod gguf_splitting;
mod gguf_tokenizer;
mod gguf_vocabulary;
mod go_template;
#[cfg(test)]
mod go_template_tests;
mod jinja;
mod lines;
mod marked;
mod message;
mod modelfile;
mod packing;
mod random;
mod report;
mod rows;
mod sample;
mod side_files;
mod spans;
mod stream_decoder;
mod template_source;
mod token_bytes;
mod tokenizer;
mod tokenizer_files;
mod tokenizer_limits;
mod turn_end;

pub use chat::ChatTemplate;
pub use dataset::{Dataset, DatasetFiles, Datasets, SplitOptions};
pub use encode::RoleTokens;
pub use gguf_metadata::GgufTokenizer;
pub use message::Message;
pub use modelfile::Modelfile;
pub use packing::{PackingLimits, batch_of, pack};
pub use random::Random;
pub use report::{Bar, DataReport, Duplicate, Duplicates, FileReport, Lengths, Span, highlight};
pub use rows::Schema;
pub use sample::{DatasetOptions, Sample, Source, TrainedTurns};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::{Encoding, Tokenizer};
