//! Prints errors with hints, and chooses the exit code.

use crate::output::Output;
use crate::rank::OTHER_FAILED;
use metal_candle::Error;
use metal_candle::files::{MAX_SIDE_FILE_BYTES, read_json};
use serde_json::Value;
use std::fmt;
use std::path::Path;

/// An error in the user's input that the library cannot detect.
#[derive(Debug)]
pub(crate) struct UserError {
    message: String,
    hint: Option<String>,
}

impl UserError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for UserError {}

/// Prints `error: ...` and, if there is one, `hint: ...`; returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    Output::error(message(error), hint(error).as_deref());
    exit_code(error)
}

/// The error and its causes, without causes whose text the message already contains.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if message.contains(&text) {
            continue;
        }
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&text);
    }
    message
}

/// Whether the reader of standard output has closed it, like `head`; this is not an error.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<Error>() {
            return match error {
                Error::Candle(_) | Error::Device(_) | Error::Bug(_) => 2,
                Error::Peer { .. } => OTHER_FAILED,
                _ => 1,
            };
        }
        if cause.is::<UserError>() || cause.is::<std::io::Error>() {
            return 1;
        }
    }
    2
}

fn hint(error: &anyhow::Error) -> Option<String> {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<UserError>() {
            return error.hint.clone();
        }
        let Some(error) = cause.downcast_ref::<Error>() else { continue };
        let hint = match error {
            Error::Tensors { path, problems } => return Some(tensors_hint(path, problems)),
            Error::Data { .. } => "`metal-candle data check FILE` shows how each row is read",
            Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. } => {
                "a lower --learning-rate or --max-grad-norm usually helps; check the rows named above"
            }
            Error::NonFiniteEvaluation { .. } => {
                "the model or the adapter overflows on these rows: `--dtype f32` has a wider range, or use an earlier checkpoint"
            }
            Error::Format { path, message } if message.contains("of the model") => return base_hint(path),
            Error::Template(_) => "`generate --raw` does not use the chat template",
            Error::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space on that disk; `train --resume RUN` continues a training run"
            }
            Error::Hub(_) => "--model also accepts a model folder on this machine",
            Error::Device(_) => "`metal-candle info` shows the devices of this build; `--device cpu` always works",
            Error::OutOfMemory(_) => {
                "fewer or shorter sequences, or --dtype bf16, need less memory; other programs may be using the device"
            }
            Error::Candle(_) => {
                "this is a bug, or the device is faulty: please open an issue and include the command you ran"
            }
            _ => return None,
        };
        return Some(hint.to_owned());
    }
    None
}

/// The base model named in the configuration of the adapter file `path`.
fn base_of(path: &Path) -> Option<String> {
    let config = path.parent()?.join("adapter_config.json");
    let config: Value = read_json(config, MAX_SIDE_FILE_BYTES).ok()?;
    let name = config.get("base_model_name_or_path").or_else(|| config.get("model"))?.as_str()?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// The hint for an adapter that may belong to another model.
fn base_hint(path: &Path) -> Option<String> {
    base_of(path).map(|base| format!("the adapter was trained on `{base}`; pass that model to --model"))
}

/// The hint for problems with the tensors in `path`.
fn tensors_hint(path: &Path, problems: &[String]) -> String {
    let folder = path.parent().unwrap_or(path);
    let is_adapter = folder.join("adapter_config.json").is_file();
    let any = |words: &str| problems.iter().any(|problem| problem.contains(words));
    let all = |words: &str| problems.iter().all(|problem| problem.contains(words));
    let what = if any("expected shape") || any("not the weight of this model") || any("expected [") {
        if is_adapter {
            match base_of(path) {
                Some(base) => {
                    return format!(
                        "the adapter was trained on `{base}`, which has other sizes or weights; pass that model to --model"
                    );
                }
                None => "the adapter belongs to a model with other sizes or weights; pass that model to --model",
            }
        } else {
            "the weights and config.json belong to different models"
        }
    } else if all("is missing") || all("found no such tensor") {
        "the file lacks tensors that its configuration requires: it may be incomplete; copy or download it again"
    } else if all("is not expected") {
        match base_of(path).filter(|_| is_adapter) {
            Some(base) => return format!("the adapter was trained on `{base}`, which may have more layers"),
            None => {
                "the file contains tensors that this model does not have; it may belong to a model with more layers"
            }
        }
    } else if all("not finite") {
        "the training that wrote the file diverged; use an earlier checkpoint"
    } else if is_adapter {
        match base_hint(path) {
            Some(hint) => return hint,
            None => "the adapter does not match the model",
        }
    } else {
        "the weights and config.json belong to different models"
    };
    what.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{exit_code, message};
    use metal_candle::Error;

    #[test]
    fn a_cause_is_printed_once() {
        let missing = || std::io::Error::other("no such file");
        let error = anyhow::Error::from(Error::Read { path: "x".into(), source: missing() });
        assert_eq!(message(&error), "cannot read `x`: no such file");
        assert_eq!(message(&anyhow::Error::from(missing()).context("y")), "y: no such file");
    }

    #[test]
    fn exit_codes_separate_input_from_program_errors() {
        assert_eq!(exit_code(&Error::Unsupported("x".into()).into()), 1);
        assert_eq!(exit_code(&anyhow::Error::from(Error::Hub("x".into())).context("y")), 1);
        assert_eq!(exit_code(&Error::Device("x".into()).into()), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), 2);
    }
}
