//! Descriptions of kernels and launches, which do not depend on the device.

use crate::blocks::BlockFormat;
use candle_core::{DType, Tensor};

/// The source that follows the prelude of each backend.
#[cfg(any(feature = "cuda", feature = "metal"))]
const COMMON: &str = include_str!("../metal/common.metal");

/// The source before kernels that read weights of any format.
#[cfg(any(feature = "cuda", feature = "metal"))]
const LOADERS: &str = include_str!("../metal/block_loaders.metal");

/// A source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// RMSNorm and its gradients.
    Norm,
    /// Rotary embeddings, activations, biases, residuals, dropout and copies.
    Elementwise,
    /// The operations between the products of a block, with low-rank updates.
    Fused,
    /// The same kernels on the tensor cores of CUDA devices.
    TensorCoreFused,
    /// Products on Metal devices, several per launch.
    Product,
    /// Attention over a ragged batch or a KV cache, and its gradients.
    Attention,
    /// Decode step of a few tokens: embedding, decoder block and head.
    Decode,
    /// Attention of a decode step.
    DecodeAttention,
    /// Cross-entropy of logits.
    CrossEntropy,
    /// Optimizer steps over flat buffers, and norms.
    Optimizer,
    /// Sampling of tokens.
    Sampling,
    /// Dequantization.
    Blocks,
    /// Attention on the tensor cores of CUDA devices.
    TensorCoreAttention,
    /// Products of a few vectors with quantized weights on the tensor cores of CUDA devices.
    BlockProduct,
    /// Products with the factors of low-rank updates, and their gradients, on the tensor cores of CUDA devices.
    LowRank,
    /// Low-rank updates of rows with different adapters, in a decode step on CUDA devices.
    RowUpdates,
}

impl Source {
    /// The source without the prelude.
    pub fn text(self) -> &'static str {
        match self {
            Self::Norm => include_str!("../metal/norm.metal"),
            Self::Elementwise => include_str!("../metal/elementwise.metal"),
            Self::Fused => include_str!("../metal/fused.metal"),
            Self::TensorCoreFused => include_str!("../cuda/fused.cu"),
            Self::Product => include_str!("../metal/product.metal"),
            Self::Attention => include_str!("../metal/attention.metal"),
            Self::Decode => include_str!("../metal/decode.metal"),
            Self::DecodeAttention => include_str!("../metal/decode_attention.metal"),
            Self::CrossEntropy => include_str!("../metal/cross_entropy.metal"),
            Self::Optimizer => include_str!("../metal/optimizer.metal"),
            Self::Sampling => include_str!("../metal/sampling.metal"),
            Self::Blocks => include_str!("../metal/blocks.metal"),
            Self::TensorCoreAttention => include_str!("../cuda/attention.cu"),
            Self::BlockProduct => include_str!("../cuda/block_product.cu"),
            Self::LowRank => include_str!("../cuda/low_rank.cu"),
            Self::RowUpdates => include_str!("../cuda/row_updates.cu"),
        }
    }

    /// Whether the kernels read weights of any format.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    fn reads_blocks(self) -> bool {
        matches!(self, Self::Product | Self::Decode | Self::Blocks | Self::BlockProduct)
    }
}

/// The formats of the matrices that a kernel reads: the kernel's constant `FORMATS`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Formats(u32);

impl Formats {
    /// The id of a format in kernels; 0 if the matrix is not quantized.
    pub fn number(format: Option<BlockFormat>) -> usize {
        let index = format.and_then(|format| BlockFormat::ALL.iter().position(|other| *other == format));
        index.map_or(0, |index| index + 1)
    }

    /// Whether kernels read blocks of this format.
    pub fn has_loader(format: BlockFormat) -> bool {
        // formats with codebooks and ternary formats are dequantized when a model is loaded
        format.is_writable()
    }

    /// Adds a format.
    #[must_use]
    pub fn with(self, format: Option<BlockFormat>) -> Self {
        Self(self.0 | 1 << Self::number(format))
    }

    /// The value of the constant `FORMATS`: a bit for each format.
    pub fn constant(self) -> usize {
        self.0.max(1) as usize
    }

    /// Whether a format is quantized.
    pub fn has_blocks(self) -> bool {
        self.0 > 1
    }
}

impl FromIterator<Option<BlockFormat>> for Formats {
    fn from_iter<I: IntoIterator<Item = Option<BlockFormat>>>(formats: I) -> Self {
        formats.into_iter().fold(Self::default(), Self::with)
    }
}

