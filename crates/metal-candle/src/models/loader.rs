//! `ModelLoader`: loads models from safetensors checkpoints and GGUF files.

use super::gguf::GgufWeights;
use super::packed::PackedWeights;
use super::{Model, ModelConfig};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{GgufFile, SafetensorsFile, Shards, TensorEntry};
use crate::ops::Weight;
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, ErrorKind};
use std::path::Path;

/// The number of tensors after which the loader waits for a GPU, so that it frees the memory of their transfers.
const TENSORS_PER_SYNCHRONIZATION: usize = 16;

/// Loads a model from a safetensors file, an index of shards, a folder, or a GGUF file.
///
/// Quantized matrices of a GGUF file stay quantized. On the CPU, training multiplies their f32 values, and inference
/// rounds activations to 8 bits on processors that multiply such integers. On a GPU, activations are bf16, and products
/// of many rows use weights that are dequantized to bf16, a chunk of a matrix at a time. With a requested dtype,
/// quantized matrices are dequantized.
///
/// Quantized matrices of a safetensors checkpoint are repacked to GGUF blocks while loading if a block format can
/// represent exactly the same values. Otherwise they become dense. Their dtype is that of their scales on the CPU; on a
/// GPU it is the requested dtype or that of the dense tensors, as for blocks.
///
/// Files are mapped into memory. On the CPU, matrices of the requested dtype stay in the map: processes share their
/// memory, and loading takes no time. Other tensors are read one by one. After 32 passes through the model, its files
/// are copied to private memory with larger pages, which is faster to read.
///
/// Files may be deleted, or replaced by renaming, while a model is in use. If one is truncated or overwritten before it
/// has been copied, the model returns errors from then on, never the results of other weights.
///
/// Besides the tensors of the model, a checkpoint may contain `rotary_emb.inv_freq` tensors and those of the vision
/// part of a multimodal model, which are ignored. If `tie_word_embeddings` is set, it may also contain an
/// `lm_head.weight`: as in transformers 5, one that differs from the embedding unties the head. The prefix `model.` may
/// be missing from all names.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    device: Device,
    dtype: Option<DType>,
    config: Option<ModelConfig>,
}

/// The progress of loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors loaded so far.
    pub tensors: usize,
    /// The total number of tensors.
    pub num_tensors: usize,
    /// Bytes of the files read so far.
    pub bytes: usize,
    /// The total number of bytes to read.
    pub num_bytes: usize,
}

impl Default for ModelLoader {
    fn default() -> Self {
        Self::new()
    }
}

impl ModelLoader {
    /// A loader for the CPU that preserves the dtype of the file.
    pub fn new() -> Self {
        Self { device: Device::CPU, dtype: None, config: None }
    }

    /// Loads onto `device`.
    #[must_use]
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Converts weights to `dtype` (f32, f16 or bf16).
    ///
    /// Without it, weights have the dtype of most bytes of the file; f64 becomes f32.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Uses `config` instead of the `config.json` beside the weights.
    #[must_use]
    pub fn with_config(mut self, config: ModelConfig) -> Self {
        self.config = Some(config);
        self
    }

