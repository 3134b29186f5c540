//! Weights of a model, stored as tensors, mapped file ranges or quantized blocks, behind one interface.

use super::gpu::{self, Formats, Word};
use super::gpu_blocks::{GpuBlocks, MAX_WEIGHTS, block_product};
use super::host::{Host, tensor};
use super::quantized::Quantized;
use crate::error::{Error, Result};
use crate::files::Digest;
use candle_core::{DType, Device, Shape, Tensor};
use metal_candle_kernels::{BlockFormat, BlockMatrix, ElementType, MappedFile, MatmulPrecision, Matrix, widen};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A parameter of a model. Cloning is cheap.
///
/// It provides products, rows and norms. Callers do not need to know how it is stored.
#[derive(Debug, Clone)]
pub struct Weight {
    stored: Stored,
    precision: MatmulPrecision,
}

#[derive(Debug, Clone)]
enum Stored {
    Dense(Tensor),
    Mapped(Mapped),
    Quantized(Quantized),
    OnGpu(GpuBlocks),
}

/// A range of a mapped file, aligned for its element type.
#[derive(Debug, Clone)]
struct Mapped {
    file: Arc<MappedFile>,
    bytes: Range<usize>,
    shape: Shape,
    dtype: DType,
    element: ElementType,
}

impl From<Stored> for Weight {
    fn from(stored: Stored) -> Self {
        Self { stored, precision: MatmulPrecision::F32 }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Stored::Dense(tensor).into()
    }
}

impl Weight {
    /// The elements in a byte range of `file`, little-endian and row by row, without a copy. `None` if they cannot be
    /// used in place: `dtype` is not f32, f16 or bf16, or the range is not aligned for it or does not have the size of
    /// the shape.
    pub(crate) fn mapped(file: &Arc<MappedFile>, bytes: Range<usize>, dims: &[usize], dtype: DType) -> Option<Self> {
        let element = match dtype {
            DType::F32 => ElementType::F32,
            DType::F16 => ElementType::F16,
            DType::BF16 => ElementType::BF16,
            _ => return None,
        };
        let shape = Shape::from(dims);
        let matrix = file.matrix(bytes.clone(), element)?;
        (matrix.len() == shape.elem_count())
            .then(|| Stored::Mapped(Mapped { file: file.clone(), bytes, shape, dtype, element }).into())
    }

    /// A matrix of the quantized blocks in a byte range of `file`; `None` if the range does not have its size.
    pub(crate) fn mapped_blocks(
        file: &Arc<MappedFile>,
        bytes: Range<usize>,
        dims: (usize, usize),
        format: BlockFormat,
    ) -> Option<Self> {
        Some(Stored::Quantized(Quantized::mapped(file, bytes, dims, format)?).into())
    }

    /// A matrix of quantized blocks in memory; `None` if their number does not match its size.
    pub(crate) fn blocks(blocks: Vec<u8>, dims: (usize, usize), format: BlockFormat) -> Option<Self> {
        Some(Stored::Quantized(Quantized::in_memory(blocks, dims, format)?).into())
    }

    /// The weight with this precision of its products on the CPU.
    pub(crate) fn with_precision(mut self, precision: MatmulPrecision) -> Self {
        self.precision = precision;
        self
    }

    /// The precision of its products on the CPU.
    pub(crate) fn precision(&self) -> MatmulPrecision {
        self.precision
    }

    /// The block format, if the weight is quantized.
    pub fn block_format(&self) -> Option<BlockFormat> {
        match &self.stored {
            Stored::Quantized(quantized) => Some(quantized.format()),
            Stored::OnGpu(blocks) => Some(blocks.format()),
            Stored::Dense(_) | Stored::Mapped(_) => None,
        }
    }

