//! A step of Adam and norms of flat buffers by the kernels of Metal and CUDA.

use super::gpu::{self, Arg, Grid, Kernel, Source};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use metal_candle_kernels::{AdamStep, Section};

/// The parts that the first pass of a norm leaves.
const PARTS: usize = 256;

/// Whether there are kernels for this buffer, whose elements they number by 32 bits.
pub(crate) fn has_kernels(buffer: &Tensor) -> bool {
    gpu::has_kernels(buffer) && buffer.dtype() == DType::F32 && u32::try_from(buffer.elem_count()).is_ok()
}

/// The sections as the kernel reads them.
pub(crate) fn table(sections: &[Section], device: &Device) -> Result<Tensor> {
    let words: Vec<u32> = sections
        .iter()
        .flat_map(|section| {
            let places = [section.start, section.len, section.state].map(|place| place as u32);
            [places[0], places[1], places[2], (section.rate as f32).to_bits(), u32::from(section.decays)]
        })
        .collect();
    let count = words.len();
    Ok(Tensor::from_vec(words, count, device)?)
}

/// One step over all sections, one launch. `buffer` holds parameters and, from the two places on, first and second moments.
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
    let parts = gpu::empty_f32(PARTS, x)?;
    let sum = gpu::empty_f32(1, x)?;
    let kernel = |name| Kernel::new(Source::Optimizer, name, DType::F32);
    let args = [Arg::In(x), Arg::Out(&parts)];
    gpu::launch(&kernel("sum_of_squares"), Grid::row(PARTS, 256), &args, &[x.elem_count().into()])?;
    gpu::launch(&kernel("sum_of_parts"), Grid::row(1, 256), &[Arg::In(&parts), Arg::Out(&sum)], &[PARTS.into()])?;
    Ok(sum.to_vec1::<f32>()?[0])
}