    /// Loads `path`. `config.json` must be in the same folder as the weights.
    ///
    /// # Errors
    /// A file is missing, truncated or of another format, or tensors do not fit the configuration.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.load_with_progress(path, |_| ())
    }

    /// [`ModelLoader::load`] with a callback: `progress` is called after each tensor.
    ///
    /// # Errors
    /// As [`ModelLoader::load`].
    pub fn load_with_progress(&self, path: impl AsRef<Path>, progress: impl FnMut(LoadProgress)) -> Result<Model> {
        let path = path.as_ref();
        if GgufFile::is_named(path) {
            return self.load_gguf(&GgufFile::open(path)?, progress);
        }
        let shards = Shards::open(path)?;
        let mut config = self.config_for(path)?;
        let found = names_in_model(&shards);
        if config.tie_word_embeddings && head_differs(&shards, &found)? {
            tracing::warn!(
                "`{}`: `lm_head.weight` differs from the embedding, so it is used even though `tie_word_embeddings` is set",
                shards.path().display()
            );
            config.tie_word_embeddings = false;
        }
        let parameters = Model::parameter_shapes(&config);
        let dense = prevailing_dtype(&shards, found.values());
        let packed = PackedWeights::find(&shards, config.quantization.as_ref(), &found, &parameters, dense);
        let names = match_names(&shards, &found, &config, &packed)?;
        if let Some(quantization) = config.quantization.as_ref().filter(|_| packed.is_empty()) {
            let problem = format!(
                "`config.json` says that the weights are quantized ({quantization}): expected such matrices, found none; if they \
                 are not quantized, remove `quantization_config` or `quantization` from it"
            );
            return Err(Error::Tensors { path: shards.path().to_path_buf(), problems: vec![problem] });
        }
        let weights = self.read(&shards, &names, &packed, progress)?;
        drop(packed);
        Model::from_weights(config, weights, self.device)
    }

    fn load_gguf(&self, file: &GgufFile, progress: impl FnMut(LoadProgress)) -> Result<Model> {
        let config = match &self.config {
            Some(config) => config.clone(),
            None => ModelConfig::from_gguf(file)?,
        };
        config.validate()?;
        let source = GgufWeights::new(file)?;
        let shape = |name: &str| file.tensor(name).map(|tensor| tensor.shape.as_slice());
        let (names, problems) = match_shapes(&config, |parameter| source.name(parameter), shape, file.names());
        if !problems.is_empty() {
            return Err(Error::Tensors { path: file.path().to_path_buf(), problems });
        }
        self.dtype.map(check_dtype).transpose()?;
        // on a GPU, dense weights have the dtype of activations
        let home = (!self.device.is_cpu()).then_some(DType::BF16);
        let mut loading = Loading::new(self, names.len(), file.num_bytes(), progress);
        for spec in config.parameter_specs()? {
            let Some(tensor) = names.get(&spec.name).and_then(|name| file.tensor(name)) else { continue };
            let mut weight = source.weight(&spec, tensor)?;
            let num_bytes = weight.num_bytes();
            let is_quantized = weight.block_format().is_some();
            let dtype = self.dtype.or(home.filter(|_| !is_quantized));
            if let Some(dtype) = dtype
                && (is_quantized || weight.dtype() != dtype)
            {
                weight = weight.to_dtype(dtype)?.into();
            }
            loading.add(spec.name, weight, num_bytes)?;
            if !self.device.is_cpu() {
                file.release(tensor, num_bytes);
            }
        }
        Model::from_weights(config, loading.finish()?, self.device)
    }

    /// Loads all tensors of `path` by their names in the file, for any model.
    ///
    /// # Errors
    /// A file is missing, truncated or of another format, or a tensor does not have a float dtype.
    pub fn load_weights(&self, path: impl AsRef<Path>) -> Result<HashMap<String, Tensor>> {
        let shards = Shards::open(path.as_ref())?;
        let names: BTreeMap<String, String> = shards.names().map(|name| (name.into(), name.into())).collect();
        let problems: Vec<String> = shards.names().filter_map(|name| dtype_problem(&shards, name)).collect();
        if !problems.is_empty() {
            return Err(Error::Tensors { path: shards.path().to_path_buf(), problems });
        }
        let weights = self.read(&shards, &names, &PackedWeights::default(), |_| ())?;
        weights.into_iter().map(|(name, weight)| Ok((name, weight.tensor()?))).collect()
    }

    fn config_for(&self, path: &Path) -> Result<ModelConfig> {
        if let Some(config) = &self.config {
            config.validate()?;
            return Ok(config.clone());
        }
        let beside = ModelConfig::path_beside(path);
        if !beside.exists() {
            let message = "no such file; it contains the sizes of the model, unless `with_config` provides them";
            return Err(Error::read(beside, io::Error::new(ErrorKind::NotFound, message)));
        }
        ModelConfig::from_json(beside)
    }

    /// Reads tensors, given as a map from their names in the model to those in the files.
    fn read(
        &self,
        shards: &Shards,
        names: &BTreeMap<String, String>,
        packed: &PackedWeights,
        progress: impl FnMut(LoadProgress),
    ) -> Result<HashMap<String, Weight>> {
        let prevailing = || prevailing_dtype(shards, names.values().filter(|name| !packed.is_part(name)));
        let dtype = match self.dtype {
            Some(dtype) => Some(dtype),
            None if packed.is_empty() => Some(prevailing()),
            // on the CPU, the parameters of a model may have different dtypes
            None if self.device.is_cpu() => None,
            None => Some(if prevailing() == DType::F16 { DType::F16 } else { DType::BF16 }),
        };
        dtype.map(check_dtype).transpose()?;
        let dense = names.values().filter(|name| !packed.is_part(name)).filter_map(|name| shards.get(name));
        let num_bytes = dense.map(|(_, entry)| entry.num_bytes()).sum::<usize>() + packed.num_bytes();
        let mut loading = Loading::new(self, names.len(), num_bytes, progress);
        loading.dtype = dtype.unwrap_or(loading.dtype);
        for (name, name_in_file) in names {
            if let Some((weight, num_bytes)) = packed.weight(name, self.dtype)? {
                let is_foreign = !self.device.is_cpu() && weight.block_format().is_none();
                let weight = if is_foreign { weight.to_dtype(loading.dtype)?.into() } else { weight };
                loading.add(name.clone(), weight, num_bytes)?;
                continue;
            }
            let Some((file, entry)) = shards.get(name_in_file) else { continue };
            let dtype = dtype.unwrap_or_else(|| dense_dtype(entry));
            let weight = match mapped(file, entry, dtype) {
                Some(weight) => weight,
                None => file.float_tensor(name_in_file, dtype)?.into(),
            };
            loading.add(name.clone(), weight, entry.num_bytes())?;
            if !self.device.is_cpu() {
                file.map().release(entry.byte_range());
            }
        }
        loading.finish()
    }
}

