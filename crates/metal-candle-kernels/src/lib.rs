//! CPU kernels of metal-candle: plain slices in, slices out.

mod file;
pub mod sampling;

pub use file::{MappedFile, map_file};
