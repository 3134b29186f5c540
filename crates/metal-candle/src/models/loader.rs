//! Loading safetensors checkpoints and GGUF files.

use super::gguf_weights::GgufWeights;
use super::{Model, ModelConfig};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{GgufFile, SafetensorsFile, Shards, TensorEntry};
use crate::ops::Weight;
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, ErrorKind};
use std::path::Path;

/// After this many tensors a GPU is waited for, so that it frees what their transfer took.
const TENSORS_PER_SYNCHRONIZATION: usize = 16;

/// Loads a model from a safetensors file, an index of shards, a folder, or a GGUF file.
///
/// Quantized matrices of a GGUF file stay quantized on the CPU, and are multiplied with f32 activations. On a GPU they become
/// matrices of the requested dtype, bf16 by default.
///
/// Files are mapped into memory. On the CPU, matrices that have the requested dtype stay in the map: processes share their
/// memory, and loading takes no time. Other tensors are read one by one. After 32 passes through the model its files are copied
/// into memory of their own, whose pages are large and thus faster to read.
///
/// Files may be deleted or replaced by renaming while a model is in use. If one is shortened or overwritten in place before it is
/// copied, the model returns errors from then on, never results of other weights.
///
/// Besides the tensors of the model, a checkpoint may hold `rotary_emb.inv_freq` tensors, and those of the vision part of a
/// multimodal model, which are left out.
/// Where `tie_word_embeddings` is set, an `lm_head.weight` may be there too: one that differs from the embedding unties
/// the head, as in transformers 5. Names may lack the prefix `model.`, if all do.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    device: Device,
    dtype: Option<DType>,
    config: Option<ModelConfig>,
}

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors loaded so far.
    pub tensors: usize,
    /// Tensors in all.
    pub num_tensors: usize,
    /// Bytes of the files read so far.
    pub bytes: usize,
    /// Bytes to be read in all.
    pub num_bytes: usize,
}

impl Default for ModelLoader {
    fn default() -> Self {
        Self::new()
    }
}

impl ModelLoader {
    /// A loader for the CPU that keeps the file's dtype.
    pub fn new() -> Self {
        Self { device: Device::CPU, dtype: None, config: None }
    }

    /// Loads onto `device`.
    #[must_use]
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Converts weights to `dtype` (f32, f16 or bf16) while loading.
    ///
    /// Without it, weights keep the dtype that most of the file's bytes have; f64 becomes f32.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Uses `config` in place of the `config.json` beside the weights.
    #[must_use]
    pub fn with_config(mut self, config: ModelConfig) -> Self {
        self.config = Some(config);
        self
    }

    /// Loads `path`; `config.json` is looked for beside the weights.
    ///
    /// # Errors
    /// A file is missing, truncated or foreign, or tensors do not fit the configuration.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<Model> {
        self.load_with_progress(path, |_| ())
    }

    /// As [`ModelLoader::load`]; `progress` is called after each tensor.
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
                "`{}`: `lm_head.weight` differs from the embedding, so it is used although `tie_word_embeddings` is set",
                shards.path().display()
            );
            config.tie_word_embeddings = false;
        }
        let names = match_names(&shards, found, &config)?;
        let weights = self.read(&shards, &names, progress)?;
        Model::from_weights(config, weights, self.device)
    }

    fn load_gguf(&self, file: &GgufFile, mut progress: impl FnMut(LoadProgress)) -> Result<Model> {
        let config = match &self.config {
            Some(config) => config.clone(),
            None => ModelConfig::from_gguf(file)?,
        };
        config.validate()?;
        let source = GgufWeights::new(file)?;
        let mut problems = Vec::new();
        let mut found = Vec::new();
        for (name, shape) in Model::parameter_shapes(&config) {
            let tensor = source.name(&name).and_then(|name| file.tensor(&name));
            let Some(tensor) = tensor else {
                let name = source.name(&name).unwrap_or(name);
                problems.push(format!("`{name}`: expected {shape:?}, found no such tensor"));
                continue;
            };
            if tensor.shape != shape {
                problems.push(format!("`{}`: expected {shape:?}, found {:?}", tensor.name, tensor.shape));
            }
            found.push((name, tensor));
        }
        let names: HashSet<&str> = found.iter().map(|(_, tensor)| tensor.name.as_str()).collect();
        for tensor in file.tensors() {
            if !GgufWeights::is_aside(&tensor.name) && !names.contains(tensor.name.as_str()) {
                problems.push(format!("`{}`: expected no such tensor, found {:?}", tensor.name, tensor.shape));
            }
        }
        if !problems.is_empty() {
            problems.sort();
            return Err(Error::Tensors { path: file.path().to_path_buf(), problems });
        }
        // a GPU has no kernels for blocks
        let dtype = if self.device.is_cpu() { self.dtype } else { Some(self.dtype.unwrap_or(DType::BF16)) };
        let device = self.device.candle();
        let mut state = LoadProgress { tensors: 0, num_tensors: found.len(), bytes: 0, num_bytes: file.num_bytes() };
        let mut weights = HashMap::with_capacity(found.len());
        for (name, tensor) in found {
            let mut weight = source.weight(&name, tensor)?;
            state.tensors += 1;
            state.bytes += weight.num_bytes();
            if let Some(dtype) = dtype {
                weight = weight.to_dtype(dtype)?.to_device(&device)?.into();
            }
            weights.insert(name, weight);
            progress(state);
        }
        self.device.synchronize()?;
        Model::from_weights(config, weights, self.device)
    }

    /// Loads all tensors of `path` by their names in the file, whatever model they belong to.
    ///
    /// # Errors
    /// A file is missing, truncated or foreign, or a tensor is not of a float dtype.
    pub fn load_weights(&self, path: impl AsRef<Path>) -> Result<HashMap<String, Tensor>> {
        let shards = Shards::open(path.as_ref())?;
        let names: BTreeMap<String, String> = shards.names().map(|name| (name.into(), name.into())).collect();
        let problems: Vec<String> = shards.names().filter_map(|name| dtype_problem(&shards, name)).collect();
        if !problems.is_empty() {
            return Err(Error::Tensors { path: shards.path().to_path_buf(), problems });
        }
        let weights = self.read(&shards, &names, |_| ())?;
        weights.into_iter().map(|(name, weight)| Ok((name, weight.tensor()?))).collect()
    }

    fn config_for(&self, path: &Path) -> Result<ModelConfig> {
        if let Some(config) = &self.config {
            config.validate()?;
            return Ok(config.clone());
        }
        let beside = ModelConfig::path_beside(path);
        if !beside.exists() {
            let message = "no such file; the sizes of the model are read from it, or given by `with_config`";
            return Err(Error::read(beside, io::Error::new(ErrorKind::NotFound, message)));
        }
        ModelConfig::from_json(beside)
    }

    /// Reads tensors, given by the names they shall have and the names in the files.
    fn read(
        &self,
        shards: &Shards,
        names: &BTreeMap<String, String>,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<HashMap<String, Weight>> {
        let dtype = self.dtype.unwrap_or_else(|| prevailing_dtype(shards, names.values()));
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            let found = dtype.as_str();
            return Err(Error::argument("dtype", format!("expected f32, f16 or bf16, found {found}")));
        }
        let device = self.device.candle();
        let num_bytes = names.values().filter_map(|name| shards.get(name)).map(|(_, entry)| entry.num_bytes()).sum();
        let mut state = LoadProgress { tensors: 0, num_tensors: names.len(), bytes: 0, num_bytes };
        let mut weights = HashMap::with_capacity(names.len());
        for (name, name_in_file) in names {
            let Some((file, entry)) = shards.get(name_in_file) else { continue };
            let mut weight = match mapped(file, entry, dtype) {
                Some(weight) => weight,
                None => file.float_tensor(name_in_file, dtype)?.into(),
            };
            if !self.device.is_cpu() {
                weight = weight.to_device(&device)?;
                file.map().release(entry.byte_range());
            }
            weights.insert(name.clone(), weight);
            state.tensors += 1;
            state.bytes += entry.num_bytes();
            if !self.device.is_cpu() && state.tensors.is_multiple_of(TENSORS_PER_SYNCHRONIZATION) {
                self.device.synchronize()?;
            }
            progress(state);
        }
        self.device.synchronize()?;
        Ok(weights)
    }
}

