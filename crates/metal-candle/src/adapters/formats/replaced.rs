//! Reads the tensors of a PEFT file that replace parameters of the model: copies of embedding and head, rows of trained
//! tokens, and biases.

use super::source::TensorSource;
use crate::adapters::layout::{
    EMBEDDING_WEIGHT, HEAD_WEIGHT, Planned, Settings, TrainedBiases, all_parameters, parameter,
};
use crate::error::{Error, Result};
use crate::files::JsonObject;
use crate::models::Model;
use crate::ops::Weight;
use candle_core::{DType, Device};
use half::{bf16, f16};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Parts of a path that PEFT's wrappers add.
const WRAPPERS: [&str; 4] = [".token_adapter.", ".base_layer.", ".modules_to_save.", ".original_module."];
pub(super) const PREFIX: &str = "base_model.model.";
const DELTA: &str = "trainable_tokens_delta";
/// The suffix of a module with trained rows.
pub(super) const TOKENS_SUFFIX: &str = "token_adapter.trainable_tokens_delta";

/// The parameters that the tensors of a file replace.
#[derive(Default)]
pub(super) struct Replaced {
    /// The values of each parameter that differs from the model's.
    pub(super) values: BTreeMap<String, Vec<f32>>,
    /// The token ids of the rows among the values, by parameter name.
    pub(super) rows: BTreeMap<String, Vec<u32>>,
    /// The names of trained biases.
    biases: BTreeSet<String>,
    /// The tensors of the file that have been read.
    pub(super) names: BTreeSet<String>,
}

