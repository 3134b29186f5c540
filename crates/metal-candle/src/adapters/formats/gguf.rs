//! Reads and writes adapters in GGUF files, which llama.cpp loads with `--lora`: tensors `blk.0.attn_q.weight.lora_a` and
//! `.lora_b`.
//!
//! The factor of a module is `adapter.lora.alpha` divided by the rank of its B.

use super::config_file::layout_of;
use super::refusal::low_rank_only;
use crate::adapters::layout::{LoRAModule, Planned, Settings, TrainedBiases};
use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};
use crate::files::{GgufField, GgufFile, GgufTensor, GgufType, GgufValue, NewTensor, write_gguf};
use crate::models::{GgufNames, LinearInfo, Model};
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const ALPHA: &str = "adapter.lora.alpha";
const EMBEDDING: &str = "embed_tokens";

/// The tensors of A and B of a linear layer.
fn names_of(names: GgufNames, path: &str) -> Option<[String; 2]> {
    let weight = names.tensor(&format!("{path}.weight"))?;
    Some([format!("{weight}.lora_a"), format!("{weight}.lora_b")])
}

pub(super) fn load(model: &Model, path: &Path) -> Result<LoRAAdapter> {
    let file = GgufFile::open(path)?;
    let names = GgufNames::for_config(model.config())?;
    for (key, expected) in
        [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", names.architecture())]
    {
        let found = file.text(key)?.unwrap_or("none");
        if found != expected {
            let hint = if found == "model" { ": give it to `--model`" } else { "" };
            let message = format!("`{key}`: expected `{expected}`, found `{found}`{hint}");
            return Err(Error::format(path, message));
        }
    }
    let alpha =
        file.number(ALPHA)?.ok_or_else(|| Error::format(path, format!("expected the key `{ALPHA}`, found none")))?;
    let mut problems = Vec::new();
    let mut left: BTreeSet<&str> = file.tensors().map(|tensor| tensor.name.as_str()).collect();
    let mut planned = Vec::new();
    let mut found = Vec::new();
    for (number, linear) in model.linears().iter().enumerate() {
        let Some([a, b]) = names_of(names, &linear.path) else { continue };
        let is_there = left.remove(a.as_str()) | left.remove(b.as_str());
        if !is_there {
            continue;
        }
        match (file.tensor(&a), file.tensor(&b)) {
            (Some(a), Some(b)) => match rank_of(linear, a, b) {
                Ok(rank) => {
                    // in llama.cpp, an alpha of 0 means a factor of 1
                    let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
                    planned.push(Planned { number, rank, alpha, is_subtracted: false });
                    found.push((a, b));
                }
                Err(problem) => problems.push(problem),
            },
            (a_there, _) => {
                let missing = if a_there.is_some() { b } else { a };
                problems.push(format!("`{missing}` is missing"));
            }
        }
    }
    problems.extend(left.into_iter().map(|name| format!("`{name}` is not expected")));
    if !problems.is_empty() {
        return Err(Error::Tensors { path: path.to_path_buf(), problems });
    }
    let first = planned.first().copied();
    let settings = Settings {
        rank: first.map_or(0, |planned| planned.rank),
        alpha: first.map_or(0.0, |planned| planned.alpha),
        dropout: 0.0,
        use_rslora: false,
        use_dora: false,
        modules_to_save: Vec::new(),
        parameters_to_save: Vec::new(),
        bias: TrainedBiases::None,
        trainable_tokens: BTreeMap::new(),
        ensure_weight_tying: false,
        base_model: file.text("general.base_model.0.name")?.map(String::from),
    };
    let layout = layout_of(path, model, settings, &planned)?;
    let mut parameters = vec![0.0; layout.num_parameters];
    for (module, (a, b)) in layout.modules.iter().zip(found) {
        let (mut a_values, mut b_values) = (file.floats(a)?, file.floats(b)?);
        if module.module == EMBEDDING {
            a_values = transposed(&a_values, module.in_features);
        }
        if names.is_interleaved(&b.name) {
            b_values = rows(&b_values, |bytes| names.in_halves(bytes, 4 * module.rank));
        }
        if let Some(tensor) = [(a, &a_values), (b, &b_values)].iter().find(|(_, values)| !all_finite(values)) {
            let problems = vec![format!("`{}` contains a value that is not finite", tensor.0.name)];
            return Err(Error::Tensors { path: path.to_path_buf(), problems });
        }
        let at = module.offset;
        parameters[at..at + a_values.len()].copy_from_slice(&a_values);
        let at = at + module.num_a();
        parameters[at..at + b_values.len()].copy_from_slice(&b_values);
    }
    LoRAAdapter::from_values(model, layout, parameters, Vec::new())
}

fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

/// The rank of A and B, or a message about wrong shapes.
fn rank_of(linear: &LinearInfo, a: &GgufTensor, b: &GgufTensor) -> std::result::Result<usize, String> {
    let expected = |rank: usize| {
        let a = [rank, linear.in_features];
        [if linear.module == EMBEDDING { [a[1], a[0]] } else { a }, [linear.out_features, rank]]
    };
    let rank = b.shape.get(1).copied().unwrap_or(0);
    let [a_shape, b_shape] = expected(rank);
    if rank == 0 || b.shape != b_shape {
        return Err(format!("`{}`: expected shape [{}, rank], found {:?}", b.name, linear.out_features, b.shape));
    }
    if a.shape != a_shape {
        return Err(format!("`{}`: expected shape {a_shape:?}, found {:?}", a.name, a.shape));
    }
    Ok(rank)
}

/// Transposes a matrix with `num_rows` rows.
fn transposed(values: &[f32], num_rows: usize) -> Vec<f32> {
    let columns = values.len() / num_rows.max(1);
    (0..values.len()).map(|index| values[index % num_rows * columns + index / num_rows]).collect()
}

/// Reorders the bytes of floats.
fn rows(values: &[f32], order: impl Fn(&[u8]) -> Vec<u8>) -> Vec<f32> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    order(&bytes).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The part of a module that a GGUF adapter cannot store, if there is one.
fn refusal(adapter: &LoRAAdapter, module: &LoRAModule) -> Option<&'static str> {
    match module.module {
        _ if adapter.use_dora() => Some("DoRA magnitudes"),
        EMBEDDING | "lm_head" if adapter.model().config().tie_word_embeddings => {
            Some("low-rank updates of a tied embedding or head")
        }
        _ => None,
    }
}