/// A matrix as it is in the file, if it has the type and the alignment for it. Vectors are small and are read.
fn mapped(file: &SafetensorsFile, entry: &TensorEntry, dtype: DType) -> Option<Weight> {
    let is_usable = entry.shape.len() > 1 && entry.candle_dtype() == Some(dtype);
    is_usable.then(|| Weight::mapped(file.map(), entry.byte_range(), &entry.shape, dtype))?
}

/// The name in the file of each tensor, by its name in a model of the family. The text part of a multimodal checkpoint is taken
/// for the model, the other parts are left out.
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

/// The name in the file of each tensor of the model, or everything that does not fit.
fn match_names(
    shards: &Shards,
    mut found: HashMap<String, String>,
    config: &ModelConfig,
) -> Result<BTreeMap<String, String>> {
    let mut names = BTreeMap::new();
    let mut problems = Vec::new();
    for (name, shape) in Model::parameter_shapes(config) {
        let Some(name_in_file) = found.remove(&name) else {
            problems.push(format!("`{name}`: expected {shape:?}, found no such tensor"));
            continue;
        };
        let Some((_, entry)) = shards.get(&name_in_file) else { continue };
        if entry.shape != shape {
            problems.push(format!("`{name_in_file}`: expected {shape:?}, found {:?}", entry.shape));
        }
        problems.extend(dtype_problem(shards, &name_in_file));
        names.insert(name, name_in_file);
    }
    for name in found.values() {
        let tied_head = config.tie_word_embeddings && name == "lm_head.weight";
        if !tied_head && !name.ends_with("rotary_emb.inv_freq") {
            let shape = shards.get(name).map_or(&[][..], |(_, entry)| &entry.shape);
            problems.push(format!("`{name}`: expected no such tensor, found {shape:?}"));
        }
    }
    if problems.is_empty() {
        return Ok(names);
    }
    problems.sort();
    Err(Error::Tensors { path: shards.path().to_path_buf(), problems })
}

/// Whether there are a head and an embedding of one shape with different values.
fn head_differs(shards: &Shards, found: &HashMap<String, String>) -> Result<bool> {
    let get = |name: &str| found.get(name).and_then(|name| shards.get(name));
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

/// The dtype most bytes have; f32 for f64.
fn prevailing_dtype<'a>(shards: &Shards, names: impl Iterator<Item = &'a String>) -> DType {
    let mut sums: Vec<(DType, usize)> = Vec::new();
    for (_, entry) in names.filter_map(|name| shards.get(name)) {
        let dtype = match entry.candle_dtype() {
            Some(dtype @ (DType::F16 | DType::BF16)) => dtype,
            _ => DType::F32,
        };
        match sums.iter_mut().find(|(known, _)| *known == dtype) {
            Some((_, bytes)) => *bytes += entry.num_bytes(),
            None => sums.push((dtype, entry.num_bytes())),
        }
    }
    sums.into_iter().max_by_key(|&(_, bytes)| bytes).map_or(DType::F32, |(dtype, _)| dtype)
}
