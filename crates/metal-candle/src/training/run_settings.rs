//! Describes the settings and data of a run, and checks them when the run is resumed.

use super::config::{Options, TrainingConfig};
use super::trained::Trained;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::models::{MatmulPrecision, Model};
use candle_core::DType;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Settings that may change when a run is resumed: they only affect when it ends.
const FREE_SETTINGS: [&str; 2] = ["num_epochs", "max_steps"];

/// All settings that affect what the steps of a run compute.
pub(super) fn describe_settings<T: Trained>(
    start: &T,
    config: &TrainingConfig,
    options: &Options,
    dataset: &Dataset,
) -> Map<String, Value> {
    let evaluation = options
        .evaluation
        .as_ref()
        .map(|evaluation| json!({"dataset": fingerprint(&evaluation.dataset), "interval": evaluation.interval}));
    let model = start.run_model();
    let entries = [
        ("trained", json!(digest(&start.identity().to_string()))),
        ("model", json!(digest(&model.config().identity()))),
        ("dtype", json!(model.dtype().as_str())),
        ("matmul_precision", json!((model.matmul_precision() == MatmulPrecision::Bf16).then_some("bf16"))),
        ("dataset", json!(fingerprint(dataset))),
        ("num_epochs", json!(config.num_epochs)),
        ("max_steps", json!(options.max_steps)),
        ("lr_scheduler", config.lr_scheduler.to_json()),
        ("optimizer_config", options.optimizer(config).to_json()),
        ("lora_plus_ratio", json!(options.lora_plus_ratio.map(|ratio| ratio.to_string()))),
        ("decay_matrices_only", json!(options.decay_matrices_only.then_some(true))),
        ("max_grad_norm", json!(config.max_grad_norm.map(|norm| norm.to_string()))),
        ("batch_tokens", json!(options.batch_tokens)),
        ("batch_samples", json!(options.batch_samples)),
        ("batches", json!(options.batches.as_ref().map(|batches| digest(&format!("{batches:?}"))))),
        ("gradient_accumulation", json!(options.gradient_accumulation)),
        ("label_smoothing", json!(options.label_smoothing.to_string())),
        ("neftune_noise_alpha", json!(options.neftune_noise_alpha.to_string())),
        ("seed", json!(options.seed)),
        ("evaluation", json!(evaluation)),
        ("patience", json!(options.patience)),
    ];
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// Whether a model has quantized weights on a GPU, where activations are not f32 as on the CPU.
pub(super) fn is_quantized_on_gpu(model: &Model) -> bool {
    let is_quantized = || model.parameters().iter().any(|(_, weight)| weight.block_format().is_some());
    !model.device().is_cpu() && is_quantized()
}

/// Returns an error if the checkpoint at `path` was `saved` with other settings.
pub(super) fn check_settings(
    path: &Path,
    settings: &Map<String, Value>,
    saved: &Map<String, Value>,
    is_quantized_on_gpu: bool,
) -> Result<()> {
    let different: Vec<String> = settings
        .iter()
        .filter(|(key, value)| {
            !FREE_SETTINGS.contains(&key.as_str()) && saved.get(*key).unwrap_or(&Value::Null) != *value
        })
        .map(|(key, value)| format!("`{key}` was {}, is {value}", saved.get(key).unwrap_or(&Value::Null)))
        .collect();
    if different.is_empty() {
        return Ok(());
    }
    let mut message = format!("`{}` belongs to another run: {}", path.display(), different.join("; "));
    let (before, now) = (saved.get("dtype"), settings.get("dtype"));
    if is_quantized_on_gpu && before != now && before.is_some_and(|dtype| dtype == DType::F32.as_str()) {
        message += "; with quantized weights, a run on the CPU uses f32: resume such a run with `--device cpu`";
    }
    Err(Error::argument("resume", message))
}

fn digest(text: &str) -> String {
    format!("{:08x}", crc32c::crc32c(text.as_bytes()))
}

/// A fingerprint of the tokens of a dataset and which of them are trained.
fn fingerprint(dataset: &Dataset) -> String {
    let mut sum = 0;
    for sample in &dataset.samples {
        sum = crc32c::crc32c_append(sum, &(sample.ids.len() as u64).to_le_bytes());
        for (id, trained) in sample.ids.iter().zip(&sample.trained) {
            let [a, b, c, d] = id.to_le_bytes();
            sum = crc32c::crc32c_append(sum, &[a, b, c, d, u8::from(*trained)]);
        }
    }
    format!("{} samples, {sum:08x}", dataset.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_quantized_run_of_the_cpu_is_resumed_there() {
        let settings =
            |dtype: &str, seed: u64| Map::from_iter([("dtype".into(), json!(dtype)), ("seed".into(), json!(seed))]);
        let check = |saved: &str, now: (&str, u64), is_quantized_on_gpu: bool| {
            let (now, saved) = (settings(now.0, now.1), settings(saved, 1));
            check_settings(Path::new("step-000003"), &now, &saved, is_quantized_on_gpu)
        };
        let message = |result: Result<()>| result.unwrap_err().to_string();
        let found = message(check("f32", ("bf16", 1), true));
        assert!(found.contains("`dtype` was \"f32\", is \"bf16\"; with quantized weights"), "{found}");
        assert!(found.ends_with("`--device cpu`"), "{found}");
        for other in [check("f32", ("bf16", 1), false), check("f16", ("bf16", 1), true), check("f32", ("f32", 2), true)]
        {
            let found = message(other);
            assert!(!found.contains("--device"), "{found}");
        }
        check("f32", ("f32", 1), true).unwrap();
    }
}
