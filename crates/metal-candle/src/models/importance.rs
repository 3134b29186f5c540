//! Importance matrices: how much each input of a linear layer matters, measured on text.

use super::batch::Batch;
use super::gguf::GgufNames;
use super::model::Model;
use super::parts::inputs::InputSquares;
use crate::error::{Error, Result};
use crate::files::{GgufField, GgufFile, GgufType, GgufValue, NewTensor, read_bounded, write_gguf};
use std::collections::BTreeMap;
use std::path::Path;

const MAX_BYTES: u64 = 1 << 30;

/// For each linear layer, the mean squares of its inputs over the tokens of a text.
///
/// A quantizer that weighs errors by it rounds the columns that see large inputs more carefully.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// By the name of the weight: `model.layers.0.self_attn.q_proj.weight`.
    columns: BTreeMap<String, Vec<f32>>,
    /// What it was computed from.
    source: Option<String>,
    /// The number of tokens.
    tokens: usize,
}

impl Importance {
    /// Measures the inputs of the linear layers of a model's blocks on a text.
    ///
    /// # Errors
    /// The model is not on the CPU, there is no token, or an input is not finite.
    pub fn measure<'a>(model: &Model, batches: impl IntoIterator<Item = &'a Batch>) -> Result<Self> {
        if !model.device().is_cpu() {
            return Err(Error::Unsupported("an importance matrix on a GPU: load the model on the CPU".into()));
        }
        let (inputs, mut tokens) = (InputSquares::default(), 0);
        for batch in batches {
            model.add_inputs(batch, &inputs)?;
            tokens += batch.ids().len();
        }
        if tokens == 0 {
            return Err(Error::argument("text", "expected at least one token, found none"));
        }
        let mut columns = BTreeMap::new();
        for (layer, sums) in inputs.into_sums() {
            let name = format!("{}.weight", model.linears()[layer].path);
            if sums.iter().any(|sum| !sum.is_finite()) {
                return Err(Error::argument(name, "an input is not finite: the model overflows on this text"));
            }
            columns.insert(name, sums.iter().map(|sum| (sum / tokens as f64) as f32).collect());
        }
        Ok(Self { columns, source: None, tokens })
    }

    /// The same with the name of the text it was computed from.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The importance of the columns of a weight: `[in_features]`.
    pub fn of(&self, weight: &str) -> Option<&[f32]> {
        self.columns.get(weight).map(Vec::as_slice)
    }

    /// The number of weights.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Reads a file of llama.cpp's `llama-imatrix`, GGUF or the older format, for a model.
    ///
    /// # Errors
    /// The file is damaged, is for another model, or holds values that are negative or not finite.
    pub fn read(path: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bounded(path, MAX_BYTES)?;
        let entries = if bytes.starts_with(b"GGUF") { from_gguf(path)? } else { from_dat(path, &bytes)? };
        let names = GgufNames::for_config(model.config())?;
        let mut columns = BTreeMap::new();
        let mut problems = Vec::new();
        let mut left = entries;
        for linear in model.linears() {
            let weight = format!("{}.weight", linear.path);
            let Some(values) = names.tensor(&weight).and_then(|name| left.remove(&name)) else { continue };
            if values.len() != linear.in_features {
                let (expected, found) = (linear.in_features, values.len());
                problems.push(format!("`{weight}`: expected {expected} columns, found {found}"));
            } else if values.iter().any(|value| !value.is_finite() || *value < 0.0) {
                problems.push(format!("`{weight}`: expected numbers that are not negative"));
            }
            columns.insert(weight, values);
        }
        problems.extend(left.keys().map(|name| format!("`{name}`: expected no such tensor")));
        if !problems.is_empty() {
            return Err(Error::Tensors { path: path.to_path_buf(), problems });
        }
        if columns.is_empty() {
            return Err(Error::format(path, "expected the importance of at least one tensor, found none"));
        }
        Ok(Self { columns, source: Some(path.display().to_string()), tokens: 0 })
    }

    /// Writes a file that llama.cpp's `llama-quantize --imatrix` reads.
    ///
    /// # Errors
    /// The file cannot be written, or GGUF has no architecture for the model.
    pub fn save(&self, path: impl AsRef<Path>, model: &Model) -> Result<()> {
        let path = path.as_ref();
        let names = GgufNames::for_config(model.config())?;
        let count = self.tokens.max(1) as f32;
        let (mut tensors, mut contents) = (Vec::new(), Vec::new());
        for (weight, values) in &self.columns {
            let Some(name) = names.tensor(weight) else { continue };
            let sums: Vec<f32> = values.iter().map(|value| value * count).collect();
            for (suffix, values) in [("in_sum2", sums), ("counts", vec![count])] {
                let shape = vec![1, values.len()];
                tensors.push(NewTensor { name: format!("{name}.{suffix}"), shape, kind: GgufType::F32 });
                contents.push(values);
            }
        }
        let text = |value: &str| GgufField::from(GgufValue::Text(value.into()));
        let chunk = 512_usize.min(self.tokens.max(1));
        let metadata = vec![
            ("general.type".into(), text("imatrix")),
            (
                "imatrix.datasets".into(),
                GgufValue::List(vec![GgufValue::Text(self.source.clone().unwrap_or_default())]).into(),
            ),
            ("imatrix.chunk_count".into(), GgufValue::Integer(self.tokens.div_ceil(chunk) as i128).into()),
            ("imatrix.chunk_size".into(), GgufValue::Integer(chunk as i128).into()),
        ];
        write_gguf(path, &metadata, &tensors, |index, file| {
            let bytes: Vec<u8> = contents[index].iter().flat_map(|value| value.to_le_bytes()).collect();
            file.write_all(&bytes).map_err(|error| Error::write(path, error))
        })
    }
}

