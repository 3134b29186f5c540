//! Writes models in the quantized formats of MLX, for mlx-lm.

use super::model::Model;
use super::registry::{ParameterSpec, Role};
use crate::error::{Error, Result};
use crate::files::{check_finite, create_folder, write_atomically, write_safetensors};
use crate::ops::Weight;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use metal_candle_kernels::BlockFormat;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

/// Bits of a word.
const WORD: usize = 32;
/// Columns that share a scale in mxfp4.
const MX_GROUP: usize = 32;
/// The bytes of a block of mxfp4 in ggml: the scale, and 32 codes.
const MX_BLOCK: usize = 17;

/// How MLX quantizes the matrices of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlxQuantization {
    /// Weights are `scale * code + bias`, with codes of `bits` bits, and a scale and a bias for each `group_size` columns.
    Affine {
        /// 2, 3, 4, 5, 6 or 8.
        bits: usize,
        /// 32, 64 or 128.
        group_size: usize,
    },
    /// Weights are floats of 4 bits, with a power of two for each 32 columns
    /// (<https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>, section 5).
    Mxfp4,
}

impl MlxQuantization {
    fn bits(self) -> usize {
        match self {
            Self::Affine { bits, .. } => bits,
            Self::Mxfp4 => 4,
        }
    }

    fn group_size(self) -> usize {
        match self {
            Self::Affine { group_size, .. } => group_size,
            Self::Mxfp4 => MX_GROUP,
        }
    }

    fn check(self) -> Result<()> {
        let (bits, group_size) = (self.bits(), self.group_size());
        if !matches!(bits, 2..=6 | 8) {
            return Err(Error::argument("bits", format!("expected 2, 3, 4, 5, 6 or 8, found {bits}")));
        }
        if !matches!(group_size, 32 | 64 | 128) {
            return Err(Error::argument("group_size", format!("expected 32, 64 or 128, found {group_size}")));
        }
        Ok(())
    }

    /// The value of `quantization` in `config.json`.
    fn to_json(self) -> Value {
        let mode = if self == Self::Mxfp4 { "mxfp4" } else { "affine" };
        json!({"group_size": self.group_size(), "bits": self.bits(), "mode": mode})
    }

    /// Whether the rows of a matrix are whole groups.
    fn fits(self, spec: &ParameterSpec) -> bool {
        spec.shape.get(1).is_some_and(|columns| columns.is_multiple_of(self.group_size()))
    }
}

/// Writes a model as a folder for mlx-lm, which [`ModelLoader`](crate::models::ModelLoader) loads, too: `model.safetensors`,
/// `config.json` and `generation_config.json`.
///
/// A quantized matrix `[rows, columns]` is stored as `weight`, u32 `[rows, columns * bits / 32]`, `scales`
/// `[rows, columns / group_size]` and, unless the format is mxfp4, `biases` of the same shape. Scales and biases have the dtype of
/// the matrix, or bf16 if it was quantized before. Matrices whose rows are not whole groups are not quantized; their names are
/// returned.
///
/// # Errors
/// MLX has no such number of bits or group size, no matrix has rows of whole groups, a weight is not finite, or the folder or a
/// file cannot be written.
pub fn save_mlx_model(model: &Model, folder: impl AsRef<Path>, quantization: MlxQuantization) -> Result<Vec<String>> {
    quantization.check()?;
    let (mut tensors, mut dense) = (Vec::new(), Vec::new());
    let mut is_quantized = false;
    for (spec, (name, weight)) in model.config().parameter_specs()?.iter().zip(model.parameters()) {
        let is_matrix = matches!(spec.role, Role::Matrix | Role::Embedding);
        let module = name.strip_suffix(".weight").filter(|_| is_matrix && quantization.fits(spec));
        let Some(module) = module else {
            dense.extend(is_matrix.then(|| name.clone()));
            tensors.push((name.clone(), weight.tensor()?));
            continue;
        };
        is_quantized = true;
        for (part, tensor) in quantized(name, weight, quantization)? {
            tensors.push((format!("{module}.{part}"), tensor));
        }
    }
    if !is_quantized {
        let group_size = quantization.group_size();
        let message = format!("expected matrices whose rows are a multiple of {group_size}, found none in this model");
        return Err(Error::argument("group_size", message));
    }
    let folder = folder.as_ref();
    create_folder(folder)?;
    write_safetensors(folder.join("model.safetensors"), &tensors, &[("format", "mlx")])?;
    let config = config_of(model, quantization);
    write_atomically(folder.join("config.json"), |file| file.write_all(config.as_bytes()))?;
    write_atomically(folder.join("generation_config.json"), |file| {
        file.write_all(model.config().generation_to_json().as_bytes())
    })?;
    Ok(dense)
}

/// The text of `config.json`, with the rotary settings also under the keys of transformers 4, which most models of mlx-lm read.
fn config_of(model: &Model, quantization: MlxQuantization) -> String {
    let mut map = model.config().to_json_map(dtype_of(model.dtype()));
    for key in ["quantization", "quantization_config"] {
        map.insert(key.into(), quantization.to_json());
    }
    let rope = map.get("rope_parameters").and_then(Value::as_object).cloned().unwrap_or_default();
    let base = |kind: &str| rope.get(kind).and_then(|settings| settings.get("rope_theta")).cloned();
    if let (Some(local), Some(full)) = (base("sliding_attention"), base("full_attention")) {
        map.insert("rope_local_base_freq".into(), local);
        map.insert("rope_theta".into(), full);
    } else if rope.get("rope_type").is_some_and(|kind| kind != "default") {
        map.entry("rope_scaling").or_insert(Value::Object(rope));
    }
    format!("{:#}\n", Value::Object(map))
}

