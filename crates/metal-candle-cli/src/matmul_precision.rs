//! Defines `--matmul-precision`, the flag for the precision of matrix products on the CPU.

use crate::output::Output;
use clap::{Args, ValueEnum};
use metal_candle::models::MatmulPrecision;
use metal_candle::{Device, Model};
use serde::{Deserialize, Serialize};

/// The type to which activations are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    /// Activations are not rounded.
    F32,
    /// Activations are rounded to bf16 in products with bf16 weights.
    Bf16,
}

/// The flag for the precision of matrix products.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct PrecisionArguments {
    /// Type to which the CPU rounds activations in products with bf16 weights; `bf16` is faster with AVX512-BF16 or AMX [default: f32].
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Model")]
    pub(crate) matmul_precision: Option<Precision>,
}

impl PrecisionArguments {
    /// The model with the requested precision.
    pub(crate) fn apply(self, model: Model) -> metal_candle::Result<Model> {
        apply(self.matmul_precision, model)
    }
}

/// The model with a requested precision.
pub(crate) fn apply(precision: Option<Precision>, model: Model) -> metal_candle::Result<Model> {
    match precision {
        None | Some(Precision::F32) => Ok(model),
        Some(Precision::Bf16) => {
            let model = model.with_matmul_precision(MatmulPrecision::Bf16)?;
            if !Device::multiplies_bf16() {
                Output::warn(
                    "`--matmul-precision bf16` changes nothing: this processor has neither AVX512-BF16 nor AMX",
                );
            }
            Ok(model)
        }
    }
}
