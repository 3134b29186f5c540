//! Families: how a `model_type` names its tensors and reads its `config.json`.

pub(crate) mod qwen2;
