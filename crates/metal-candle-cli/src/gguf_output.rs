//! Shared by `quantize` and `convert`: writes a model with its tokenizer as a GGUF file.

use crate::adapter_output::{largest_difference, probe};
use crate::error::UserError;
use crate::model_source::ModelSource;
use crate::output::{Output, Unit, bytes};
use crate::proof::{PROOF, Proof};
use anyhow::Result;
use metal_candle::data::{ChatTemplate, Tokenizer};
use metal_candle::files::{GgufFile, GgufValue, write_atomically};
use metal_candle::models::{GgufExport, Rows};
use metal_candle::{Model, ModelConfig, ModelLoader};
use serde_json::json;
use std::path::{Path, PathBuf};

/// The key of the chat template in the metadata.
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// Returns an error unless the path ends in `.gguf` and does not exist.
pub(crate) fn check_output(path: &Path) -> Result<()> {
    let is_named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if !is_named {
        let message = format!("`{}`: expected a name that ends in `.gguf`", path.display());
        return Err(UserError::new(message).into());
    }
    for path in [path, &report_path(path), &modelfile_path(path)] {
        if path.symlink_metadata().is_ok() {
            let message = format!("`{}` already exists", path.display());
            return Err(UserError::new(message).with_hint("choose a new file name; nothing is overwritten").into());
        }
    }
    Ok(())
}

/// The path of the report on a GGUF file.
fn report_path(path: &Path) -> PathBuf {
    path.with_extension("proof.json")
}

/// The path of the Modelfile of a GGUF file.
fn modelfile_path(path: &Path) -> PathBuf {
    path.with_extension("Modelfile")
}

/// Creates an export of a model in its types, with the tokenizer and the name of its source.
pub(crate) fn export<'a>(
    model: &'a Model,
    source: &ModelSource,
    tokenizer: Option<&Tokenizer>,
) -> Result<GgufExport<'a>> {
    let mut export = GgufExport::new(model)?;
    for limit in export.limits_of_llama_cpp()? {
        Output::warn(limit);
    }
    if let Some(file) = source.gguf() {
        if let Some(tokenizer) = tokenizer {
            put_template(&mut export, file, tokenizer)?;
        }
        export.copy_metadata(file);
        return Ok(export);
    }
    let folder = std::path::absolute(source.folder()).unwrap_or_else(|_| source.folder().to_path_buf());
    if let Some(name) = folder.file_name() {
        export.put("general.name", GgufValue::Text(name.to_string_lossy().into_owned()));
    }
    let Some(tokenizer) = tokenizer else {
        Output::warn("the model has no tokenizer: programs that read the GGUF file need one");
        // llama.cpp requires the key, and loads such a file for token ids
        export.put("tokenizer.ggml.model", GgufValue::Text("no_vocab".into()));
        return Ok(export);
    };
    let config = serde_json::from_str(&model.config().to_json(model.dtype()))?;
    let written = tokenizer.to_gguf(model.config().vocab_size, &config)?;
    for note in &written.notes {
        Output::warn(note);
    }
    for (key, value) in written.metadata {
        export.put(&key, value);
    }
    Ok(export)
}

/// Sets the chat template and end-of-turn token of the adapter's run, if they differ from the file's.
fn put_template(export: &mut GgufExport, file: &GgufFile, tokenizer: &Tokenizer) -> Result<()> {
    let Some([(_, source)]) = tokenizer.chat_template().map(ChatTemplate::sources) else { return Ok(()) };
    if file.text(CHAT_TEMPLATE)? == Some(source.as_str()) {
        return Ok(());
    }
    export.put(CHAT_TEMPLATE, GgufValue::Text(source.clone()));
    if let Some(id) = tokenizer.end_of_turn_id().filter(|id| !is_end(file, *id)) {
        export.put("tokenizer.ggml.eot_token_id", GgufValue::Integer(id.into()));
    }
    Ok(())
}

/// Whether this token ends a text in a model's file.
fn is_end(file: &GgufFile, id: u32) -> bool {
    ModelConfig::from_gguf(file).is_ok_and(|config| config.eos_token_ids.contains(&id))
}

/// Adds a proof to the metadata.
pub(crate) fn put_proof(export: &mut GgufExport, proof: &Proof) {
    export.put(PROOF, GgufValue::Text(proof.to_line()));
}

/// Writes an export with a progress bar, and returns the paths of its files.
pub(crate) fn write(
    export: &GgufExport,
    path: &Path,
    max_bytes: Option<usize>,
    output: Output,
) -> Result<Vec<PathBuf>> {
    let total: usize =
        export.tensors().iter().map(|tensor| tensor.kind.num_bytes(&tensor.spec.shape).unwrap_or(0)).sum();
    let mut bar = None;
    let mut written = 0;
    let paths = export.write(path, max_bytes.map(|bytes| bytes as u64), |num_bytes| {
        written += num_bytes;
        bar.get_or_insert_with(|| output.progress(total as u64, "writing", Unit::Bytes)).set(written as u64, "");
    })?;
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(paths)
}

/// The report on a written GGUF file.
pub(crate) struct GgufReport<'a> {
    /// The paths of its files.
    pub(crate) paths: &'a [PathBuf],
    /// The requested path.
    pub(crate) path: &'a Path,
    /// The written model.
    pub(crate) model: &'a Model,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) proof: Option<&'a Proof>,
}

impl GgufReport<'_> {
    /// Reads the file again and compares it with the model, writes a report and a Modelfile next to it, and prints the report.
    pub(crate) fn finish(&self, output: Output) -> Result<()> {
        let first = self.paths.first().map_or(self.path, PathBuf::as_path);
        let written = ModelLoader::new().with_device(self.model.device()).load(first)?;
        let batch = probe(self.model);
        let logits = |model: &Model| model.forward(&batch, None, None, Rows::All);
        let difference = largest_difference(&logits(self.model)?, &logits(&written)?)?;
        let size: u64 = self.paths.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum();
        let names: Vec<String> = self.paths.iter().map(|path| path.display().to_string()).collect();
        let mut report = json!({
            "output": self.path.to_string_lossy(),
            "files": names,
            "bytes": size,
            "max_logit_difference": difference,
        });
        if let Some(proof) = self.proof {
            report["proof"] = proof.to_json();
            let text = format!("{:#}\n", proof.to_json());
            write_atomically(report_path(self.path), |file| file.write_all(text.as_bytes()))?;
        }
        if let Some(tokenizer) = self.tokenizer {
            let name = first.file_name().unwrap_or_default().to_string_lossy();
            let defaults = serde_json::from_str(&self.model.config().generation_to_json())?;
            let modelfile = tokenizer.modelfile(&name, &defaults);
            write_atomically(modelfile_path(self.path), |file| file.write_all(modelfile.text.as_bytes()))?;
            report["modelfile"] = json!(modelfile_path(self.path).to_string_lossy());
        }
        if output.json {
            return Ok(Output::print_json(&report)?);
        }
        if let Some(proof) = self.proof {
            proof.note(output);
        }
        output.note(format_args!(
            "wrote {} ({})\nlogits of the model and the written file differ by at most {difference:.2e}",
            names.join(", "),
            bytes(size),
        ));
        if self.tokenizer.is_some() {
            output.note(format_args!("for Ollama: {}", modelfile_path(self.path).display()));
        }
        Ok(())
    }
}
