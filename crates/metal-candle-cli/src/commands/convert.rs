//! `convert`: writes a model or an adapter in another format.

use crate::adapter_output::{largest_difference, probe};
use crate::error::UserError;
use crate::gguf_output::{self, GgufReport};
use crate::model_source::{ModelArguments, ModelSource, check_adapter, load_adapter};
use crate::output::{Output, bytes};
use crate::proof::{Proof, ProofText, save_proved, save_report};
use crate::run_folder::{FREE_HINT, check_free, fill_folder};
use crate::values::ByteSize;
use anyhow::Result;
use clap::{Args, ValueEnum};
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::Tokenizer;
use metal_candle::models::{MlxQuantization, Rows, save_mlx_model};
use metal_candle::{Model, ModelLoader};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A format of models or adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A PEFT adapter: `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
    /// An mlx-lm folder: `adapters.safetensors` and `adapter_config.json` for an adapter; for a model
    /// the same as `safetensors`, or a quantized model with `--mlx-type`.
    Mlx,
    /// A GGUF file for llama.cpp, of a model or an adapter.
    Gguf,
    /// A model folder for transformers: `model.safetensors`, `config.json` and the tokenizer.
    Safetensors,
}

/// How the matrices of an mlx-lm model are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MlxType {
    /// The number of bits.
    Affine(usize),
    Mxfp4,
}

impl FromStr for MlxType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "mxfp4" {
            return Ok(Self::Mxfp4);
        }
        let bits = text.strip_suffix("bit").and_then(|bits| bits.parse().ok()).filter(|bits| matches!(bits, 2..=6 | 8));
        bits.map(Self::Affine).ok_or_else(|| "expected one of 2bit, 3bit, 4bit, 5bit, 6bit, 8bit, mxfp4".into())
    }
}

/// Flags of `convert`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConvertArguments {
    /// The format to write.
    #[arg(long, value_enum)]
    pub(crate) format: Format,

    /// Quantize a model for mlx-lm: `2bit` to `6bit` or `8bit` (affine, with a scale and a bias for
    /// each group of weights of a row), or `mxfp4`. Needs `--format mlx`.
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["quantize", "adapter"])]
    pub(crate) mlx_type: Option<MlxType>,

    /// Weights of a group: 32, 64 or 128 [default: 64; always 32 for `mxfp4`].
    #[arg(long, value_name = "COUNT", requires = "mlx_type")]
    pub(crate) mlx_group_size: Option<usize>,

    #[command(flatten)]
    pub(crate) model: ModelArguments,

    /// The adapter to convert: a run folder, a PEFT folder, an mlx-lm folder or a GGUF file
    /// [default: the model is converted].
    #[arg(long, value_name = "PATH", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,

    /// The folder or GGUF file to write; it must not exist.
    #[arg(long, value_name = "PATH")]
    pub(crate) output: PathBuf,

    /// Split the model into files of at most this size, such as `4GB`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) split_max_size: Option<ByteSize>,

    #[command(flatten)]
    pub(crate) text: ProofText,
}

impl ConvertArguments {
    /// The settings of `--mlx-type`.
    fn mlx_quantization(&self) -> Result<Option<MlxQuantization>> {
        let group_size = self.mlx_group_size.unwrap_or(if self.mlx_type == Some(MlxType::Mxfp4) { 32 } else { 64 });
        match self.mlx_type {
            None => Ok(None),
            Some(MlxType::Mxfp4) if group_size == 32 => Ok(Some(MlxQuantization::Mxfp4)),
            Some(MlxType::Affine(bits)) if matches!(group_size, 32 | 64 | 128) => {
                Ok(Some(MlxQuantization::Affine { bits, group_size }))
            }
            Some(kind) => {
                let expected = if kind == MlxType::Mxfp4 { "32 for `mxfp4`" } else { "32, 64 or 128" };
                Err(UserError::new(format!("`--mlx-group-size`: expected {expected}, found {group_size}")).into())
            }
        }
    }
}

pub(crate) fn run(flags: &ConvertArguments, output: Output) -> Result<()> {
    match flags.format {
        Format::Gguf => gguf_output::check_output(&flags.output)?,
        Format::Peft | Format::Mlx | Format::Safetensors => check_free(&flags.output, FREE_HINT)?,
    }
    if flags.split_max_size.is_some() && (flags.format != Format::Gguf || flags.adapter.is_some()) {
        return Err(UserError::new("`--split-max-size` needs a model and `--format gguf`").into());
    }
    if flags.mlx_quantization()?.is_some() && flags.format != Format::Mlx {
        return Err(UserError::new("`--mlx-type` needs `--format mlx`").into());
    }
    if let Some(adapter) = &flags.adapter {
        check_adapter(adapter)?;
        if flags.text.proof.is_some() {
            return Err(UserError::new("`--proof` needs a model: converting an adapter is lossless").into());
        }
    }
    flags.text.check()?;
    let source = ModelSource::find(&flags.model.model, output)?;
    let model = source.load_as(flags.model.types(), flags.model.device, output)?;
    match &flags.adapter {
        Some(path) => {
            let adapter = load_adapter(&model, path, &source)?;
            convert_adapter(flags, &model, adapter, output)
        }
        None => convert_model(flags, &source, &model, output),
    }
}

fn convert_model(flags: &ConvertArguments, source: &ModelSource, model: &Model, output: Output) -> Result<()> {
    match flags.format {
        Format::Peft => Err(UserError::new("`--format peft` needs `--adapter`").into()),
        Format::Gguf => {
            let tokenizer = source.has_tokenizer().then(|| source.tokenizer()).transpose()?;
            let proof = proof(flags, source, model, tokenizer.as_ref(), output)?;
            let mut export = gguf_output::export(model, source, tokenizer.as_ref())?;
            if let Some(proof) = &proof {
                gguf_output::put_proof(&mut export, proof);
            }
            let paths = gguf_output::write(&export, &flags.output, flags.split_max_size.map(|size| size.0), output)?;
            GgufReport {
                paths: &paths,
                path: &flags.output,
                model,
                tokenizer: tokenizer.as_ref(),
                proof: proof.as_ref(),
            }
            .finish(output)
        }
        Format::Mlx | Format::Safetensors => match flags.mlx_quantization()? {
            Some(quantization) => write_quantized_folder(flags, quantization, source, model, output),
            None => write_folder(flags, source, model, output),
        },
    }
}

/// Compares the model before and after the change of types; none if types do not change and no text is given.
fn proof(
    flags: &ConvertArguments,
    source: &ModelSource,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    output: Output,
) -> Result<Option<Proof>> {
    if flags.model.types() == (None, None) {
        return match flags.text.proof {
            Some(_) => flags.text.measure((model, None), model, tokenizer, None, Vec::new()).map(Some),
            None => Ok(None),
        };
    }
    let original = source.load(None, flags.model.device, output)?;
    flags.text.measure((&original, None), model, tokenizer, None, Vec::new()).map(Some)
}

fn write_folder(flags: &ConvertArguments, source: &ModelSource, model: &Model, output: Output) -> Result<()> {
    let tokenizer = source.has_tokenizer().then(|| source.tokenizer()).transpose()?;
    let proof = proof(flags, source, model, tokenizer.as_ref(), output)?;
    fill_folder(&flags.output, FREE_HINT, || {
        save_proved(model, &flags.output, proof.as_ref())?;
        Ok(source.write_tokenizer(&flags.output)?)
    })?;
    let written = ModelLoader::new().with_device(model.device()).load(&flags.output)?;
    report_folder(flags, (model, &written), proof.as_ref(), output)
}

/// Writes a quantized model for mlx-lm, and compares it with its source before anything is reported.
fn write_quantized_folder(
    flags: &ConvertArguments,
    quantization: MlxQuantization,
    source: &ModelSource,
    model: &Model,
    output: Output,
) -> Result<()> {
    let tokenizer = source.has_tokenizer().then(|| source.tokenizer()).transpose()?;
    let mut compared = None;
    fill_folder(&flags.output, FREE_HINT, || {
        let dense = save_mlx_model(model, &flags.output, quantization)?;
        if let Some(first) = dense.first() {
            output.note(format_args!(
                "{} matrices are not quantized, such as `{first}`: their rows are not whole groups (see --mlx-group-size)",
                dense.len()
            ));
        }
        source.write_tokenizer(&flags.output)?;
        let written = ModelLoader::new().with_device(model.device()).load(&flags.output)?;
        let proof = flags.text.measure((model, None), &written, tokenizer.as_ref(), None, Vec::new())?;
        save_report(&flags.output, &proof)?;
        compared = Some((written, proof));
        Ok(())
    })?;
    let Some((written, proof)) = compared else { return Ok(()) };
    report_folder(flags, (model, &written), Some(&proof), output)
}

/// Reports a written folder, and how far its logits are from those of the source.
fn report_folder(
    flags: &ConvertArguments,
    (model, written): (&Model, &Model),
    proof: Option<&Proof>,
    output: Output,
) -> Result<()> {
    let batch = probe(model);
    let logits = |model: &Model| model.forward(&batch, None, None, Rows::All);
    let difference = largest_difference(&logits(model)?, &logits(written)?)?;
    let size = std::fs::metadata(flags.output.join("model.safetensors")).map_or(0, |file| file.len());
    if output.json {
        return Ok(Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "bytes": size,
            "max_logit_difference": difference,
            "proof": proof.map(Proof::to_json),
        }))?);
    }
    if let Some(proof) = proof {
        proof.note(output);
    }
    output.note(format_args!(
        "wrote {} ({})\nlogits of the source and the written model differ by at most {difference:.2e}",
        flags.output.display(),
        bytes(size),
    ));
    Ok(())
}

fn convert_adapter(flags: &ConvertArguments, model: &Model, mut adapter: LoRAAdapter, output: Output) -> Result<()> {
    if adapter.base_model().is_none() {
        adapter = adapter.with_base_model(&flags.model.model);
    }
    let batch = probe(model);
    let logits_of = |adapter: &LoRAAdapter| -> metal_candle::Result<_> {
        adapter.run_model().forward(&batch, Some(&adapter.low_rank_updates()?), None, Rows::All)
    };
    let expected = logits_of(&adapter)?;
    if !largest_difference(&expected, &expected)?.is_finite() {
        return Err(UserError::new("the logits with this adapter are not finite: the adapter overflows").into());
    }
    let in_folder = |save: &dyn Fn(&Path) -> metal_candle::Result<()>| {
        fill_folder(&flags.output, FREE_HINT, || Ok(save(&flags.output)?))
    };
    match flags.format {
        Format::Peft => in_folder(&|folder| adapter.save(folder))?,
        Format::Mlx => in_folder(&|folder| adapter.save_mlx(folder))?,
        Format::Gguf => adapter.save_gguf(&flags.output)?,
        Format::Safetensors => {
            let message = "`--format safetensors` needs a model: adapters have the formats `peft`, `mlx` and `gguf`";
            return Err(UserError::new(message).into());
        }
    }
    let written = LoRAAdapter::load(model, &flags.output)?;
    let difference = largest_difference(&expected, &logits_of(&written)?)?;
    if output.json {
        Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "modules": written.modules().len(),
            "parameters": written.num_parameters(),
            "max_logit_difference": difference,
        }))?;
    } else {
        output.note(format_args!(
            "wrote {} ({} modules)\nlogits of the source and the written adapter differ by at most {difference:.2e}",
            flags.output.display(),
            written.modules().len(),
        ));
    }
    Ok(())
}
