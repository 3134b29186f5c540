//! Families: how a `model_type` names its tensors and reads its `config.json`.

pub(crate) mod qwen2;

/// Each `model_type` that can be loaded.
pub(crate) const SUPPORTED: &[&str] = &["qwen2"];
