//! Optimizers that update all parameters in one flat buffer.

mod layout;
mod settings;
mod step;
mod tensors;

pub use layout::ParameterGroup;
pub use settings::{
    AdafactorConfig, AdamConfig, AdamWConfig, LionConfig, MuonConfig, MuonScale, OptimizerConfig,
    ScheduleFreeAdamWConfig, SgdConfig,
};

use super::in_place::{change_bytes, change_with};
use super::trained::Parameter;
use crate::error::{Error, Result};
use crate::ops::adam;
use candle_core::{DType, Tensor};
use layout::Layout;
use step::Step;

/// The state tensor with the point at which schedule-free AdamW takes gradients.
const TRAINING_POINT: &str = "training_point";
/// The state tensor with the largest learning rate so far and the sum of the averaging weights.
const AVERAGING: &str = "averaging";
const CODES: [&str; 2] = ["first_codes", "second_codes"];

/// Holds parameters and optimizer state in one f32 tensor and updates it in place.
///
/// Views of [`Optimizer::parameters`] see each update.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    layout: Layout,
    /// Parameters, then the slots of the layout.
    buffer: Tensor,
    /// The u8 codes of the first moments, then of the second moments.
    codes: Option<Tensor>,
    /// The sections as GPU kernels read them; created at first use.
    table: Option<Tensor>,
    average: Average,
    step: usize,
}

/// The state of schedule-free AdamW's average.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    highest_rate: f64,
    sum_of_weights: f64,
}

impl Average {
    /// Returns the share in the average of a step with this learning rate. The weight of a step is the square of the
    /// highest rate so far, so warm-up steps count less.
    fn add(&mut self, learning_rate: f64) -> f64 {
        self.highest_rate = self.highest_rate.max(learning_rate);
        let weight = self.highest_rate * self.highest_rate;
        self.sum_of_weights += weight;
        if self.sum_of_weights > 0.0 { weight / self.sum_of_weights } else { 0.0 }
    }
}

impl OptimizerConfig {
    /// The size of the state for these parameters, in bytes: what [`Optimizer::new`] allocates in addition to the
    /// parameters.
    ///
    /// # Errors
    /// The offsets of the parameters are not contiguous, or a shape does not match its number of elements.
    pub fn state_bytes(&self, parameters: &[Parameter]) -> Result<usize> {
        Ok(Layout::new(self, parameters, |_| ParameterGroup::default())?.state_bytes())
    }
}

impl Optimizer {
    /// Creates an optimizer of a copy of `values` with zero state; `group` returns the group of each parameter.
    ///
    /// # Shapes
    /// `values` is `[n]` in f32, where `n` is the number of elements of all `parameters` together.
    ///
    /// # Errors
    /// `values` has a different shape or dtype, the offsets of the parameters are not contiguous, a setting is out of its range,
    /// or the optimizer does not exist on this device.
    pub fn new(
        values: &Tensor,
        parameters: &[Parameter],
        config: impl Into<OptimizerConfig>,
        group: impl Fn(&Parameter) -> ParameterGroup,
    ) -> Result<Self> {
        let config = config.into();
        config.check()?;
        let layout = Layout::new(&config, parameters, group)?;
        let (n, device) = (layout.num_parameters, values.device());
        if values.dims() != [n] || values.dtype() != DType::F32 {
            return Err(Error::shape("parameters", format!("[{n}] in f32"), values.dims()));
        }
        if layout.num_codes > 0 && !device.is_cpu() {
            return Err(Error::Unsupported(format!(
                "the optimizer `{}` on a device other than the CPU",
                config.name()
            )));
        }
        let buffer = Tensor::zeros(n + layout.state_len(), DType::F32, device)?;
        let codes = match layout.num_codes {
            0 => None,
            count => Some(Tensor::zeros(2 * count, DType::U8, device)?),
        };
        let optimizer = Self { config, layout, buffer, codes, table: None, average: Average::default(), step: 0 };
        let values = values.contiguous()?;
        optimizer.buffer.slice_set(&values, 0, 0)?;
        if let OptimizerConfig::ScheduleFreeAdamW(_) = config {
            optimizer.buffer.slice_set(&values, 0, n)?;
        }
        Ok(optimizer)
    }

    /// The optimizer and its settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// The parameters at which gradients are taken: a view `[n]` that later steps update.
    ///
    /// # Errors
    /// The device fails.
    pub fn parameters(&self) -> Result<Tensor> {
        Ok(self.buffer.narrow(0, 0, self.layout.num_parameters)?)
    }

