//! AdamW (<https://arxiv.org/abs/1711.05101>, algorithm 2) over one flat buffer.

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor};
use metal_candle_kernels as kernels;
use serde_json::{Value, json};

/// Settings of [`AdamW`]; the learning rate comes from the schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the mean of the gradients.
    pub beta1: f64,
    /// Decay rate of the mean of their squares.
    pub beta2: f64,
    /// Added to the square root of the latter.
    pub eps: f64,
    /// Share of each parameter that is taken away in a step of learning rate 1, apart from the gradient.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamWConfig {
    pub(crate) fn check(&self) -> Result<()> {
        let checks = [
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1)),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2)),
            ("eps", self.eps, self.eps > 0.0 && self.eps.is_finite()),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0 && self.weight_decay.is_finite()),
        ];
        for (name, value, fits) in checks {
            if !fits {
                return Err(Error::argument(format!("optimizer_config.{name}"), format!("`{value}` is out of range")));
            }
        }
        Ok(())
    }

    pub(crate) fn to_json(self) -> Value {
        json!({
            "beta1": self.beta1.to_string(), "beta2": self.beta2.to_string(),
            "eps": self.eps.to_string(), "weight_decay": self.weight_decay.to_string(),
        })
    }
}

/// The optimizer: parameters and both moments side by side in one f32 tensor that is updated in place.
///
/// Views of [`AdamW::parameters`] see each update.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// `[3 n]`: parameters, first moments, second moments.
    buffer: Tensor,
    num_parameters: usize,
    step: usize,
}

impl AdamW {
    /// An optimizer of a copy of `parameters`, with moments of zero.
    ///
    /// # Shapes
    /// `parameters` is `[n]` in f32.
    ///
    /// # Errors
    /// `parameters` has another shape or dtype, or a setting is out of its range.
    pub fn new(parameters: &Tensor, config: AdamWConfig) -> Result<Self> {
        config.check()?;
        if parameters.rank() != 1 || parameters.dtype() != DType::F32 {
            return Err(Error::shape("parameters", "[n] in f32", parameters.dims()));
        }
        let num_parameters = parameters.elem_count();
        let buffer = Tensor::zeros(3 * num_parameters, DType::F32, parameters.device())?;
        let optimizer = Self { config, buffer, num_parameters, step: 0 };
        optimizer.buffer.slice_set(&parameters.contiguous()?, 0, 0)?;
        Ok(optimizer)
    }

    /// The parameters: a view `[n]` that later steps change.
    ///
    /// # Errors
    /// The device fails.
    pub fn parameters(&self) -> Result<Tensor> {
        Ok(self.buffer.narrow(0, 0, self.num_parameters)?)
    }

    /// First and second moments: views `[n]` that later steps change.
    ///
    /// # Errors
    /// The device fails.
    pub fn moments(&self) -> Result<(Tensor, Tensor)> {
        let n = self.num_parameters;
        Ok((self.buffer.narrow(0, n, n)?, self.buffer.narrow(0, 2 * n, n)?))
    }

    /// The number of steps done.
    pub fn step_count(&self) -> usize {
        self.step
    }

    /// Puts back what [`AdamW::parameters`], [`AdamW::moments`] and [`AdamW::step_count`] gave.
    ///
    /// # Shapes
    /// Each tensor is `[n]` in f32 and does not share its storage with this optimizer.
    ///
    /// # Errors
    /// A shape or dtype is another.
    pub fn restore(&mut self, parameters: &Tensor, first: &Tensor, second: &Tensor, step: usize) -> Result<()> {
        for (part, tensor) in [parameters, first, second].into_iter().enumerate() {
            if tensor.dims() != [self.num_parameters] {
                return Err(Error::shape(
                    "state of the optimizer",
                    format!("[{}]", self.num_parameters),
                    tensor.dims(),
                ));
            }
            self.buffer.slice_set(&tensor.contiguous()?, 0, part * self.num_parameters)?;
        }
        self.step = step;
        Ok(())
    }

