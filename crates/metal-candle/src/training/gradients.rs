//! The gradients of a step: their sum, their norm and clipping.

use super::in_place::{change_with, part};
use crate::error::{Error, Result};
use crate::ops::adam;
use crate::ops::products::add_scaled;
use candle_core::{DType, Tensor};
use metal_candle_kernels as kernels;

/// Gradients accumulated over the micro-batches of a step, in one flat f32 tensor.
#[derive(Debug)]
pub(crate) struct GradientSum(Tensor);

impl GradientSum {
    pub(crate) fn zeros(num_parameters: usize, device: &candle_core::Device) -> Result<Self> {
        Ok(Self(Tensor::zeros(num_parameters, DType::F32, device)?))
    }

    /// Adds each gradient to the elements from its offset on, or overwrites them if it is the `first` of a step. If all are
    /// views of `together` laid out like the offsets, they are added in one operation.
    pub(crate) fn add(&mut self, parts: &[(usize, &Tensor)], together: Option<&Tensor>, first: bool) -> Result<()> {
        let mut parts = parts.iter().copied().peekable();
        while let Some((offset, gradient)) = parts.next() {
            let Some((all, start)) = together.and_then(|all| Some((all, start_in(gradient, all)?))) else {
                self.add_one(offset, gradient, first)?;
                continue;
            };
            let mut len = gradient.elem_count();
            let follows = |(next, gradient): &(usize, &Tensor), len| {
                *next == offset + len && start_in(gradient, all) == Some(start + len)
            };
            while let Some((_, gradient)) = parts.next_if(|part| follows(part, len)) {
                len += gradient.elem_count();
            }
            if first && [all.elem_count(), self.0.elem_count()] == [len, len] {
                self.0 = all.clone();
            } else {
                self.add_one(offset, &all.narrow(0, start, len)?, first)?;
            }
        }
        Ok(())
    }

    fn add_one(&self, offset: usize, gradient: &Tensor, first: bool) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
        if first {
            self.0.slice_set(&gradient, 0, offset)?;
            return Ok(());
        }
        let sum = self.0.narrow(0, offset, gradient.elem_count())?;
        if !sum.device().is_cpu() {
            let added = add_scaled(sum, 1.0, &gradient)?;
            if start_in(&added, &self.0) != Some(offset) {
                self.0.slice_set(&added, 0, offset)?;
            }
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

/// The offset of the contiguous `part` in the flat tensor `all`, if it is a view of it.
fn start_in(part: &Tensor, all: &Tensor) -> Option<usize> {
    let ((of_part, layout), (of_all, all)) = (part.storage_and_layout(), all.storage_and_layout());
    let is_view = std::ptr::eq(&raw const *of_part, &raw const *of_all) && layout.is_contiguous();
    if is_view { layout.start_offset().checked_sub(all.start_offset()) } else { None }
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
        _ => Err(Error::Bug("a tensor on the CPU has no CPU storage".into())),
    }
}

/// The factor that scales gradients of norm `norm` down to `max_norm`, like `torch.nn.utils.clip_grad_norm_`.
pub(crate) fn clip_factor(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn gradients_are_added_at_their_offsets() {
        let mut sum = GradientSum::zeros(5, &Device::Cpu).unwrap();
        let gradient = Tensor::new(&[[1.0_f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        sum.add(&[(1, &gradient)], None, true).unwrap();
        sum.add(&[(1, &gradient.t().unwrap())], None, false).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [0.0, 2.0, 5.0, 5.0, 8.0]);
        sum.add(&[(1, &gradient)], None, true).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn adjacent_gradients_are_added_in_one_operation() {
        let all = Tensor::new(&[1.0_f32, 2.0, 3.0, 4.0, 5.0], &Device::Cpu).unwrap();
        let part = |start, len| all.narrow(0, start, len).unwrap();
        let mut sum = GradientSum::zeros(5, &Device::Cpu).unwrap();
        // a single part that fills the tensor: the sum is the tensor itself
        sum.add(&[(0, &part(0, 2)), (2, &part(2, 3))], Some(&all), true).unwrap();
        assert_eq!(start_in(sum.tensor(), &all), Some(0));
        // in another order, and one that is not a view of it
        let mut sum = GradientSum::zeros(6, &Device::Cpu).unwrap();
        let other = Tensor::new(&[10.0_f32], &Device::Cpu).unwrap();
        let parts = [(0, &part(3, 2)), (2, &other), (3, &part(0, 1)), (4, &part(1, 2))];
        sum.add(&parts, Some(&all), true).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [4.0, 5.0, 10.0, 1.0, 2.0, 3.0]);
        sum.add(&parts, Some(&all), false).unwrap();
        assert_eq!(sum.tensor().to_vec1::<f32>().unwrap(), [8.0, 10.0, 20.0, 2.0, 4.0, 6.0]);
    }

    #[test]
    fn clipping_matches_pytorch() {
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert!((clip_factor(4.0, Some(1.0)) - 1.0 / (4.0 + 1e-6)).abs() < 1e-15);
        assert_eq!(clip_factor(4.0, None), 1.0);
    }
}