/// The weights loaded so far, and their destination.
struct Loading<P> {
    device: Device,
    /// The dtype of activations on a GPU.
    dtype: DType,
    weights: HashMap<String, Weight>,
    state: LoadProgress,
    progress: P,
}

impl<P: FnMut(LoadProgress)> Loading<P> {
    fn new(loader: &ModelLoader, num_tensors: usize, num_bytes: usize, progress: P) -> Self {
        let state = LoadProgress { tensors: 0, num_tensors, bytes: 0, num_bytes };
        let (device, weights) = (loader.device, HashMap::with_capacity(num_tensors));
        Self { device, dtype: loader.dtype.unwrap_or(DType::BF16), weights, state, progress }
    }

    /// Adds a weight with a size of `num_bytes` in its file.
    fn add(&mut self, name: String, weight: Weight, num_bytes: usize) -> Result<()> {
        let is_on_gpu = !self.device.is_cpu();
        let weight = if is_on_gpu { weight.to_device(&self.device.candle(), self.dtype)? } else { weight };
        self.weights.insert(name, weight);
        self.state.tensors += 1;
        self.state.bytes += num_bytes;
        if is_on_gpu && self.state.tensors.is_multiple_of(TENSORS_PER_SYNCHRONIZATION) {
            self.device.synchronize()?;
        }
        (self.progress)(self.state);
        Ok(())
    }

    fn finish(self) -> Result<HashMap<String, Weight>> {
        self.device.synchronize()?;
        Ok(self.weights)
    }
}

fn check_dtype(dtype: DType) -> Result<()> {
    if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(());
    }
    Err(Error::argument("dtype", format!("expected f32, f16 or bf16, found {}", dtype.as_str())))
}

