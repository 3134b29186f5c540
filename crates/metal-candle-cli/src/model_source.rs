//! Finds and loads the model and adapter of the flags.

use crate::error::UserError;
use crate::matmul_precision::PrecisionArguments;
use crate::model_folder::copy_tokenizer;
use crate::output::{Output, Unit};
use crate::values::{DeviceKind, MixtureName, WeightType};
use anyhow::Result;
use candle_core::DType;
use clap::Args;
use metal_candle::adapters::LoRAAdapter;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::files::{GgufFile, shard_names};
use metal_candle::models::{Quantization, SafetensorsFile};
use metal_candle::{Device, Model, ModelConfig, ModelLoader};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The name of the built-in model.
pub(crate) const NANO: &str = "nano";

/// The flags of a model and its device.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArguments {
    /// The model: a folder, a safetensors or GGUF file, `nano` (the built-in model), or a Hub name such
    /// as `org/name` or `org/name@revision`.
    #[arg(long, default_value = "nano")]
    pub(crate) model: String,

    /// Convert weights to this type while loading [default: as in the file].
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<WeightType>,

    /// Quantize the weights while loading to a type such as `q8_0` or `q4_k_m` (see `quantize`).
    #[arg(long, value_name = "TYPE")]
    pub(crate) quantize: Option<MixtureName>,

    /// Where to run: `auto` (Metal or CUDA, else the CPU), `cpu`, `metal`, `cuda`, or `cuda:1` for
    /// the second CUDA device.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceKind,
}

impl ModelArguments {
    /// The requested types of weights.
    pub(crate) fn types(&self) -> (Option<WeightType>, Option<MixtureName>) {
        (self.dtype, self.quantize)
    }
}

/// The flags of a model and an adapter on it.
#[derive(Debug, Clone, Args)]
pub(crate) struct AdaptedModelArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,

    /// An adapter to apply: a run folder, a PEFT or mlx-lm folder, or a GGUF file.
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
}

/// A model on disk.
#[derive(Debug, Clone)]
pub(crate) struct ModelSource {
    /// A folder, or a safetensors file, an index of shards or a GGUF file in a folder.
    path: PathBuf,
    /// The GGUF file that contains the whole model.
    gguf: Option<Arc<GgufFile>>,
    /// The name given by the user.
    pub(crate) name: String,
}

impl ModelSource {
    /// Finds a model by the value of `--model`; downloads models of the Hub.
    pub(crate) fn find(model: &str, output: Output) -> Result<Self> {
        let name = model.to_owned();
        if model == NANO {
            return Self::at(crate::nano::folder()?, name);
        }
        let path = PathBuf::from(model);
        if path.exists() {
            return Self::at(path, name);
        }
        if is_local(model) {
            let error = UserError::new(format!("there is no model `{model}`: no such file or folder"));
            let folder = model.split_once('/').map(|(folder, _)| folder).filter(|folder| Path::new(folder).is_dir());
            return Err(match folder.filter(|folder| !folder.starts_with('.')) {
                Some(folder) => {
                    error.with_hint(format!("the Hub was not searched, because `{folder}` is a folder here"))
                }
                None => error,
            }
            .into());
        }
        Self::at(from_hub(model, output)?, name)
    }

    /// The model at `path`. In a folder without a `config.json`, a single GGUF file is the model.
    fn at(path: PathBuf, name: String) -> Result<Self> {
        let path = match gguf_in_folder(&path) {
            Some(file) => file,
            None => path,
        };
        let gguf = GgufFile::is_named(&path).then(|| GgufFile::open(&path)).transpose()?.map(Arc::new);
        Ok(Self { path, gguf, name })
    }

    /// The GGUF file that contains the whole model, if there is one.
    pub(crate) fn gguf(&self) -> Option<&GgufFile> {
        self.gguf.as_deref()
    }

