//! Maps module paths to PEFT's paths for multimodal models, which have an additional prefix.

use crate::models::Model;

/// The path that PEFT has for a path of `model`.
pub(super) fn peft_path(model: &Model, path: &str) -> String {
    match path.strip_prefix("model.").filter(|_| model.config().is_text_part) {
        Some(rest) => format!("model.language_model.{rest}"),
        None => path.to_string(),
    }
}