pub(super) fn save(adapter: &LoRAAdapter, path: &Path) -> Result<()> {
    let adapter = &adapter.without_start()?;
    let names = GgufNames::for_config(adapter.model().config())?;
    low_rank_only(adapter, "a GGUF file")?;
    let Some(first) = adapter.modules().first() else {
        return Err(Error::argument("adapter", "has no module"));
    };
    // the file has one alpha: the largest factor times its rank; the difference is multiplied into B
    let alpha = first.scale * first.rank as f64;
    let mut tensors = Vec::new();
    let mut contents = Vec::new();
    for module in adapter.modules() {
        let named = names_of(names, &module.path).filter(|_| refusal(adapter, module).is_none());
        let Some([a_name, b_name]) = named else {
            let what = refusal(adapter, module).unwrap_or("an update of this layer");
            let message = format!("`{}`: {what} in a GGUF adapter: `fuse` merges the adapter instead", module.path);
            return Err(Error::Unsupported(message));
        };
        let (a, mut b) = adapter.matrices(module)?;
        let factor = module.scale * module.rank as f64 / alpha;
        if alpha != 0.0 && factor.to_bits() != 1.0_f64.to_bits() {
            b = (b * factor)?;
        }
        let a = if module.module == EMBEDDING { a.t()?.contiguous()? } else { a };
        for (name, matrix) in [(a_name, a), (b_name, b)] {
            let values = to_vec(&matrix)?;
            let values = if name.ends_with("lora_b") && names.is_interleaved(&name) {
                rows(&values, |bytes| names.interleaved(bytes, 4 * module.rank))
            } else {
                values
            };
            tensors.push(NewTensor { name, shape: matrix.dims().to_vec(), kind: GgufType::F32 });
            contents.push(values);
        }
    }
    let text = |value: &str| GgufField::from(GgufValue::Text(value.into()));
    let mut metadata: Vec<(String, GgufField)> = vec![
        ("general.type".into(), text("adapter")),
        ("general.architecture".into(), text(names.architecture())),
        ("general.file_type".into(), GgufValue::Integer(0).into()),
        ("adapter.type".into(), text("lora")),
        (ALPHA.into(), GgufValue::Float(alpha).into()),
    ];
    if let Some(base) = adapter.base_model() {
        metadata.push(("general.base_model.count".into(), GgufValue::Integer(1).into()));
        metadata.push(("general.base_model.0.name".into(), text(base)));
    }
    write_gguf(path, &metadata, &tensors, |index, file| {
        let bytes: Vec<u8> = contents[index].iter().flat_map(|value| value.to_le_bytes()).collect();
        file.write_all(&bytes).map_err(|error| Error::write(path, error))
    })
}

fn to_vec(matrix: &Tensor) -> Result<Vec<f32>> {
    Ok(matrix.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}
