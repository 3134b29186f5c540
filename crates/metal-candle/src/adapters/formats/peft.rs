//! Reads and writes adapter folders of PEFT: `adapter_model.safetensors` (or `adapter_model.bin`) and
//! `adapter_config.json`.

use super::config_file::{CONFIG_FILE, layout_of};
use super::peft_config::{self, describe};
use super::replaced::{PREFIX, Replaced, TOKENS_SUFFIX, is_equal};
use super::source::TensorSource;
use super::text_part::peft_path;
use super::values::{self, Naming, Part};
use crate::adapters::initial_values::subtracted_values;
use crate::adapters::layout::{EMBEDDING_WEIGHT, HEAD_WEIGHT, Layout, LoRAModule, SavedParameter};
use crate::adapters::lora::LoRAAdapter;
use crate::error::{Error, Result};
use crate::files::{JsonObject, create_folder, write_atomically, write_safetensors};
use crate::models::{LinearInfo, Model};
use candle_core::Tensor;
use std::path::Path;

const TENSOR_FILE: &str = "adapter_model.safetensors";
/// The prefix of PEFT's tensor names.
const PICKLE_FILE: &str = "adapter_model.bin";

struct Names;

impl Naming for Names {
    fn name(&self, module: &LoRAModule, part: Part) -> String {
        let leaf = match (part, module.is_embedding()) {
            (Part::A, false) => "lora_A.weight",
            (Part::B, false) => "lora_B.weight",
            (Part::A, true) => "lora_embedding_A",
            (Part::B, true) => "lora_embedding_B",
            (Part::Magnitude, _) => "lora_magnitude_vector",
        };
        format!("{PREFIX}{}.{leaf}", module.path)
    }

    fn saved(&self, saved: &SavedParameter, has_terms: bool) -> String {
        match saved.name.rsplit_once('.') {
            Some((module, _)) if saved.rows.is_some() => format!("{PREFIX}{module}.{TOKENS_SUFFIX}"),
            Some((module, leaf)) if has_terms => format!("{PREFIX}{module}.base_layer.{leaf}"),
            _ => format!("{PREFIX}{}", saved.name),
        }
    }

    fn transposed(&self) -> bool {
        false
    }
}

pub(super) fn load(model: &Model, folder: &Path, config: &JsonObject) -> Result<LoRAAdapter> {
    let path = folder.join(TENSOR_FILE);
    let pickle = folder.join(PICKLE_FILE);
    read(model, if !path.exists() && pickle.exists() { &pickle } else { &path }, config)
}

/// Reads the adapter whose tensors are in the file `path`.
pub(super) fn read(model: &Model, path: &Path, config: &JsonObject) -> Result<LoRAAdapter> {
    let source = TensorSource::open(path)?;
    let leaves = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"];
    let is_in_file = |linear: &LinearInfo| {
        leaves.iter().any(|leaf| source.shape(&format!("{PREFIX}{}.{leaf}", linear.path)).is_some())
    };
    let (mut settings, planned, start) = peft_config::plan(model, config, is_in_file)?;
    let found = Replaced::read(model, &source, config, &settings, &planned)?;
    settings.trainable_tokens.clone_from(&found.rows);
    settings.parameters_to_save = found.others();
    if planned.is_empty() && !settings.saves_something() {
        return Err(peft_config::nothing_selected(config));
    }
    let layout = layout_of(config.path(), model, settings, &planned)?;
    let values = values::read(&source, &layout, &Names, &found.values, &found.names)?;
    check_tied_terms(&source, &layout)?;
    // PEFT subtracts these from the weights when it loads the adapter
    let subtracted = start.map_or(Ok(Vec::new()), |start| subtracted_values(model, &layout, start))?;
    LoRAAdapter::from_values(model, layout, values, subtracted)
}

/// With `ensure_weight_tying`, PEFT trains one A and B for embedding and head, and writes both: they must agree.
fn check_tied_terms(source: &TensorSource, layout: &Layout) -> Result<()> {
    let module = |is_embedding: bool| {
        layout.modules.iter().find(|module| module.layer.is_none() && module.is_embedding() == is_embedding)
    };
    let (true, Some(embedding), Some(head)) = (layout.settings.ensure_weight_tying, module(true), module(false)) else {
        return Ok(());
    };
    let transposed = |name: &str, (rows, columns): (usize, usize)| -> Result<Vec<f32>> {
        let values = source.values(name)?;
        Ok((0..values.len()).map(|index| values[index % rows * columns + index / rows]).collect())
    };
    let (rank, vocab, hidden) = (embedding.rank, embedding.in_features, embedding.out_features);
    for (part, other, shape) in [(Part::A, Part::B, (hidden, rank)), (Part::B, Part::A, (rank, vocab))] {
        let (name, of_embedding) = (Names.name(head, part), Names.name(embedding, other));
        if head.rank != rank || !is_equal(&source.values(&name)?, &transposed(&of_embedding, shape)?) {
            let problem =
                format!("`{name}` is not the transpose of `{of_embedding}`, although `ensure_weight_tying` ties them");
            return Err(Error::Tensors { path: source.path().to_path_buf(), problems: vec![problem] });
        }
    }
    Ok(())
}

pub(super) fn save(adapter: &LoRAAdapter, folder: &Path) -> Result<()> {
    let adapter = adapter.without_start()?;
    create_folder(folder)?;
    write_safetensors(folder.join(TENSOR_FILE), &named_tensors(&adapter)?, &[("format", "pt")])?;
    let path = folder.join(CONFIG_FILE);
    let text = serde_json::to_vec_pretty(&describe(&adapter)).map_err(|error| Error::format(&path, error))?;
    write_atomically(&path, |file| file.write_all(&text))
}

/// All tensors under their PEFT names, sorted by name, of an adapter without a subtracted update.
pub(super) fn named_tensors(adapter: &LoRAAdapter) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::with_capacity(2 * adapter.modules().len());
    for module in adapter.modules() {
        let (a, b) = adapter.matrices(module)?;
        tensors.push((Names.name(module, Part::A), a));
        tensors.push((Names.name(module, Part::B), b));
        if let Some(magnitudes) = adapter.magnitudes(module)? {
            tensors.push((Names.name(module, Part::Magnitude), magnitudes));
        }
    }
    for saved in adapter.saved_parameters() {
        let has_terms = saved
            .name
            .rsplit_once('.')
            .is_some_and(|(path, _)| adapter.modules().iter().any(|module| module.path == path));
        let tensor = adapter.saved_tensor(saved)?;
        if adapter.ensure_weight_tying() && saved.name == EMBEDDING_WEIGHT && saved.rows.is_none() {
            // PEFT writes both
            tensors.push((format!("{PREFIX}{HEAD_WEIGHT}"), tensor.copy()?));
        }
        tensors.push((Names.saved(saved, has_terms), tensor));
    }
    for (name, _) in &mut tensors {
        if let Some(path) = name.strip_prefix(PREFIX) {
            *name = format!("{PREFIX}{}", peft_path(adapter.model(), path));
        }
    }
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    Ok(tensors)
}