    /// The memory of the elements, in bytes.
    pub fn num_bytes(&self) -> usize {
        match &self.stored {
            Stored::Quantized(quantized) => quantized.num_bytes(),
            Stored::OnGpu(blocks) => blocks.bytes().elem_count(),
            Stored::Dense(_) | Stored::Mapped(_) => self.elem_count() * self.dtype().size_in_bytes(),
        }
    }

    /// Whether the elements are in a mapped file, whose pages the system reads when they are used.
    pub fn is_mapped(&self) -> bool {
        match &self.stored {
            Stored::Mapped(_) => true,
            Stored::Quantized(quantized) => quantized.file().is_some(),
            Stored::Dense(_) | Stored::OnGpu(_) => false,
        }
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        match &self.stored {
            Stored::Quantized(quantized) => quantized.dims(),
            Stored::OnGpu(blocks) => blocks.dims(),
            Stored::Dense(tensor) => tensor.dims(),
            Stored::Mapped(mapped) => mapped.shape.dims(),
        }
    }

    /// The number of rows and columns of a matrix.
    ///
    /// # Errors
    /// The weight is not a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self.dims() {
            &[rows, columns] => Ok((rows, columns)),
            dims => Err(Error::argument("weight", format!("expected a matrix, found the shape {dims:?}"))),
        }
    }

    /// The number of elements.
    pub fn elem_count(&self) -> usize {
        self.dims().iter().product()
    }

    /// The dtype of the elements, or of the products of quantized blocks: f32 on the CPU.
    pub fn dtype(&self) -> DType {
        match &self.stored {
            Stored::Quantized(_) => DType::F32,
            Stored::OnGpu(blocks) => blocks.dtype(),
            Stored::Dense(tensor) => tensor.dtype(),
            Stored::Mapped(mapped) => mapped.dtype,
        }
    }

    /// The device of the elements. A mapped file is on the CPU.
    pub fn device(&self) -> &Device {
        match &self.stored {
            Stored::Dense(tensor) => tensor.device(),
            Stored::OnGpu(blocks) => blocks.bytes().device(),
            Stored::Mapped(_) | Stored::Quantized(_) => &Device::Cpu,
        }
    }

    /// The elements as a tensor: the tensor itself, or a copy of a range of a file.
    ///
    /// # Errors
    /// The file has been truncated or overwritten.
    pub fn tensor(&self) -> Result<Tensor> {
        match &self.stored {
            Stored::Dense(tensor) => Ok(tensor.clone()),
            Stored::Quantized(quantized) => quantized.tensor(),
            Stored::OnGpu(blocks) => blocks.tensor(),
            Stored::Mapped(mapped) => {
                let (bytes, dims) = (&mapped.file[mapped.bytes.clone()], mapped.shape.dims());
                let copy = Tensor::from_raw_buffer(bytes, mapped.dtype, dims, &Device::Cpu)?;
                mapped.check()?;
                Ok(copy)
            }
        }
    }

    /// The elements as a tensor of this dtype; see [`Weight::tensor`].
    ///
    /// # Errors
    /// The file has been truncated or overwritten, or the device fails.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        Ok(self.tensor()?.to_dtype(dtype)?)
    }

    /// The weight on `device`. A mapped weight stays mapped on the CPU, and is uploaded from the file to a GPU. On a
    /// GPU the products of quantized blocks are of type `dtype`; blocks that its kernels do not support are dequantized
    /// to `dtype`.
    pub(crate) fn to_device(&self, device: &Device, dtype: DType) -> Result<Self> {
        let mapped = match &self.stored {
            Stored::Dense(tensor) => return Ok(tensor.to_device(device)?.into()),
            Stored::Mapped(_) | Stored::Quantized(_) if device.is_cpu() => return Ok(self.clone()),
            Stored::Quantized(quantized) => return upload(quantized, device, dtype),
            Stored::OnGpu(blocks) if device.is_cpu() => return Ok(blocks.tensor()?.to_device(device)?.into()),
            Stored::OnGpu(blocks) => return Ok(Stored::OnGpu(blocks.to_device(device, dtype)?).into()),
            Stored::Mapped(mapped) => mapped,
        };
        let tensor = match mapped.matrix()? {
            Matrix::F32(values) => Tensor::from_slice(values, mapped.shape.dims(), device)?,
            Matrix::F16(values) => Tensor::from_slice(values, mapped.shape.dims(), device)?,
            Matrix::BF16(values) => Tensor::from_slice(values, mapped.shape.dims(), device)?,
        };
        mapped.check()?;
        Ok(tensor.into())
    }

    /// The elements, as the argument of a GPU kernel.
    ///
    /// # Errors
    /// The elements are quantized, or in a mapped file, which only the CPU can read.
    pub(crate) fn dense(&self) -> Result<&Tensor> {
        match &self.stored {
            Stored::Dense(tensor) => Ok(tensor),
            Stored::Mapped(_) | Stored::Quantized(_) | Stored::OnGpu(_) => {
                Err(Error::Bug("a GPU kernel received a mapped or quantized weight".into()))
            }
        }
    }

    /// The argument of a GPU kernel that supports any format: the elements, or the bytes of the blocks.
    ///
    /// # Errors
    /// The elements are in a mapped file, which only the CPU can read.
    pub(crate) fn stored(&self) -> Result<&Tensor> {
        match &self.stored {
            Stored::OnGpu(blocks) => Ok(blocks.bytes()),
            _ => self.dense(),
        }
    }

    /// The id of the format, as an argument of the kernels that read [`Self::stored`].
    pub(crate) fn format_word(&self) -> Word {
        Formats::number(self.block_format()).into()
    }

    /// Whether kernels can load eight weights of the matrix at once, with activations of type `dtype`.
    pub(crate) fn supports_vector_loads(&self, dtype: DType) -> bool {
        match &self.stored {
            Stored::Dense(tensor) => gpu::supports_vector_loads(tensor, dtype),
            Stored::OnGpu(blocks) => blocks.dtype() == dtype,
            Stored::Mapped(_) | Stored::Quantized(_) => false,
        }
    }

    /// `y = scale x W + beta y`, or with the transpose of W, on CUDA. `scratch` is a buffer of [`scratch_len`] weights;
    /// without it, memory may be allocated.
    ///
    /// [`scratch_len`]: super::gpu_blocks::scratch_len
    pub(crate) fn multiply_on_gpu(
        &self,
        y: &Tensor,
        x: &Tensor,
        is_transposed: bool,
        (scale, beta): (f32, f32),
        scratch: Option<&Tensor>,
    ) -> Result<()> {
        match &self.stored {
            Stored::OnGpu(blocks) => blocks.multiply(y, x, is_transposed, scale, beta, scratch),
            _ => gpu::product(y, (x, false), (self.dense()?, is_transposed), scale, beta),
        }
    }

    /// `y = x W^T` for weights that share `x`, on CUDA. With few vectors, quantized weights of the same format are
    /// multiplied in one launch.
    pub(crate) fn multiply_together(x: &Tensor, products: &[(&Self, &Tensor)], scratch: Option<&Tensor>) -> Result<()> {
        let of_blocks = products.iter().map(|(weight, y)| match &weight.stored {
            Stored::OnGpu(blocks) if blocks.supports_block_product(x, y) => Some((blocks, *y)),
            _ => None,
        });
        let blocks: Option<Vec<_>> = of_blocks.collect();
        let Some(blocks) = blocks.filter(|blocks| blocks.len() <= 3) else {
            return products.iter().try_for_each(|(w, y)| w.multiply_on_gpu(y, x, true, (1.0, 0.0), scratch));
        };
        for same in blocks.chunk_by(|a, b| a.0.format() == b.0.format() && a.1.dtype() == b.1.dtype()) {
            block_product(x, same, 1.0, 0.0)?;
        }
        Ok(())
    }

    /// The elements as a slice on the CPU.
    pub(super) fn host(&self) -> Result<Host<'_>> {
        match &self.stored {
            Stored::Dense(tensor) => Host::new(tensor),
            Stored::Mapped(mapped) => Ok(mapped.matrix()?.into()),
            Stored::Quantized(_) | Stored::OnGpu(_) => {
                Err(Error::Bug("quantized blocks were read as a slice of elements".into()))
            }
        }
    }

    /// The blocks of a quantized matrix.
    pub(super) fn block_matrix(&self) -> Result<Option<BlockMatrix<'_>>> {
        match &self.stored {
            Stored::Quantized(quantized) => quantized.matrix().map(Some),
            Stored::Dense(_) | Stored::Mapped(_) | Stored::OnGpu(_) => Ok(None),
        }
    }

    /// The bytes of a quantized matrix, block by block.
    ///
    /// # Errors
    /// It is not quantized, or its file has been truncated or overwritten.
    pub(crate) fn block_bytes(&self) -> Result<Vec<u8>> {
        match &self.stored {
            Stored::Quantized(quantized) => {
                let bytes = quantized.matrix()?.bytes().to_vec();
                quantized.check()?;
                Ok(bytes)
            }
            Stored::OnGpu(blocks) => Ok(blocks.bytes().to_vec1()?),
            Stored::Dense(_) | Stored::Mapped(_) => {
                Err(Error::Bug("a dense weight was read as quantized blocks".into()))
            }
        }
    }

    /// A SHA-256 of format, shape and elements.
    ///
    /// # Errors
    /// The file has been truncated or overwritten, or the device fails.
    pub(crate) fn digest(&self) -> Result<[u8; 32]> {
        let mut digest = Digest::new("weight");
        digest.add(self.block_format().map_or("", BlockFormat::name).as_bytes());
        self.dims().iter().for_each(|&size| digest.add_number(size as u64));
        if let Stored::Quantized(quantized) = &self.stored {
            digest.add(quantized.matrix()?.bytes());
            quantized.check()?;
            return Ok(digest.finish());
        }
        if self.block_format().is_some() {
            digest.add(&self.block_bytes()?);
            return Ok(digest.finish());
        }
        // in chunks, so that mapped weights are not copied as a whole
        let count = self.dims().first().copied().unwrap_or(0);
        for start in (0..count).step_by(ROWS_WIDENED) {
            digest.add_tensor(&self.narrow_rows(start, ROWS_WIDENED.min(count - start))?.tensor()?)?;
        }
        Ok(digest.finish())
    }

    /// The rows with these indices in `dtype`: `[ids, columns]`.
    ///
    /// # Errors
    /// An index is out of range, or the weight is not a matrix.
    pub fn rows(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        let (count, width) = self.dims2()?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= count) {
            return Err(Error::argument("ids", format!("expected row indices below {count}, found {id}")));
        }
        match &self.stored {
            Stored::Dense(tensor) => {
                Ok(tensor.index_select(&Tensor::new(ids, tensor.device())?, 0)?.to_dtype(dtype)?)
            }
            Stored::Quantized(quantized) => Ok(quantized.rows(ids)?.to_dtype(dtype)?),
            Stored::OnGpu(blocks) => Ok(blocks.rows(ids)?.to_dtype(dtype)?),
            Stored::Mapped(mapped) => {
                let mut rows = vec![0.0; ids.len() * width];
                let matrix = mapped.matrix()?;
                for (id, row) in ids.iter().zip(rows.chunks_exact_mut(width.max(1))) {
                    let range = *id as usize * width..(*id as usize + 1) * width;
                    match matrix {
                        Matrix::F32(values) => row.copy_from_slice(&values[range]),
                        Matrix::F16(values) => widen(&values[range], row),
                        Matrix::BF16(values) => widen(&values[range], row),
                    }
                }
                Ok(tensor(rows, (ids.len(), width))?.to_dtype(dtype)?)
            }
        }
    }

    /// Rows `start..start + len`, without a copy.
    ///
    /// # Errors
    /// The rows are out of range.
    pub fn narrow_rows(&self, start: usize, len: usize) -> Result<Self> {
        let stored = match &self.stored {
            Stored::Dense(tensor) => Stored::Dense(tensor.narrow(0, start, len)?),
            Stored::Quantized(quantized) => Stored::Quantized(quantized.narrow_rows(start, len)?),
            Stored::OnGpu(blocks) => Stored::OnGpu(blocks.narrow_rows(start, len)?),
            Stored::Mapped(mapped) => {
                let dims = mapped.shape.dims();
                let count = dims.first().copied().unwrap_or(0);
                if start.checked_add(len).is_none_or(|end| end > count) {
                    let message = format!(
                        "expected rows within the {count} rows of the weight, found {start} to {start} + {len}"
                    );
                    return Err(Error::argument("rows", message));
                }
                let row = mapped.bytes.len().checked_div(count).unwrap_or(0);
                let begin = mapped.bytes.start + start * row;
                let shape = Shape::from([&[len], &dims[1..]].concat());
                Stored::Mapped(Mapped { bytes: begin..begin + len * row, shape, ..mapped.clone() })
            }
        };
        Ok(Self { stored, ..*self })
    }

    /// The squared Euclidean norm of each row of a matrix: `[rows]`, f32.
    ///
    /// # Errors
    /// The device fails.
    pub fn row_norms_squared(&self) -> Result<Tensor> {
        let rows = self.dims2()?.0;
        let mut parts = Vec::new();
        // in chunks, so that half-precision weights are not widened as a whole
        for start in (0..rows).step_by(ROWS_WIDENED) {
            let part = self.narrow_rows(start, ROWS_WIDENED.min(rows - start))?.tensor()?.to_dtype(DType::F32)?;
            parts.push(part.sqr()?.sum(1)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// A zero gradient with its shape, f32.
    pub(crate) fn zero_gradient(&self) -> Result<Tensor> {
        if self.device().is_cpu() {
            return tensor(vec![0.0; self.elem_count()], self.dims());
        }
        Ok(Tensor::zeros(self.dims(), DType::F32, self.device())?)
    }
}

const ROWS_WIDENED: usize = 4096;

/// Uploads quantized blocks to a GPU, or dequantizes them if it has no loader for their format.
fn upload(quantized: &Quantized, device: &Device, dtype: DType) -> Result<Weight> {
    let matrix = quantized.matrix()?;
    if !Formats::has_loader(matrix.format()) {
        return Ok(quantized.tensor()?.to_dtype(dtype)?.to_device(device)?.into());
    }
    let dims = (matrix.rows(), matrix.columns());
    let blocks = GpuBlocks::upload(matrix.bytes(), dims, matrix.format(), dtype, device)?;
    quantized.check()?;
    Ok(Stored::OnGpu(blocks).into())
}

impl Mapped {
    fn check(&self) -> Result<()> {
        check(&self.file)
    }

    fn matrix(&self) -> Result<Matrix<'_>> {
        let matrix = self.file.matrix(self.bytes.clone(), self.element);
        matrix.ok_or_else(|| Error::Bug("a mapped weight is not aligned".into()))
    }
}

/// The mapped files of a model's weights.
#[derive(Debug)]
pub(crate) struct MappedFiles {
    /// Each file with the offset of one of its weights. The other weights are usually a multiple of a cache line away.
    files: Vec<(Arc<MappedFile>, usize)>,
    passes: AtomicU32,
}

/// The number of passes through a model before its files are copied. Loading and short runs read the files directly,
/// whose memory is shared between processes. A file that cannot be copied then, because another process reads it, is
/// tried again after twice as many passes each time: asking the system who shares a large file takes long.
const PASSES_BEFORE_COPY: u32 = 32;

impl MappedFiles {
    /// The mapped files of these weights.
    pub(crate) fn of<'a>(weights: impl Iterator<Item = &'a Weight>) -> Self {
        let mut files: Vec<(Arc<MappedFile>, usize)> = Vec::new();
        for weight in weights {
            let source = match &weight.stored {
                Stored::Dense(_) | Stored::OnGpu(_) => None,
                Stored::Mapped(Mapped { file, bytes, .. }) => Some((file, bytes.start)),
                Stored::Quantized(quantized) => quantized.file(),
            };
            if let Some((file, start)) = source
                && !files.iter().any(|(found, _)| Arc::ptr_eq(found, file))
            {
                files.push((file.clone(), start));
            }
        }
        Self { files, passes: AtomicU32::new(0) }
    }

    /// Ends a pass through the model. Fails if a file has been truncated or overwritten, because the results may be
    /// wrong. After [`PASSES_BEFORE_COPY`] passes the files are copied to private memory, where weights are read
    /// faster.
    pub(crate) fn finish_pass(&self) -> Result<()> {
        let passes = if self.files.is_empty() { 0 } else { self.passes.fetch_add(1, Ordering::Relaxed) };
        let is_long = passes >= PASSES_BEFORE_COPY && passes.is_power_of_two();
        for (file, first) in &self.files {
            check(file)?;
            if is_long {
                file.make_resident(*first).map_err(|error| Error::read(file.path(), error))?;
            }
        }
        Ok(())
    }
}

