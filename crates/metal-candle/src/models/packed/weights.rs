//! `PackedWeights`: finds and reads the quantized matrices of a checkpoint.

use super::matrix::PackedMatrix;
use super::module::{Checked, Module};
use super::quantization::Quantization;
use super::{bitsandbytes, compressed, float8, gptq, mlx};
use crate::error::Result;
use crate::files::Shards;
use crate::ops::Weight;
use candle_core::DType;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The quantized matrices of a checkpoint, by parameter name.
#[derive(Default)]
pub(crate) struct PackedWeights<'a> {
    matrices: BTreeMap<&'a str, PackedMatrix<'a>>,
    /// The tensors that store them, by their names in the files.
    parts: HashSet<&'a str>,
    shapes: HashMap<&'a str, [usize; 2]>,
    /// The problems with other matrices.
    pub(crate) problems: Vec<String>,
}

impl<'a> PackedWeights<'a> {
    /// Finds the parameters, given by name and shape, among the tensors `found`, given by their names in the model and
    /// in the files. `dense_dtype` is the dtype of dense matrices without half-precision scales.
    pub(crate) fn find(
        shards: &'a Shards,
        quantization: Option<&Quantization>,
        found: &'a HashMap<String, String>,
        parameters: &'a [(String, Vec<usize>)],
        dense_dtype: DType,
    ) -> Self {
        let mut packed = Self::default();
        let Some(quantization) = quantization else { return packed };
        let sorted: BTreeMap<&str, &str> = found.iter().map(|(own, name)| (own.as_str(), name.as_str())).collect();
        let names: HashSet<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        for (parameter, shape) in parameters {
            let (Some(module), &[rows, columns]) = (parameter.strip_suffix("weight"), shape.as_slice()) else {
                continue;
            };
            let has_bias = names.contains(format!("{module}bias").as_str());
            let tensors = sorted.range(module..).map_while(|(own, name)| Some((own.strip_prefix(module)?, *name)));
            let Some(module) = Module::new(shards, tensors) else { continue };
            let matrix = find(&module, quantization, [rows, columns], dense_dtype)
                .and_then(|matrix| if has_bias { Ok(matrix) } else { with_zero_bias(&module, matrix) });
            match matrix {
                Ok(None) => (),
                Ok(Some(matrix)) => packed.insert(parameter, matrix),
                Err(problem) => packed.problems.push(problem),
            }
        }
        packed
    }

    /// Whether no matrix is quantized.
    pub(crate) fn is_empty(&self) -> bool {
        self.matrices.is_empty()
    }

    /// The size of all quantized matrices in the files, in bytes.
    pub(crate) fn num_bytes(&self) -> usize {
        self.matrices.values().map(PackedMatrix::num_bytes).sum()
    }

    fn insert(&mut self, parameter: &'a str, matrix: PackedMatrix<'a>) {
        self.parts.extend(matrix.parts.iter().map(|part| part.name()));
        self.shapes.insert(matrix.parts[0].name(), matrix.shape);
        self.matrices.insert(parameter, matrix);
    }

    /// The first tensor that stores a parameter, by its name in the files.
    pub(crate) fn name(&self, parameter: &str) -> Option<&'a str> {
        self.matrices.get(parameter).map(|matrix| matrix.parts[0].name())
    }

    /// The shape of the parameter whose first tensor this is.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(<[usize; 2]>::as_slice)
    }

    /// Whether this tensor stores a part of a quantized matrix.
    pub(crate) fn is_part(&self, name: &str) -> bool {
        self.parts.contains(name)
    }

    /// Reads a parameter on the CPU; also returns its size in the files in bytes. `None` if it is not quantized.
    ///
    /// Without a dtype, it consists of quantized blocks if they can represent the same values, otherwise it has the
    /// dtype of its scales.
    pub(crate) fn weight(&self, parameter: &str, dtype: Option<DType>) -> Result<Option<(Weight, usize)>> {
        let Some(matrix) = self.matrices.get(parameter) else { return Ok(None) };
        Ok(Some((matrix.weight(dtype)?, matrix.num_bytes())))
    }
}

/// The matrix `[rows, columns]` of a module; `None` if it is not quantized.
fn find<'a>(
    module: &Module<'a>,
    quantization: &Quantization,
    shape: [usize; 2],
    dense_dtype: DType,
) -> Checked<Option<PackedMatrix<'a>>> {
    match quantization {
        Quantization::Mlx(settings) => mlx::find(module, settings, shape[1]),
        Quantization::BitsAndBytes { .. } => bitsandbytes::find(module, shape, dense_dtype),
        Quantization::Float8 { block } => {
            let scale = if module.find("weight_scale").is_some() { "weight_scale" } else { "weight_scale_inv" };
            float8::find(module, shape, scale, *block, dense_dtype)
        }
        Quantization::Gptq(settings) => gptq::find(module, shape, settings, dense_dtype),
        Quantization::Awq => gptq::find_awq(module, shape, dense_dtype),
        Quantization::Compressed(settings) => compressed::find(module, shape, settings, dense_dtype),
    }
}

/// Accepts the zero bias that GPTQ tools write for layers without one.
fn with_zero_bias<'a>(module: &Module<'a>, matrix: Option<PackedMatrix<'a>>) -> Checked<Option<PackedMatrix<'a>>> {
    let Some(bias) = module.find("bias") else { return Ok(matrix) };
    let Some(mut matrix) = matrix else { return Ok(None) };
    if bias.bytes().iter().any(|&byte| byte != 0) {
        return Err(format!("`{}`: expected no such tensor, or zeros, found a bias", bias.name()));
    }
    matrix.parts.push(bias);
    Ok(Some(matrix))
}
