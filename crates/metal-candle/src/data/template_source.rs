//! A chat template given beside a model folder instead of the folder's own.

use super::ChatTemplate;
use super::side_files::read_json_if_exists;
use crate::error::Result;
use serde_json::Value;
use std::path::Path;

impl ChatTemplate {
    /// The template with this source, with the special tokens of the model in `folder` as variables.
    ///
    /// # Errors
    /// The source is no valid template, or the folder's `tokenizer_config.json` cannot be read.
    pub fn for_folder(source: impl Into<String>, folder: impl AsRef<Path>) -> Result<Self> {
        let config = read_json_if_exists(&folder.as_ref().join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        Ok(Self::new(source)?.with_special_tokens(&config))
    }
}
