//! Refuses adapters with fully trained parameters for formats that store low-rank updates only.

use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};

/// Returns an error that names a fully trained parameter of the adapter, if it has one.
pub(super) fn low_rank_only(adapter: &LoRAAdapter, format: &str) -> Result<()> {
    let Some(saved) = adapter.saved_parameters().first() else { return Ok(()) };
    let what = match saved.name.rsplit('.').next() {
        _ if saved.rows.is_some() => "trained token rows (`trainable_token_indices`)",
        Some("bias") => "trained (`bias`)",
        _ => "trained in full",
    };
    let message = format!("`{}`: {what}, in {format}, which stores low-rank updates only", saved.name);
    Err(Error::Unsupported(message))
}