    /// The folder of `config.json` and the tokenizer.
    pub(crate) fn folder(&self) -> &Path {
        if self.path.is_dir() {
            return &self.path;
        }
        self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    pub(crate) fn config(&self) -> metal_candle::Result<ModelConfig> {
        let config = match self.gguf() {
            Some(file) => ModelConfig::from_gguf(file)?,
            None => ModelConfig::from_json(self.folder().join("config.json"))?,
        };
        warn_once(&config.notes);
        Ok(config)
    }

    pub(crate) fn tokenizer(&self) -> metal_candle::Result<Tokenizer> {
        match self.gguf() {
            Some(file) => Tokenizer::from_gguf(file),
            None => Tokenizer::from_folder(self.folder()),
        }
    }

    /// Whether there is a tokenizer.
    pub(crate) fn has_tokenizer(&self) -> bool {
        match self.gguf() {
            Some(file) => Tokenizer::is_in_gguf(file),
            None => Tokenizer::is_in_folder(self.folder()),
        }
    }

    /// Compiles a chat template with the special tokens of the model.
    pub(crate) fn template(&self, source: String) -> metal_candle::Result<ChatTemplate> {
        match self.gguf() {
            Some(file) => ChatTemplate::for_tokenizer(source, &Tokenizer::from_gguf(file)?),
            None => ChatTemplate::for_folder(source, self.folder()),
        }
    }

    /// Writes the files of the tokenizer and its chat template into `folder`.
    pub(crate) fn write_tokenizer(&self, folder: &Path) -> metal_candle::Result<()> {
        match self.gguf() {
            Some(file) => Tokenizer::from_gguf(file)?.save(folder),
            None => copy_tokenizer(self.folder(), folder),
        }
    }

    /// The safetensors files of its weights, and the missing files of its index.
    pub(crate) fn weights(&self) -> Result<(Vec<SafetensorsFile>, Vec<String>)> {
        let file = if self.path.is_file() { self.path.clone() } else { self.path.join("model.safetensors") };
        let index = match file.extension() {
            Some(extension) if extension == "json" => file.clone(),
            _ if file.is_file() => return Ok((vec![SafetensorsFile::open(file)?], Vec::new())),
            _ => self.folder().join("model.safetensors.index.json"),
        };
        let names: BTreeSet<String> = if index.is_file() {
            shard_names(&index)?
        } else {
            let entries = std::fs::read_dir(self.folder()).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.ends_with(".safetensors") && !name.contains("adapter")).collect()
        };
        let (there, missing): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| self.folder().join(name).is_file());
        let files = there.iter().map(|name| SafetensorsFile::open(self.folder().join(name)));
        Ok((files.collect::<metal_candle::Result<_>>()?, missing))
    }

    /// The dtype of its weights, if they can be read.
    pub(crate) fn dtype(&self) -> Option<DType> {
        if self.gguf.is_some() {
            return None;
        }
        let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
        let mut files: Vec<PathBuf> = if self.path.is_file() && is_weights(&self.path) {
            vec![self.path.clone()]
        } else {
            std::fs::read_dir(self.folder()).ok()?.flatten().map(|entry| entry.path()).collect()
        };
        files.retain(is_weights);
        files.sort();
        let file = SafetensorsFile::open(files.first()?).ok()?;
        let floats = file.entries().iter().filter(|entry| entry.is_float());
        floats.max_by_key(|entry| entry.num_bytes())?.candle_dtype()
    }

    /// Loads the model in the types of the flags or settings.
    pub(crate) fn load_as(
        &self,
        (dtype, quantize): (Option<WeightType>, Option<MixtureName>),
        device: DeviceKind,
        output: Output,
    ) -> Result<Model> {
        let Some(MixtureName(mixture)) = quantize else { return self.load(dtype, device, output) };
        let model = quantized(&self.load(dtype, DeviceKind::Cpu, output)?, &mixture.into(), output)?;
        moved(&model, device.open(output)?, dtype)
    }

    pub(crate) fn load(&self, dtype: Option<WeightType>, device: DeviceKind, output: Output) -> Result<Model> {
        let mut loader = ModelLoader::new().with_device(device.open(output)?);
        if let Some(dtype) = dtype {
            loader = loader.with_dtype(dtype.dtype());
        }
        // show a bar only for slow loads
        let mut bar = None;
        let model = loader.load_with_progress(&self.path, |progress| {
            if progress.num_bytes > 200 << 20 {
                bar.get_or_insert_with(|| output.progress(progress.num_bytes as u64, "loading", Unit::Bytes))
                    .set(progress.bytes as u64, "");
            }
        })?;
        if let Some(bar) = bar {
            bar.finish();
        }
        warn_once(&model.config().notes);
        Ok(model)
    }
}

