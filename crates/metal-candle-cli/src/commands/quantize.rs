//! `quantize`: writes a model as a quantized GGUF file.

use crate::error::UserError;
use crate::eval_data::EvalData;
use crate::gguf_output::{self, GgufReport};
use crate::model_folder::with_end_of_turn;
use crate::model_source::{AdaptedModelArguments, ModelSource, check_adapter, load_adapter, quantized};
use crate::output::{Output, Unit};
use crate::proof::{Proof, ProofArguments};
use crate::templates::TemplateArguments;
use crate::values::{ByteSize, DeviceKind, MixtureName};
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::Model;
use metal_candle::adapters::{LoRAAdapter, Survival};
use metal_candle::data::{DatasetFiles, Tokenizer};
use metal_candle::files::GgufType;
use metal_candle::models::{Batch, Importance, Quantization};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Tokens of a window of a calibration text.
const CALIBRATION_WINDOW: usize = 512;

/// Maximum number of windows in a calibration text.
const MAX_CALIBRATION_WINDOWS: usize = 256;

/// A pattern of tensor names, and the type of matching tensors.
#[derive(Debug, Clone)]
pub(crate) struct TensorType {
    pattern: String,
    kind: GgufType,
}

impl FromStr for TensorType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, name) = text.rsplit_once('=').ok_or("expected PATTERN=TYPE, as in `ffn_down=q6_k`")?;
        let kind = GgufType::from_name(&name.to_ascii_lowercase()).filter(|kind| kind.is_writable());
        let kind = kind.ok_or_else(|| {
            let known: Vec<&str> = GgufType::all().filter(|kind| kind.is_writable()).map(GgufType::name).collect();
            format!("expected one of {} after `=`, found `{name}`", known.join(", "))
        })?;
        Ok(Self { pattern: pattern.into(), kind })
    }
}

/// Flags of `quantize`.
#[derive(Debug, Clone, Args)]
pub(crate) struct QuantizeArguments {
    /// The type to quantize to, named as in `llama-quantize`: `q8_0`, `q6_k`, `q5_k_m`, `q5_k_s`,
    /// `q5_1`, `q5_0`, `q4_k_m`, `q4_k_s`, `q4_1`, `q4_0`, `iq4_nl`, `iq4_xs`, `mxfp4`, `q3_k_l`,
    /// `q3_k_m`, `q3_k_s`, `q2_k`, `f32`, `f16` or `bf16`.
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) mixture: MixtureName,

    /// Use another type for tensors whose names match a regular expression, such as `ffn_down=q6_k` or
    /// `blk\.0\.=f16`. May be given more than once; the first match applies.
    #[arg(long, value_name = "PATTERN=TYPE")]
    pub(crate) tensor_type: Vec<TensorType>,

    /// Weight rounding errors by an importance matrix: a file of `llama-imatrix` or
    /// `--save-imatrix`.
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,

    /// Compute the importance matrix from this text: a JSONL file, a folder with splits, or a text
    /// file.
    #[arg(long, value_name = "PATH", conflicts_with = "imatrix")]
    pub(crate) calibration: Option<PathBuf>,

    /// Write the importance matrix to this GGUF file.
    #[arg(long, value_name = "FILE", requires = "calibration")]
    pub(crate) save_imatrix: Option<PathBuf>,

    /// The GGUF file to write; it must not exist.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,

    /// Split the model into files of at most this size, such as `4GB`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) split_max_size: Option<ByteSize>,

    #[command(flatten)]
    pub(crate) model: AdaptedModelArguments,

    #[command(flatten)]
    pub(crate) proof: ProofArguments,
}

pub(crate) fn run(flags: &QuantizeArguments, output: Output) -> Result<()> {
    gguf_output::check_output(&flags.output)?;
    flags.proof.check()?;
    if let Some(path) = &flags.save_imatrix {
        gguf_output::check_output(path)?;
    }
    let path = flags.model.adapter.as_deref();
    path.map(check_adapter).transpose()?;
    let arguments = &flags.model.model;
    if arguments.quantize.is_some() {
        return Err(UserError::new("use `--type` instead of `--quantize`").into());
    }
    if !matches!(arguments.device, DeviceKind::Auto | DeviceKind::Cpu) {
        let message = format!("`--device {}`: quantizing runs on the CPU", arguments.device);
        return Err(UserError::new(message).into());
    }
    let source = ModelSource::find(&arguments.model, output)?;
    let model = source.load(arguments.dtype, DeviceKind::Cpu, output)?;
    let tokenizer =
        source.has_tokenizer().then(|| TemplateArguments::default().tokenizer(&source, path)).transpose()?;
    let adapter = path.map(|path| load_adapter(&model, path, &source)).transpose()?;
    let (full, terms) = match &adapter {
        Some(adapter) => {
            let merged = adapter.merge_in(&model, DType::F32)?;
            let merged = match &tokenizer {
                Some(tokenizer) => with_end_of_turn(merged, tokenizer)?,
                None => merged,
            };
            (merged, Some(adapter.low_rank_updates()?))
        }
        None => (model.clone(), None),
    };
    let quantization = quantization(flags, &full, tokenizer.as_ref(), output)?;
    let (result, survivals) = quantize(flags, quantization, (&model, adapter.as_ref()), &full, output)?;
    let base = adapter.as_ref().map_or(&model, LoRAAdapter::run_model);
    let proof = flags.proof.text.measure((base, terms.as_ref()), &result, tokenizer.as_ref(), path, survivals)?;
    let mut export = gguf_output::export(&result, &source, tokenizer.as_ref())?.with_mixture(flags.mixture.0);
    gguf_output::put_proof(&mut export, &proof);
    let max_bytes = flags.split_max_size.map(|size| size.0);
    let paths = gguf_output::write(&export, &flags.output, max_bytes, output)?;
    GgufReport {
        paths: &paths,
        path: &flags.output,
        model: &result,
        tokenizer: tokenizer.as_ref(),
        proof: Some(&proof),
    }
    .finish(output)
}

