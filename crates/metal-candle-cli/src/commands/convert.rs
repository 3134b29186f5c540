//! `convert`: writes a model or an adapter in another format.

use crate::adapter_output::{largest_difference, probe};
use crate::error::UserError;
use crate::gguf_output::{self, GgufReport};
use crate::model_source::{ModelArguments, ModelSource, check_adapter, load_adapter};
use crate::output::{Output, bytes};
use crate::proof::{Proof, ProofText, save_proved};
use crate::run_folder::{FREE_HINT, check_free, fill_folder};
use crate::values::ByteSize;
use anyhow::Result;
use clap::{Args, ValueEnum};
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::Tokenizer;
use metal_candle::models::Rows;
use metal_candle::{Model, ModelLoader};
use serde_json::json;
use std::path::{Path, PathBuf};

/// A format of models or adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A PEFT adapter: `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
    /// An mlx-lm folder: `adapters.safetensors` and `adapter_config.json` for an adapter, the same as
    /// `safetensors` for a model.
    Mlx,
    /// A GGUF file for llama.cpp, of a model or an adapter.
    Gguf,
    /// A model folder for transformers: `model.safetensors`, `config.json` and the tokenizer.
    Safetensors,
}

/// Flags of `convert`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConvertArguments {
    /// The format to write.
    #[arg(long, value_enum)]
    pub(crate) format: Format,

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

pub(crate) fn run(flags: &ConvertArguments, output: Output) -> Result<()> {
    match flags.format {
        Format::Gguf => gguf_output::check_output(&flags.output)?,
        Format::Peft | Format::Mlx | Format::Safetensors => check_free(&flags.output, FREE_HINT)?,
    }
    if flags.split_max_size.is_some() && (flags.format != Format::Gguf || flags.adapter.is_some()) {
        return Err(UserError::new("`--split-max-size` needs a model and `--format gguf`").into());
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
        Format::Mlx | Format::Safetensors => write_folder(flags, source, model, output),
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
    let batch = probe(model);
    let logits = |model: &Model| model.forward(&batch, None, None, Rows::All);
    let difference = largest_difference(&logits(model)?, &logits(&written)?)?;
    let size = std::fs::metadata(flags.output.join("model.safetensors")).map_or(0, |file| file.len());
    if output.json {
        return Ok(Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "bytes": size,
            "max_logit_difference": difference,
            "proof": proof.as_ref().map(Proof::to_json),
        }))?);
    }
    if let Some(proof) = &proof {
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
