//! Computes the coefficients of one optimizer step and runs its CPU kernels.

use super::layout::Layout;
use super::settings::{AdamWConfig, MuonScale, OptimizerConfig};
use metal_candle_kernels as kernels;
use metal_candle_kernels::{AdafactorStep, AdamStep, LionStep, MuonStep, ScheduleFreeStep, SgdStep};

/// The coefficients of Muon's iteration.
const MUON_COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const MUON_EPS: f64 = 1e-7;

/// The coefficients of one step.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Adam(AdamStep),
    EightBit(AdamStep),
    Sgd(SgdStep),
    Lion(LionStep),
    Adafactor(AdafactorStep),
    /// With the coefficients of AdamW for parameters other than hidden matrices.
    Muon(MuonStep, MuonScale, AdamStep),
    ScheduleFree(ScheduleFreeStep),
}

impl Step {
    /// `step` counts from 1; `weight` is the share of the step in schedule-free AdamW's average.
    pub(super) fn new(config: &OptimizerConfig, step: usize, learning_rate: f64, grad_scale: f64, weight: f64) -> Self {
        let adamw = |config: AdamWConfig| AdamStep {
            learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
            is_decoupled: true,
            step,
            grad_scale,
        };
        match *config {
            OptimizerConfig::AdamW(config) => Self::Adam(adamw(config)),
            OptimizerConfig::AdamW8bit(config) => Self::EightBit(adamw(config)),
            OptimizerConfig::Adam(config) => Self::Adam(AdamStep {
                learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                weight_decay: config.weight_decay,
                is_decoupled: false,
                step,
                grad_scale,
            }),
            OptimizerConfig::Sgd(config) => Self::Sgd(SgdStep {
                learning_rate,
                momentum: config.momentum,
                nesterov: config.nesterov,
                weight_decay: config.weight_decay,
                grad_scale,
            }),
            OptimizerConfig::Lion(config) => Self::Lion(LionStep {
                learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                weight_decay: config.weight_decay,
                grad_scale,
            }),
            OptimizerConfig::Adafactor(config) => Self::Adafactor(AdafactorStep {
                learning_rate,
                beta2: 1.0 - (step as f64).powf(config.beta2_decay),
                eps: config.eps,
                clip_threshold: config.clip_threshold,
                least_scale: config.scale_parameter.then_some(config.least_scale),
                weight_decay: config.weight_decay,
                grad_scale,
            }),
            OptimizerConfig::Muon(config) => {
                let muon = MuonStep {
                    learning_rate,
                    momentum: config.momentum,
                    nesterov: config.nesterov,
                    weight_decay: config.weight_decay,
                    coefficients: MUON_COEFFICIENTS,
                    iterations: config.iterations,
                    eps: MUON_EPS,
                    grad_scale,
                };
                Self::Muon(muon, config.scale, adamw(config.adamw))
            }
            OptimizerConfig::ScheduleFreeAdamW(config) => Self::ScheduleFree(ScheduleFreeStep {
                learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                weight_decay: config.weight_decay,
                weight,
                step,
                grad_scale,
            }),
        }
    }

    /// Runs the CPU kernels. `buffer` holds parameters and f32 state, `codes` the codes of 8-bit moments.
    pub(super) fn run(&self, buffer: &mut [f32], codes: &mut [u8], gradients: &[f32], layout: &Layout) {
        let (parameters, mut rest) = buffer.split_at_mut(layout.num_parameters);
        let mut state = layout.slots.iter().map(|slot| rest.split_off_mut(..slot.len).unwrap_or_default());
        let mut next = || state.next().unwrap_or_default();
        let sections = &layout.sections;
        match self {
            Self::Adam(step) => kernels::adam(parameters, gradients, next(), next(), step, sections),
            Self::EightBit(step) => {
                let (first, second) = codes.split_at_mut(layout.num_codes);
                kernels::adamw_8bit(parameters, gradients, (first, next()), (second, next()), step, sections);
            }
            Self::Sgd(step) => {
                let moment = (!layout.slots.is_empty()).then(next);
                kernels::sgd(parameters, gradients, moment, step, sections);
            }
            Self::Lion(step) => kernels::lion(parameters, gradients, next(), step, sections),
            Self::Adafactor(step) => {
                kernels::adafactor_matrices(parameters, gradients, next(), next(), step, &layout.matrices);
                kernels::adafactor_vectors(parameters, gradients, next(), step, sections);
            }
            Self::Muon(step, scale, adamw) => {
                let scale = |rows, columns| scale.factor(rows, columns);
                kernels::muon(parameters, gradients, next(), step, scale, &layout.matrices);
                kernels::adam(parameters, gradients, next(), next(), adamw, sections);
            }
            Self::ScheduleFree(step) => {
                kernels::schedule_free_adamw(parameters, gradients, next(), next(), step, sections);
            }
        }
    }
}
