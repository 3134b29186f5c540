//! The types in which a key/value cache stores its elements.

use crate::error::{Error, Result};
use candle_core::DType;
use metal_candle_kernels::BlockFormat;
use std::fmt;
use std::str::FromStr;

/// The type of the elements of a key/value cache.
///
/// `Q8_0` and `Q4_0` are ggml's blocks of 32 elements of a head with one f16 scale. Attention dequantizes them a few rows at a
/// time. They need heads whose width is a multiple of 32, and run on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the underscore separates two digits
pub enum KVCacheType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats of IEEE 754.
    F16,
    /// The upper halves of 32-bit floats.
    BF16,
    /// 8 bits with a scale: 8.5 bits an element.
    Q8_0,
    /// 4 bits with a scale: 4.5 bits an element.
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

    /// The type that stores elements of this dtype as they are.
    #[must_use]
    pub fn from_dtype(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    /// The dtype of the tensors that hold the elements, or the bytes of blocks.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8_0 | Self::Q4_0 => DType::U8,
        }
    }

    /// The format of the blocks, if they are blocks.
    pub(crate) fn block_format(self) -> Option<BlockFormat> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q8_0 => Some(BlockFormat::Q8_0),
            Self::Q4_0 => Some(BlockFormat::Q4_0),
        }
    }

    /// Elements of the tensor that holds a head of this width: its elements, or the bytes of its blocks. A part of a block
    /// counts as a whole one.
    pub(crate) fn row_len(self, head_dim: usize) -> usize {
        self.block_format().map_or(head_dim, |format| head_dim.div_ceil(format.len()) * format.bytes())
    }

    /// Checks that heads of this width are whole blocks.
    ///
    /// # Errors
    /// The type is made of blocks, and the width is no multiple of 32.
    pub fn check_head_dim(self, head_dim: usize) -> Result<()> {
        match self.block_format() {
            Some(format) if !head_dim.is_multiple_of(format.len()) => {
                let message = format!(
                    "`{self}` stores heads of a multiple of {} elements, found heads of {head_dim}; choose `f16`",
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
