//! Adam steps and gradient norms of flat buffers on Metal and CUDA.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AdamStep, Section};

/// The number of partial sums that the first pass of a norm computes.
const PARTIAL_SUMS: usize = 256;

/// Whether the kernels support this buffer: they index its elements with 32 bits.
pub(crate) fn has_kernels(buffer: &Tensor) -> bool {
    gpu::has_kernels(buffer) && buffer.dtype() == DType::F32 && u32::try_from(buffer.elem_count()).is_ok()
}

/// The sections, in the layout that the kernel reads.
pub(crate) fn table(sections: &[Section], device: &Device) -> Result<Tensor> {
    let words: Vec<u32> = sections
        .iter()
        .flat_map(|section| {
            let offsets = [section.start, section.len, section.state].map(|offset| offset as u32);
            [offsets[0], offsets[1], offsets[2], (section.rate as f32).to_bits(), u32::from(section.decays)]
        })
        .collect();
    let count = words.len();
    Ok(Tensor::from_vec(words, count, device)?)
}

/// One step over all sections, in one launch. `buffer` contains the parameters, and the first and second moments from
/// the offsets `moments` on.
pub(crate) fn step(
    buffer: &Tensor,
    gradients: &Tensor,
    (table, sections): (&Tensor, &[Section]),
    moments: (usize, usize),
    step: &AdamStep,
) -> Result<()> {
    let Some(last) = sections.last() else { return Ok(()) };
    let count = last.start + last.len;
    let power = |beta: f64| 1.0 - beta.powf(step.step as f64);
    let words = [
        count.into(),
        sections.len().into(),
        moments.0.into(),
        moments.1.into(),
        (step.learning_rate as f32).into(),
        (step.beta1 as f32).into(),
        (step.beta2 as f32).into(),
        (step.eps as f32).into(),
        (step.weight_decay as f32).into(),
        ((1.0 / power(step.beta2).sqrt()) as f32).into(),
        ((step.learning_rate / power(step.beta1)) as f32).into(),
        (step.grad_scale as f32).into(),
        step.is_decoupled.into(),
    ];
    let args = [Arg::Out(buffer), Arg::In(gradients), Arg::In(table)];
    gpu::launch(&Kernel::new(Source::Optimizer, "adam", DType::F32), Grid::elements(count), &args, &words)
}

/// The sum of the squares of all elements.
pub(crate) fn sum_of_squares(x: &Tensor) -> Result<f32> {
    let partial_sums = gpu::empty_f32(PARTIAL_SUMS, x)?;
    let sum = gpu::empty_f32(1, x)?;
    let kernel = |name| Kernel::new(Source::Optimizer, name, DType::F32);
    let args = [Arg::In(x), Arg::Out(&partial_sums)];
    gpu::launch(&kernel("sum_of_squares"), Grid::row(PARTIAL_SUMS, 256), &args, &[x.elem_count().into()])?;
    gpu::launch(
        &kernel("sum_of_parts"),
        Grid::row(1, 256),
        &[Arg::In(&partial_sums), Arg::Out(&sum)],
        &[PARTIAL_SUMS.into()],
    )?;
    Ok(sum.to_vec1::<f32>()?[0])
}
