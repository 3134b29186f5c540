//! Trains the parameters of a model directly, all of them or some, instead of an adapter.

use super::trained::{Parameter, Trained};
use crate::error::{Error, Result};
use crate::files::SafetensorsFile;
use crate::models::{GradientOf, Model, save_model};
use crate::ops::{LowRankUpdates, Weight};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// The trained parameters of a model, in their order in the flat values.
pub(super) struct WholeParameters<'a> {
    model: &'a Model,
    /// The indices in [`Model::parameters`].
    indices: Vec<usize>,
}

impl<'a> WholeParameters<'a> {
    pub(super) fn new(model: &'a Model, indices: impl IntoIterator<Item = usize>) -> Self {
        Self { model, indices: indices.into_iter().collect() }
    }

    /// The names and tensors.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'a (String, Weight)> {
        self.indices.iter().map(|&index| &self.model.parameters()[index])
    }

    /// The trainable parameters.
    pub(super) fn describe(&self) -> Vec<Parameter> {
        let mut offset = 0;
        let mut parameters = Vec::with_capacity(self.indices.len());
        for (&index, (name, tensor)) in self.indices.iter().zip(self.iter()) {
            let (len, shape) = (tensor.elem_count(), tensor.dims().to_vec());
            parameters.push(Parameter {
                name: name.clone(),
                offset,
                len,
                shape,
                gradient: GradientOf::Parameter(index),
            });
            offset += len;
        }
        parameters
    }

    /// The flat values, f32.
    pub(super) fn values(&self) -> Result<Tensor> {
        let flat = |weight: &Weight| Ok(weight.to_dtype(DType::F32)?.flatten_all()?.contiguous()?);
        let tensors = self.iter().map(|(_, weight)| flat(weight)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&tensors, 0)?)
    }

    /// Views of flat values, by the name of each parameter.
    pub(super) fn views(&self, values: &Tensor) -> Result<HashMap<String, Tensor>> {
        let mut offset = 0;
        let mut views = HashMap::with_capacity(self.indices.len());
        for (name, tensor) in self.iter() {
            let view = values.narrow(0, offset, tensor.elem_count())?.reshape(tensor.dims())?;
            offset += tensor.elem_count();
            views.insert(name.clone(), view);
        }
        Ok(views)
    }

    /// The flat values in the safetensors file at `path`, on the device of the model.
    pub(super) fn load(&self, path: &Path) -> Result<Tensor> {
        let file = SafetensorsFile::open(path)?;
        let mut tensors = Vec::with_capacity(self.indices.len());
        for (name, tensor) in self.iter() {
            let loaded = file.float_tensor(name, DType::F32)?;
            if loaded.dims() != tensor.dims() {
                return Err(Error::shape(name, format!("{:?}", tensor.dims()), loaded.dims()));
            }
            tensors.push(loaded.flatten_all()?);
        }
        Ok(Tensor::cat(&tensors, 0)?.to_device(&self.model.device().candle())?)
    }
}

/// All parameters of a model.
fn all(model: &Model) -> WholeParameters<'_> {
    WholeParameters::new(model, 0..model.parameters().len())
}

impl Trained for Model {
    fn trainable(&self) -> Vec<Parameter> {
        all(self).describe()
    }

    fn values(&self) -> Result<Tensor> {
        all(self).values()
    }

    fn with_values(&self, values: &Tensor) -> Result<Self> {
        Self::from_tensors(self.config().clone(), all(self).views(values)?, self.device())
    }

    fn run_model(&self) -> &Model {
        self
    }

    fn run_terms(&self) -> Result<Option<LowRankUpdates>> {
        Ok(None)
    }

    fn terms_are_copies(&self) -> bool {
        false
    }

    fn save_files(&self, folder: &Path) -> Result<()> {
        save_model(self, folder)
    }

    fn load_values(&self, folder: &Path) -> Result<Tensor> {
        all(self).load(&folder.join("model.safetensors"))
    }

    fn identity(&self) -> Value {
        json!("all parameters")
    }
}
