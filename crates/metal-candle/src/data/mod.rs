//! Data: tokenizers, chat templates, datasets and packing.

mod dataset;

pub use dataset::{Dataset, Sample, Source};
