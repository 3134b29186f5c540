//! Optimizer steps as tensor operations, for devices without optimizer kernels.

use super::layout::Layout;
use super::settings::MuonScale;
use super::step::Step;
use crate::error::{Error, Result};
use candle_core::Tensor;
use metal_candle_kernels::{
    AdafactorStep, AdamStep, LionStep, MatrixSection, MuonStep, ScheduleFreeStep, Section, SgdStep,
};

/// Performs a step; `buffer` holds parameters and f32 state.
pub(super) fn step(buffer: &Tensor, gradients: &Tensor, layout: &Layout, step: &Step) -> Result<()> {
    let flat = Flat { buffer, gradients, layout };
    let sections = &layout.sections;
    match step {
        Step::Adam(step) => sections.iter().try_for_each(|section| flat.adam(section, 0, step)),
        Step::Sgd(step) => sections.iter().try_for_each(|section| flat.sgd(section, step)),
        Step::Lion(step) => sections.iter().try_for_each(|section| flat.lion(section, step)),
        Step::ScheduleFree(step) => sections.iter().try_for_each(|section| flat.schedule_free(section, step)),
        Step::Adafactor(step) => {
            layout.matrices.iter().try_for_each(|matrix| flat.adafactor_matrix(matrix, step))?;
            sections.iter().try_for_each(|section| flat.adafactor_vector(section, step))
        }
        Step::Muon(step, scale, adamw) => {
            layout.matrices.iter().try_for_each(|matrix| flat.muon(matrix, step, *scale))?;
            sections.iter().try_for_each(|section| flat.adam(section, 1, adamw))
        }
        Step::EightBit(_) => {
            Err(Error::Bug("8-bit moments reached the tensor operations, although they need the CPU kernels".into()))
        }
    }
}

struct Flat<'a> {
    buffer: &'a Tensor,
    gradients: &'a Tensor,
    layout: &'a Layout,
}

/// A range of the buffer, in a slot of the state or in the parameters.
#[derive(Clone, Copy)]
struct BufferRange {
    slot: Option<usize>,
    start: usize,
    len: usize,
}

fn decay(section: &Section, weight_decay: f64) -> f64 {
    if section.decays { weight_decay } else { 0.0 }
}

