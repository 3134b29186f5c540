//! CPU kernels of metal-candle: plain slices in, slices out.
//!
//! Each kernel is compiled for the baseline, AVX2 + FMA and AVX-512, and the best version for the machine is selected at run
//! time ([`isa`]). Work is split into tasks whose size depends only on the problem, so results do not depend on the number of
//! threads. All `unsafe` code of the workspace is in this crate.

// kernels must be inlined into the function compiled for the instruction set, otherwise they are compiled for the baseline
#![allow(clippy::inline_always)]

mod activation;
mod attention;
mod attention_backward;
mod blocks;
mod cross_entropy;
mod decomposition;
mod elementwise;
mod file;
mod gemm;
mod gemm_narrow;
mod gemm_rows;
mod gemm_tile;
pub mod gpu;
mod helpers;
mod isa;
mod levels;
mod low_rank;
mod math;
mod missing_pages;
#[cfg(feature = "nccl")]
mod nccl;
mod norm;
mod operand;
mod optimizer;
mod pack;
mod parallel;
mod rounding;
pub mod sampling;
mod small_pages;
#[cfg(test)]
mod testing;
mod tiles;

pub use activation::{Activation, activate, activate_backward, gated, gated_backward};
pub use attention::{AttentionShape, HeadRows, KeyValues, Mask, Span, attention};
pub use attention_backward::{Saved, attention_backward, sink_gradient};
pub use blocks::{
    BlockFormat, BlockMatrix, QuantizeError, block_products, block_row_products, block_transposed_products,
};
pub use cross_entropy::{LogitForm, Row, cross_entropy, cross_entropy_backward};
pub use decomposition::{SingularValues, qr, singular_values, singular_values_by_iteration};
pub use elementwise::{
    Pairs, add_bias, add_scaled, column_sums, dropout, dropout_threshold, rotary, round_to_bf16, scale_columns,
    scale_rows, uniform_noise,
};
pub use file::{ElementType, MappedFile, map_file};
pub use gemm::{gemm, gemm_sum, gemm_sum_to, packed_bytes};
pub use gemm_rows::{RowProduct, row_products};
pub use isa::{ISA_VARIABLE, Isa, LEVELS, isa};
pub use levels::{levels, multiplies_bf16};
pub use low_rank::{LowRankUpdate, add_low_rank_updates};
pub use math::{Element, narrow, widen};
#[cfg(feature = "nccl")]
pub use nccl::{Communicator, communicator_id};
pub use norm::{Norm, NormKind};
pub use operand::{MatmulPrecision, Matrix, Product, Start};
pub use optimizer::{
    AdafactorStep, AdamStep, BLOCK, LionStep, MatrixSection, MuonStep, ScheduleFreeStep, Section, SgdStep,
    adafactor_matrices, adafactor_vectors, adam, adamw_8bit, dynamic_codes, lion, muon, schedule_free_adamw, sgd,
    sum_of_squares,
};
pub use rounding::{round_to_int8, round_to_nf4};
pub use small_pages::prefer_small_pages;
