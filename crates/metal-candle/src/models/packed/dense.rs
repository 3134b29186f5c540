//! Builds dense tensors from rows that are computed in parallel.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// A function that writes the row with an index.
pub(super) type RowFunction<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// A matrix in `dtype` on the CPU, whose rows are written by `row`; `None` if a finite value overflows in `dtype`.
pub(super) fn dense(shape: [usize; 2], dtype: DType, row: &RowFunction) -> Result<Option<Tensor>> {
    match dtype {
        DType::F32 => build::<f32>(shape, row),
        DType::F16 => build::<f16>(shape, row),
        DType::BF16 => build::<bf16>(shape, row),
        other => Err(Error::argument("dtype", format!("expected f32, f16 or bf16, found {}", other.as_str()))),
    }
}

trait Element: WithDType + Default {
    fn convert(values: &[f32], into: &mut [Self]);
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    fn convert(values: &[f32], into: &mut [Self]) {
        into.copy_from_slice(values);
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for f16 {
    fn convert(values: &[f32], into: &mut [Self]) {
        into.convert_from_f32_slice(values);
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for bf16 {
    fn convert(values: &[f32], into: &mut [Self]) {
        into.convert_from_f32_slice(values);
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

fn build<T: Element>([rows, columns]: [usize; 2], row: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<Option<Tensor>> {
    let mut elements = vec![T::default(); rows * columns];
    let fits = elements
        .par_chunks_mut(columns.max(1))
        .enumerate()
        .map_init(
            || vec![0.0; columns],
            |values, (index, into)| {
                row(index, values);
                T::convert(values, into);
                into.iter().zip(&*values).all(|(element, value)| element.is_finite() || !value.is_finite())
            },
        )
        .reduce(|| true, |left, right| left && right);
    if !fits {
        return Ok(None);
    }
    Ok(Some(Tensor::from_vec(elements, (rows, columns), &Device::Cpu)?))
}
