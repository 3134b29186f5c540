//! Differentiable operations: the only place that knows backends and gradients.

mod low_rank;

pub use low_rank::{LowRank, LowRankTerms};
