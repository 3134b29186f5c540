//! The trait [`Trained`] of adapters and models that a trainer can train, and its implementation for adapters.

use crate::adapters::{LoRAAdapter, LoRAModule, SavedParameter};
use crate::error::{Error, Result};
use crate::models::{GradientOf, Model, Parameters, TokenRows, Trainable};
use crate::ops::LowRankUpdates;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// A trainable tensor: its range in the flat parameters, and its gradient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// The name, for messages.
    pub name: String,
    /// The index of its first element in the flat parameters.
    pub offset: usize,
    /// The number of elements.
    pub len: usize,
    /// The shape; matrices are row-major.
    pub shape: Vec<usize>,
    /// Its entry in [`Gradients`](crate::models::Gradients).
    pub gradient: GradientOf,
}

/// The trained parameters of the model itself.
pub(super) struct OfModel {
    indices: Vec<usize>,
    rows: Vec<TokenRows>,
}

impl OfModel {
    pub(super) fn new<T: Trained>(trained: &T, parameters: &[Parameter]) -> Self {
        let index_of = |parameter: &Parameter| match parameter.gradient {
            GradientOf::Parameter(index) => Some(index),
            _ => None,
        };
        Self { indices: parameters.iter().filter_map(index_of).collect(), rows: trained.token_rows() }
    }

    /// These parameters and the low-rank updates.
    pub(super) fn with<'a>(&'a self, terms: Option<&'a LowRankUpdates>) -> Trainable<'a> {
        Trainable { low_rank: terms, parameters: Parameters::WithRows(&self.indices, &self.rows) }
    }
}

/// What a [`Trainer`](super::Trainer) trains: a [`LoRAAdapter`], all parameters of a [`Model`], or those of its
/// [`LastLayers`](super::LastLayers).
pub trait Trained: Clone + Send + Sync + 'static {
    /// The trainable tensors, in the order of their offsets.
    fn trainable(&self) -> Vec<Parameter>;

    /// A copy of all parameters: `[n]`, f32.
    ///
    /// # Errors
    /// The device fails.
    fn values(&self) -> Result<Tensor>;

    /// Returns a copy of `self` whose parameters are views of `values` (`[n]`, f32).
    ///
    /// # Errors
    /// The shape is wrong.
    fn with_values(&self, values: &Tensor) -> Result<Self>;

    /// Returns the result of [`Trained::with_values`] after `values` changed. It may update copies in `self` in place, so
    /// callers must not use `self` afterwards.
    ///
    /// # Errors
    /// As [`Trained::with_values`].
    fn refreshed(&self, values: &Tensor) -> Result<Self> {
        self.with_values(values)
    }

    /// The individually trained rows of embedding and head.
    fn token_rows(&self) -> Vec<TokenRows> {
        Vec::new()
    }

    /// The model of the forward pass.
    fn run_model(&self) -> &Model;

    /// The trained low-rank updates; none if the model itself is trained.
    ///
    /// # Errors
    /// The device fails.
    fn run_terms(&self) -> Result<Option<LowRankUpdates>>;

    /// Whether low-rank updates and model are copies, so that updates of the parameters do not change them.
    fn terms_are_copies(&self) -> bool;

    /// Writes the parameters, and everything required to use them, into `folder`.
    ///
    /// # Errors
    /// A file cannot be written.
    fn save_files(&self, folder: &Path) -> Result<()>;

    /// Loads the parameters that [`Trained::save_files`] wrote into `folder`: `[n]`, f32.
    ///
    /// # Errors
    /// A file is missing or damaged, or does not contain the expected tensors.
    fn load_values(&self, folder: &Path) -> Result<Tensor>;

    /// The settings that must not change when a run is resumed.
    fn identity(&self) -> Value;

    /// Returns an error if it cannot be trained.
    ///
    /// # Errors
    /// The adapter contains tensors that this trainer would update differently than the program that wrote it.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

