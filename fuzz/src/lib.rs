//! What the fuzz targets run, and the mutator of the bounded run on stable.

mod bodies;
mod mutate;

pub use bodies::*;
pub use mutate::Mutator;
