//! The element types of a key/value cache.

use crate::error::{Error, Result};
use candle_core::DType;
use metal_candle_kernels::BlockFormat;
use std::fmt;
use std::str::FromStr;

/// The type of the elements of a key/value cache.
///
/// `Q8_0` and `Q4_0` are ggml's blocks: 32 elements of a head share one f16 scale. Attention dequantizes a few rows at
/// a time. These types need a head width that is a multiple of 32, and run on the CPU only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the underscore separates two digits
pub enum KVCacheType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats (IEEE 754).
    F16,
    /// bfloat16.
    BF16,
    /// 8 bits with a scale: 8.5 bits per element.
    Q8_0,
    /// 4 bits with a scale: 4.5 bits per element.
    Q4_0,
}

impl KVCacheType {
    /// All types.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0];

    /// The name in ggml, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// The cache type for this dtype.
    #[must_use]
    pub fn from_dtype(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    /// The dtype of the cache's tensors; u8 for blocks.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8_0 | Self::Q4_0 => DType::U8,
        }
    }

    /// The block format, if the type is quantized.
    pub(crate) fn block_format(self) -> Option<BlockFormat> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q8_0 => Some(BlockFormat::Q8_0),
            Self::Q4_0 => Some(BlockFormat::Q4_0),
        }
    }

    /// The number of tensor elements that store a head of this width: its elements, or the bytes of its blocks, rounded
    /// up to whole blocks.
    pub(crate) fn row_len(self, head_dim: usize) -> usize {
        self.block_format().map_or(head_dim, |format| head_dim.div_ceil(format.len()) * format.bytes())
    }

    /// Checks that a head of this width is a whole number of blocks.
    ///
    /// # Errors
    /// The type is quantized, and the width is not a multiple of 32.
    pub fn check_head_dim(self, head_dim: usize) -> Result<()> {
        match self.block_format() {
            Some(format) if !head_dim.is_multiple_of(format.len()) => {
                let message = format!(
                    "expected a head width that is a multiple of {} for `{self}`, found {head_dim}; use `f16`",
                    format.len()
                );
                Err(Error::argument("kv_cache", message))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for KVCacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KVCacheType {
    type Err = Error;

    /// The type with this name.
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join("`, `");
            Error::argument("kv_cache", format!("expected one of `{known}`, found `{name}`"))
        })
    }
}