/// The types, and the importance matrix if one is requested.
fn quantization(
    flags: &QuantizeArguments,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    output: Output,
) -> Result<Quantization> {
    let mut quantization = Quantization::from(flags.mixture.0);
    for TensorType { pattern, kind } in &flags.tensor_type {
        quantization = quantization.with_type(pattern, *kind)?;
    }
    // check the types before anything that takes time
    quantization.types(model)?;
    if let Some(path) = &flags.imatrix {
        return Ok(quantization.with_importance(Importance::read(path, model)?));
    }
    let Some(path) = &flags.calibration else { return Ok(quantization) };
    let tokenizer = tokenizer.ok_or_else(|| UserError::new("`--calibration`: the model has no tokenizer"))?;
    let file = DatasetFiles::find_for_evaluation(path)?;
    let window = CALIBRATION_WINDOW.min(model.config().max_sequence_length());
    let rows = EvalData::read(&file, tokenizer, window, model.config().vocab_size)?.dataset.samples;
    let rows: Vec<Batch> = rows.iter().take(MAX_CALIBRATION_WINDOWS).map(|row| Batch::single(&row.ids)).collect();
    let mut bar = output.progress(rows.len() as u64, "importance", Unit::Steps);
    let measured = rows.iter().enumerate().map(|(index, row)| {
        bar.set(index as u64, "");
        row
    });
    let importance = Importance::measure(model, measured)?.with_source(file.display().to_string());
    bar.finish();
    if let Some(path) = &flags.save_imatrix {
        importance.save(path, model)?;
    }
    Ok(quantization.with_importance(importance))
}

/// The quantized model, and how much of the adapter's change survives. With `--auto`, weights that lose too much get types
/// with more bits.
fn quantize(
    flags: &QuantizeArguments,
    mut quantization: Quantization,
    (base, adapter): (&Model, Option<&LoRAAdapter>),
    full: &Model,
    output: Output,
) -> Result<(Model, Vec<Survival>)> {
    let min_survival = flags.proof.min_survival;
    loop {
        let result = quantized(full, &quantization, output)?;
        let survivals = adapter.map(|adapter| adapter.survival(base, &result)).transpose()?.unwrap_or_default();
        let lost = Proof::lost(&survivals, min_survival);
        if lost.is_empty() {
            return Ok((result, survivals));
        }
        if !flags.proof.auto {
            let hint = "`--auto` uses more bits for these weights; `--type q8_0` or f16 loses less; `convert --format gguf` \
            writes the adapter as a separate file, which loses nothing; `--min-survival` lowers the threshold";
            return Err(Proof::refusal(&lost, min_survival, hint).into());
        }
        let types = quantization.types(full)?;
        let mut widened = BTreeMap::new();
        for one in &lost {
            if let Some(kind) = types.get(&one.name).and_then(|kind| kind.with_more_bits()) {
                *widened.entry(kind.name()).or_insert(0) += 1;
                quantization = quantization.with_type_of(&one.name, kind);
            }
        }
        if widened.is_empty() {
            return Err(Proof::refusal(&lost, min_survival, "the adapter's change is lost even in f32").into());
        }
        output.note(round_summary(&lost, survivals.len(), &widened));
    }
}

/// One line about a round of `--auto`: how many of the `total` weights are in `lost`, the worst of them, and the number of
/// weights that get each type.
fn round_summary(lost: &[&Survival], total: usize, widened: &BTreeMap<&str, usize>) -> String {
    let worst = lost.iter().min_by(|a, b| a.share.total_cmp(&b.share));
    let worst = worst.map_or_else(String::new, |one| format!(" (only {:.2} of `{}` survives)", one.share, one.name));
    let types: Vec<String> = widened.iter().map(|(name, count)| format!("{name} for {count}")).collect();
    format!(
        "{} of {total} weights would lose too much of the adapter's change{worst}: using {}",
        lost.len(),
        types.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::round_summary;
    use metal_candle::adapters::Survival;
    use std::collections::BTreeMap;

    #[test]
    fn a_round_is_one_line() {
        let lost = [("a.weight", 0.5), ("b.weight", 0.4321)];
        let lost = lost.map(|(name, share)| Survival { name: name.into(), share, noise: 0.0 });
        let found = round_summary(&lost.each_ref(), 9, &BTreeMap::from([("q5_1", 1), ("q6_k", 1)]));
        let expected = "2 of 9 weights would lose too much of the adapter's change (only 0.43 of `b.weight` survives): \
                        using q5_1 for 1, q6_k for 1";
        assert_eq!(found, expected);
    }
}