#[cfg(feature = "cuda")]
impl Source {
    /// The maximum number of threads in a block of these kernels, if it is known before compilation. The compiler then limits
    /// the registers of a thread so that a block fits.
    pub(super) fn known_threads(self) -> Option<usize> {
        match self {
            Self::Decode | Self::DecodeAttention => None,
            Self::Norm | Self::CrossEntropy | Self::Sampling => Some(512),
            _ => Some(256),
        }
    }
}

/// A kernel for one element type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The source file.
    pub source: Source,
    /// The name of the function.
    pub name: &'static str,
    /// The type `T` in the source: f32, f16 or bf16.
    pub element: DType,
    /// Macros that are defined before the source.
    pub constants: Vec<(&'static str, u32)>,
}

impl Kernel {
    /// A kernel without constants.
    pub fn new(source: Source, name: &'static str, element: DType) -> Self {
        Self { source, name, element, constants: Vec::new() }
    }

    /// Adds a constant.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: usize) -> Self {
        self.constants.push((name, value as u32));
        self
    }

    /// The complete source to compile, with `prelude`.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(super) fn text(&self, prelude: &str) -> candle_core::Result<String> {
        use std::fmt::Write;
        let element = match self.element {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            other => candle_core::bail!("kernels support f32, f16 and bf16, found {}", other.as_str()),
        };
        let mut text = format!("#define ELEMENT {element}\n");
        if self.source == Source::TensorCoreAttention {
            let _ =
                writeln!(text, "#define T_F16 {}\n#define T_BF16 {}", u8::from(element == 1), u8::from(element == 2));
        }
        #[cfg(feature = "cuda")]
        if let Some(threads) = self.source.known_threads() {
            let _ = writeln!(text, "#define BLOCK_THREADS {threads}");
        }
        for (name, value) in &self.constants {
            // writing to a string cannot fail
            let _ = writeln!(text, "#define {name} {value}");
        }
        // this source is CUDA only and needs no prelude
        if self.source == Source::TensorCoreAttention {
            return Ok(text + self.source.text());
        }
        let mut loaders = "";
        if self.source.reads_blocks() {
            for format in BlockFormat::ALL {
                let (name, number) = (format.name().to_ascii_uppercase(), Formats::number(Some(format)));
                let _ = writeln!(text, "#define FORMAT_{name} {number}\n#define BYTES_{name} {}", format.bytes());
            }
            loaders = LOADERS;
        }
        Ok(text + prelude + COMMON + loaders + self.source.text())
    }
}

/// An argument of a kernel: a buffer, or none.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A contiguous input.
    In(&'a Tensor),
    /// A contiguous output, or a buffer that is updated in place.
    Out(&'a Tensor),
    /// No buffer; the kernel does not access this argument.
    None,
}

impl Arg<'_> {
    pub(super) fn tensor(&self) -> Option<&Tensor> {
        match self {
            Self::In(tensor) | Self::Out(tensor) => Some(tensor),
            Self::None => None,
        }
    }
}

/// A word of a kernel's structure of parameters.
#[derive(Debug, Clone, Copy)]
pub struct Word(pub u32);

impl From<usize> for Word {
    fn from(value: usize) -> Self {
        Self(value as u32)
    }
}

impl From<u32> for Word {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl From<f32> for Word {
    fn from(value: f32) -> Self {
        Self(value.to_bits())
    }
}

impl From<bool> for Word {
    fn from(value: bool) -> Self {
        Self(u32::from(value))
    }
}

/// The number of threadgroups (blocks) of a launch, and the threads in each.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// The number of groups in each dimension.
    pub groups: [usize; 3],
    /// The number of threads in a group: a multiple of 32.
    pub threads: usize,
    /// Dynamic shared memory of a group, in bytes; CUDA only.
    pub shared_bytes: usize,
}

impl Grid {
    /// Groups in one dimension.
    pub fn row(groups: usize, threads: usize) -> Self {
        Self { groups: [groups, 1, 1], threads, shared_bytes: 0 }
    }

    /// Groups in two dimensions.
    pub fn plane(groups: (usize, usize), threads: usize) -> Self {
        Self { groups: [groups.0, groups.1, 1], threads, shared_bytes: 0 }
    }

    /// Enough groups of 256 threads for `count` elements.
    pub fn elements(count: usize) -> Self {
        Self::row(count.div_ceil(256), 256)
    }
}