/// Maps a matrix from the file, if it has the right dtype and alignment. Vectors are small, so they are read instead.
fn mapped(file: &SafetensorsFile, entry: &TensorEntry, dtype: DType) -> Option<Weight> {
    let is_usable = entry.shape.len() > 1 && entry.candle_dtype() == Some(dtype);
    is_usable.then(|| Weight::mapped(file.map(), entry.byte_range(), &entry.shape, dtype))?
}

/// The name of each tensor in the file, by its name in a model of the family. For a multimodal checkpoint, only the
/// tensors of the text model are returned.
fn names_in_model(shards: &Shards) -> HashMap<String, String> {
    const TEXT_PARTS: [(&str, &str); 3] = [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ];
    let in_text_part = |name: &str| -> Option<String> {
        TEXT_PARTS.iter().find_map(|(prefix, own)| Some(format!("{own}{}", name.strip_prefix(prefix)?)))
    };
    if shards.names().any(|name| in_text_part(name).is_some()) {
        let own = |name: &str| in_text_part(name).or_else(|| name.starts_with("lm_head.").then(|| name.to_string()));
        return shards.names().filter_map(|name| Some((own(name)?, name.to_string()))).collect();
    }
    let without_prefix = !shards.names().any(|name| name.starts_with("model."));
    let own = |name: &str| {
        if without_prefix && !name.starts_with("lm_head.") { format!("model.{name}") } else { name.to_string() }
    };
    shards.names().map(|name| (own(name), name.to_string())).collect()
}

/// The name of each tensor of the model in the file, or all problems.
fn match_names(
    shards: &Shards,
    found: &HashMap<String, String>,
    config: &ModelConfig,
    packed: &PackedWeights,
) -> Result<BTreeMap<String, String>> {
    let fail = |mut problems: Vec<String>| {
        problems.sort();
        Err(Error::Tensors { path: shards.path().to_path_buf(), problems })
    };
    if !packed.problems.is_empty() {
        return fail(packed.problems.clone());
    }
    // some quantized checkpoints contain scales for a quantized key/value cache
    let of_cache = [".k_scale", ".v_scale", ".q_scale"];
    let is_aside = |own: &str| {
        let is_tied_head = config.tie_word_embeddings && own.starts_with(HEAD);
        let is_of_cache = config.quantization.is_some() && of_cache.iter().any(|part| own.ends_with(part));
        is_tied_head || is_of_cache || own.ends_with("rotary_emb.inv_freq")
    };
    let name = |parameter: &str| packed.name(parameter).map(String::from).or_else(|| found.get(parameter).cloned());
    let shape = |name: &str| packed.shape(name).or_else(|| shards.get(name).map(|(_, entry)| entry.shape.as_slice()));
    let in_files = found.iter().filter(|(own, name)| !is_aside(own) && !packed.is_part(name));
    let (names, mut problems) = match_shapes(config, name, shape, in_files.map(|(_, name)| name.as_str()));
    let dense = names.values().filter(|name| !packed.is_part(name));
    problems.extend(dense.filter_map(|name| dtype_problem(shards, name)));
    if problems.is_empty() { Ok(names) } else { fail(problems) }
}

/// The name of each parameter in the file, as returned by `name`, and the problems: missing parameters, wrong shapes,
/// and tensors of `in_files` that are not parameters.
fn match_shapes<'a>(
    config: &ModelConfig,
    name: impl Fn(&str) -> Option<String>,
    shape: impl Fn(&str) -> Option<&'a [usize]>,
    in_files: impl Iterator<Item = &'a str>,
) -> (BTreeMap<String, String>, Vec<String>) {
    let (mut names, mut problems) = (BTreeMap::new(), Vec::new());
    for (parameter, expected) in Model::parameter_shapes(config) {
        let name_in_file = name(&parameter);
        let found = name_in_file.as_deref().and_then(&shape);
        let (Some(name_in_file), Some(found)) = (&name_in_file, found) else {
            let name = name_in_file.unwrap_or(parameter);
            problems.push(format!("`{name}`: expected {expected:?}, found no such tensor"));
            continue;
        };
        if found != expected {
            problems.push(format!("`{name_in_file}`: expected {expected:?}, found {found:?}"));
        }
        names.insert(parameter, name_in_file.clone());
    }
    let known: HashSet<&str> = names.values().map(String::as_str).collect();
    for name in in_files.filter(|name| !known.contains(name)) {
        let found = shape(name).unwrap_or_default();
        problems.push(format!("`{name}`: expected no such tensor, found {found:?}"));
    }
    problems.sort();
    (names, problems)
}

