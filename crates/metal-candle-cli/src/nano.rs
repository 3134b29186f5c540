//! The built-in model and its sample data.

use crate::output::UserError;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// The folder of the built-in model.
pub(crate) fn folder() -> Result<PathBuf> {
    let start = std::env::current_dir().unwrap_or_default();
    let found =
        start.ancestors().map(|folder| folder.join("assets/nano")).find(|folder| folder.join("config.json").exists());
    found.ok_or_else(|| UserError::new("there is no `assets/nano` in this folder or those above it").into())
}

/// The folder of its sample data.
pub(crate) fn data() -> Result<PathBuf> {
    Ok(folder()?.join(Path::new("data")))
}
