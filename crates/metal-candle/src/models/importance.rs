//! Importance matrices for quantization: the mean squares of the inputs of linear layers, measured on text.

use super::batch::Batch;
use super::gguf::GgufNames;
use super::model::Model;
use super::parts::inputs::InputSquares;
use crate::error::{Error, Result};
use crate::files::{GgufField, GgufFile, GgufType, GgufValue, NewTensor, read_bounded, write_gguf};
use std::collections::BTreeMap;
use std::path::Path;

const MAX_BYTES: u64 = 1 << 30;

/// The mean squares of the inputs of each linear layer over the tokens of a text.
///
/// A quantizer that weights rounding errors by them is more accurate for columns with large inputs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// By the name of the weight: `model.layers.0.self_attn.q_proj.weight`.
    columns: BTreeMap<String, Vec<f32>>,
    /// The text that it was computed from.
    source: Option<String>,
    /// The number of tokens.
    tokens: usize,
}

impl Importance {
    /// Measures the inputs of the linear layers of a model's blocks on a text.
    ///
    /// # Errors
    /// The model is not on the CPU, there are no tokens, or an input is not finite.
    pub fn measure<'a>(model: &Model, batches: impl IntoIterator<Item = &'a Batch>) -> Result<Self> {
        if !model.device().is_cpu() {
            return Err(Error::Unsupported(
                "measuring an importance matrix on a GPU; load the model on the CPU".into(),
            ));
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
                return Err(Error::argument(
                    name,
                    "the input of this layer is not finite, because the model overflows on this text",
                ));
            }
            columns.insert(name, sums.iter().map(|sum| (sum / tokens as f64) as f32).collect());
        }
        Ok(Self { columns, source: None, tokens })
    }

    /// Sets the name of the text that it was computed from.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The importance of the columns of a weight: `[in_features]`.
    pub fn of(&self, weight: &str) -> Option<&[f32]> {
        self.columns.get(weight).map(Vec::as_slice)
    }

    /// The number of weights with an importance.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether no weight has an importance.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Reads a file of llama.cpp's `llama-imatrix`, in GGUF or the older format, for a model.
    ///
    /// # Errors
    /// The file is invalid, belongs to another model, or contains values that are negative or not finite.
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
                problems.push(format!("`{weight}`: expected finite numbers of at least 0"));
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

    /// Writes a file for llama.cpp's `llama-quantize --imatrix`.
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

/// Mean squares, by the name of the tensor, from sums of squares and token counts.
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
            // all columns of a tensor without tokens are equally important
            *value = if count > 0.0 { *value / count } else { 1.0 };
        }
        entries.insert(name.to_string(), values);
    }
    Ok(entries)
}

/// The format before GGUF: the number of entries, each with a name, a number of calls and sums.
fn from_dat(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Vec<f32>>> {
    let damaged =
        || Error::format(path, "expected an importance matrix of llama.cpp, found another format or a truncated file");
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
