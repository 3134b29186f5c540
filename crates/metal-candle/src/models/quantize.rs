//! Quantizes the matrices of a model, and moves models between devices and dtypes.

use super::gguf::{GgufNames, MixtureContext, QuantizationMixture};
use super::importance::Importance;
use super::model::Model;
use super::registry::{ParameterSpec, Role};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{GgufType, check_finite};
use crate::ops::Weight;
use candle_core::{DType, Tensor};
use half::f16;
use metal_candle_kernels::{BlockFormat, QuantizeError};
use regex::Regex;
use std::collections::HashMap;

/// The number of elements that are quantized at a time.
const ELEMENTS_AT_ONCE: usize = 1 << 24;

/// Settings for quantizing a model: a mixture, overrides for single tensors, and an importance matrix.
#[derive(Debug, Clone)]
pub struct Quantization {
    mixture: QuantizationMixture,
    /// Types for tensors with matching names; the first match applies.
    overrides: Vec<(Regex, GgufType)>,
    importance: Option<Importance>,
}

/// The progress of quantizing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizeProgress {
    /// Elements quantized so far.
    pub elements: usize,
    /// The total number of elements.
    pub num_elements: usize,
}

impl From<QuantizationMixture> for Quantization {
    fn from(mixture: QuantizationMixture) -> Self {
        Self { mixture, overrides: Vec::new(), importance: None }
    }
}

impl Quantization {
    /// Overrides the type of tensors whose names match `pattern`, a regular expression. It is matched against their
    /// names in GGUF files (`blk.0.ffn_down.weight`) and in checkpoints. If several patterns match, the first one
    /// applies.
    ///
    /// # Errors
    /// The pattern is not a regular expression, or the type cannot be written.
    pub fn with_type(mut self, pattern: &str, kind: GgufType) -> Result<Self> {
        if !kind.is_writable() {
            let known: Vec<&str> = GgufType::all().filter(|kind| kind.is_writable()).map(GgufType::name).collect();
            let message = format!("`{}` can only be read; expected one of `{}`", kind.name(), known.join("`, `"));
            return Err(Error::argument("tensor_type", message));
        }
        let wrong = |error: regex::Error| {
            let message = format!("`{pattern}`: expected a regular expression: {error}");
            Error::argument("tensor_type", message)
        };
        self.overrides.push((Regex::new(pattern).map_err(wrong)?, kind));
        Ok(self)
    }

    /// Overrides the type of one weight, named as in a checkpoint. It takes precedence over all other settings.
    #[must_use]
    pub fn with_type_of(mut self, weight: &str, kind: GgufType) -> Self {
        if let Ok(pattern) = Regex::new(&format!("^{}$", regex::escape(weight))) {
            self.overrides.insert(0, (pattern, kind));
        }
        self
    }

    /// Weights rounding errors by the importance of columns.
    #[must_use]
    pub fn with_importance(mut self, importance: Importance) -> Self {
        self.importance = Some(importance);
        self
    }

    /// The mixture.
    pub fn mixture(&self) -> QuantizationMixture {
        self.mixture
    }

    /// The type of each matrix of a model, by the name of the parameter.
    ///
    /// # Errors
    /// The blocks of a requested type do not fill the rows of a tensor.
    pub fn types(&self, model: &Model) -> Result<HashMap<String, GgufType>> {
        let config = model.config();
        let names = GgufNames::for_config(config).ok();
        let context = MixtureContext::new(config, self.importance.is_some());
        let mut types = HashMap::new();
        for spec in config.parameter_specs()?.into_iter().filter(is_matrix) {
            let in_file = names.and_then(|names| names.tensor(&spec.name));
            let matches = |(pattern, _): &&(Regex, GgufType)| {
                in_file.as_deref().is_some_and(|name| pattern.is_match(name)) || pattern.is_match(&spec.name)
            };
            let kind = match self.overrides.iter().find(matches) {
                Some((_, kind)) if spec.shape[1].is_multiple_of(kind.block_len()) => *kind,
                Some((_, kind)) => {
                    let (columns, kind, len) = (spec.shape[1], kind.name(), kind.block_len());
                    let message =
                        format!("`{}`: expected rows of blocks of {len} ({kind}), found rows of {columns}", spec.name);
                    return Err(Error::argument("tensor_type", message));
                }
                None => self.mixture.of(&spec.name, spec.shape[1], &context),
            };
            types.insert(spec.name, kind);
        }
        Ok(types)
    }
}

/// Whether a parameter is a matrix that can be quantized.
fn is_matrix(spec: &ParameterSpec) -> bool {
    spec.shape.len() == 2 && matches!(spec.role, Role::Matrix | Role::Embedding)
}

