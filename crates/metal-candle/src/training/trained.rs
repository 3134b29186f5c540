//! The trait of what a trainer trains, and its implementation for adapters.

use crate::adapters::{LoRAAdapter, LoRAModule, SavedParameter};
use crate::error::{Error, Result};
use crate::models::{GradientOf, Model, Parameters, TokenRows, Trainable};
use crate::ops::LowRankTerms;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// A trainable tensor: where it is in the flat parameters, and which gradient is its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name, for messages.
    pub name: String,
    /// Where it begins.
    pub offset: usize,
    /// Its number of elements.
    pub len: usize,
    /// Its shape; a matrix lies there row by row.
    pub shape: Vec<usize>,
    /// Its gradient among [`Gradients`](crate::models::Gradients).
    pub gradient: GradientOf,
}

/// The trained ones among the model's own parameters.
pub(super) struct OfModel {
    places: Vec<usize>,
    rows: Vec<TokenRows>,
}

impl OfModel {
    pub(super) fn new<T: Trained>(trained: &T, parameters: &[Parameter]) -> Self {
        let place = |parameter: &Parameter| match parameter.gradient {
            GradientOf::Parameter(place) => Some(place),
            _ => None,
        };
        Self { places: parameters.iter().filter_map(place).collect(), rows: trained.token_rows() }
    }

    /// These and the low-rank terms.
    pub(super) fn with<'a>(&'a self, terms: Option<&'a LowRankTerms>) -> Trainable<'a> {
        Trainable { terms, parameters: Parameters::WithRows(&self.places, &self.rows) }
    }
}

/// What a [`Trainer`](super::Trainer) trains: a [`LoRAAdapter`], all parameters of a [`Model`], or those of its
/// [`LastLayers`](super::LastLayers).
pub trait Trained: Clone + Send + Sync + 'static {
    /// Its trainable tensors, in the order of their offsets.
    fn trainable(&self) -> Vec<Parameter>;

    /// A copy of all parameters: `[n]`, f32.
    ///
    /// # Errors
    /// The device fails.
    fn values(&self) -> Result<Tensor>;

    /// The same thing with views of `values` (`[n]`, f32) as its parameters.
    ///
    /// # Errors
    /// The shape is another.
    fn with_values(&self, values: &Tensor) -> Result<Self>;

    /// Returns what [`Trained::with_values`] returns, after `values` have changed. It may update copies that `self` holds in
    /// place, so nothing else may use `self` any more.
    ///
    /// # Errors
    /// As [`Trained::with_values`].
    fn refreshed(&self, values: &Tensor) -> Result<Self> {
        self.with_values(values)
    }

    /// The rows of embedding and head that are trained by themselves.
    fn token_rows(&self) -> Vec<TokenRows> {
        Vec::new()
    }

    /// The model that is run.
    fn run_model(&self) -> &Model;

    /// The low-rank terms that are trained; none when the model itself is.
    ///
    /// # Errors
    /// The device fails.
    fn run_terms(&self) -> Result<Option<LowRankTerms>>;

    /// Whether terms and model are copies that do not see changes of the parameters.
    fn terms_are_copies(&self) -> bool;

    /// Writes the parameters and all that is needed to use them into `folder`.
    ///
    /// # Errors
    /// A file cannot be written.
    fn save_files(&self, folder: &Path) -> Result<()>;

    /// The parameters in a folder of [`Trained::save_files`]: `[n]`, f32.
    ///
    /// # Errors
    /// A file is missing or damaged, or holds other tensors.
    fn load_values(&self, folder: &Path) -> Result<Tensor>;

    /// What must be the same when a run goes on.
    fn identity(&self) -> Value;

    /// Whether it can be trained as it is.
    ///
    /// # Errors
    /// The adapter holds tensors that this trainer would not update the way the program that wrote it does.
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
        let places: HashMap<&str, usize> = Trained::run_model(self)
            .parameters()
            .iter()
            .enumerate()
            .map(|(place, (name, _))| (name.as_str(), place))
            .collect();
        for saved in self.saved_parameters() {
            if let Some(&place) = places.get(saved.name.as_str()) {
                let (name, shape, offset) = (saved.name.clone(), saved.shape.clone(), saved.offset);
                let gradient =
                    if saved.rows.is_some() { GradientOf::Rows(place) } else { GradientOf::Parameter(place) };
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
            Some(TokenRows { place, ids: saved.rows.clone()? })
        };
        self.saved_parameters().iter().filter_map(rows_of).collect()
    }

    fn run_model(&self) -> &Model {
        Self::run_model(self)
    }

    fn run_terms(&self) -> Result<Option<LowRankTerms>> {
        self.terms().map(Some)
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
        let others = || Error::format(folder, "the adapter has other modules, ranks or another start");
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
                "training from an adapter that brings another `{name}`: fuse it into the model and train a new adapter"
            )));
        }
        let is_outside = |module: &&LoRAModule| module.layer.is_none();
        if self.ensure_weight_tying() && self.modules().iter().filter(is_outside).count() > 1 {
            return Err(Error::Unsupported(
                "training from an adapter whose `ensure_weight_tying` ties low-rank terms of embedding and head: they \
                 would be trained apart. Fuse it into the model and train a new adapter"
                    .into(),
            ));
        }
        Ok(())
    }
}