impl Replaced {
    /// Compares the tensors of `source` that are named like parameters of the model. A copy is accepted, also one rounded to
    /// bf16 or f16; other values replace the model's.
    pub(super) fn read(
        model: &Model,
        source: &TensorSource,
        config: &JsonObject,
        settings: &Settings,
        planned: &[Planned],
    ) -> Result<Self> {
        let mut found = Self::default();
        let mut problems = Vec::new();
        let shapes: BTreeMap<String, Vec<usize>> = all_parameters(model).into_iter().collect();
        let has_term = |path: &str| planned.iter().any(|planned| model.linears()[planned.number].path == path);
        for name in shapes.keys() {
            let Some(path) = name.strip_suffix(".bias") else { continue };
            let is_trained = match settings.bias {
                TrainedBiases::None => false,
                TrainedBiases::All => !settings.saves(path),
                TrainedBiases::LoraOnly => has_term(path) && !settings.saves(path),
            };
            if is_trained {
                // a file without the parameter uses the model's
                found.biases.insert(name.clone());
                found.values.insert(name.clone(), base(model, name)?);
            }
        }
        for name in source.names() {
            let Some(rest) = name.strip_prefix(PREFIX) else { continue };
            let bare = WRAPPERS.iter().fold(rest.to_owned(), |name, wrapper| name.replace(wrapper, "."));
            let Some((path, shape)) = bare.rsplit_once('.').and_then(|(path, _)| Some((path, shapes.get(&bare)?)))
            else {
                continue;
            };
            match role(rest, &bare, path, settings) {
                Role::Saved => continue,
                Role::Original => {
                    found.names.insert(name.into());
                    continue;
                }
                Role::CopyOf(other) => {
                    found.names.insert(name.into());
                    let is_equal = source.shape(name) == source.shape(&other)
                        && source.foreign_dtype(name).is_none()
                        && is_copy(&source.values(name)?, &source.values(&other)?);
                    if !is_equal {
                        problems.push(format!("`{name}` differs from `{other}`, which it should be a copy of"));
                    }
                    continue;
                }
                Role::Replacement => {}
            }
            found.names.insert(name.into());
            let values = match source.checked_values(name, shape.as_slice())? {
                Ok(values) => values,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            if found.biases.contains(&bare) {
                found.values.insert(bare, values);
                continue;
            }
            if is_copy(&values, &base(model, &bare)?) {
                continue;
            }
            if bare.ends_with(".weight") && has_term(path) {
                problems.push(format!("`{name}` is not the weight of this model"));
            } else {
                found.values.insert(bare, values);
            }
        }
        found.insert_tokens(model, source, config, &mut problems)?;
        if model.config().tie_word_embeddings {
            found.tie(settings, &mut problems);
        }
        if problems.is_empty() {
            return Ok(found);
        }
        Err(Error::Tensors { path: source.path().to_path_buf(), problems })
    }

    /// The parameters that are neither trained rows nor trained biases.
    pub(super) fn others(&self) -> Vec<String> {
        let is_other = |name: &&String| !self.rows.contains_key(*name) && !self.biases.contains(*name);
        self.values.keys().filter(is_other).cloned().collect()
    }

    /// Writes the rows of `trainable_token_indices` into the embedding or head.
    fn insert_tokens(
        &mut self,
        model: &Model,
        source: &TensorSource,
        config: &JsonObject,
        problems: &mut Vec<String>,
    ) -> Result<()> {
        let Some(indices) = config.get("trainable_token_indices") else { return Ok(()) };
        let (mut num_found, is_tied) = (0, model.config().tie_word_embeddings);
        for name in source.names().filter(|name| name.ends_with(DELTA)) {
            let path = name.strip_prefix(PREFIX).unwrap_or(name);
            let path = path.strip_suffix(DELTA).unwrap_or(path).trim_end_matches('.');
            let path = path.strip_suffix(".token_adapter").unwrap_or(path);
            let rows = match indices {
                Value::Object(of_modules) => of_modules
                    .iter()
                    .find(|(key, _)| path == *key || path.strip_suffix(key.as_str()).is_some_and(|p| p.ends_with('.')))
                    .map(|(_, rows)| rows)
                    // PEFT ties the rows of a tied head to those of the embedding
                    .or_else(|| of_modules.values().next().filter(|_| is_tied && of_modules.len() == 1)),
                rows => Some(rows),
            };
            let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            let rows: Option<Vec<u32>> =
                rows.and_then(Value::as_array).and_then(|rows| rows.iter().map(as_id).collect());
            let Some(rows) = rows else {
                let expected = "a list of token ids, or an object of such lists by module";
                return Err(config.wrong("trainable_token_indices", expected, indices));
            };
            let weight = format!("{path}.weight");
            let Ok((vocab, hidden)) = crate::adapters::layout::weight(model, &weight).and_then(Weight::dims2) else {
                problems.push(format!("`{name}`: the model has no module `{path}`"));
                continue;
            };
            self.names.insert(name.into());
            num_found += 1;
            if let Some(row) = rows.iter().find(|row| **row as usize >= vocab) {
                problems.push(format!("`{name}`: token {row} is outside the model's vocabulary of {vocab}"));
                continue;
            }
            let delta = match source.checked_values(name, &[rows.len(), hidden])? {
                Ok(delta) => delta,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            if let Some(values) = self.values.get_mut(&weight) {
                // the file replaces the whole embedding, which includes these rows
                for (row, delta) in rows.iter().zip(delta.chunks_exact(hidden)) {
                    values[*row as usize * hidden..][..hidden].copy_from_slice(delta);
                }
            } else {
                self.values.insert(weight.clone(), delta);
                self.rows.insert(weight, rows);
            }
        }
        let is_empty =
            indices.as_array().is_some_and(Vec::is_empty) || indices.as_object().is_some_and(serde_json::Map::is_empty);
        if num_found == 0 && !is_empty {
            problems.push(format!("`...{DELTA}` is missing, which `trainable_token_indices` requires"));
        }
        Ok(())
    }

    /// Handles models with a tied head, where PEFT changes head and embedding together.
    fn tie(&mut self, settings: &Settings, problems: &mut Vec<String>) {
        let (rows, of_head) = (self.rows.get(EMBEDDING_WEIGHT), self.rows.get(HEAD_WEIGHT));
        match (self.values.get(EMBEDDING_WEIGHT), self.values.get(HEAD_WEIGHT)) {
            (Some(_), None) if rows.is_some() => {}
            (Some(_), Some(_)) if of_head.is_some() && rows.is_none() => {
                problems.push("trained rows of a tied head, while the file replaces the embedding".into());
            }
            // PEFT ties the rows only if the token ids are equal; otherwise the head is separate
            (_, Some(_)) if of_head.is_some() && rows != of_head => {}
            (Some(embedding), Some(head)) if of_head.is_some() && embedding == head => {
                self.values.remove(HEAD_WEIGHT);
                self.rows.remove(HEAD_WEIGHT);
            }
            (Some(embedding), None) if !settings.saves("lm_head") => {
                self.values.insert(HEAD_WEIGHT.into(), embedding.clone());
            }
            (embedding, Some(head)) if embedding != Some(head) => {
                problems.push(format!("`{HEAD_WEIGHT}` differs from the embedding that this model ties it to"));
            }
            _ => {}
        }
    }
}

/// The purpose of a tensor that is named like a parameter of the model.
enum Role {
    /// A parameter of a fully trained module; the layout expects it.
    Saved,
    /// The value of such a parameter before training.
    Original,
    /// A copy of another tensor of the file.
    CopyOf(String),
    /// It replaces the model's parameter.
    Replacement,
}

/// The role of the tensor `rest` of the module `path`; `bare` is its name without PEFT's wrappers.
///
/// PEFT writes wrapped modules more than once with `save_embedding_layers` or `bias`, and a tied head in addition to its
/// embedding.
fn role(rest: &str, bare: &str, path: &str, settings: &Settings) -> Role {
    let is_tied = settings.saves_tied() && [EMBEDDING_WEIGHT, HEAD_WEIGHT].contains(&bare);
    if !settings.saves(path) && !is_tied {
        return Role::Replacement;
    }
    if rest.contains(".original_module.") {
        Role::Original
    } else if rest.contains(".modules_to_save.") {
        Role::CopyOf(format!("{PREFIX}{bare}"))
    } else if is_tied && rest == HEAD_WEIGHT {
        Role::CopyOf(format!("{PREFIX}{EMBEDDING_WEIGHT}"))
    } else {
        Role::Saved
    }
}

/// The values of a parameter of the model.
fn base(model: &Model, name: &str) -> Result<Vec<f32>> {
    let tensor = parameter(model, name)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

// copies are identical bit for bit
#[allow(clippy::float_cmp)]
/// Whether all values are equal.
pub(super) fn is_equal(left: &[f32], right: &[f32]) -> bool {
    left == right
}

#[allow(clippy::float_cmp)]
/// Whether all values are equal, possibly after rounding one side to bf16 or f16.
fn is_copy(left: &[f32], right: &[f32]) -> bool {
    let to_bf16 = |value: f32| bf16::from_f32(value).to_f32();
    let to_f16 = |value: f32| f16::from_f32(value).to_f32();
    let is_equal = |left_of: &dyn Fn(f32) -> f32, right_of: &dyn Fn(f32) -> f32| {
        left.len() == right.len() && left.iter().zip(right).all(|(left, right)| left_of(*left) == right_of(*right))
    };
    let same = |value: f32| value;
    is_equal(&same, &same)
        || is_equal(&same, &to_bf16)
        || is_equal(&same, &to_f16)
        || is_equal(&to_bf16, &same)
        || is_equal(&to_f16, &same)
}
