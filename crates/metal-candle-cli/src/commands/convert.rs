//! `convert`: a model or an adapter written in another format.

use crate::adapter_output::{largest_difference, probe};
use crate::error::UserError;
use crate::gguf_output;
use crate::model_source::{ModelArguments, ModelSource, check_adapter, load_adapter};
use crate::output::{Output, bytes};
use crate::run_folder::{FREE_HINT, check_free, fill_folder};
use crate::values::ByteSize;
use anyhow::Result;
use clap::{Args, ValueEnum};
use metal_candle::adapters::LoRAAdapter;
use metal_candle::models::{Rows, save_model};
use metal_candle::{Model, ModelLoader};
use serde_json::json;
use std::path::{Path, PathBuf};

/// A format of models or adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// An adapter as PEFT reads it: `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
    /// A folder as mlx-lm reads it: of an adapter `adapters.safetensors` and `adapter_config.json`,
    /// of a model as `safetensors`.
    Mlx,
    /// A GGUF file as llama.cpp reads it, of a model or of an adapter.
    Gguf,
    /// A model's folder as transformers reads it: `model.safetensors`, `config.json` and the tokenizer.
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

    /// The folder or GGUF file to write; nothing may be there.
    #[arg(long, value_name = "PATH")]
    pub(crate) output: PathBuf,

    /// Split a GGUF file into files of at most this size, as in `4GB`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) split_max_size: Option<ByteSize>,
}

pub(crate) fn run(flags: &ConvertArguments, output: Output) -> Result<()> {
    match flags.format {
        Format::Gguf => gguf_output::check_output(&flags.output)?,
        Format::Peft | Format::Mlx | Format::Safetensors => check_free(&flags.output, FREE_HINT)?,
    }
    if flags.split_max_size.is_some() && (flags.format != Format::Gguf || flags.adapter.is_some()) {
        return Err(UserError::new("`--split-max-size` is for models written as GGUF").into());
    }
    if let Some(adapter) = &flags.adapter {
        check_adapter(adapter)?;
    }
    let source = ModelSource::find(&flags.model.model, output)?;
    let model = source.load(flags.model.dtype, flags.model.device, output)?;
    match &flags.adapter {
        Some(path) => {
            let adapter = load_adapter(&model, path, &source)?;
            convert_adapter(flags, &model, adapter, output)
        }
        None => convert_model(flags, &source, &model, output),
    }
}

fn convert_model(flags: &ConvertArguments, source: &ModelSource, model: &Model, output: Output) -> Result<()> {
    let batch = probe(model);
    let expected = model.forward(&batch, None, None, Rows::All)?;
    let paths = match flags.format {
        Format::Peft => {
            return Err(UserError::new("`--format peft` is for adapters: `--adapter` is missing").into());
        }
        Format::Gguf => {
            let export = gguf_output::export(model, source)?;
            gguf_output::write(&export, &flags.output, flags.split_max_size.map(|size| size.0), output)?
        }
        Format::Mlx | Format::Safetensors => {
            fill_folder(&flags.output, FREE_HINT, || {
                save_model(model, &flags.output)?;
                Ok(source.write_tokenizer(&flags.output)?)
            })?;
            vec![flags.output.join("model.safetensors")]
        }
    };
    let is_gguf = flags.format == Format::Gguf;
    let written = ModelLoader::new().with_device(model.device());
    let written = written.load(if is_gguf { paths.first().unwrap_or(&flags.output) } else { &flags.output })?;
    let difference = largest_difference(&expected, &written.forward(&batch, None, None, Rows::All)?)?;
    let size: u64 = paths.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum();
    if output.json {
        return Ok(Output::print_json(&json!({
            "output": flags.output.to_string_lossy(),
            "files": paths.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>(),
            "bytes": size,
            "max_logit_difference": difference,
        }))?);
    }
    let names = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    output.note(format_args!(
        "wrote {names} ({})\nlogits of the model and of the one written differ by at most {difference:.2e}",
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
        adapter.run_model().forward(&batch, Some(&adapter.terms()?), None, Rows::All)
    };
    let expected = logits_of(&adapter)?;
    if !largest_difference(&expected, &expected)?.is_finite() {
        return Err(UserError::new("the logits with this adapter are not finite: it overflows").into());
    }
    let in_folder = |save: &dyn Fn(&Path) -> metal_candle::Result<()>| {
        fill_folder(&flags.output, FREE_HINT, || Ok(save(&flags.output)?))
    };
    match flags.format {
        Format::Peft => in_folder(&|folder| adapter.save(folder))?,
        Format::Mlx => in_folder(&|folder| adapter.save_mlx(folder))?,
        Format::Gguf => adapter.save_gguf(&flags.output)?,
        Format::Safetensors => {
            let message = "`--format safetensors` is for models: an adapter is written as `peft`, `mlx` or `gguf`";
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
            "wrote {} ({} modules)\nlogits with the adapter and with the one written differ by at most {difference:.2e}",
            flags.output.display(),
            written.modules().len(),
        ));
    }
    Ok(())
}