impl Flat<'_> {
    fn offset(&self, range: BufferRange) -> usize {
        let before = |slot| self.layout.slots[..slot].iter().map(|slot| slot.len).sum::<usize>();
        range.slot.map_or(0, |slot| self.layout.num_parameters + before(slot)) + range.start
    }

    fn get(&self, range: BufferRange) -> Result<Tensor> {
        Ok(self.buffer.narrow(0, self.offset(range), range.len)?)
    }

    fn put(&self, range: BufferRange, tensor: &Tensor) -> Result<()> {
        Ok(self.buffer.slice_set(&tensor.flatten_all()?.contiguous()?, 0, self.offset(range))?)
    }

    fn gradients(&self, section: &Section, scale: f64) -> Result<Tensor> {
        Ok((self.gradients.narrow(0, section.start, section.len)? * scale)?)
    }

    fn adam(&self, section: &Section, first_slot: usize, step: &AdamStep) -> Result<()> {
        let [parameters, m, v] = [None, Some(first_slot), Some(first_slot + 1)].map(|slot| section_of(section, slot));
        let weight_decay = decay(section, step.weight_decay);
        let learning_rate = step.learning_rate * section.rate;
        let (mut values, mut g) = (self.get(parameters)?, self.gradients(section, step.grad_scale)?);
        if step.is_decoupled {
            values = (values * (1.0 - learning_rate * weight_decay))?;
        } else {
            g = (g + (&values * weight_decay)?)?;
        }
        let first = ((self.get(m)? * step.beta1)? + (&g * (1.0 - step.beta1))?)?;
        let second = ((self.get(v)? * step.beta2)? + (g.sqr()? * (1.0 - step.beta2))?)?;
        let count = step.step as f64;
        let root = 1.0 / (1.0 - step.beta2.powf(count)).sqrt();
        let size = learning_rate / (1.0 - step.beta1.powf(count));
        let change = (first.div(&second.sqrt()?.affine(root, step.eps)?)? * size)?;
        self.put(parameters, &(values - change)?)?;
        self.put(m, &first)?;
        self.put(v, &second)
    }

    fn sgd(&self, section: &Section, step: &SgdStep) -> Result<()> {
        let [parameters, m] = [None, Some(0)].map(|slot| section_of(section, slot));
        let values = self.get(parameters)?;
        let g = self.gradients(section, step.grad_scale)?;
        let g = (g + (&values * decay(section, step.weight_decay))?)?;
        let change = if self.layout.slots.is_empty() {
            g
        } else {
            let moment = ((self.get(m)? * step.momentum)? + &g)?;
            self.put(m, &moment)?;
            if step.nesterov { (g + (moment * step.momentum)?)? } else { moment }
        };
        self.put(parameters, &(values - (change * (step.learning_rate * section.rate))?)?)
    }

    fn lion(&self, section: &Section, step: &LionStep) -> Result<()> {
        let [parameters, m] = [None, Some(0)].map(|slot| section_of(section, slot));
        let learning_rate = step.learning_rate * section.rate;
        let (moment, g) = (self.get(m)?, self.gradients(section, step.grad_scale)?);
        let direction = ((&moment * step.beta1)? + (&g * (1.0 - step.beta1))?)?;
        let keep = 1.0 - learning_rate * decay(section, step.weight_decay);
        let sign = direction.sign()?;
        self.put(parameters, &((self.get(parameters)? * keep)? - (sign * learning_rate)?)?)?;
        self.put(m, &((moment * step.beta2)? + (g * (1.0 - step.beta2))?)?)
    }

    fn schedule_free(&self, section: &Section, step: &ScheduleFreeStep) -> Result<()> {
        let [at_y, at_z, at_v] = [None, Some(0), Some(1)].map(|slot| section_of(section, slot));
        let learning_rate = step.learning_rate * section.rate;
        let (y, z) = (self.get(at_y)?, self.get(at_z)?);
        let g = self.gradients(section, step.grad_scale)?;
        let second = ((self.get(at_v)? * step.beta2)? + (g.sqr()? * (1.0 - step.beta2))?)?;
        let root = 1.0 / (1.0 - step.beta2.powf(step.step as f64)).sqrt();
        let change = g.div(&second.sqrt()?.affine(root, step.eps)?)?;
        let change = (change + (&y * decay(section, step.weight_decay))?)?;
        let moved = ((y * (1.0 - step.weight))? + (&z * step.weight)?)?;
        let rate_of_y = learning_rate * (1.0 - step.beta1 * (1.0 - step.weight));
        self.put(at_y, &(moved - (&change * rate_of_y)?)?)?;
        self.put(at_z, &(z - (change * learning_rate)?)?)?;
        self.put(at_v, &second)
    }

    fn adafactor_matrix(&self, matrix: &MatrixSection, step: &AdafactorStep) -> Result<()> {
        let MatrixSection { section, rows, columns, column_state } = matrix;
        let at_rows = BufferRange { slot: Some(0), start: section.state, len: *rows };
        let at_columns = BufferRange { slot: Some(1), start: *column_state, len: *columns };
        let g = self.gradients(section, step.grad_scale)?.reshape((*rows, *columns))?;
        let squares = (g.sqr()? + step.eps)?;
        let mixed = |old: Tensor, new: Tensor| (old * step.beta2)? + (new * (1.0 - step.beta2))?;
        let row_means = mixed(self.get(at_rows)?, squares.mean(1)?)?;
        let column_means = mixed(self.get(at_columns)?, squares.mean(0)?)?;
        let by_row = row_means.broadcast_div(&row_means.mean_all()?)?.sqrt()?.recip()?.unsqueeze(1)?;
        let by_column = column_means.sqrt()?.recip()?.unsqueeze(0)?;
        let update = g.broadcast_mul(&by_row)?.broadcast_mul(&by_column)?;
        self.put(at_rows, &row_means)?;
        self.put(at_columns, &column_means)?;
        self.adafactor_update(section, &update.flatten_all()?, step)
    }

    fn adafactor_vector(&self, section: &Section, step: &AdafactorStep) -> Result<()> {
        let at_means = section_of(section, Some(2));
        let g = self.gradients(section, step.grad_scale)?;
        let means = ((self.get(at_means)? * step.beta2)? + ((g.sqr()? + step.eps)? * (1.0 - step.beta2))?)?;
        self.put(at_means, &means)?;
        self.adafactor_update(section, &g.div(&means.sqrt()?)?, step)
    }

    fn adafactor_update(&self, section: &Section, update: &Tensor, step: &AdafactorStep) -> Result<()> {
        let parameters = section_of(section, None);
        let values = self.get(parameters)?;
        let root_mean_square = |tensor: &Tensor| tensor.sqr()?.mean_all()?.sqrt();
        let mut rate = Tensor::full(step.learning_rate as f32 * section.rate as f32, (), values.device())?;
        if let Some(least) = step.least_scale {
            rate = (rate * root_mean_square(&values)?.maximum(least)?)?;
        }
        let clip = (root_mean_square(update)? / step.clip_threshold)?.maximum(1.0)?;
        let change = update.broadcast_mul(&(&rate / clip)?)?;
        let decayed = values.broadcast_mul(&rate.affine(-decay(section, step.weight_decay), 1.0)?)?;
        self.put(parameters, &(decayed - change)?)
    }

    fn muon(&self, matrix: &MatrixSection, step: &MuonStep, scale: MuonScale) -> Result<()> {
        let MatrixSection { section, rows, columns, .. } = matrix;
        let [parameters, m] = [None, Some(0)].map(|slot| section_of(section, slot));
        let g = self.gradients(section, step.grad_scale)?;
        let moment = ((self.get(m)? * step.momentum)? + (&g * (1.0 - step.momentum))?)?;
        self.put(m, &moment)?;
        let direction =
            if step.nesterov { ((moment * step.momentum)? + (g * (1.0 - step.momentum))?)? } else { moment };
        let direction = direction.reshape((*rows, *columns))?;
        let is_tall = rows > columns;
        let mut x = if is_tall { direction.t()?.contiguous()? } else { direction };
        x = x.broadcast_div(&x.sqr()?.sum_all()?.sqrt()?.maximum(step.eps)?)?;
        let [a, b, c] = step.coefficients.map(f64::from);
        for _ in 0..step.iterations {
            let gram = x.matmul(&x.t()?)?;
            let factor = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
            x = ((&x * a)? + factor.matmul(&x)?)?;
        }
        let x = if is_tall { x.t()?.contiguous()? } else { x };
        let learning_rate = step.learning_rate * section.rate;
        let keep = 1.0 - learning_rate * decay(section, step.weight_decay);
        let change = (x.flatten_all()? * (learning_rate * scale.factor(*rows, *columns)))?;
        self.put(parameters, &((self.get(parameters)? * keep)? - change)?)
    }
}

