//! Merges adapters into the weights of a model, and removes them again.

use super::LoRAAdapter;
use super::layout::{EMBEDDING_WEIGHT, HEAD_WEIGHT, LoRAModule, parameter};
use super::lora::with_rows;
use super::random::Random;
use crate::error::{Error, Result};
use crate::models::Model;
use candle_core::{DType, Tensor};
use std::collections::HashMap;

impl LoRAAdapter {
    /// Returns a model with the adapted weights (`W + scale * B A` for plain LoRA) and the saved parameters. Other weights
    /// are shared with `model`. If the adapter changes only one of a tied embedding and head, they are untied.
    ///
    /// The sum is computed in f32 and rounded to the dtype of the weights.
    ///
    /// # Errors
    /// `model` lacks a layer, or its shape differs.
    pub fn merge(&self, model: &Model) -> Result<Model> {
        self.merge_with(model, |_, sum, weight| Ok(sum.to_dtype(weight.dtype())?))
    }

    /// As [`LoRAAdapter::merge`], with the adapted weights in `dtype`. On a GPU they are converted to the model's dtype.
    ///
    /// # Errors
    /// As [`LoRAAdapter::merge`].
    pub fn merge_in(&self, model: &Model, dtype: DType) -> Result<Model> {
        self.merge_with(model, |_, sum, _| Ok(sum.to_dtype(dtype)?))
    }

    /// As [`LoRAAdapter::merge`], with stochastic rounding to bf16, so that changes smaller than half the distance of two
    /// bf16 values survive on average.
    ///
    /// # Errors
    /// As [`LoRAAdapter::merge`], or the weights are not bf16 on the CPU.
    pub fn merge_stochastically(&self, model: &Model, seed: u64) -> Result<Model> {
        if model.dtype() != DType::BF16 || !model.device().is_cpu() {
            let message = format!("expected a bf16 model on the CPU, found {} elsewhere", model.dtype().as_str());
            return Err(Error::argument("stochastic rounding", message));
        }
        self.merge_with(model, |name, sum, _| stochastically_rounded(sum, Random::new(seed, name)))
    }

    fn merge_with(
        &self,
        model: &Model,
        mut round: impl FnMut(&str, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Model> {
        let adapter = self.attach(model)?;
        let mut tensors = HashMap::new();
        for module in adapter.modules() {
            let name = format!("{}.weight", module.path);
            let weight = parameter(model, &name)?;
            let mut merged = (weight.to_dtype(DType::F32)? + adapter.change(module)?)?;
            if let Some(factors) = adapter.factors(module)? {
                merged = merged.broadcast_mul(&factors)?;
            }
            let rounded = round(&name, &merged, &weight)?;
            tensors.insert(name, rounded);
        }
        for saved in adapter.saved_parameters() {
            let weight = parameter(model, &saved.name)?;
            let mut tensor = adapter.saved_tensor(saved)?.to_dtype(weight.dtype())?.force_contiguous()?;
            if let Some(ids) = &saved.rows {
                tensor = with_rows(weight.force_contiguous()?, ids, &tensor)?;
            }
            tensors.insert(saved.name.clone(), tensor);
        }
        let is_tied = adapter.is_tied();
        if model.config().tie_word_embeddings && !is_tied && tensors.contains_key(EMBEDDING_WEIGHT) {
            let head = parameter(model, HEAD_WEIGHT)?;
            tensors.entry(HEAD_WEIGHT.into()).or_insert(head);
        }
        if tensors.is_empty() { Ok(model.clone()) } else { model.with_parameters(tensors) }
    }

    /// The inverse of [`LoRAAdapter::merge`], up to rounding to the dtype of the weights. Parameters that merging replaced
    /// are restored from the adapter's own model.
    ///
    /// # Errors
    /// `model` lacks a layer, or its shape differs.
    pub fn unmerge(&self, model: &Model) -> Result<Model> {
        let own = self.model();
        let was_tied = own.config().tie_word_embeddings && !model.config().tie_word_embeddings;
        let tensors = model.parameters().iter().map(|(name, weight)| Ok((name.clone(), weight.tensor()?)));
        let mut tensors: HashMap<String, Tensor> = tensors.collect::<Result<_>>()?;
        for module in self.modules() {
            let name = format!("{}.weight", module.path);
            let Some(weight) = tensors.get(&name) else {
                return Err(Error::argument("model", format!("has no tensor `{name}`")));
            };
            let device = weight.device();
            let mut unmerged = weight.to_dtype(DType::F32)?;
            if let Some(factors) = self.factors(module)? {
                unmerged = unmerged.broadcast_div(&factors.to_device(device)?)?;
            }
            unmerged = (unmerged - self.change(module)?.to_device(device)?)?;
            let unmerged = unmerged.to_dtype(weight.dtype())?;
            tensors.insert(name, unmerged);
        }
        let mut originals: Vec<&str> = self.saved_parameters().iter().map(|saved| saved.name.as_str()).collect();
        if was_tied {
            originals.push(EMBEDDING_WEIGHT);
        }
        for name in originals {
            let original = parameter(own, name)?.to_device(&model.device().candle())?;
            tensors.insert(name.into(), original.to_dtype(model.dtype())?);
        }
        let mut config = model.config().clone();
        if was_tied {
            config.tie_word_embeddings = true;
            tensors.remove(HEAD_WEIGHT);
        }
        Model::from_tensors(config, tensors, model.device())
    }

    /// The change of a module's weight, in the shape of the weight, f32.
    fn change(&self, module: &LoRAModule) -> Result<Tensor> {
        let (a, b) = self.matrices(module)?;
        let mut product = b.matmul(&a)?;
        if let Some((a, b)) = self.start(module)? {
            product = (product - b.matmul(&a)?)?;
        }
        let change = (product * module.scale)?;
        // the embedding is stored as `[vocab, hidden]`
        Ok(if module.is_embedding() { change.t()?.contiguous()? } else { change })
    }

    /// The factors on the rows of the adapted weight of a module with DoRA magnitudes (the columns of an embedding).
    fn factors(&self, module: &LoRAModule) -> Result<Option<Tensor>> {
        let Some(magnitudes) = self.magnitudes(module)? else { return Ok(None) };
        let weight = parameter(self.model(), &format!("{}.weight", module.path))?;
        let adapted = (weight.to_dtype(DType::F32)? + self.change(module)?)?;
        let across = usize::from(!module.is_embedding());
        let norms = adapted.sqr()?.sum_keepdim(across)?.sqrt()?;
        let shape = if module.is_embedding() { (1, module.out_features) } else { (module.out_features, 1) };
        Ok(Some((magnitudes.reshape(shape)? / norms)?))
    }
}

/// Rounds f32 values to bf16, up with a probability proportional to the distance from the lower value.
fn stochastically_rounded(values: &Tensor, mut random: Random) -> Result<Tensor> {
    let mut rounded = values.flatten_all()?.to_vec1::<f32>()?;
    for value in &mut rounded {
        // bf16 drops the lower half of the bits; a carry from it moves to the next value
        let noise = u32::from(random.bits());
        let bits = value.to_bits().saturating_add(noise) & 0xffff_0000;
        if f32::from_bits(bits).is_finite() {
            *value = f32::from_bits(bits);
        }
    }
    Ok(Tensor::from_vec(rounded, values.dims(), values.device())?.to_dtype(DType::BF16)?)
}
