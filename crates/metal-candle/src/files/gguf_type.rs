//! [`GgufType`]: the tensor types of GGUF files.

use candle_core::DType;
use metal_candle_kernels::BlockFormat;

/// The types of a tensor's elements in a GGUF file that this crate reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgufType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats (IEEE 754).
    F16,
    /// 16-bit floats: the upper halves of 32-bit floats.
    BF16,
    /// Quantized blocks.
    Blocks(BlockFormat),
}

impl GgufType {
    /// All types.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().chain(BlockFormat::ALL.map(Self::Blocks))
    }

    /// Whether weights can be quantized to this type; other types are read-only.
    pub fn is_writable(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => true,
            Self::Blocks(format) => format.is_writable(),
        }
    }

    /// The type with this id in `enum ggml_type`.
    pub fn from_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            30 => Some(Self::BF16),
            _ => BlockFormat::from_ggml_type(id).map(Self::Blocks),
        }
    }

    /// The id in `enum ggml_type`.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 30,
            Self::Blocks(format) => format.ggml_type(),
        }
    }

    /// The type with this name of ggml, in lower case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|kind| kind.name() == name)
    }

    /// The name in ggml, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Blocks(format) => format.name(),
        }
    }

    /// The name of the type with this id, including unsupported types.
    pub(crate) fn name_of(id: u32) -> String {
        const OTHERS: [(u32, &str); 9] = [
            (9, "q8_1"),
            (24, "i8"),
            (25, "i16"),
            (26, "i32"),
            (27, "i64"),
            (28, "f64"),
            (40, "nvfp4"),
            (41, "q1_0"),
            (42, "q2_0"),
        ];
        if let Some(kind) = Self::from_id(id) {
            return kind.name().into();
        }
        let name = OTHERS.iter().find(|(known, _)| *known == id);
        name.map_or_else(|| format!("unknown type {id}"), |(_, name)| (*name).into())
    }

    /// candle's dtype; none for quantized blocks.
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            Self::Blocks(_) => None,
        }
    }

    /// The type for a dtype; none if GGUF has no such type.
    pub fn of_dtype(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    /// The next type with more precision; none for f32.
    pub fn with_more_bits(self) -> Option<Self> {
        use BlockFormat::{
            IQ1M, IQ1S, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS, IQ4NL, IQ4XS, MXFP4, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1,
            Q5K, Q6K, Q8_0, TQ1_0, TQ2_0,
        };
        Some(match self {
            Self::F32 => return None,
            Self::F16 | Self::BF16 => Self::F32,
            Self::Blocks(Q8_0) => Self::F16,
            Self::Blocks(format) => Self::Blocks(match format {
                IQ1S | IQ1M | IQ2XXS | IQ2XS | IQ2S | Q2K | TQ1_0 | TQ2_0 => Q3K,
                IQ3XXS | IQ3S | Q3K => Q4K,
                Q4K | IQ4XS => Q5K,
                Q5K => Q6K,
                Q4_0 | Q4_1 | IQ4NL | MXFP4 => Q5_1,
                Q6K | Q5_0 | Q5_1 | Q8_0 => Q8_0,
            }),
        })
    }

    /// The number of elements of a block; rows are whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::Blocks(format) => format.len(),
            Self::F32 | Self::F16 | Self::BF16 => 1,
        }
    }

    /// The size in bytes of a tensor with this shape, whose last dimension is contiguous; none if its rows are not whole blocks
    /// or the size overflows.
    pub fn num_bytes(self, shape: &[usize]) -> Option<usize> {
        let (columns, others) = shape.split_last().unwrap_or((&1, &[]));
        let row = match self {
            Self::Blocks(format) => format.row_bytes(*columns)?,
            Self::F32 => columns.checked_mul(4)?,
            Self::F16 | Self::BF16 => columns.checked_mul(2)?,
        };
        others.iter().try_fold(row, |bytes, &size| bytes.checked_mul(size))
    }
}
