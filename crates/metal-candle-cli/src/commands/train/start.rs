//! Loads everything that a run needs before its first step.

use super::prepared::Prepared;
use crate::error::UserError;
use crate::matmul_precision;
use crate::model_folder::with_end_of_turn;
use crate::model_source::{ModelSource, NANO, check_adapter, load_adapter};
use crate::output::Output;
use crate::run_folder::RunFolder;
use crate::run_record::{RunRecord, seconds_since_epoch};
use crate::settings::{PathValues, TrainSettings, parse_layers};
use crate::templates::with_template;
use anyhow::Result;
use candle_core::DType;
use metal_candle::Model;
use metal_candle::adapters::{LoRAAdapter, TargetModule};
use metal_candle::data::Tokenizer;
use metal_candle::models::save_model;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// Loads model, adapter and data; a resumed run renders its data with the date of its first start.
pub(super) fn prepare(mut settings: TrainSettings, resumed: Option<&RunFolder>, output: Output) -> Result<Prepared> {
    let given = settings.clone();
    let name = settings.model.clone().unwrap_or_else(|| NANO.into());
    let mut source = ModelSource::find(&name, output)?;
    source.name = shown(Path::new(&name));
    let config = source.config()?;
    settings.complete(&config)?;
    if let Some(adapter) = &settings.adapter {
        check_adapter(adapter)?;
    }
    settings.data_path()?;
    let data_name = settings.data.as_ref().map_or_else(|| "its sample data".to_owned(), |path| shown(path));
    let variables: Vec<&str> = settings.template_var.iter().flatten().map(String::as_str).collect();
    let tokenizer = with_template(&source, settings.chat_template.as_deref(), &variables)?;
    let recorded =
        resumed.and_then(|run| RunRecord::read(run.path()).ok().flatten()).map_or(0, |record| record.started);
    let started = if recorded == 0 { seconds_since_epoch() } else { recorded };
    let now = UNIX_EPOCH + Duration::from_secs(started);
    let template = tokenizer.chat_template().cloned().map(|template| template.with_clock(move || now));
    let tokenizer = tokenizer.with_chat_template(template);
    let data = settings.datasets(&tokenizer, config.vocab_size)?;
    for note in &data.notes {
        output.note(format_args!("note: {note}"));
    }

    let is_full = settings.full == Some(true);
    if settings.quantize.is_some() && (is_full || settings.from_scratch == Some(true)) {
        return Err(UserError::new("`--quantize` needs an adapter: quantized weights cannot be trained").into());
    }
    let device = settings.device.unwrap_or(crate::values::DeviceKind::Auto);
    let model = if settings.from_scratch == Some(true) {
        Model::initialize(config, settings.seed.unwrap_or(0), device.open(output)?)?
    } else if is_full && settings.train_last_layers.is_none() {
        // all weights are trained in f32, whatever their saved dtype
        source.load(Some(crate::values::WeightType::F32), device, output)?
    } else {
        source.load_as((settings.dtype, settings.quantize), device, output)?
    };
    let model = matmul_precision::apply(settings.matmul_precision, model)?;
    let adapter = if is_full { None } else { Some(adapter(&settings, &model, &name, &source, &tokenizer)?) };
    // an initialization that rounds weights creates another model
    let model = adapter.as_ref().map_or(model, |adapter| adapter.model().clone());
    Ok(Prepared { given, settings, source, model, adapter, tokenizer, data, data_name, started, num_devices: 1 })
}

/// A path relative to the working folder.
fn shown(path: &Path) -> String {
    let folder = std::env::current_dir().ok();
    let inside = folder.as_ref().and_then(|folder| path.strip_prefix(folder).ok());
    match inside.filter(|inside| !inside.as_os_str().is_empty()) {
        Some(inside) => inside.display().to_string(),
        None => path.display().to_string(),
    }
}

fn adapter(
    settings: &TrainSettings,
    model: &Model,
    name: &str,
    source: &ModelSource,
    tokenizer: &Tokenizer,
) -> Result<LoRAAdapter> {
    if let Some(path) = &settings.adapter {
        return load_adapter(model, path, source);
    }
    let modules = TargetModule::parse_list(&settings.target_modules.clone().unwrap_or_default().join(","))?;
    let mut builder = LoRAAdapter::builder(model)
        .with_rank(settings.rank.unwrap_or(8))
        .with_alpha(settings.alpha.unwrap_or(16.0))
        .with_dropout(settings.dropout.unwrap_or(0.0))
        .with_target_modules(modules)
        .with_rslora(settings.use_rslora == Some(true))
        .with_dora(settings.use_dora == Some(true))
        .with_start(settings.start()?)
        .with_modules_to_save(settings.modules_to_save.clone().unwrap_or_default())
        .with_ensure_weight_tying(settings.ensure_weight_tying == Some(true))
        .with_bias(settings.trained_biases()?)
        .with_trainable_tokens(settings.trainable_token_ids(tokenizer)?)
        .with_seed(settings.seed.unwrap_or(0))
        .with_base_model(name);
    if let Some(layers) = &settings.layers {
        builder = builder.with_layers(parse_layers(layers, model.config().num_hidden_layers)?);
    }
    for (pattern, rank) in settings.rank_pattern.as_ref().map_or(Ok(Vec::new()), PathValues::ranks)? {
        builder = builder.with_rank_pattern(pattern, rank);
    }
    for (pattern, alpha) in settings.alpha_pattern.iter().flat_map(|patterns| &patterns.0) {
        builder = builder.with_alpha_pattern(pattern, *alpha);
    }
    Ok(builder.build()?)
}

/// Writes a trained model, in the requested dtype or else the dtype of the original model.
pub(super) fn save_full(model: &Model, folder: &Path, prepared: &Prepared) -> Result<()> {
    let dtype = match prepared.settings.dtype {
        Some(dtype) => dtype.dtype(),
        None => prepared.source.dtype().unwrap_or(DType::F32),
    };
    let mut tensors = HashMap::new();
    for (name, tensor) in model.parameters() {
        tensors.insert(name.clone(), tensor.to_dtype(dtype)?);
    }
    let model = Model::from_tensors(model.config().clone(), tensors, model.device())?;
    save_model(&with_end_of_turn(model, &prepared.tokenizer)?, folder)?;
    prepared.source.write_tokenizer(folder)?;
    prepared.write_template(folder)?;
    Ok(())
}