impl Trained for LoRAAdapter {
    fn trainable(&self) -> Vec<Parameter> {
        let mut parameters = Vec::with_capacity(2 * self.modules().len());
        for module in self.modules() {
            let (num_a, number) = (module.num_a(), module.number);
            let mut push = |part: &str, offset, shape: Vec<usize>, gradient| {
                let (name, len) = (format!("{}.{part}", module.path), shape.iter().product());
                parameters.push(Parameter { name, offset, len, shape, gradient });
            };
            push("lora_A", module.offset, vec![module.rank, module.in_features], GradientOf::A(number));
            push("lora_B", module.offset + num_a, vec![module.out_features, module.rank], GradientOf::B(number));
            if module.use_dora {
                let (offset, shape) = (module.magnitude_offset(), vec![module.out_features]);
                push("lora_magnitude_vector", offset, shape, GradientOf::Magnitude(number));
            }
        }
        let indices: HashMap<&str, usize> = Trained::run_model(self)
            .parameters()
            .iter()
            .enumerate()
            .map(|(index, (name, _))| (name.as_str(), index))
            .collect();
        for saved in self.saved_parameters() {
            if let Some(&index) = indices.get(saved.name.as_str()) {
                let (name, shape, offset) = (saved.name.clone(), saved.shape.clone(), saved.offset);
                let gradient =
                    if saved.rows.is_some() { GradientOf::Rows(index) } else { GradientOf::Parameter(index) };
                let len = saved.num_parameters();
                parameters.push(Parameter { name, offset, len, shape, gradient });
            }
        }
        parameters
    }

    fn values(&self) -> Result<Tensor> {
        Ok(self.parameters().force_contiguous()?)
    }

    fn with_values(&self, values: &Tensor) -> Result<Self> {
        self.with_parameters(values.clone())
    }

    fn refreshed(&self, values: &Tensor) -> Result<Self> {
        self.with_parameters_in_place(values.clone())
    }

    fn token_rows(&self) -> Vec<TokenRows> {
        let parameters = Trained::run_model(self).parameters();
        let rows_of = |saved: &SavedParameter| {
            let place = parameters.iter().position(|(name, _)| *name == saved.name)?;
            Some(TokenRows { parameter: place, ids: saved.rows.clone()? })
        };
        self.saved_parameters().iter().filter_map(rows_of).collect()
    }

    fn run_model(&self) -> &Model {
        Self::run_model(self)
    }

    fn run_terms(&self) -> Result<Option<LowRankUpdates>> {
        self.low_rank_updates().map(Some)
    }

    fn terms_are_copies(&self) -> bool {
        self.model().activation_dtype() != DType::F32
            || self.saved_parameters().iter().any(|saved| saved.rows.is_some())
    }

    fn save_files(&self, folder: &Path) -> Result<()> {
        self.save(folder)
    }

    fn load_values(&self, folder: &Path) -> Result<Tensor> {
        let adapter = Self::load(self.model(), folder)?;
        let others = || {
            Error::format(
                folder,
                "the adapter differs from the one in training in its modules, ranks or initialization",
            )
        };
        self.parameters_with_start(&adapter)?.ok_or_else(others)
    }

    fn identity(&self) -> Value {
        let modules: Vec<Value> =
            self.modules().iter().map(|module| json!([module.path, module.rank, module.scale.to_string()])).collect();
        let mut identity = json!({"modules": modules, "dropout": self.dropout().to_string()});
        if self.use_dora() {
            identity["use_dora"] = json!(true);
        }
        if !self.saved_parameters().is_empty() {
            let names = self.saved_parameters().iter().map(|saved| saved.name.as_str());
            identity["saved"] = names.collect();
        }
        let rows =
            self.saved_parameters().iter().filter_map(|saved| saved.rows.as_ref().map(|rows| (&saved.name, rows)));
        let rows: Vec<_> = rows.collect();
        if !rows.is_empty() {
            identity["rows"] = json!(rows);
        }
        identity
    }

    fn check(&self) -> Result<()> {
        if let Some(name) = self.parameters_to_save().first() {
            return Err(Error::Unsupported(format!(
                "training from an adapter that replaces `{name}`: fuse it into the model and train a new adapter"
            )));
        }
        let is_outside = |module: &&LoRAModule| module.layer.is_none();
        if self.ensure_weight_tying() && self.modules().iter().filter(is_outside).count() > 1 {
            return Err(Error::Unsupported(
                "training from an adapter whose `ensure_weight_tying` ties the low-rank updates of embedding and head: the \
                trainer would update them separately. Fuse the adapter into the model and train a new one"
                    .into(),
            ));
        }
        Ok(())
    }
}
