//! What `quantize` and `convert` share: a model written as a GGUF file with its tokenizer.

use crate::error::UserError;
use crate::model_source::ModelSource;
use crate::output::{Output, Unit};
use anyhow::Result;
use metal_candle::Model;
use metal_candle::files::GgufValue;
use metal_candle::models::GgufExport;
use std::path::{Path, PathBuf};

/// Refuses a path unless it has the name of a GGUF file and nothing is there.
pub(crate) fn check_output(path: &Path) -> Result<()> {
    let is_named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if !is_named {
        let message = format!("`--output {}`: expected a name that ends in `.gguf`", path.display());
        return Err(UserError::new(message).into());
    }
    if path.symlink_metadata().is_ok() {
        let message = format!("`{}` is there already", path.display());
        return Err(UserError::new(message).with_hint("name a new file with --output; nothing is overwritten").into());
    }
    Ok(())
}

/// An export of a model in the types that it has, with the tokenizer and the name of its source.
pub(crate) fn export<'a>(model: &'a Model, source: &ModelSource) -> Result<GgufExport<'a>> {
    let mut export = GgufExport::new(model)?;
    match source.gguf() {
        Some(file) => export.copy_metadata(file),
        None => {
            let name = std::path::absolute(source.folder()).unwrap_or_else(|_| source.folder().to_path_buf());
            if let Some(name) = name.file_name() {
                export.put("general.name", GgufValue::Text(name.to_string_lossy().into_owned()));
            }
            return Err(UserError::new("a tokenizer from a folder").into());
        }
    }
    Ok(export)
}

/// Writes an export, with a bar, and returns the paths of its files.
pub(crate) fn write(
    export: &GgufExport,
    path: &Path,
    max_bytes: Option<usize>,
    output: Output,
) -> Result<Vec<PathBuf>> {
    let total: usize =
        export.tensors().iter().map(|tensor| tensor.kind.num_bytes(&tensor.spec.shape).unwrap_or(0)).sum();
    let mut bar = None;
    let mut written = 0;
    let paths = export.write(path, max_bytes.map(|bytes| bytes as u64), |num_bytes| {
        written += num_bytes;
        bar.get_or_insert_with(|| output.progress(total as u64, "writing", Unit::Bytes)).set(written as u64, "");
    })?;
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(paths)
}
