//! `Family`: the model type, defaults and description of a model family.

use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;

/// A model family: a `model_type` of `config.json`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// The class name in transformers, which is written to `architectures`.
    pub(crate) architecture: &'static str,
    pub(crate) defaults: Defaults,
    /// Describes a model, and sets the fields of the configuration that depend on the family.
    pub(crate) describe: fn(&mut ModelConfig, &Keys) -> Result<Description>,
}
