//! Compiles a chat template that replaces the model's.

use super::side_files::read_json_if_exists;
use super::{ChatTemplate, Tokenizer};
use crate::error::Result;
use serde_json::Value;
use std::path::Path;

impl ChatTemplate {
    /// Compiles a template with the special tokens of the model in `folder` as variables.
    ///
    /// # Errors
    /// The source is not a valid template, or the folder's `tokenizer_config.json` cannot be read.
    pub fn for_folder(source: impl Into<String>, folder: impl AsRef<Path>) -> Result<Self> {
        let config = read_json_if_exists(&folder.as_ref().join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        Ok(Self::new(source)?.with_special_tokens(&config))
    }

    /// Compiles a template with the special tokens of `tokenizer` as variables.
    ///
    /// # Errors
    /// The source is not a valid template.
    pub fn for_tokenizer(source: impl Into<String>, tokenizer: &Tokenizer) -> Result<Self> {
        let mut template = Self::new(source)?;
        for (name, token) in [
            ("bos_token", tokenizer.bos_token()),
            ("eos_token", tokenizer.eos_token()),
            ("pad_token", tokenizer.pad_token()),
        ] {
            if let Some(token) = token {
                template = template.with_variable(name, &Value::from(token));
            }
        }
        Ok(template)
    }
}
