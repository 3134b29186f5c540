//! What formats of low-rank terms cannot hold.

use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};

/// Refuses an adapter with parameters that are trained as a whole, for a format that holds low-rank terms only.
pub(super) fn low_rank_only(adapter: &LoRAAdapter, format: &str) -> Result<()> {
    let Some(saved) = adapter.saved_parameters().first() else { return Ok(()) };
    let what = match saved.name.rsplit('.').next() {
        _ if saved.rows.is_some() => "rows of single tokens (`trainable_token_indices`)",
        Some("bias") => "trained (`bias`)",
        _ => "trained as a whole",
    };
    let message = format!("`{}`: {what}, in {format}, which holds low-rank terms only", saved.name);
    Err(Error::Unsupported(message))
}
