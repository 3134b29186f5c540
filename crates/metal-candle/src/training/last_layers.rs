//! Trains all parameters of the last decoder blocks.

use super::trained::{Parameter, Trained};
use super::whole_parameters::WholeParameters;
use crate::error::{Error, Result};
use crate::files::write_safetensors;
use crate::models::Model;
use crate::ops::LowRankUpdates;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
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
    /// The indices of the trained parameters in [`Model::parameters`].
    indices: Vec<usize>,
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
        let indices = (0..model.parameters().len()).filter(|&index| is_trained(&model.parameters()[index].0)).collect();
        Ok(Self { model: model.clone(), num_layers, indices })
    }

    /// The model, with the trained parameters in f32.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The number of trained blocks.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    fn parameters(&self) -> WholeParameters<'_> {
        WholeParameters::new(&self.model, self.indices.iter().copied())
    }
}

impl Trained for LastLayers {
    fn trainable(&self) -> Vec<Parameter> {
        self.parameters().describe()
    }

    fn values(&self) -> Result<Tensor> {
        self.parameters().values()
    }

    fn with_values(&self, values: &Tensor) -> Result<Self> {
        Ok(Self { model: self.model.with_parameters(self.parameters().views(values)?)?, ..self.clone() })
    }

    fn run_model(&self) -> &Model {
        &self.model
    }

    fn run_terms(&self) -> Result<Option<LowRankUpdates>> {
        Ok(None)
    }

    fn terms_are_copies(&self) -> bool {
        self.model.activation_dtype() != DType::F32
    }

    /// Writes the trained parameters only.
    fn save_files(&self, folder: &Path) -> Result<()> {
        let mut tensors = Vec::with_capacity(self.indices.len());
        for (name, tensor) in self.parameters().iter() {
            tensors.push((name, tensor.to_dtype(DType::F32)?));
        }
        write_safetensors(folder.join(TENSOR_FILE), &tensors, &[("format", "pt")])
    }

    fn load_values(&self, folder: &Path) -> Result<Tensor> {
        self.parameters().load(&folder.join(TENSOR_FILE))
    }

    fn identity(&self) -> Value {
        json!(format!("the last {} blocks", self.num_layers))
    }
}
