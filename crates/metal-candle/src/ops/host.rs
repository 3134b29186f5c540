//! Reads CPU tensors as slices and edits them in place, so that kernels can use them.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};
use metal_candle_kernels::Matrix;

/// Elements on the CPU, readable as a slice.
pub(crate) struct Host<'a>(Elements<'a>);

enum Elements<'a> {
    /// A contiguous tensor.
    Tensor {
        storage: StorageRef<'a>,
        start: usize,
        end: usize,
    },
    Slice(Matrix<'a>),
}

impl<'a> From<Matrix<'a>> for Host<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self(Elements::Slice(matrix))
    }
}

impl<'a> Host<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::Unsupported(format!(
                "tensors that are not contiguous on the CPU: strides {:?}",
                layout.stride()
            )));
        };
        Ok(Self(Elements::Tensor { storage, start, end }))
    }

    /// The elements of an f32 tensor.
    pub(crate) fn f32(&self) -> Result<&[f32]> {
        match self.matrix()? {
            Matrix::F32(values) => Ok(values),
            Matrix::F16(_) | Matrix::BF16(_) => Err(Error::Unsupported("half-precision activations on the CPU".into())),
        }
    }

    /// The elements of a u8 tensor.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        match &self.0 {
            Elements::Tensor { storage, start, end } => match &**storage {
                Storage::Cpu(CpuStorage::U8(bytes)) => Ok(&bytes[*start..*end]),
                other => Err(Error::Bug(format!("a tensor of {:?} was read as bytes", other.dtype()))),
            },
            Elements::Slice(_) => Err(Error::Bug("floats were read as bytes".into())),
        }
    }

    /// The elements of an f32, f16 or bf16 tensor.
    pub(crate) fn matrix(&self) -> Result<Matrix<'_>> {
        let (storage, range) = match &self.0 {
            Elements::Tensor { storage, start, end } => (storage, *start..*end),
            Elements::Slice(matrix) => return Ok(*matrix),
        };
        match &**storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(Matrix::F32(&values[range])),
            Storage::Cpu(CpuStorage::F16(values)) => Ok(Matrix::F16(&values[range])),
            Storage::Cpu(CpuStorage::BF16(values)) => Ok(Matrix::BF16(&values[range])),
            other => {
                Err(Error::Unsupported(format!("tensors of {:?} on the CPU: expected f32, f16 or bf16", other.dtype())))
            }
        }
    }
}

/// A CPU tensor with these elements.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// `x` in f32 rounded to bf16.
pub(crate) fn rounded(x: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(metal_candle_kernels::round_to_bf16(Host::new(x)?.f32()?), x.shape(), &Device::Cpu)?)
}

/// Whether this project's CPU kernels support the tensor: f32 on the CPU.
pub(crate) fn on_cpu(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// Edits the elements of `x` in place. No other tensor may share its storage.
pub(crate) fn edit(x: Tensor, change: impl Fn(&mut [f32])) -> Result<Tensor> {
    x.inplace_op1(&Edit(change))?;
    Ok(x)
}

struct Edit<F>(F);

impl<F: Fn(&mut [f32])> InplaceOp1 for Edit<F> {
    fn name(&self) -> &'static str {
        "edit"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((start, end))) => {
                (self.0)(&mut values[start..end]);
                Ok(())
            }
            _ => candle_core::bail!("only contiguous f32 tensors can be edited in place"),
        }
    }
}
