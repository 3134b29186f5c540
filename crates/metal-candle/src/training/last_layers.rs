//! Training the last decoder blocks as a whole.

use super::trained::{Parameter, Trained};
use crate::error::{Error, Result};
use crate::files::{SafetensorsFile, write_safetensors};
use crate::models::{GradientOf, Model};
use crate::ops::LowRankTerms;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// The file of the trained parameters in a checkpoint.
const TENSOR_FILE: &str = "last_layers.safetensors";

/// All parameters of the last blocks of a model, to be trained with [`Trainer::of`](super::Trainer::of); embedding, final
/// norm, head and the blocks below are frozen and may be in half precision.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// use metal_candle::training::{AdamWConfig, LRScheduler, LastLayers, Trainer, TrainingConfig};
///
/// let model = metal_candle::ModelLoader::new().load("model.safetensors")?;
/// let config = TrainingConfig {
///     num_epochs: 1,
///     lr_scheduler: LRScheduler::constant(2e-5),
///     optimizer_config: AdamWConfig::default(),
///     max_grad_norm: Some(1.0),
/// };
/// let trainer = Trainer::of(LastLayers::new(&model, 4)?, config)?;
/// println!("{} layers", trainer.latest().num_layers());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LastLayers {
    model: Model,
    num_layers: usize,
    /// The trained ones of [`Model::parameters`].
    places: Vec<usize>,
}

impl LastLayers {
    /// The last `num_layers` blocks of a model.
    ///
    /// # Errors
    /// The model has fewer blocks, or `num_layers` is 0.
    pub fn new(model: &Model, num_layers: usize) -> Result<Self> {
        let total = model.config().num_hidden_layers;
        if num_layers == 0 || num_layers > total {
            return Err(Error::argument("num_layers", format!("expected 1 to {total}, found {num_layers}")));
        }
        let is_trained = |name: &str| {
            let layer =
                name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            layer.is_some_and(|layer| layer + num_layers >= total)
        };
        let places = (0..model.parameters().len()).filter(|&place| is_trained(&model.parameters()[place].0)).collect();
        Ok(Self { model: model.clone(), num_layers, places })
    }

    /// The model, with the trained parameters in f32.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The number of trained blocks.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    fn tensors(&self) -> impl Iterator<Item = &(String, Tensor)> {
        self.places.iter().map(|&place| &self.model.parameters()[place])
    }
}

impl Trained for LastLayers {
    fn trainable(&self) -> Vec<Parameter> {
        let mut offset = 0;
        let mut parameters = Vec::with_capacity(self.places.len());
        for (&place, (name, tensor)) in self.places.iter().zip(self.tensors()) {
            let (len, shape) = (tensor.elem_count(), tensor.dims().to_vec());
            let gradient = GradientOf::Parameter(place);
            parameters.push(Parameter { name: name.clone(), offset, len, shape, gradient });
            offset += len;
        }
        parameters
    }

    fn values(&self) -> Result<Tensor> {
        let flat = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.contiguous();
        let tensors: Vec<Tensor> =
            self.tensors().map(|(_, tensor)| flat(tensor)).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&tensors, 0)?)
    }

    fn with_values(&self, values: &Tensor) -> Result<Self> {
        let mut offset = 0;
        let mut replaced = HashMap::with_capacity(self.places.len());
        for (name, tensor) in self.tensors() {
            let view = values.narrow(0, offset, tensor.elem_count())?.reshape(tensor.shape())?;
            offset += tensor.elem_count();
            replaced.insert(name.clone(), view);
        }
        Ok(Self { model: self.model.with_parameters(replaced)?, ..self.clone() })
    }

    fn run_model(&self) -> &Model {
        &self.model
    }

    fn run_terms(&self) -> Result<Option<LowRankTerms>> {
        Ok(None)
    }

    fn terms_are_copies(&self) -> bool {
        self.model.activation_dtype() != DType::F32
    }

    /// Writes the trained parameters alone.
    fn save_files(&self, folder: &Path) -> Result<()> {
        let mut tensors = Vec::with_capacity(self.places.len());
        for (name, tensor) in self.tensors() {
            tensors.push((name, tensor.to_dtype(DType::F32)?));
        }
        write_safetensors(folder.join(TENSOR_FILE), &tensors, &[("format", "pt")])
    }

    fn load_values(&self, folder: &Path) -> Result<Tensor> {
        let file = SafetensorsFile::open(folder.join(TENSOR_FILE))?;
        let mut tensors = Vec::with_capacity(self.places.len());
        for (name, tensor) in self.tensors() {
            let loaded = file.float_tensor(name, DType::F32)?;
            if loaded.dims() != tensor.dims() {
                return Err(Error::shape(name, format!("{:?}", tensor.dims()), loaded.dims()));
            }
            tensors.push(loaded.flatten_all()?);
        }
        Ok(Tensor::cat(&tensors, 0)?.to_device(&self.model.device().candle())?)
    }

    fn identity(&self) -> Value {
        json!(format!("the last {} blocks", self.num_layers))
    }
}