    /// The parameters to evaluate and save, if they differ from [`Optimizer::parameters`]: a copy `[n]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn averaged_parameters(&self) -> Result<Option<Tensor>> {
        let OptimizerConfig::ScheduleFreeAdamW(config) = &self.config else { return Ok(None) };
        let (y, n) = (self.parameters()?, self.layout.num_parameters);
        let z = self.buffer.narrow(0, n, n)?;
        // y = (1 - beta1) z + beta1 x
        Ok(Some((&y + ((z - &y)? * (1.0 - 1.0 / config.beta1))?)?))
    }

    /// The state by name: views that later steps update, and a few numbers. [`Optimizer::restore`] needs the state, the
    /// parameters (or the averaged ones) and [`Optimizer::step_count`].
    ///
    /// # Errors
    /// The device fails.
    pub fn state(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let mut state = Vec::new();
        let mut offset = self.layout.num_parameters;
        for slot in self.layout.slots.iter().filter(|slot| slot.len > 0) {
            state.push((slot.name, self.buffer.narrow(0, offset, slot.len)?));
            offset += slot.len;
        }
        if let Some(codes) = &self.codes {
            for (part, name) in CODES.into_iter().enumerate() {
                state.push((name, codes.narrow(0, part * self.layout.num_codes, self.layout.num_codes)?));
            }
        }
        if let OptimizerConfig::ScheduleFreeAdamW(_) = self.config {
            state.push((TRAINING_POINT, self.parameters()?));
            let Average { highest_rate, sum_of_weights } = self.average;
            state.push((AVERAGING, Tensor::new(&[highest_rate, sum_of_weights], &candle_core::Device::Cpu)?));
        }
        Ok(state)
    }

    /// The number of completed steps.
    pub fn step_count(&self) -> usize {
        self.step
    }

    /// Restores parameters, state and step count; `state` returns a tensor of [`Optimizer::state`] by name.
    ///
    /// # Shapes
    /// Each tensor has the shape and dtype that [`Optimizer::state`] returned, and does not share storage with this
    /// optimizer.
    ///
    /// # Errors
    /// A tensor is missing, or has the wrong shape or dtype.
    pub fn restore(&mut self, values: &Tensor, state: impl Fn(&str) -> Result<Tensor>, step: usize) -> Result<()> {
        let device = self.buffer.device();
        let fetch = |name: &str, len: usize, dtype: DType| -> Result<Tensor> {
            let tensor = state(name)?;
            if tensor.dims() != [len] || tensor.dtype() != dtype {
                let expected = format!("[{len}] in {}", dtype.as_str());
                return Err(Error::shape(&format!("`{name}` of the optimizer"), expected, tensor.dims()));
            }
            Ok(tensor.contiguous()?)
        };
        let n = self.layout.num_parameters;
        if values.dims() != [n] {
            return Err(Error::shape("parameters of the optimizer", format!("[{n}]"), values.dims()));
        }
        let mut offset = n;
        for slot in self.layout.slots.iter().filter(|slot| slot.len > 0) {
            self.buffer.slice_set(&fetch(slot.name, slot.len, DType::F32)?.to_device(device)?, 0, offset)?;
            offset += slot.len;
        }
        if let Some(codes) = &self.codes {
            for (part, name) in CODES.into_iter().enumerate() {
                let count = self.layout.num_codes;
                codes.slice_set(&fetch(name, count, DType::U8)?.to_device(device)?, 0, part * count)?;
            }
        }
        if let OptimizerConfig::ScheduleFreeAdamW(_) = self.config {
            self.buffer.slice_set(&fetch(TRAINING_POINT, n, DType::F32)?.to_device(device)?, 0, 0)?;
            let numbers = fetch(AVERAGING, 2, DType::F64)?.to_vec1::<f64>()?;
            self.average = Average { highest_rate: numbers[0], sum_of_weights: numbers[1] };
        } else {
            self.buffer.slice_set(&values.contiguous()?, 0, 0)?;
        }
        self.step = step;
        Ok(())
    }

    /// Performs one step with the gradients `gradient_scale * gradients`.
    ///
    /// # Shapes
    /// `gradients` is `[n]` in f32.
    ///
    /// # Errors
    /// The shape is wrong, or the device fails.
    pub fn step(&mut self, gradients: &Tensor, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        let step = self.begin(gradients, learning_rate, gradient_scale)?;
        if let Step::Adam(step) = &step
            && adam::has_kernels(&self.buffer)
        {
            let sections = &self.layout.sections;
            let table = match &self.table {
                Some(table) => table,
                None => self.table.insert(adam::table(sections, self.buffer.device())?),
            };
            let n = self.layout.num_parameters;
            let moments = (n, n + self.layout.slots[0].len);
            return adam::step(&self.buffer, &gradients.contiguous()?, (table, sections), moments, step);
        }
        if !self.buffer.device().is_cpu() {
            return tensors::step(&self.buffer, gradients, &self.layout, &step);
        }
        let (gradients, layout) = (gradients.contiguous()?, &self.layout);
        let Some(codes) = &self.codes else {
            return change_with(&self.buffer, &gradients, |buffer, gradients| {
                step.run(buffer, &mut [], gradients, layout);
                Ok(())
            });
        };
        change_bytes(codes, |codes| {
            let changed = change_with(&self.buffer, &gradients, |buffer, gradients| {
                step.run(buffer, codes, gradients, layout);
                Ok(())
            });
            changed.map_err(candle_core::Error::wrap)
        })?;
        Ok(())
    }

    /// Counts a step and returns its coefficients.
    fn begin(&mut self, gradients: &Tensor, learning_rate: f64, gradient_scale: f64) -> Result<Step> {
        let n = self.layout.num_parameters;
        if gradients.dims() != [n] {
            return Err(Error::shape("gradients", format!("[{n}]"), gradients.dims()));
        }
        self.step += 1;
        let weight = self.average.add(learning_rate);
        Ok(Step::new(&self.config, self.step, learning_rate, gradient_scale, weight))
    }
}