    /// One step against `gradient_scale * gradients`.
    ///
    /// # Shapes
    /// `gradients` is `[n]` in f32.
    ///
    /// # Errors
    /// The shape is another, or the device fails.
    pub fn step(&mut self, gradients: &Tensor, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        if gradients.dims() != [self.num_parameters] {
            return Err(Error::shape("gradients", format!("[{}]", self.num_parameters), gradients.dims()));
        }
        self.step += 1;
        let step = kernels::AdamWStep {
            learning_rate,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            step: self.step,
            grad_scale: gradient_scale,
        };
        if self.buffer.device().is_cpu() {
            self.buffer.inplace_op2(&gradients.contiguous()?, &Update(step))?;
            return Ok(());
        }
        self.step_by_tensors(gradients, &step)
    }

    fn step_by_tensors(&self, gradients: &Tensor, step: &kernels::AdamWStep) -> Result<()> {
        let n = self.num_parameters;
        let count = step.step as f64;
        let (first, second) = self.moments()?;
        let gradients = (gradients * step.grad_scale)?;
        let first = ((first * step.beta1)? + (&gradients * (1.0 - step.beta1))?)?;
        let second = ((second * step.beta2)? + (gradients.sqr()? * (1.0 - step.beta2))?)?;
        let correction = 1.0 / (1.0 - step.beta2.powf(count)).sqrt();
        let denominator = second.sqrt()?.affine(correction, step.eps)?;
        let size = step.learning_rate / (1.0 - step.beta1.powf(count));
        let change = (first.div(&denominator)? * size)?;
        let decayed = (self.parameters()? * (1.0 - step.learning_rate * step.weight_decay))?;
        let parameters = (decayed - change)?;
        for (part, tensor) in [parameters, first, second].iter().enumerate() {
            self.buffer.slice_set(tensor, 0, part * n)?;
        }
        Ok(())
    }
}

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
        if sum.device().is_cpu() {
            sum.inplace_op2(&gradient, &Add)?;
        } else {
            self.0.slice_set(&(sum + gradient)?, 0, offset)?;
        }
        Ok(())
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

struct Update(kernels::AdamWStep);

impl InplaceOp2 for Update {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        buffer: &mut CpuStorage,
        buffer_layout: &Layout,
        gradients: &CpuStorage,
        gradients_layout: &Layout,
    ) -> candle_core::Result<()> {
        let gradients = part(gradients, gradients_layout)?;
        let n = gradients.len();
        let buffer = part_mut(buffer, buffer_layout)?;
        if buffer.len() != 3 * n {
            candle_core::bail!("adamw: {} gradients for a buffer of {}", n, buffer.len());
        }
        let (parameters, moments) = buffer.split_at_mut(n);
        let (first, second) = moments.split_at_mut(n);
        kernels::adamw(parameters, gradients, first, second, &self.0);
        Ok(())
    }
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add-assign"
    }

    fn cpu_fwd(
        &self,
        sums: &mut CpuStorage,
        sums_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> candle_core::Result<()> {
        for (sum, value) in part_mut(sums, sums_layout)?.iter_mut().zip(part(values, values_layout)?) {
            *sum += value;
        }
        Ok(())
    }
}

fn part<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("a contiguous f32 tensor is wanted"),
    }
}

fn part_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("a contiguous f32 tensor is wanted"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::float_cmp)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn tensor_operations_and_kernel_agree() {
        let values = |seed: usize| -> Tensor {
            let values: Vec<f32> = (0..50).map(|i| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0).collect();
            Tensor::from_vec(values, 50, &Device::Cpu).unwrap()
        };
        let mut by_kernel = AdamW::new(&values(0), AdamWConfig::default()).unwrap();
        let by_tensors = AdamW::new(&values(0), AdamWConfig::default()).unwrap();
        for step in 1..=5 {
            by_kernel.step(&values(step), 0.1, 0.5).unwrap();
            let numbers = kernels::AdamWStep {
                learning_rate: 0.1,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.01,
                step,
                grad_scale: 0.5,
            };
            by_tensors.step_by_tensors(&values(step), &numbers).unwrap();
            let (left, right) =
                (by_kernel.buffer.to_vec1::<f32>().unwrap(), by_tensors.buffer.to_vec1::<f32>().unwrap());
            assert!(left.iter().zip(&right).all(|(l, r)| (l - r).abs() < 1e-5), "step {step}: {left:?} {right:?}");
        }
    }

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