/// Moves a model that was quantized on the CPU to the device that runs it. On a GPU, activations are of the type of the flag.
pub(crate) fn moved(model: &Model, device: Device, dtype: Option<WeightType>) -> Result<Model> {
    Ok(if device.is_cpu() { model.clone() } else { model.to_device(device, type_on_gpu(model, dtype))? })
}

/// The type of activations of a model on a GPU: the requested one, otherwise bf16 beside quantized weights.
fn type_on_gpu(model: &Model, requested: Option<WeightType>) -> DType {
    let has_blocks = || model.parameters().iter().any(|(_, weight)| weight.block_format().is_some());
    match requested {
        Some(dtype) => dtype.dtype(),
        None if has_blocks() => DType::BF16,
        None => model.dtype(),
    }
}

/// Quantizes a model, with a progress bar.
pub(crate) fn quantized(model: &Model, quantization: &Quantization, output: Output) -> Result<Model> {
    let mut bar = None;
    let result = model.quantize(quantization, |progress| {
        if progress.num_elements > 200 << 20 {
            bar.get_or_insert_with(|| output.progress(progress.num_elements as u64, "quantizing", Unit::Steps))
                .set(progress.elements as u64, "");
        }
    })?;
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(result)
}

/// The only GGUF file, or the first file of a split model, in a folder without a `config.json`.
fn gguf_in_folder(folder: &Path) -> Option<PathBuf> {
    if !folder.is_dir() || folder.join("config.json").exists() {
        return None;
    }
    let entries = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| GgufFile::is_named(path)).collect();
    files.sort();
    let first = files.first()?.clone();
    let is_split = first.to_string_lossy().contains("-00001-of-");
    (files.len() == 1 || is_split).then_some(first)
}

/// Prints each note on a model's files once per process.
fn warn_once(notes: &[String]) {
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
    for note in notes {
        if warned.insert(note.clone()) {
            Output::warn(note);
        }
    }
}

/// A loaded model with its tokenizer, and an adapter if one was named.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) source: ModelSource,
    /// The model that the adapter runs on.
    pub(crate) model: Model,
    pub(crate) adapter: Option<LoRAAdapter>,
}

impl Loaded {
    pub(crate) fn new(flags: &AdaptedModelArguments, precision: PrecisionArguments, output: Output) -> Result<Self> {
        let source = ModelSource::find(&flags.model.model, output)?;
        if let Some(adapter) = &flags.adapter {
            check_adapter(adapter)?;
        }
        let model = precision.apply(source.load_as(flags.model.types(), flags.model.device, output)?)?;
        let adapter = flags.adapter.as_deref().map(|path| load_adapter(&model, path, &source)).transpose()?;
        // fully trained modules replace the model's
        let model = adapter.as_ref().map_or(model, |adapter| adapter.run_model().clone());
        Ok(Self { source, model, adapter })
    }
}

/// Checks that a path can be an adapter, before the model is loaded.
pub(crate) fn check_adapter(path: &Path) -> Result<()> {
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let message = format!("there is no adapter `{}`: no such file or folder", path.display());
            let hint = "--adapter accepts a run folder, a PEFT or mlx-lm folder, a GGUF adapter, or a checkpoint file; \
                `metal-candle runs` lists runs";
            Err(UserError::new(message).with_hint(hint).into())
        }
        Err(source) => Err(metal_candle::Error::Read { path: path.to_path_buf(), source }.into()),
    }
}