impl Model {
    /// A copy of the model with its matrices quantized, on the CPU. Matrices that already have their type are shared.
    ///
    /// # Errors
    /// The model is on a GPU, or an element is not finite or too large for its type.
    pub fn quantize(&self, quantization: &Quantization, mut progress: impl FnMut(QuantizeProgress)) -> Result<Self> {
        if !self.device().is_cpu() {
            return Err(Error::Unsupported("quantizing on a GPU; load the model on the CPU".into()));
        }
        let types = quantization.types(self)?;
        let num_elements = self
            .parameters()
            .iter()
            .filter(|(name, _)| types.contains_key(name))
            .map(|(_, weight)| weight.elem_count())
            .sum();
        let mut state = QuantizeProgress { elements: 0, num_elements };
        let mut weights = HashMap::new();
        for (name, weight) in self.parameters() {
            let Some(kind) = types.get(name).copied() else {
                weights.insert(name.clone(), weight.clone());
                continue;
            };
            let importance = quantization.importance.as_ref().and_then(|importance| importance.of(name));
            let quantized = convert(name, weight, kind, importance, |count| {
                state.elements += count;
                progress(state);
            })?;
            weights.insert(name.clone(), quantized);
        }
        Self::from_weights(self.config().clone(), weights, self.device())
    }
}

impl Model {
    /// The model on another device. On a GPU, dense parameters become `dtype`, the dtype of activations, and quantized
    /// ones stay quantized. On the CPU dtypes do not change, and weights that were quantized on a GPU are dequantized.
    ///
    /// # Errors
    /// The device has too little memory.
    pub fn to_device(&self, device: Device, dtype: DType) -> Result<Self> {
        let mut weights = HashMap::new();
        for (name, weight) in self.parameters() {
            let is_foreign = !device.is_cpu() && weight.block_format().is_none() && weight.dtype() != dtype;
            let weight = if is_foreign { weight.to_dtype(dtype)?.into() } else { weight.clone() };
            weights.insert(name.clone(), weight.to_device(&device.candle(), dtype)?);
        }
        Self::from_weights(self.config().clone(), weights, device)
    }

    /// The model with all its parameters in this dtype.
    ///
    /// # Errors
    /// An element is too large for the dtype.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let mut weights = HashMap::new();
        for (name, weight) in self.parameters() {
            weights.insert(name.clone(), narrowed(name, &weight.to_dtype(DType::F32)?, dtype)?.into());
        }
        Self::from_weights(self.config().clone(), weights, self.device())
    }
}

/// Converts a matrix to another type.
fn convert(
    name: &str,
    weight: &Weight,
    kind: GgufType,
    importance: Option<&[f32]>,
    mut progress: impl FnMut(usize),
) -> Result<Weight> {
    let (rows, columns) = weight.dims2()?;
    let is_there = match kind {
        GgufType::Blocks(format) => weight.block_format() == Some(format),
        _ => weight.block_format().is_none() && kind.dtype() == Some(weight.dtype()),
    };
    if is_there {
        progress(rows * columns);
        return Ok(weight.clone());
    }
    let at_once = (ELEMENTS_AT_ONCE / columns.max(1)).max(1);
    let (mut blocks, mut dense) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(at_once) {
        let len = at_once.min(rows - start);
        let values = weight.narrow_rows(start, len)?.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?;
        check_finite(name, &values)?;
        match kind {
            GgufType::Blocks(format) => {
                blocks.extend(quantize(name, &values.flatten_all()?.to_vec1()?, columns, format, importance)?);
            }
            _ => dense.push(narrowed(name, &values, kind.dtype().unwrap_or(DType::F32))?),
        }
        progress(len * columns);
    }
    match kind {
        GgufType::Blocks(format) => Weight::blocks(blocks, (rows, columns), format)
            .ok_or_else(|| Error::Bug(format!("the blocks of `{name}` do not have the size of their matrix"))),
        _ => Ok(Tensor::cat(&dense, 0)?.into()),
    }
}

fn quantize(
    name: &str,
    values: &[f32],
    columns: usize,
    format: BlockFormat,
    importance: Option<&[f32]>,
) -> Result<Vec<u8>> {
    format
        .quantize(values, columns, importance)
        .map_err(|error: QuantizeError| Error::argument(name, error.to_string()))
}

/// Converts finite values to a smaller dtype, if it can represent all of them.
fn narrowed(name: &str, values: &Tensor, dtype: DType) -> Result<Tensor> {
    if dtype == DType::F16 {
        let largest = values.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        if f16::from_f32(largest).is_infinite() {
            return Err(Error::argument(name, format!("an element of {largest} is too large for f16; use bf16")));
        }
    }
    Ok(values.to_dtype(dtype)?)
}