fn check(file: &MappedFile) -> Result<()> {
    file.check().map_err(|error| Error::read(file.path(), error))
}

/// The right operand of a product: an activation, a matrix of a low-rank update, or a weight.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    Tensor(&'a Tensor),
    Weight(&'a Weight),
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<'a> From<&'a Weight> for Operand<'a> {
    fn from(weight: &'a Weight) -> Self {
        Self::Weight(weight)
    }
}

impl<'a> Operand<'a> {
    pub(super) fn dims(self) -> &'a [usize] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::Weight(weight) => weight.dims(),
        }
    }

    /// The elements as a slice on the CPU.
    pub(super) fn host(self) -> Result<Host<'a>> {
        match self {
            Self::Tensor(tensor) => Host::new(tensor),
            Self::Weight(weight) => weight.host(),
        }
    }

    /// The precision of its products on the CPU.
    pub(super) fn precision(self) -> MatmulPrecision {
        match self {
            Self::Tensor(_) => MatmulPrecision::F32,
            Self::Weight(weight) => weight.precision,
        }
    }

    /// The blocks of a quantized weight.
    pub(super) fn block_matrix(self) -> Result<Option<BlockMatrix<'a>>> {
        match self {
            Self::Tensor(_) => Ok(None),
            Self::Weight(weight) => weight.block_matrix(),
        }
    }

    /// `y = scale x W + beta y`, or with the transpose of W, on CUDA.
    pub(super) fn multiply_on_gpu(
        self,
        y: &Tensor,
        x: &Tensor,
        is_transposed: bool,
        factors: (f32, f32),
    ) -> Result<()> {
        match self {
            Self::Tensor(tensor) => gpu::product(y, (x, false), (tensor, is_transposed), factors.0, factors.1),
            Self::Weight(weight) => weight.multiply_on_gpu(y, x, is_transposed, factors, None),
        }
    }

    /// `X W`, or with the transpose of W, by candle's products.
    pub(super) fn plain_product(self, x: &Tensor, is_transposed: bool) -> Result<Tensor> {
        let w = match self {
            Self::Tensor(tensor) => tensor.clone(),
            Self::Weight(Weight { stored: Stored::OnGpu(blocks), .. }) => {
                return blocks.plain_product(x, is_transposed, MAX_WEIGHTS);
            }
            Self::Weight(weight) => weight.tensor()?,
        };
        Ok(if is_transposed { x.matmul(&w.t()?)? } else { x.matmul(&w)? })
    }
}