/// Reads an adapter of a model from a run folder, a PEFT or mlx-lm folder, or a checkpoint file.
pub(crate) fn load_adapter(model: &Model, path: &Path, source: &ModelSource) -> Result<LoRAAdapter> {
    check_adapter(path)?;
    let in_run = path.join("adapter");
    let path = if in_run.is_dir() { in_run.as_path() } else { path };
    check_base(path, source)?;
    Ok(LoRAAdapter::load(model, path)?)
}

/// Returns an error if a run's adapter is used with another model than the rounded model in the run folder.
fn check_base(adapter: &Path, source: &ModelSource) -> Result<()> {
    let base = adapter.join("..").join("base");
    let (Ok(base), Ok(found)) = (base.canonicalize(), source.folder().canonicalize()) else { return Ok(()) };
    if !adapter.ends_with("adapter") || !base.join("config.json").is_file() || base == found {
        return Ok(());
    }
    let message =
        format!("`{}` belongs to the model in the same run folder, whose weights were rounded", adapter.display());
    Err(UserError::new(message).with_hint(format!("--model {}", base.display())).into())
}

/// Whether a missing path was meant as a path rather than a Hub name.
fn is_local(model: &str) -> bool {
    // a revision may contain more slashes
    let name = model.split_once('@').map_or(model, |(name, _)| name);
    let has_other_separators = model.contains('\\') || name.matches('/').count() > 1;
    let parent = Path::new(model).parent().filter(|parent| !parent.as_os_str().is_empty());
    has_other_separators || name.starts_with(['.', '/', '~']) || parent.is_some_and(Path::exists)
}

fn no_such_model(model: &str) -> UserError {
    UserError::new(format!("there is no model `{model}`: no such file or folder, and not a Hub name")).with_hint(
        "--model accepts a folder, a safetensors or GGUF file, `nano`, or a Hub name such as `Qwen/Qwen2.5-Coder-0.5B-Instruct`",
    )
}

#[cfg(feature = "hub")]
fn from_hub(model: &str, output: Output) -> Result<PathBuf> {
    use metal_candle::models::{Hub, HubName};
    let name: HubName = model.parse().map_err(|_| no_such_model(model))?;
    let mut current: Option<(String, crate::output::Progress)> = None;
    let folder = Hub::from_env()?.fetch_model(&name, &mut |progress| {
        let total = progress.total_bytes.unwrap_or(progress.num_bytes);
        // small files are downloaded before anyone could read a bar
        if total < 1 << 20 {
            return;
        }
        if current.as_ref().is_none_or(|(file, _)| file != progress.file) {
            if let Some((_, bar)) = current.take() {
                bar.finish();
            }
            current = Some((progress.file.to_owned(), output.progress(total, progress.file, Unit::Bytes)));
        }
        if let Some((_, bar)) = &mut current {
            bar.set(progress.num_bytes, "");
        }
    });
    if let Some((_, bar)) = current {
        bar.finish();
    }
    Ok(folder?)
}

#[cfg(not(feature = "hub"))]
fn from_hub(model: &str, _output: Output) -> Result<PathBuf> {
    if model.split('/').count() == 2 {
        return Err(no_such_model(model).with_hint("this build cannot download models (feature `hub`)").into());
    }
    Err(no_such_model(model).into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use metal_candle::models::QuantizationMixture;

    #[test]
    fn a_quantized_model_has_the_requested_type_of_activations_on_a_gpu() {
        let dense = ModelLoader::new().with_device(Device::CPU).load(crate::nano::folder().unwrap()).unwrap();
        let mixture = QuantizationMixture::from_name("q8_0").unwrap();
        let quantized = dense.quantize(&mixture.into(), |_| ()).unwrap();
        let wide = dense.to_dtype(DType::F32).unwrap();
        for (model, requested, expected) in [
            (&quantized, None, DType::BF16),
            (&quantized, Some(WeightType::F32), DType::F32),
            (&quantized, Some(WeightType::F16), DType::F16),
            (&dense, None, DType::BF16),
            (&wide, None, DType::F32),
        ] {
            assert_eq!(type_on_gpu(model, requested), expected, "{requested:?}");
        }
    }
}
