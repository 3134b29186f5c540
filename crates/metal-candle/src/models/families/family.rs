//! What a family is.

use crate::error::Result;
use crate::models::config::{Defaults, ModelConfig};
use crate::models::description::Description;
use crate::models::keys::Keys;

/// A `model_type` of `config.json`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// The class that transformers has for it, written into `architectures`.
    pub(crate) architecture: &'static str,
    pub(crate) defaults: Defaults,
    /// The description of a model; it sets the fields of the configuration that depend on the family.
    pub(crate) describe: fn(&mut ModelConfig, &Keys) -> Result<Description>,
}
