//! Computes the initial values of a new adapter.

use super::initialization::{InitialFactors, Start};
use super::layout::{Layout, LoRAModule, parameter};
use super::lora::{LoRAAdapter, norms_squared};
use super::random::Random;
use crate::error::Result;
use crate::models::Model;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::HashMap;

/// Creates an adapter with initial values. If the initialization rounds weights, the adapter belongs to a model with the
/// rounded weights.
pub(super) fn initialize(model: &Model, layout: Layout, start: Start, seed: u64) -> Result<LoRAAdapter> {
    // each decomposition runs on one thread
    let mut factors: Vec<InitialFactors> =
        layout.modules.par_iter().map(|module| initialize_module(model, module, start, seed)).collect::<Result<_>>()?;
    let base = with_weights(model, &layout, &mut factors)?;
    let (mut values, mut subtracted) = (Vec::new(), Vec::new());
    reserve(&mut values, layout.num_parameters)?;
    reserve(&mut subtracted, layout.num_start)?;
    for (module, factors) in layout.modules.iter().zip(factors) {
        if module.use_dora {
            let magnitudes = magnitudes(&base, module, &factors)?;
            values.extend(factors.a.iter().chain(&factors.b).chain(&magnitudes));
        } else {
            values.extend(factors.a.iter().chain(&factors.b));
        }
        if module.start.is_some() {
            subtracted.extend(factors.a.into_iter().chain(factors.b));
        }
    }
    for saved in &layout.saved {
        let whole = parameter(&base, &saved.name)?;
        values.extend(match &saved.rows {
            Some(ids) => host_values(&whole.index_select(&Tensor::new(ids.as_slice(), whole.device())?, 0)?)?,
            None => host_values(&whole)?,
        });
    }
    LoRAAdapter::from_values(&base, layout, values, subtracted)
}

/// A and B of an initialization that depends on the weights, in the order of the layout.
pub(super) fn subtracted_values(model: &Model, layout: &Layout, start: Start) -> Result<Vec<f32>> {
    let modules: Vec<&LoRAModule> = layout.modules.iter().filter(|module| module.start.is_some()).collect();
    let factors: Vec<InitialFactors> =
        modules.into_par_iter().map(|module| initialize_module(model, module, start, 0)).collect::<Result<_>>()?;
    Ok(factors.into_iter().flat_map(|factors| factors.a.into_iter().chain(factors.b)).collect())
}

fn initialize_module(model: &Model, module: &LoRAModule, start: Start, seed: u64) -> Result<InitialFactors> {
    let mut random = Random::new(seed, &module.path);
    if module.is_embedding() {
        // PEFT defines no other initialization for embeddings
        let a = vec![0.0; module.num_a()];
        let b = (0..module.num_b()).map(|_| random.normal() as f32).collect();
        return Ok(InitialFactors { a, b, weight: None });
    }
    let weight =
        if start.needs_weights() { host_values(&parameter(model, &weight_name(module))?)? } else { Vec::new() };
    start.initialize((module.out_features, module.in_features), module.rank, module.scale, &weight, &mut random)
}

fn weight_name(module: &LoRAModule) -> String {
    format!("{}.weight", module.path)
}

/// The model with the rounded weights of the initialization.
fn with_weights(model: &Model, layout: &Layout, factors: &mut [InitialFactors]) -> Result<Model> {
    let mut replaced = HashMap::new();
    for (module, factors) in layout.modules.iter().zip(factors) {
        if let Some(weight) = factors.weight.take() {
            let name = weight_name(module);
            let original = parameter(model, &name)?;
            let rounded = Tensor::from_vec(weight, original.dims(), &Device::Cpu)?.to_dtype(original.dtype())?;
            replaced.insert(name, rounded.to_device(original.device())?);
        }
    }
    if replaced.is_empty() { Ok(model.clone()) } else { model.with_parameters(replaced) }
}

/// The row norms of the initial adapted weight.
fn magnitudes(base: &Model, module: &LoRAModule, factors: &InitialFactors) -> Result<Vec<f32>> {
    let has_effect = module.start.is_none() && factors.b.iter().any(|value| *value != 0.0);
    if !has_effect || module.is_embedding() {
        // the initial update is zero or subtracted, so the adapted weight equals the base weight
        return host_values(&norms_squared(base, module)?.sqrt()?);
    }
    let a = Tensor::from_slice(&factors.a, (module.rank, module.in_features), &Device::Cpu)?;
    let b = Tensor::from_slice(&factors.b, (module.out_features, module.rank), &Device::Cpu)?;
    let weight = parameter(base, &weight_name(module))?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let adapted = (weight + (b.matmul(&a)? * module.scale)?)?;
    host_values(&adapted.sqr()?.sum(1)?.sqrt()?)
}

fn host_values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn reserve(values: &mut Vec<f32>, count: usize) -> Result<()> {
    values
        .try_reserve_exact(count)
        .map_err(|_| crate::error::Error::argument("rank", format!("{count} parameters do not fit into memory")))
}