fn section_of(section: &Section, slot: Option<usize>) -> BufferRange {
    BufferRange { slot, start: if slot.is_some() { section.state } else { section.start }, len: section.len }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{
        AdafactorConfig, AdamConfig, LionConfig, MuonConfig, Optimizer, OptimizerConfig, ParameterGroup,
        ScheduleFreeAdamWConfig, SgdConfig,
    };
    use super::*;
    use crate::models::GradientOf;
    use crate::training::Parameter;
    use candle_core::Device;

    fn parameters() -> Vec<Parameter> {
        let shapes = [("wide", vec![3, 40]), ("norm", vec![40]), ("tall", vec![40, 5]), ("embed_tokens", vec![9, 4])];
        let mut offset = 0;
        let mut parameters = Vec::new();
        for (name, shape) in shapes {
            let len = shape.iter().product();
            parameters.push(Parameter { name: name.into(), offset, len, shape, gradient: GradientOf::Parameter(0) });
            offset += len;
        }
        parameters
    }

    fn values(len: usize, seed: usize) -> Tensor {
        let values: Vec<f32> = (0..len).map(|i| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0).collect();
        Tensor::from_vec(values, len, &Device::Cpu).unwrap()
    }

    #[test]
    fn tensor_operations_and_kernels_agree() {
        let configs = [
            OptimizerConfig::default(),
            OptimizerConfig::Adam(AdamConfig { weight_decay: 0.1, ..AdamConfig::default() }),
            OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, nesterov: false, weight_decay: 0.1 }),
            OptimizerConfig::Sgd(SgdConfig { momentum: 0.8, nesterov: true, weight_decay: 0.1 }),
            OptimizerConfig::Lion(LionConfig::default()),
            OptimizerConfig::Adafactor(AdafactorConfig { weight_decay: 0.1, ..AdafactorConfig::default() }),
            OptimizerConfig::Adafactor(AdafactorConfig { scale_parameter: true, ..AdafactorConfig::default() }),
            OptimizerConfig::Muon(MuonConfig::default()),
            OptimizerConfig::ScheduleFreeAdamW(ScheduleFreeAdamWConfig { weight_decay: 0.1, ..Default::default() }),
        ];
        let parameters = parameters();
        let n = parameters.iter().map(|parameter| parameter.len).sum();
        let group = |parameter: &Parameter| match parameter.name.as_str() {
            "norm" => ParameterGroup { learning_rate_factor: 2.0, decays: false },
            _ => ParameterGroup::default(),
        };
        for config in configs {
            let mut by_kernels = Optimizer::new(&values(n, 0), &parameters, config, group).unwrap();
            let mut by_tensors = Optimizer::new(&values(n, 0), &parameters, config, group).unwrap();
            for count in 1..=5 {
                by_kernels.step(&values(n, count), 0.1, 0.5).unwrap();
                let numbers = by_tensors.begin(&values(n, count), 0.1, 0.5).unwrap();
                step(&by_tensors.buffer, &values(n, count), &by_tensors.layout, &numbers).unwrap();
                let (left, right) =
                    (by_kernels.buffer.to_vec1::<f32>().unwrap(), by_tensors.buffer.to_vec1::<f32>().unwrap());
                let difference = left.iter().zip(&right).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max);
                assert!(difference < 2e-5, "{config:?} step {count}: {difference}");
            }
        }
    }
}
