//! The gradients of a step: their sum, their norm and clipping.

use super::in_place::{change_with, part};
use crate::error::{Error, Result};
use crate::ops::adam;
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;

/// Gradients added up over the micro-batches of a step, in one flat f32 tensor.
#[derive(Debug)]
pub(crate) struct GradientSum(Tensor);

impl GradientSum {
    pub(crate) fn zeros(num_parameters: usize, device: &candle_core::Device) -> Result<Self> {
        Ok(Self(Tensor::zeros(num_parameters, DType::F32, device)?))
    }

    /// Adds `gradient` to the elements from `offset` on, or puts it there when it is the `first` of a step.
    pub(crate) fn add(&self, offset: usize, gradient: &Tensor, first: bool) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
        if first {
            self.0.slice_set(&gradient, 0, offset)?;
            return Ok(());
        }
        let sum = self.0.narrow(0, offset, gradient.elem_count())?;
        if !sum.device().is_cpu() {
            self.0.slice_set(&(sum + gradient)?, 0, offset)?;
            return Ok(());
        }
        change_with(&sum, &gradient, |sum, gradient| {
            for (sum, value) in sum.iter_mut().zip(gradient) {
                *sum += value;
            }
            Ok(())
        })
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// The Euclidean norm of all elements of an f32 tensor.
///
/// # Errors
/// The device fails.
pub fn global_norm(tensor: &Tensor) -> Result<f64> {
    if adam::has_kernels(tensor) && tensor.is_contiguous() {
        return Ok(f64::from(adam::sum_of_squares(tensor)?).sqrt());
    }
    if !tensor.device().is_cpu() {
        return Ok(f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt());
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => Ok(kernels::sum_of_squares(part(storage, layout)?).sqrt()),
        _ => Err(Error::Device("a tensor of the CPU is not there".into())),
    }
}

/// The factor that brings gradients of norm `norm` down to `max_norm`, as torch's `clip_grad_norm_`.
pub(crate) fn clip_factor(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn gradients_add_up_where_they_belong() {
        let sum = GradientSum::zeros(5, &Device::Cpu).unwrap();
        let gradient = Tensor::new(&[[1.0_f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        sum.add(1, &gradient, true).unwrap();
        sum.add(1, &gradient.t().unwrap(), false).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [0.0, 2.0, 5.0, 5.0, 8.0]);
        sum.add(1, &gradient, true).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn clipping_is_that_of_torch() {
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert!((clip_factor(4.0, Some(1.0)) - 1.0 / (4.0 + 1e-6)).abs() < 1e-15);
        assert_eq!(clip_factor(4.0, None), 1.0);
    }
}