/// The prefix of the names of a head's tensors.
const HEAD: &str = "lm_head.";

/// Whether the checkpoint contains a head that differs from the embedding.
fn head_differs(shards: &Shards, found: &HashMap<String, String>) -> Result<bool> {
    let get = |name: &str| found.get(name).and_then(|name| shards.get(name));
    let parts = |module: &str| -> BTreeMap<&str, &str> {
        found.iter().filter_map(|(own, name)| Some((own.strip_prefix(module)?, name.as_str()))).collect()
    };
    let (of_head, of_embedding) = (parts(HEAD), parts("model.embed_tokens."));
    if of_head.len() > 1 || of_embedding.len() > 1 {
        // each tensor of a quantized matrix is compared
        let bytes = |name: &str| shards.get(name).map(|(file, entry)| &file.map()[entry.byte_range()]);
        let is_same = of_head.len() == of_embedding.len()
            && of_head.iter().all(|(part, name)| of_embedding.get(part).is_some_and(|own| bytes(name) == bytes(own)));
        return Ok(!of_head.is_empty() && !is_same);
    }
    let (head, embedding) = (get("lm_head.weight"), get("model.embed_tokens.weight"));
    let (Some((head_file, head)), Some((file, embedding))) = (head, embedding) else {
        return Ok(false);
    };
    if head.dtype == embedding.dtype && head_file.bytes(&head.name)? == file.bytes(&embedding.name)? {
        return Ok(false);
    }
    if head.shape != embedding.shape || !head.is_float() || !embedding.is_float() {
        return Ok(true);
    }
    let (head, embedding) =
        (head_file.float_tensor(&head.name, DType::F32)?, file.float_tensor(&embedding.name, DType::F32)?);
    Ok(head.ne(&embedding)?.flatten_all()?.max(0)?.to_scalar::<u8>()? != 0)
}

fn dtype_problem(shards: &Shards, name: &str) -> Option<String> {
    let (_, entry) = shards.get(name)?;
    let found = entry.dtype;
    (!entry.is_float()).then(|| format!("`{name}`: expected dtype F32, F16, BF16 or F64, found {found}"))
}

/// The dtype of a tensor that is loaded without conversion.
fn dense_dtype(entry: &TensorEntry) -> DType {
    entry.candle_dtype().filter(|dtype| *dtype != DType::F64).unwrap_or(DType::F32)
}

/// The dtype of most bytes of float tensors; f32 for f64.
fn prevailing_dtype<'a>(shards: &Shards, names: impl Iterator<Item = &'a String>) -> DType {
    let mut sums: Vec<(DType, usize)> = Vec::new();
    for (_, entry) in names.filter_map(|name| shards.get(name)) {
        let dtype = match entry.candle_dtype() {
            Some(dtype @ (DType::F16 | DType::BF16)) => dtype,
            _ if entry.is_float() => DType::F32,
            _ => continue,
        };
        match sums.iter_mut().find(|(known, _)| *known == dtype) {
            Some((_, bytes)) => *bytes += entry.num_bytes(),
            None => sums.push((dtype, entry.num_bytes())),
        }
    }
    sums.into_iter().max_by_key(|&(_, bytes)| bytes).map_or(DType::F32, |(dtype, _)| dtype)
}