/// The dtype of scales beside a matrix of this dtype.
fn dtype_of(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::F32 => dtype,
        _ => DType::BF16,
    }
}

/// The tensors of a matrix.
fn quantized(name: &str, weight: &Weight, quantization: MlxQuantization) -> Result<Vec<(&'static str, Tensor)>> {
    let (rows, columns) = weight.dims2()?;
    let dtype = if weight.block_format().is_some() { DType::BF16 } else { dtype_of(weight.dtype()) };
    let values = weight.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    check_finite(name, &values)?;
    let values = values.flatten_all()?.to_vec1::<f32>()?;
    let words = |bytes: Vec<u8>| {
        let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        Tensor::from_vec(words, (rows, columns * quantization.bits() / WORD), &Device::Cpu)
    };
    let groups = (rows, columns / quantization.group_size());
    match quantization {
        MlxQuantization::Mxfp4 => {
            let blocks = BlockFormat::MXFP4.quantize(&values, columns, None);
            let blocks = blocks.map_err(|error| Error::argument(name, error.to_string()))?;
            let (codes, scales) = of_blocks(&blocks);
            Ok(vec![("weight", words(codes)?), ("scales", Tensor::from_vec(scales, groups, &Device::Cpu)?)])
        }
        MlxQuantization::Affine { bits, group_size } => {
            let num_groups = values.len() / group_size;
            let (mut scales, mut biases) = (vec![0.0; num_groups], vec![0.0; num_groups]);
            let mut codes = vec![0; values.len() * bits / 8];
            let groups_of_values = values.par_chunks(group_size).zip(codes.par_chunks_mut(group_size * bits / 8));
            groups_of_values.zip(scales.par_iter_mut().zip(biases.par_iter_mut())).for_each(
                |((values, codes), (scale, bias))| {
                    let line = Line::through(values, bits, dtype);
                    line.write(values, bits, codes);
                    (*scale, *bias) = (line.scale, line.bias);
                },
            );
            let floats = |values: Vec<f32>| Tensor::from_vec(values, groups, &Device::Cpu)?.to_dtype(dtype);
            Ok(vec![("weight", words(codes)?), ("scales", floats(scales)?), ("biases", floats(biases)?)])
        }
    }
}

/// The weights of a group: `scale * code + bias`.
#[derive(Debug, Clone, Copy)]
struct Line {
    scale: f32,
    bias: f32,
}

impl Line {
    /// The smallest scale: groups of equal values have one, too.
    const LEAST: f32 = 1e-7;

    /// The better of two lines whose code 0 is the end of the range that is farther from zero, which is therefore exact: one
    /// whose last code is the other end, and one that has a code for zero. Scale and bias are rounded to `dtype`.
    fn through(values: &[f32], bits: usize, dtype: DType) -> Self {
        let (low, high) = values
            .iter()
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
        let step = ((high - low) / highest_code(bits)).max(Self::LEAST);
        let (edge, step) = if low.abs() > high.abs() { (low, step) } else { (high, -step) };
        let bias = rounded(edge, dtype);
        let whole = Self { scale: rounded(step, dtype), bias };
        let zero = (-edge / step).round();
        if zero == 0.0 {
            return whole;
        }
        let with_zero = Self { scale: rounded(-edge / zero, dtype), bias };
        if with_zero.squared_error(values, bits) <= whole.squared_error(values, bits) { with_zero } else { whole }
    }

    /// The nearest code of a weight.
    fn code(self, value: f32, bits: usize) -> f32 {
        ((value - self.bias) / self.scale).round().clamp(0.0, highest_code(bits))
    }

    fn squared_error(self, values: &[f32], bits: usize) -> f32 {
        let error = |value: &f32| self.scale * self.code(*value, bits) + self.bias - value;
        values.iter().map(|value| error(value).powi(2)).sum()
    }

    /// Writes the codes as a stream of bits, lowest first.
    fn write(self, values: &[f32], bits: usize, bytes: &mut [u8]) {
        let (mut buffer, mut len) = (0_u32, 0);
        let mut bytes = bytes.iter_mut();
        for value in values {
            buffer |= (self.code(*value, bits) as u32) << len;
            len += bits;
            while len >= 8 {
                if let Some(byte) = bytes.next() {
                    *byte = (buffer & 0xff) as u8;
                }
                buffer >>= 8;
                len -= 8;
            }
        }
    }
}

/// The largest code of `bits` bits.
fn highest_code(bits: usize) -> f32 {
    ((1_u32 << bits) - 1) as f32
}

/// A value as `dtype` holds it.
fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The codes and scales of ggml's blocks, which hold the first 16 codes beside the others.
fn of_blocks(blocks: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (Vec::with_capacity(blocks.len()), Vec::with_capacity(blocks.len() / MX_BLOCK));
    for block in blocks.as_chunks::<MX_BLOCK>().0 {
        let [scale, bytes @ ..] = block;
        scales.push(*scale);
        for shift in [0, 4] {
            codes.extend(
                bytes.as_chunks::<2>().0.iter().map(|[even, odd]| (even >> shift & 15) | (odd >> shift & 15) << 4),
            );
        }
    }
    (codes, scales)
}