/// Sums of squares and the numbers of tokens, by the name of the tensor.
fn from_gguf(path: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let file = GgufFile::open(path)?;
    let mut entries = BTreeMap::new();
    for tensor in file.tensors() {
        let Some(name) = tensor.name.strip_suffix(".in_sum2") else { continue };
        let counts = file.tensor(&format!("{name}.counts"));
        let counts =
            counts.ok_or_else(|| Error::format(path, format!("expected a tensor `{name}.counts`, found none")))?;
        let counts = file.floats(counts)?;
        let &[count] = counts.as_slice() else {
            return Err(Error::Unsupported(format!("`{}`: `{name}` of a mixture of experts", path.display())));
        };
        let mut values = file.floats(tensor)?;
        for value in &mut values {
            // a tensor that saw no token matters no more in one column than in another
            *value = if count > 0.0 { *value / count } else { 1.0 };
        }
        entries.insert(name.to_string(), values);
    }
    Ok(entries)
}

/// The format before GGUF: a number of entries, each with a name, a number of calls and sums.
fn from_dat(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Vec<f32>>> {
    let damaged = || Error::format(path, "expected an importance matrix of llama.cpp, found other or cut bytes");
    let mut at = 0_usize;
    let mut take = |count: usize| -> Result<&[u8]> {
        let end = at.checked_add(count).filter(|&end| end <= bytes.len()).ok_or_else(damaged)?;
        let taken = &bytes[at..end];
        at = end;
        Ok(taken)
    };
    let as_size = |bytes: &[u8]| -> Result<usize> {
        let number = i32::from_le_bytes(bytes.try_into().map_err(|_| damaged())?);
        usize::try_from(number).map_err(|_| damaged())
    };
    let mut entries = BTreeMap::new();
    for _ in 0..as_size(take(4)?)? {
        let len = as_size(take(4)?)?;
        let name = String::from_utf8_lossy(take(len)?).into_owned();
        let calls = as_size(take(4)?)?.max(1) as f32;
        let len = as_size(take(4)?)?;
        let values = take(len.checked_mul(4).ok_or_else(damaged)?)?;
        let values = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes) / calls);
        entries.insert(name, values.collect());
    }
    Ok(entries)
}
